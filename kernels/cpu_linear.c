/* Dense linears on the CPU over weights packed once at load: y = x W^T (+ bias) (+ y).

Packed weight: panels of PANEL output columns, each panel I rows (bfloat16: I / 2 rows of pairs) long, the last panel
padded with zeros, so that a panel is one stream through memory:

    float32  [O / 32, I, 32]          bfloat16  [O / 32, I / 2, 32, 2]

Why not a library: MKL re-packs its operand in every call, which at 4 to 32 rows costs as much as the product. Each
output is one sum over i in rising order, whatever the number of rows, so a token's result does not depend on what
else is in the step. 2 x EPYC with AVX512-BF16, one thread, weights from memory, [32, 576] x [576, 3072]: MKL through
torch.mm 2.0 to 2.4 ms (fp32) and 0.91 ms (bf16), oneDNN with weights packed for 32 rows 1.4 and 0.67, this 1.76
and 0.61; one row: 0.40 to 0.64 and 0.43, 0.52 and 0.36, this 0.36 and 0.18. So oneDNN wins the wide product in fp32.
bfloat16 uses the processor's dot product where it has one (AVX512-BF16), else float32 products of widened
values: never slower than float32 by the widening alone, and half its bytes. */
#include <stdlib.h>

#include "cpu_vector.h"
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define HAS_DOT 1
#else
#define HAS_DOT 0
#endif

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

/* sums[t] += x[t][k] w[k] for k in [0, depth). x_words: float32 values, or pairs of bfloat16 as they lie in memory. */
INLINE void multiply(const int NT, vec sums[TILE][WIDTH], const void *x, int64_t x_stride, const void *w,
                     int64_t depth, const int dtype) {
    if (dtype == F32) {
        const float_memory *token = x;
        for (int64_t k = 0; k < depth; k++)
            for (int v = 0; v < WIDTH; v++) {
                vec row = load(w, k * PANEL + v * LANES, F32);
                for (int t = 0; t < NT; t++) sums[t][v] += token[t * x_stride + k] * row;
            }
        return;
    }
#if HAS_DOT
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh rows[WIDTH];
        for (int v = 0; v < WIDTH; v++)
            rows[v] = (__m512bh)_mm512_loadu_si512(at(w, k * PANEL + v * 2 * LANES, BF16));
        for (int t = 0; t < NT; t++) {
            int32_t pair;
            __builtin_memcpy(&pair, at(x, t * x_stride + k, BF16), 4);
            for (int v = 0; v < WIDTH; v++)
                sums[t][v] = (vec)_mm512_dpbf16_ps((__m512)sums[t][v], (__m512bh)_mm512_set1_epi32(pair), rows[v]);
        }
    }
#else
    /* x was widened to float32 by the caller. */
    const float_memory *token = x;
    typedef uint32_t pair_memory __attribute__((vector_size(64), aligned(2), may_alias));
    for (int64_t k = 0; k < depth; k += 2)
        for (int v = 0; v < WIDTH; v++) {
            uvec pairs = *(const pair_memory *)at(w, k * PANEL + v * 2 * LANES, BF16);
            vec even = (vec)(pairs << 16), odd = (vec)(pairs & 0xffff0000u);
            for (int t = 0; t < NT; t++) {
                sums[t][v] += token[t * x_stride + k] * even;
                sums[t][v] += token[t * x_stride + k + 1] * odd;
            }
        }
#endif
}

typedef struct {
    void *y;
    const void *x, *w, *bias;
    int64_t num_rows, I, O;
    int add, out_dtype;
} Linear;

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
                 int64_t first, int64_t depth, vec (*partial)[WIDTH], const int dtype) {
    vec sums[TILE][WIDTH];
    for (int t = 0; t < NT; t++)
        for (int v = 0; v < WIDTH; v++) sums[t][v] = first ? partial[t][v] : splat(0);
    multiply(NT, sums, x, l->I, w, depth, dtype);
    int is_last = first + depth == l->I;
    for (int t = 0; t < NT; t++) {
        if (is_last) finish(l, sums[t], row + t, column, dtype);
        else
            for (int v = 0; v < WIDTH; v++) partial[t][v] = sums[t][v];
    }
}

/* One panel times rows [first_row, last_row), at most BLOCK_ROWS of them. */
INLINE void panel(const Linear *l, int64_t column, int64_t first_row, int64_t last_row, const int dtype) {
    vec partial[BLOCK_ROWS][WIDTH];
    const int x_dtype = dtype == BF16 && HAS_DOT ? BF16 : F32;
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
#define CASE(n) case n: tile(n, l, row, column, x, w, first, depth, part, dtype); break;
                CASE(1) CASE(2) CASE(3)
#if TILE == 12
                CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
            }
        }
    }
}

#define RUN(d)                                                                            \
    for (int64_t row = 0; row < num_rows; row += BLOCK_ROWS) {                            \
        int64_t end = row + BLOCK_ROWS < num_rows ? row + BLOCK_ROWS : num_rows;          \
        _Pragma("omp for schedule(dynamic) nowait") for (int64_t p = 0; p < num_panels; p++) \
            panel(&l, p * PANEL, row, end, d);                                            \
    }

/* x: [num_rows, I], bias: [O] or NULL of `dtype`; y: [num_rows, O] of `dtype`, or float32 where out_dtype says so
(then without add). Returns 0, or 1 when memory ran out. */
EXPORT int trailmark_linear(void *y, const void *x, const void *w, const void *bias, int64_t num_rows, int64_t I,
                            int64_t O, int add, int dtype, int out_dtype, int num_threads) {
    Linear l = {y, x, w, bias, num_rows, I, O, add, out_dtype};
    int64_t num_panels = (O + PANEL - 1) / PANEL;
    float *widened = NULL;
    if (dtype == BF16 && !HAS_DOT) {
        widened = malloc(sizeof(float) * (size_t)(num_rows * I + 1));
        if (!widened) return 1;
        for (int64_t i = 0; i < num_rows * I; i++) widened[i] = load_one(x, i, BF16);
        l.x = widened;
    }
#pragma omp parallel num_threads(num_threads)
    {
        if (dtype == F32) {
            RUN(F32)
        } else {
            RUN(BF16)
        }
    }
    free(widened);
    return 0;
}

/* 1 where bfloat16 products have their own instruction, so that a bfloat16 base is the faster one. */
EXPORT int trailmark_has_bf16_dot(void) {
    return HAS_DOT;
}
