/* LoRA of many adapters on the CPU: y += B A x for every segment of a step, in one call per group of linears.

Shrink first (one dot product per rank row and token), then expand (a weighted sum of B's rows per token); work is cut
into items of one module's rank rows or output columns times at most ITEM_ROWS tokens, and threads take items as they
come, but for those of a step of few tokens, which are dealt out beforehand so that each thread can ask memory for its own
(`list_wanted`). Every sum runs over its index in one fixed order, so a result depends neither on the cut, nor on the thread that
took it, nor on what else is in the step. Each adapter's A and B are read once per ITEM_ROWS tokens.

Many segments of a few tokens, a decode step of many adapters, are bound by memory: there an item is all that a segment
does, which is one stretch of memory (A of the group's modules, then B), read from front to back as the processor reads
ahead. Two threads of a Xeon, SmolLM2 shapes, 32 adapters: 26 GB/s,
what the machine reads at best; in columns of B it was 21. */
#include <omp.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu_team.h"

#define TILE 4
/* Small enough that a lone adapter of a narrow linear still gives every thread something to do. */
#define ITEM_ROWS 64
#define ITEM_RANKS TILE
#define ITEM_COLUMNS 256
#define FIXED_COLUMNS 64
#define WHOLES_PER_THREAD 4
#define STRIP 2048 /* columns of one token summed at a time: 8 KiB, in the first-level cache */

typedef struct LoraProduct {
    const void *a, *b;          /* [rank, I], [rank, O_m] */
    float *shrunk;              /* [rows, rank] */
    int64_t rank, start, end;   /* tokens [start, end) */
    int64_t column, num_columns;
} Product;

typedef struct LoraItem {
    int32_t product, row, first, last; /* tokens from `row` on; rank rows or columns [first, last) */
} Item;

typedef struct LoraSegment {
    int64_t first, count; /* products of one segment */
} Segment;

/* shrunk[t][r] for NT tokens and NR rank rows (1 or TILE). */
INLINE void shrink_tile(const int NT, const int NR, float *h, int64_t rank, const void *x, const void *a, int64_t I,
                        const int x_dtype, const int w_dtype) {
    vec sums[TILE][TILE];
    for (int t = 0; t < NT; t++)
        for (int r = 0; r < NR; r++) sums[t][r] = splat(0);
    int64_t i = 0;
    for (; i + LANES <= I; i += LANES) {
        vec rows[TILE];
        for (int r = 0; r < NR; r++) rows[r] = load(a, r * I + i, w_dtype);
        for (int t = 0; t < NT; t++) {
            vec token = load(x, t * I + i, x_dtype);
            for (int r = 0; r < NR; r++) sums[t][r] += token * rows[r];
        }
    }
    for (int t = 0; t < NT; t++) {
        float total[TILE];
        if (NR == TILE) sum_lanes_of_four(total, sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
        else total[0] = sum_lanes(sums[t][0]);
        for (int r = 0; r < NR; r++) {
            for (int64_t rest = i; rest < I; rest++)
                total[r] += load_one(x, t * I + rest, x_dtype) * load_one(a, r * I + rest, w_dtype);
            h[t * rank + r] = total[r];
        }
    }
}

INLINE void shrink_item(const Product *p, const Item *item, const void *x, int64_t I, const int x_dtype,
                        const int w_dtype) {
    int64_t end = item->row + ITEM_ROWS < p->end ? item->row + ITEM_ROWS : p->end;
    for (int64_t r = item->first; r < item->last;) {
        int is_full = item->last - r >= TILE;
        const void *a = at(p->a, r * I, w_dtype);
        for (int64_t t = item->row; t < end;) {
            float *h = p->shrunk + (t - p->start) * p->rank + r;
            const void *token = at(x, t * I, x_dtype);
            int64_t left = end - t;
            if (is_full && left >= TILE) {
                shrink_tile(TILE, TILE, h, p->rank, token, a, I, x_dtype, w_dtype);
                t += TILE;
            } else if (is_full) {
                shrink_tile(1, TILE, h, p->rank, token, a, I, x_dtype, w_dtype);
                t += 1;
            } else if (left >= TILE) {
                shrink_tile(TILE, 1, h, p->rank, token, a, I, x_dtype, w_dtype);
                t += TILE;
            } else {
                shrink_tile(1, 1, h, p->rank, token, a, I, x_dtype, w_dtype);
                t += 1;
            }
        }
        r += is_full ? TILE : 1;
    }
}

/* y[t][c .. c + NV * 16) += sum over r of shrunk[t][r] B[r], for NT tokens. */
INLINE void expand_tile(const int NT, const int NV, void *y, int64_t stride, const float *h, const void *b,
                        int64_t rank, int64_t b_stride, const int y_dtype, const int w_dtype) {
    vec sums[TILE][16];
    for (int t = 0; t < NT; t++)
        for (int v = 0; v < NV; v++) sums[t][v] = splat(0);
    for (int64_t r = 0; r < rank; r++) {
        for (int v = 0; v < NV; v++) {
            vec row = load(b, r * b_stride + v * LANES, w_dtype);
            for (int t = 0; t < NT; t++) sums[t][v] += h[t * rank + r] * row;
        }
    }
    for (int t = 0; t < NT; t++)
        for (int v = 0; v < NV; v++) {
            int64_t place = t * stride + v * LANES;
            store(y, place, load(y, place, y_dtype) + sums[t][v], y_dtype);
        }
}

INLINE void expand_rest(void *y, const float *h, const void *b, int64_t rank, int64_t b_stride, int64_t num_columns,
                        const int y_dtype, const int w_dtype) {
    for (int64_t c = 0; c < num_columns; c++) {
        float sum = 0;
        for (int64_t r = 0; r < rank; r++) sum = __builtin_fmaf(h[r], load_one(b, r * b_stride + c, w_dtype), sum);
        store_one(y, c, load_one(y, c, y_dtype) + sum, y_dtype);
    }
}

INLINE void expand_item(const Product *p, const Item *item, void *y, int64_t stride, const int y_dtype,
                        const int w_dtype) {
    int64_t end = item->row + ITEM_ROWS < p->end ? item->row + ITEM_ROWS : p->end;
    for (int64_t t = item->row; t < end;) {
        int num_tokens = end - t >= TILE ? TILE : 1;
        const float *h = p->shrunk + (t - p->start) * p->rank;
        int64_t c = item->first, num_columns = p->num_columns;
        while (c < item->last) {
            void *out = (void *)at(y, t * stride + p->column + c, y_dtype);
            const void *b = at(p->b, c, w_dtype);
            int64_t left = item->last - c;
            if (num_tokens == 1 && left >= 16 * LANES) {
                expand_tile(1, 16, out, stride, h, b, p->rank, num_columns, y_dtype, w_dtype);
                c += 16 * LANES;
            } else if (num_tokens == 1 && left >= 4 * LANES) {
                expand_tile(1, 4, out, stride, h, b, p->rank, num_columns, y_dtype, w_dtype);
                c += 4 * LANES;
            } else if (left >= 4 * LANES) {
                expand_tile(TILE, 4, out, stride, h, b, p->rank, num_columns, y_dtype, w_dtype);
                c += 4 * LANES;
            } else if (left >= LANES) {
                for (int k = 0; k < num_tokens; k++)
                    expand_tile(1, 1, (void *)at(out, k * stride, y_dtype), stride, h + k * p->rank, b, p->rank,
                                num_columns, y_dtype, w_dtype);
                c += LANES;
            } else {
                for (int k = 0; k < num_tokens; k++)
                    expand_rest((void *)at(out, k * stride, y_dtype), h + k * p->rank, b, p->rank, num_columns, left,
                                y_dtype, w_dtype);
                c += left;
            }
        }
        t += num_tokens;
    }
}

/* One token: y += sum over r of h[r] B[r], B read row by row from front to back. Same sums as expand_tile. */
INLINE void expand_token(void *y, const float *h, const void *b, int64_t rank, int64_t num_columns, const int y_dtype,
                         const int w_dtype) {
    for (int64_t first = 0; first < num_columns; first += STRIP) {
        int64_t width = num_columns - first < STRIP ? num_columns - first : STRIP, whole = width / LANES * LANES;
        vec sums[STRIP / LANES];
        for (int64_t c = 0; c < whole; c += LANES) sums[c / LANES] = splat(0);
        for (int64_t r = 0; r < rank; r++) {
            vec factor = splat(h[r]);
            const void *row = at(b, r * num_columns + first, w_dtype);
            for (int64_t c = 0; c < whole; c += LANES) sums[c / LANES] += factor * load(row, c, w_dtype);
        }
        for (int64_t c = first; c < first + whole; c += LANES)
            store(y, c, load(y, c, y_dtype) + sums[(c - first) / LANES], y_dtype);
        if (whole < width)
            expand_rest((void *)at(y, first + whole, y_dtype), h, at(b, first + whole, w_dtype), rank, num_columns,
                        width - whole, y_dtype, w_dtype);
    }
}

/* All that one segment of a few tokens does: its products, shrinks first. */
INLINE void whole_segment(const Product *products, int64_t count, void *y, int64_t stride, const void *x, int64_t I,
                          const int y_dtype, const int x_dtype, const int w_dtype) {
    for (const Product *p = products; p < products + count; p++)
        for (int64_t r = 0; r < p->rank; r++)
            for (int64_t t = p->start; t < p->end; t++)
                shrink_tile(1, 1, p->shrunk + (t - p->start) * p->rank + r, p->rank, at(x, t * I, x_dtype),
                            at(p->a, r * I, w_dtype), I, x_dtype, w_dtype);
    for (const Product *p = products; p < products + count; p++)
        for (int64_t t = p->start; t < p->end; t++)
            expand_token((void *)at(y, t * stride + p->column, y_dtype), p->shrunk + (t - p->start) * p->rank, p->b,
                         p->rank, p->num_columns, y_dtype, w_dtype);
}

/* Cut products into items of `size` rank rows (or columns) times ITEM_ROWS tokens; return how many (items may be 0). */
static int64_t cut(Item *items, const Product *products, int64_t num_products, int64_t size, int is_shrink) {
    int64_t count = 0;
    for (int64_t p = 0; p < num_products; p++) {
        int64_t length = is_shrink ? products[p].rank : products[p].num_columns;
        for (int64_t row = products[p].start; row < products[p].end; row += ITEM_ROWS)
            for (int64_t first = 0; first < length; first += size, count++)
                if (items)
                    items[count] = (Item){(int32_t)p, (int32_t)row, (int32_t)first,
                                          (int32_t)(first + size < length ? first + size : length)};
    }
    return count;
}

INLINE void compute(const LoraWork *w, const int y_dtype, const int x_dtype, const int w_dtype) {
    const LoraCall *c = &w->call;
    const Item *expands = w->items + w->num_shrinks;
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    int64_t fixed = w->fixed_per_thread * team < w->num_segments ? w->fixed_per_thread * team : w->num_segments;
    for (int64_t s = thread; s < fixed; s += team)
        whole_segment(w->products + w->segments[s].first, w->segments[s].count, c->y, c->stride, c->x, c->I,
                      y_dtype, x_dtype, w_dtype);
#pragma omp for schedule(dynamic) nowait
    for (int64_t s = fixed; s < w->num_segments; s++)
        whole_segment(w->products + w->segments[s].first, w->segments[s].count, c->y, c->stride, c->x, c->I,
                      y_dtype, x_dtype, w_dtype);
    if (w->is_fixed) {
        for (int64_t i = w->num_shrinks * thread / team; i < w->num_shrinks * (thread + 1) / team; i++)
            shrink_item(&w->products[w->items[i].product], &w->items[i], c->x, c->I, x_dtype, w_dtype);
#pragma omp barrier
        for (int64_t i = w->num_expands * thread / team; i < w->num_expands * (thread + 1) / team; i++)
            expand_item(&w->products[expands[i].product], &expands[i], c->y, c->stride, y_dtype, w_dtype);
    } else if (w->num_shrinks) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < w->num_shrinks; i++)
            shrink_item(&w->products[w->items[i].product], &w->items[i], c->x, c->I, x_dtype, w_dtype);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < w->num_expands; i++)
            expand_item(&w->products[expands[i].product], &expands[i], c->y, c->stride, y_dtype, w_dtype);
    }
#pragma omp barrier
}

void team_lora_add(const LoraWork *w) {
    const int y = w->call.dtype, x = w->call.x_dtype;
    if (w->call.w_dtype == F32) {
        if (y == F32) compute(w, F32, F32, F32);
        else if (x == F32) compute(w, BF16, F32, F32);
        else compute(w, BF16, BF16, F32);
    } else {
        if (y == F32) compute(w, F32, F32, BF16);
        else if (x == F32) compute(w, BF16, F32, BF16);
        else compute(w, BF16, BF16, BF16);
    }
}

/* List the products of all segments, those of long ones first, which are cut into items; return [long ones, floats]. */
static void list_products(LoraWork *w, int num_threads, int64_t *num_long, int64_t *scratch) {
    const LoraCall *c = &w->call;
    int64_t num_short = 0, num_products = 0;
    for (int64_t s = 0; s < c->num_segments; s++) num_short += c->segments[3 * s + 2] - c->segments[3 * s + 1] < TILE;
    /* Too few short segments would leave threads idle. */
    int has_wholes = num_short >= WHOLES_PER_THREAD * num_threads;
    for (int is_short = 0; is_short < 2; is_short++) {
        for (int64_t s = 0; s < c->num_segments; s++) {
            const int32_t *segment = c->segments + 3 * s;
            if ((has_wholes && segment[2] - segment[1] < TILE) != is_short) continue;
            int64_t first = num_products;
            for (int64_t m = 0; m < c->num_modules; m++) {
                const int64_t *entry = c->table + segment[0] * c->table_stride + 3 * (c->first_module + m);
                if (!entry[2]) continue;
                w->products[num_products++] = (Product){
                    at(c->weights, entry[0], c->w_dtype), at(c->weights, entry[1], c->w_dtype), NULL, entry[2],
                    segment[1], segment[2], c->bounds[m], c->bounds[m + 1] - c->bounds[m]};
                *scratch += entry[2] * (segment[2] - segment[1]);
            }
            if (is_short) w->segments[w->num_segments++] = (Segment){first, num_products - first};
            else *num_long = num_products;
        }
    }
    w->num_products = num_products;
}

static Range shrink_range(const LoraWork *w, const Item *item) {
    const Product *p = &w->products[item->product];
    int64_t row = w->call.I * ELEMENT_SIZE(w->call.w_dtype);
    return (Range){(const char *)p->a + item->first * row, (item->last - item->first) * row, 1, 0};
}

static Range expand_range(const LoraWork *w, const Item *item) {
    const Product *p = &w->products[item->product];
    const int size = ELEMENT_SIZE(w->call.w_dtype);
    return (Range){(const char *)p->b + item->first * size, (item->last - item->first) * size, p->rank,
                   p->num_columns * size};
}

/* Add to what a thread wants, up to `room` lines; return how many lines are left of them. */
static int64_t want(Wanted *wanted, Range *ranges, Range range, int64_t room) {
    int64_t lines = range.count * (range.bytes / 64 + 1);
    if (lines > room) return 0;
    ranges[wanted->num_ranges++] = range;
    wanted->num_lines += lines;
    return room - lines;
}

/* What each thread will read first, where that is known: to be asked for during the product before. A thread's share of what its
second-level cache holds beside the product's panels. */
static int list_wanted(LoraWork *w) {
    int64_t most = w->num_shrinks + w->num_expands + 2 * w->num_products, cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    int64_t room = (cache > 0 ? cache : 1 << 18) / 2 / 64;
    w->wanted = calloc((size_t)w->num_threads, sizeof(Wanted));
    w->ranges = malloc(sizeof(Range) * (size_t)(most * w->num_threads + 1));
    if (!w->wanted || !w->ranges) return 1;
    for (int64_t t = 0; t < w->num_threads; t++) {
        Range *ranges = w->ranges + t * most;
        int64_t left = room;
        w->wanted[t].ranges = ranges;
        for (int64_t k = 0; k * w->num_threads + t < w->num_segments && left; k++) {
            const LoraSegment *s = &w->segments[k * w->num_threads + t];
            for (int64_t p = s->first; p < s->first + s->count && left; p++) {
                const Item all = {(int32_t)p, 0, 0, (int32_t)w->products[p].rank};
                left = want(&w->wanted[t], ranges, shrink_range(w, &all), left);
            }
            for (int64_t p = s->first; p < s->first + s->count && left; p++) {
                const Item all = {(int32_t)p, 0, 0, (int32_t)w->products[p].num_columns};
                left = want(&w->wanted[t], ranges, expand_range(w, &all), left);
            }
            if (t == 0 && left) w->fixed_per_thread = k + 1;
        }
        if (!w->is_fixed) continue;
        for (int64_t i = w->num_shrinks * t / w->num_threads; i < w->num_shrinks * (t + 1) / w->num_threads; i++)
            left = want(&w->wanted[t], ranges, shrink_range(w, &w->items[i]), left);
        for (int64_t i = w->num_expands * t / w->num_threads; i < w->num_expands * (t + 1) / w->num_threads; i++)
            left = want(&w->wanted[t], ranges, expand_range(w, &w->items[w->num_shrinks + i]), left);
    }
    return 0;
}

int lora_prepare(LoraWork *w, const LoraCall *call, int num_threads) {
    int64_t num_long = 0, scratch = 0, most = call->num_segments * call->num_modules;
    *w = (LoraWork){.call = *call, .num_threads = num_threads};
    w->products = malloc(sizeof(Product) * (size_t)(most + 1));
    w->segments = malloc(sizeof(Segment) * (size_t)(call->num_segments + 1));
    if (!w->products || !w->segments) return 1;
    list_products(w, num_threads, &num_long, &scratch);
    int64_t longest = 0;
    for (int64_t p = 0; p < num_long; p++)
        if (w->products[p].end - w->products[p].start > longest) longest = w->products[p].end - w->products[p].start;
    w->is_fixed = num_long && longest <= ITEM_ROWS;
    int64_t columns = w->is_fixed ? FIXED_COLUMNS : ITEM_COLUMNS;
    w->num_shrinks = cut(NULL, w->products, num_long, ITEM_RANKS, 1);
    w->num_expands = cut(NULL, w->products, num_long, columns, 0);
    w->shrunk = malloc(sizeof(float) * (size_t)(scratch + 1));
    w->items = malloc(sizeof(Item) * (size_t)(w->num_shrinks + w->num_expands + 1));
    if (!w->shrunk || !w->items) return 1;
    float *next = w->shrunk;
    for (Product *p = w->products; next < w->shrunk + scratch; p++) {
        p->shrunk = next;
        next += p->rank * (p->end - p->start);
    }
    cut(w->items, w->products, num_long, ITEM_RANKS, 1);
    cut(w->items + w->num_shrinks, w->products, num_long, columns, 0);
    return list_wanted(w);
}

void lora_release(LoraWork *w) {
    free(w->wanted);
    free(w->ranges);
    free(w->items);
    free(w->shrunk);
    free(w->segments);
    free(w->products);
}

/* table: this layer's [.., 7, 3] of the first adapter row, `table_stride` numbers from one adapter row to the next.
segments: [num_segments, 3] (adapter row, start, end). Returns 0, or 1 when memory ran out. */
EXPORT int trailmark_lora_add(void *y, const void *x, const void *weights, const int64_t *table, int64_t table_stride,
                              const int32_t *segments, int64_t num_segments, int64_t first_module, int64_t num_modules,
                              const int64_t *bounds, int64_t I, int64_t stride, int dtype, int w_dtype,
                              int num_threads) {
    LoraCall call = {y,           x,      weights, table, table_stride, segments, num_segments, first_module,
                     num_modules, bounds, I,       stride, dtype,       dtype,    w_dtype};
    LoraWork work;
    int is_short = lora_prepare(&work, &call, num_threads);
    if (!is_short) {
#pragma omp parallel num_threads(num_threads)
        team_lora_add(&work);
    }
    lora_release(&work);
    return is_short;
}
