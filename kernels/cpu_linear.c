/* Dense linears on the CPU over weights packed once at load: y = x W^T (+ bias) (+ y).

Packed weight: panels of PANEL output columns, each panel I rows (bfloat16: I / 2 rows of pairs) long, the last panel
padded with zeros, so that a panel is one stream through memory:

    float32  [O / 32, I, 32]          bfloat16  [O / 32, I / 2, 32, 2]

Why not a library: MKL re-packs its operand in every call, which at 4 to 32 rows costs as much as the product. Each
output is one sum over i in rising order, whatever the number of rows, so a token's result does not depend on what
else is in the step. 2 x EPYC with AVX512-BF16, one thread, weights from memory, [32, 576] x [576, 3072]: MKL through
torch.mm 2.0 to 2.4 ms (fp32) and 0.91 ms (bf16), oneDNN with weights packed for 32 rows 1.4 and 0.67, this 1.76
and 0.61; one row: 0.40 to 0.64 and 0.43, 0.52 and 0.36, this 0.36 and 0.18. So oneDNN wins the wide product in fp32.
bfloat16 uses the processor's dot product (AVX512-BF16) where that is fast, else float32 products of widened values: the
arithmetic of float32 and half its bytes. AMD's dot product does twice the work of a float32 product in the same time,
Intel's half of it (Xeon of 2023, one thread, [2048, 2048] squared: 84 GFLOP/s against 163, torch the same).

A product of several rows keeps the arithmetic busy and memory idle, so it asks for the lines of the next panel on the
way, evenly: two lines in three rows of a panel instead of one in each of the first two thirds made a product 8 % faster.
(Asking for the adapters of the step as well gained nothing: docs/log.md.) */
#include <omp.h>
#include <stdlib.h>

#include "cpu_team.h"
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define HAS_DOT 1
#else
#define HAS_DOT 0
#endif
enum { DOT = 2 }; /* beside F32 and BF16 (widened): how a product is computed */

#define PANEL 32
#define WIDTH (PANEL / LANES)
/* Accumulators, two vectors of weights and one broadcast must fit the registers: 32 of 64 bytes, or 16 of 32. */
#ifdef __AVX512F__
#define TILE 12
#else
#define TILE 3
#endif
#define BLOCK_ROWS 192  /* rows of x that stay in L2 beside a panel */
#define BLOCK_DEPTH 2048 /* rows of a panel: 256 KiB in float32 */

/* Lines that memory has left in a stretch. */
#define MOST_OTHER(kind) ((kind) == F32 ? 4 : 10)
#define STRETCH 16 /* rows of a panel after which a thread looks what else it is to ask for */

/* Lines to bring into the second-level cache while a panel is computed. From `line` on: `rate` / 2^16 of them at each row of a
panel, evenly, since memory that is asked in bursts is idle between them. And, a few after each stretch, what is wanted. */
typedef struct {
    const char *line;
    uint64_t rate, credit;
    struct Other *other;
} Stream;

typedef struct Other {
    const Range *range, *end;
    const char *line, *line_end;
    int64_t row;
    uint64_t rate, credit;
} Other;

INLINE void fetch(Stream *s) {
    s->credit += s->rate;
    for (; s->credit >= 1 << 16; s->credit -= 1 << 16, s->line += 64) __builtin_prefetch(s->line, 0, 2);
}

static const char *line_of(const char *byte) {
    return (const char *)((uintptr_t)byte & ~(uintptr_t)63);
}

static void fetch_other(Other *o) {
    for (o->credit += o->rate; o->credit >= 1 << 16; o->credit -= 1 << 16) {
        if (o->line >= o->line_end) {
            if (o->range == o->end) return;
            const char *start = o->range->start + o->row * o->range->stride;
            o->line = line_of(start);
            o->line_end = start + o->range->bytes;
            if (++o->row == o->range->count) o->range++, o->row = 0;
        }
        __builtin_prefetch(o->line, 0, 2);
        o->line += 64;
    }
}

/* Row t of x lies at corner[t / 4] + (t % 4) strides: three pointers that move with k, where one for each row would not fit
the registers. `KEEP` hides from the compiler that it could have one for each row. */
#define CORNERS ((TILE + 3) / 4)
#ifdef __x86_64__
#define KEEP(pointer) __asm__("" : "+r"(pointer))
#else
#define KEEP(pointer)
#endif

/* sums[t] += x[t][k] w[k] for k in [0, depth). x: float32, for DOT bfloat16; x_stride: elements from row to row. */
INLINE void multiply(const int NT, vec sums[TILE][WIDTH], const void *x, int64_t x_stride, const void *w,
                     int64_t depth, Stream *ahead, const int kind) {
    const int x_dtype = kind == DOT ? BF16 : F32;
    const char *corners[CORNERS], *end = at(w, depth * PANEL, kind == F32 ? F32 : BF16);
    for (int c = 0; c < CORNERS; c++) corners[c] = at(x, 4 * c * x_stride, x_dtype);
    const char *stop = ahead->other ? (const char *)w + 128 * STRETCH : end;
    for (const char *row = w; row < end; row += 128) {
        if (row == stop) {
            fetch_other(ahead->other);
            stop += 128 * STRETCH;
        }
        fetch(ahead);
#define X(t, k) ((const char *)at(corners[(t) / 4], (t) % 4 * x_stride + (k), x_dtype))
        if (kind == F32) {
            vec first = load(row, 0, F32), second = load(row, LANES, F32);
            for (int t = 0; t < NT; t++) {
                vec token = splat(*(const float_memory *)X(t, 0));
                sums[t][0] += token * first;
                sums[t][1] += token * second;
            }
        } else if (kind == BF16) {
            typedef uint32_t pair_memory __attribute__((vector_size(64), aligned(2), may_alias));
            uvec first = *(const pair_memory *)row, second = *(const pair_memory *)(row + 64);
            vec first_even = (vec)(first << 16), first_odd = (vec)(first & 0xffff0000u);
            vec second_even = (vec)(second << 16), second_odd = (vec)(second & 0xffff0000u);
            for (int t = 0; t < NT; t++) {
                vec even = splat(*(const float_memory *)X(t, 0)), odd = splat(*(const float_memory *)X(t, 1));
                sums[t][0] += even * first_even;
                sums[t][1] += even * second_even;
                sums[t][0] += odd * first_odd;
                sums[t][1] += odd * second_odd;
            }
        } else {
#if HAS_DOT
            __m512bh first = (__m512bh)_mm512_loadu_si512(row), second = (__m512bh)_mm512_loadu_si512(row + 64);
            for (int t = 0; t < NT; t++) {
                int32_t pair;
                __builtin_memcpy(&pair, X(t, 0), 4);
                __m512bh token = (__m512bh)_mm512_set1_epi32(pair);
                sums[t][0] = (vec)_mm512_dpbf16_ps((__m512)sums[t][0], token, first);
                sums[t][1] = (vec)_mm512_dpbf16_ps((__m512)sums[t][1], token, second);
            }
#endif
        }
#undef X
        for (int c = 0; c < CORNERS; c++) {
            corners[c] = at(corners[c], kind == F32 ? 1 : 2, x_dtype);
            KEEP(corners[c]);
        }
    }
}

/* Whether bfloat16 products take the dot product; one answer for one machine, so that results repeat. */
INLINE int takes_dot(void) {
#if HAS_DOT
    return __builtin_cpu_is("amd") != 0;
#else
    return 0;
#endif
}

INLINE void finish(const Linear *l, vec sums[WIDTH], int64_t row, int64_t column, const int dtype) {
    int64_t place = row * l->O + column;
    float bias[PANEL], old[PANEL];
    union { vec v[WIDTH]; float f[PANEL]; } out;
    for (int v = 0; v < WIDTH; v++) out.v[v] = sums[v];
    if (column + PANEL <= l->O) {
        for (int v = 0; v < WIDTH; v++) {
            if (l->bias) out.v[v] += load(l->bias, column + v * LANES, dtype);
            if (l->add) out.v[v] += load(l->y, place + v * LANES, dtype);
            if (l->out_dtype == F32) store(l->y, place + v * LANES, out.v[v], F32);
            else store(l->y, place + v * LANES, out.v[v], BF16);
        }
        return;
    }
    for (int c = 0; c < l->O - column; c++) {
        bias[c] = l->bias ? load_one(l->bias, column + c, dtype) : 0;
        old[c] = l->add ? load_one(l->y, place + c, dtype) : 0;
        float sum = out.f[c] + bias[c] + old[c];
        if (l->out_dtype == F32) store_one(l->y, place + c, sum, F32);
        else store_one(l->y, place + c, sum, BF16);
    }
}

INLINE void tile(const int NT, const Linear *l, int64_t row, int64_t column, const void *x, const void *w,
                 int64_t first, int64_t depth, vec (*partial)[WIDTH], Stream *ahead, const int kind) {
    vec sums[TILE][WIDTH];
    for (int t = 0; t < NT; t++)
        for (int v = 0; v < WIDTH; v++) sums[t][v] = first ? partial[t][v] : splat(0);
    multiply(NT, sums, x, l->I, w, depth, ahead, kind);
    int is_last = first + depth == l->I;
    for (int t = 0; t < NT; t++) {
        if (is_last) finish(l, sums[t], row + t, column, kind == F32 ? F32 : BF16);
        else
            for (int v = 0; v < WIDTH; v++) partial[t][v] = sums[t][v];
    }
}

/* A panel of a product of `in_size`, to be asked for while one of ours times num_rows rows is computed. Not for a single
tile, which reads as fast as memory gives anyway. */
INLINE Stream stream_of(const Linear *l, const void *w, int64_t column, int64_t in_size, int64_t num_rows, Other *other,
                        const int kind) {
    if (num_rows <= TILE) return (Stream){0};
    if (!w) return (Stream){.other = other};
    const int dtype = kind == F32 ? F32 : BF16;
    int64_t num_lines = in_size * PANEL * ELEMENT_SIZE(dtype) / 64;
    int64_t num_steps = (num_rows + TILE - 1) / TILE * (l->I / (kind == F32 ? 1 : 2));
    return (Stream){at(w, column * in_size, dtype), (uint64_t)((num_lines << 16) / num_steps), 0, other};
}

/* What is wanted beside `num_panels` panels of a thread, as fast as memory gives it beside them: bfloat16 panels take half the
memory of float32 ones in the same time. */
INLINE Other other_of(const Linear *l, const Wanted *wanted, int64_t num_panels, const int kind) {
    int64_t num_tiles = (l->num_rows + TILE - 1) / TILE, depth = l->I / (kind == F32 ? 1 : 2);
    int64_t num_stretches = num_panels * num_tiles * (depth / STRETCH) + 1;
    uint64_t rate = (uint64_t)((wanted->num_lines << 16) / num_stretches + 1), most = (uint64_t)MOST_OTHER(kind) << 16;
    return (Other){.range = wanted->ranges,
                   .end = wanted->ranges + wanted->num_ranges,
                   .rate = rate < most ? rate : most};
}

/* One panel times rows [first_row, last_row), at most BLOCK_ROWS of them. */
INLINE void panel(const Linear *l, int64_t column, int64_t first_row, int64_t last_row, Stream *ahead,
                  const int kind) {
    vec partial[BLOCK_ROWS][WIDTH];
    const int dtype = kind == F32 ? F32 : BF16, x_dtype = kind == DOT ? BF16 : F32;
    int64_t num_tiles = (last_row - first_row + TILE - 1) / TILE;
    for (int64_t first = 0; first < l->I; first += BLOCK_DEPTH) {
        int64_t depth = l->I - first < BLOCK_DEPTH ? l->I - first : BLOCK_DEPTH;
        const void *w = at(l->w, column * l->I + first * PANEL, dtype);
        for (int64_t k = 0; k < num_tiles; k++) {
            /* Tiles of nearly equal height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8. */
            int64_t row = first_row + (last_row - first_row) * k / num_tiles;
            int64_t height = first_row + (last_row - first_row) * (k + 1) / num_tiles - row;
            const void *x = at(l->x, row * l->I + first, x_dtype);
            vec(*part)[WIDTH] = partial + (row - first_row);
            switch (height) {
#define CASE(n) case n: tile(n, l, row, column, x, w, first, depth, part, ahead, kind); break;
                CASE(1) CASE(2) CASE(3)
#if TILE == 12
                CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
            }
        }
    }
}

/* Panels times blocks of rows, as threads come for them; each asks for its next panel while it computes one, and at the
end for the one that it will begin the next product with. */
INLINE void work(const Linear *l, int64_t *next, const int kind) {
    int64_t num_panels = (l->O + PANEL - 1) / PANEL, total = num_panels * ((l->num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS);
    int64_t first = omp_get_thread_num(), item = first;
    Other store = {0}, *other = NULL;
    if (l->wanted && l->wanted[first].num_lines) {
        store = other_of(l, l->wanted + first, (total + omp_get_num_threads() - 1) / omp_get_num_threads(), kind);
        other = &store;
    }
    while (item < total) {
        int64_t following = omp_get_num_threads() + __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        int64_t row = item / num_panels * BLOCK_ROWS;
        int64_t end = row + BLOCK_ROWS < l->num_rows ? row + BLOCK_ROWS : l->num_rows;
        Stream ahead = following < total ? stream_of(l, l->w, following % num_panels * PANEL, l->I, end - row, other, kind)
                                         : stream_of(l, l->next_w, first * PANEL, l->next_I, end - row, other, kind);
        panel(l, item % num_panels * PANEL, row, end, &ahead, kind);
        item = following;
    }
}

int linear_widens(int dtype) {
    return dtype == BF16 && !takes_dot();
}

/* to = x as float32, shared out in stretches of whole vectors. */
INLINE void widen(float *to, const void *x, int64_t count) {
    int64_t whole = count / LANES * LANES;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < whole; i += LANES) store(to, i, load(x, i, BF16), F32);
    for (int64_t i = whole; i < count; i++) to[i] = load_one(x, i, BF16); /* each thread the same few */
#pragma omp barrier
}

void team_linear(const Linear *shared, int dtype, int64_t *next, float *scratch) {
    Linear l = *shared;
    if (linear_widens(dtype)) {
        widen(scratch, l.x, l.num_rows * l.I);
        l.x = scratch;
        work(&l, next, BF16);
    } else if (dtype == F32) {
        work(&l, next, F32);
    } else {
        work(&l, next, DOT);
    }
#pragma omp barrier
}

/* x: [num_rows, I], bias: [O] or NULL of `dtype`; y: [num_rows, O] of `dtype`, or float32 where out_dtype says so
(then without add). Returns 0, or 1 when memory ran out. */
EXPORT int trailmark_linear(void *y, const void *x, const void *w, const void *bias, int64_t num_rows, int64_t I,
                            int64_t O, int add, int dtype, int out_dtype, int num_threads) {
    Linear l = {y, x, w, bias, num_rows, I, O, add, out_dtype, NULL, 0, NULL};
    int64_t next = 0;
    float *scratch = NULL;
    if (linear_widens(dtype)) {
        scratch = malloc(sizeof(float) * (size_t)(num_rows * I + 1));
        if (!scratch) return 1;
    }
#pragma omp parallel num_threads(num_threads)
    team_linear(&l, dtype, &next, scratch);
    free(scratch);
    return 0;
}

/* 1 where bfloat16 costs no more arithmetic than float32 and half its bytes, so that a bfloat16 base is the faster one. */
EXPORT int trailmark_has_bf16_dot(void) {
    return HAS_DOT;
}
