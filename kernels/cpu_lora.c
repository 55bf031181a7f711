/* LoRA of many adapters on the CPU: y += B A x for every segment of a step, in one call per group of linears.

Shrink first (one dot product per rank row and token), then expand (a weighted sum of B's rows per token); work is cut
into items of one module's rank rows or output columns times at most ITEM_ROWS tokens, and threads take items as they
come. Every sum runs over its index in one fixed order, so a result depends neither on the cut, nor on the thread that
took it, nor on what else is in the step. Each adapter's A and B are read once per ITEM_ROWS tokens. */
#include <stdlib.h>

#include "cpu_vector.h"

#define ITEM_ROWS 64
#define ITEM_RANKS 16
#define ITEM_COLUMNS 512
#define TILE 4

typedef struct {
    const void *a, *b;          /* [rank, I], [rank, O_m] */
    float *shrunk;              /* [rows, rank] */
    int64_t rank, start, end;   /* tokens [start, end) */
    int64_t column, num_columns;
} Product;

typedef struct {
    int32_t product, row, first, last; /* tokens from `row` on; rank rows or columns [first, last) */
} Item;

/* shrunk[t][r] for NT tokens and NR rank rows. */
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
    for (int t = 0; t < NT; t++)
        for (int r = 0; r < NR; r++) {
            float sum = sum_lanes(sums[t][r]);
            for (int64_t rest = i; rest < I; rest++)
                sum += load_one(x, t * I + rest, x_dtype) * load_one(a, r * I + rest, w_dtype);
            h[t * rank + r] = sum;
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

INLINE void compute(const Product *products, const Item *shrinks, int64_t num_shrinks, const Item *expands,
                    int64_t num_expands, void *y, int64_t stride, const void *x, int64_t I, int num_threads,
                    const int dtype, const int w_dtype) {
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_shrinks; i++)
            shrink_item(&products[shrinks[i].product], &shrinks[i], x, I, dtype, w_dtype);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < num_expands; i++)
            expand_item(&products[expands[i].product], &expands[i], y, stride, dtype, w_dtype);
    }
}

/* table: this layer's [.., 7, 3] of the first adapter row, `table_stride` numbers from one adapter row to the next.
segments: [num_segments, 3] (adapter row, start, end). Returns 0, or 1 when memory ran out. */
EXPORT int trailmark_lora_add(void *y, const void *x, const void *weights, const int64_t *table, int64_t table_stride,
                              const int32_t *segments, int64_t num_segments, int64_t first_module, int64_t num_modules,
                              const int64_t *bounds, int64_t I, int64_t stride, int dtype, int w_dtype,
                              int num_threads) {
    int64_t num_products = 0, scratch = 0;
    Product *products = malloc(sizeof(Product) * (size_t)(num_segments * num_modules + 1));
    if (!products) return 1;
    for (int64_t s = 0; s < num_segments; s++) {
        const int32_t *segment = segments + 3 * s;
        for (int64_t m = 0; m < num_modules; m++) {
            const int64_t *entry = table + segment[0] * table_stride + 3 * (first_module + m);
            if (!entry[2]) continue;
            products[num_products++] = (Product){at(weights, entry[0], w_dtype), at(weights, entry[1], w_dtype), NULL,
                                                 entry[2], segment[1], segment[2], bounds[m],
                                                 bounds[m + 1] - bounds[m]};
            scratch += entry[2] * (segment[2] - segment[1]);
        }
    }
    int64_t num_shrinks = cut(NULL, products, num_products, ITEM_RANKS, 1);
    int64_t num_expands = cut(NULL, products, num_products, ITEM_COLUMNS, 0);
    float *shrunk = malloc(sizeof(float) * (size_t)(scratch + 1));
    Item *items = malloc(sizeof(Item) * (size_t)(num_shrinks + num_expands + 1));
    int is_short = !shrunk || !items;
    if (!is_short) {
        float *next = shrunk;
        for (int64_t p = 0; p < num_products; p++) {
            products[p].shrunk = next;
            next += products[p].rank * (products[p].end - products[p].start);
        }
        Item *expands = items + num_shrinks;
        cut(items, products, num_products, ITEM_RANKS, 1);
        cut(expands, products, num_products, ITEM_COLUMNS, 0);
#define COMPUTE(d, w) \
    compute(products, items, num_shrinks, expands, num_expands, y, stride, x, I, num_threads, d, w)
        if (dtype == F32 && w_dtype == F32) COMPUTE(F32, F32);
        if (dtype == F32 && w_dtype == BF16) COMPUTE(F32, BF16);
        if (dtype == BF16 && w_dtype == F32) COMPUTE(BF16, F32);
        if (dtype == BF16 && w_dtype == BF16) COMPUTE(BF16, BF16);
#undef COMPUTE
    }
    free(items);
    free(shrunk);
    free(products);
    return is_short;
}
