/* RoPE with the cache write, and attention over the paged cache, on the CPU: no loop over sequences in Python.

qkv: [T, (H + 2 G) D], query heads, then key heads, then value heads; k, v: one layer's cache, [slots, G, D]. D is a
multiple of 16. Each query row is computed alone, in fp32, so it does not depend on what else is in the step. */
#include <stdlib.h>

#include "cpu_vector.h"

#define MAX_VECTORS 16 /* D <= 256 */
#define MAX_SHARING 8  /* query heads computed in one pass over a key head's keys */

/* head /= rms(head) * weight, in place, before RoPE (Qwen3). */
INLINE void norm_head(void *head, const void *weight, int64_t D, float eps, const int dtype) {
    vec squares = splat(0);
    for (int64_t d = 0; d < D; d += LANES) squares += load(head, d, dtype) * load(head, d, dtype);
    float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)D + eps);
    for (int64_t d = 0; d < D; d += LANES)
        store(head, d, load(head, d, dtype) * factor * load(weight, d, dtype), dtype);
}

/* to[d] = from[d] cos - from[d + D/2] sin, to[d + D/2] = from[d + D/2] cos + from[d] sin; `to` may be `from`. */
INLINE void rotate_head(void *to, const void *from, const float *cos, const float *sin, int64_t D, const int dtype) {
    int64_t half = D / 2, d = 0;
    for (; d + LANES <= half; d += LANES) {
        vec c = load(cos, d, F32), s = load(sin, d, F32);
        vec low = load(from, d, dtype), high = load(from, d + half, dtype);
        store(to, d, low * c - high * s, dtype);
        store(to, d + half, high * c + low * s, dtype);
    }
    for (; d < half; d++) {
        float low = load_one(from, d, dtype), high = load_one(from, d + half, dtype);
        store_one(to, d, low * cos[d] - high * sin[d], dtype);
        store_one(to, d + half, high * cos[d] + low * sin[d], dtype);
    }
}

typedef struct {
    void *qkv, *k, *v;
    const float *cos, *sin;
    const int64_t *positions, *slots;
    const void *q_norm, *k_norm;
    int64_t H, G, D;
    float eps;
} Rope;

INLINE void rope_row(const Rope *r, int64_t t, const int dtype) {
    int64_t D = r->D, row = t * (r->H + 2 * r->G) * D, slot = r->slots[t] * r->G * D;
    const float *cos = r->cos + r->positions[t] * (D / 2), *sin = r->sin + r->positions[t] * (D / 2);
    for (int64_t h = 0; h < r->H + r->G; h++) {
        void *head = (void *)at(r->qkv, row + h * D, dtype);
        int is_key = h >= r->H;
        const void *weight = is_key ? r->k_norm : r->q_norm;
        if (weight) norm_head(head, weight, D, r->eps, dtype);
        rotate_head(is_key ? (void *)at(r->k, slot + (h - r->H) * D, dtype) : head, head, cos, sin, D, dtype);
    }
    const void *value = at(r->qkv, row + (r->H + r->G) * D, dtype);
    __builtin_memcpy((void *)at(r->v, slot, dtype), value, (size_t)(r->G * D * ELEMENT_SIZE(dtype)));
}

/* Rotate queries in place; write rotated keys and plain values to their slots. cos, sin: fp32 [positions, D / 2]. */
EXPORT void trailmark_rope_kv(void *qkv, void *k, void *v, const float *cos, const float *sin,
                              const int64_t *positions, const int64_t *slots, const void *q_norm, const void *k_norm,
                              int64_t T, int64_t H, int64_t G, int64_t D, float eps, int dtype, int num_threads) {
    Rope r = {qkv, k, v, cos, sin, positions, slots, q_norm, k_norm, H, G, D, eps};
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        if (dtype == F32) rope_row(&r, t, F32);
        else rope_row(&r, t, BF16);
    }
}

typedef struct {
    int64_t row, num_rows, context_len, slot, list; /* list: address of int64 slots, 0 where they are neighbours */
} Run;

INLINE int64_t slot_of(const Run *run, int64_t j) {
    return run->list ? ((const int64_t *)run->list)[j] : run->slot + j;
}

/* Softmax weights of NH query heads over keys [first, first + count), in scores[h * count_padded + j]. */
INLINE void score(const int NH, const int NV, float *scores, int64_t padded, const void *q, const void *k,
                  const Run *run, int64_t first, int64_t count, int64_t key_stride, float scale, float *totals,
                  const int dtype) {
    float best[MAX_SHARING];
    for (int h = 0; h < NH; h++) best[h] = -__builtin_inff();
    for (int64_t j = 0; j < count; j++) {
        const void *key = at(k, slot_of(run, first + j) * key_stride, dtype);
        for (int h = 0; h < NH; h++) {
            vec sum = splat(0);
            for (int v = 0; v < NV; v++)
                sum += load(q, (h * NV + v) * LANES, dtype) * load(key, v * LANES, dtype);
            float value = sum_lanes(sum) * scale;
            scores[h * padded + j] = value;
            best[h] = value > best[h] ? value : best[h];
        }
    }
    for (int h = 0; h < NH; h++) {
        float *weights = scores + h * padded;
        vec sum = splat(0);
        for (int64_t j = count; j < padded; j++) weights[j] = -__builtin_inff();
        for (int64_t j = 0; j < padded; j += LANES) {
            vec weight = vec_exp(load(weights, j, F32) - best[h]);
            store(weights, j, weight, F32);
            sum += weight;
        }
        totals[h] = sum_lanes(sum);
    }
}

INLINE void attend(const int NV, void *out, const void *q, const void *k, const void *v, const Run *run, int64_t first,
                   int64_t count, int64_t NH, int64_t key_stride, float scale, float *scores, const int dtype) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    float totals[MAX_SHARING];
    for (int64_t h = 0; h < NH; h++)
        score(1, NV, scores + h * padded, padded, at(q, h * NV * LANES, dtype), k, run, first, count, key_stride,
              scale, totals + h, dtype);
    for (int64_t h = 0; h < NH; h++) {
        vec sums[MAX_VECTORS];
        for (int d = 0; d < NV; d++) sums[d] = splat(0);
        for (int64_t j = 0; j < count; j++) {
            const void *value = at(v, slot_of(run, first + j) * key_stride, dtype);
            for (int d = 0; d < NV; d++) sums[d] += scores[h * padded + j] * load(value, d * LANES, dtype);
        }
        for (int d = 0; d < NV; d++) store(out, (h * NV + d) * LANES, sums[d] / totals[h], dtype);
    }
}

typedef struct {
    void *out;
    const void *qkv, *k, *v;
    int64_t H, G, D, window;
    float scale;
} Attention;

INLINE void attend_row(const Attention *a, const Run *run, int64_t row, int64_t g, float *scores, const int dtype) {
    int64_t D = a->D, share = a->H / a->G, t = run->row + row;
    int64_t count = run->context_len - run->num_rows + row + 1;
    int64_t first = a->window && count > a->window ? count - a->window : 0;
    count -= first;
    for (int64_t done = 0; done < share; done += MAX_SHARING) {
        int64_t head = g * share + done, num_heads = share - done < MAX_SHARING ? share - done : MAX_SHARING;
        const void *q = at(a->qkv, t * (a->H + 2 * a->G) * D + head * D, dtype);
        void *out = (void *)at(a->out, (t * a->H + head) * D, dtype);
        const void *k = at(a->k, g * D, dtype), *v = at(a->v, g * D, dtype);
        switch (D / LANES) {
#define CASE(n) \
    case n: attend(n, out, q, k, v, run, first, count, num_heads, a->G * D, a->scale, scores, dtype); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)
#undef CASE
            default:
                attend(D / LANES, out, q, k, v, run, first, count, num_heads, a->G * D, a->scale, scores, dtype);
        }
    }
}

/* out: [T, H, D]; qkv as left by trailmark_rope_kv; runs: [num_runs, 5]; window 0: all keys. Returns 0, or 1 when
memory ran out. */
EXPORT int trailmark_attention(void *out, const void *qkv, const void *k, const void *v, const int64_t *runs,
                               int64_t num_runs, int64_t longest, int64_t num_rows, int64_t H, int64_t G, int64_t D,
                               float scale, int64_t window, int dtype, int num_threads) {
    Attention a = {out, qkv, k, v, H, G, D, window, scale};
    const Run *all = (const Run *)runs;
    int64_t *run_of = malloc(sizeof(int64_t) * (size_t)(num_rows + 1));
    int is_short = !run_of;
    if (is_short) return 1;
    int64_t filled = 0;
    for (int64_t r = 0; r < num_runs; r++)
        for (int64_t row = 0; row < all[r].num_rows; row++) run_of[filled++] = r;
#pragma omp parallel num_threads(num_threads) reduction(|| : is_short)
    {
        float *scores = malloc(sizeof(float) * MAX_SHARING * (size_t)(longest + LANES));
        is_short = !scores;
#pragma omp for schedule(dynamic, 2)
        for (int64_t item = 0; item < num_rows * G; item++) {
            const Run *run = all + run_of[item / G];
            int64_t row = item / G - run->row;
            if (!scores) continue;
            if (dtype == F32) attend_row(&a, run, row, item % G, scores, F32);
            else attend_row(&a, run, row, item % G, scores, BF16);
        }
        free(scores);
    }
    free(run_of);
    return is_short;
}
