/* RoPE with the cache write, and attention over the paged cache, on the CPU: no loop over sequences in Python.

qkv: [T, (H + 2 G) D], query heads, then key heads, then value heads; k, v: one layer's cache, [slots, G, D]. D is a
multiple of 16. Each query row is computed alone, in fp32, so it does not depend on what else is in the step. */
#include <omp.h>
#include <stdlib.h>

#include "cpu_team.h"

#define MAX_SHARING 4 /* query heads computed in one pass over a key head's keys */

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

void team_rope_kv(const Rope *r, int64_t T, int dtype) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        if (dtype == F32) rope_row(r, t, F32);
        else rope_row(r, t, BF16);
    }
}

/* Rotate queries in place; write rotated keys and plain values to their slots. cos, sin: fp32 [positions, D / 2]. */
EXPORT void trailmark_rope_kv(void *qkv, void *k, void *v, const float *cos, const float *sin,
                              const int64_t *positions, const int64_t *slots, const void *q_norm, const void *k_norm,
                              int64_t T, int64_t H, int64_t G, int64_t D, float eps, int dtype, int num_threads) {
    Rope r = {qkv, k, v, cos, sin, positions, slots, q_norm, k_norm, H, G, D, eps};
#pragma omp parallel num_threads(num_threads)
    team_rope_kv(&r, T, dtype);
}

INLINE int64_t slot_of(const Run *run, int64_t j) {
    return run->list ? ((const int64_t *)run->list)[j] : run->slot + j;
}

/* Lanes `low` of a and b next to each other, plus lanes `high` of a and b. */
#define FOLD(a, b, low, high) (__builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high))

/* The sums of 16 vectors' lanes as one vector; each is summed by halves, quarters, ..., wherever it stands. */
INLINE vec sum_lanes_of_16(const vec *v) {
    const ivec half_low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, half_high = half_low + 8;
    const ivec quarter_low = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, quarter_high = quarter_low + 4;
    const ivec pair_low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, pair_high = pair_low + 2;
    const ivec one_low = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, one_high = one_low + 1;
    vec a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) a[i] = FOLD(v[i], v[i + 8], half_low, half_high);
    for (int i = 0; i < 4; i++) b[i] = FOLD(a[i], a[i + 4], quarter_low, quarter_high);
    for (int i = 0; i < 2; i++) c[i] = FOLD(b[i], b[i + 2], pair_low, pair_high);
    return FOLD(c[0], c[1], one_low, one_high); /* lane l is vector l's sum: each fold halves the step between them */
}

/* Ask for all heads' lines of the slot at position + AHEAD; `lines` of a slot, 0 asks for nothing. */
#define AHEAD 8
INLINE void fetch_slot(const void *base, const Run *run, int64_t position, int64_t last, int64_t stride, int64_t lines,
                       const int dtype) {
    if (!lines) return;
    const char *slot = at(base, slot_of(run, position + AHEAD < last ? position + AHEAD : last) * stride, dtype);
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(slot + 64 * line, 0, 3);
}

/* scores[h * padded + j] = exp(scale q[h] K[j] - its maximum) for NH heads; -inf becomes 0 beyond count. */
INLINE void score(const int NH, const int NV, float *scores, int64_t padded, const void *q, const void *k,
                  const Run *run, int64_t first, int64_t count, int64_t key_stride, float scale, float *totals,
                  int64_t lines, const int dtype) {
    vec queries[NH * NV], best[NH];
    for (int i = 0; i < NH * NV; i++) queries[i] = load(q, i * LANES, dtype) * scale;
    for (int h = 0; h < NH; h++) best[h] = splat(-__builtin_inff());
    for (int64_t block = 0; block < count; block += LANES) {
        vec products[NH][LANES];
        for (int j = 0; j < LANES; j++) {
            /* Beyond the last key the last one again: its scores are overwritten below. */
            int64_t position = block + j < count ? block + j : count - 1;
            const void *key = at(k, slot_of(run, first + position) * key_stride, dtype);
            fetch_slot(k, run, first + position, first + count - 1, key_stride, lines, dtype);
            for (int h = 0; h < NH; h++) products[h][j] = queries[h * NV] * load(key, 0, dtype);
            for (int v = 1; v < NV; v++) {
                vec part = load(key, v * LANES, dtype);
                for (int h = 0; h < NH; h++) products[h][j] += queries[h * NV + v] * part;
            }
        }
        for (int h = 0; h < NH; h++) {
            vec sums = sum_lanes_of_16(products[h]);
            store(scores, h * padded + block, sums, F32);
            best[h] = choose(sums > best[h], sums, best[h]);
        }
    }
    for (int h = 0; h < NH; h++) {
        float *weights = scores + h * padded, most = best[h][0];
        for (int l = 1; l < LANES; l++) most = best[h][l] > most ? best[h][l] : most;
        for (int64_t j = count; j < padded; j++) weights[j] = -__builtin_inff();
        vec sum = splat(0);
        for (int64_t j = 0; j < padded; j += LANES) {
            vec weight = vec_exp(load(weights, j, F32) - most);
            store(weights, j, weight, F32);
            sum += weight;
        }
        totals[h] = sum_lanes(sum);
    }
}

/* NH query heads that share a key head over keys [first, first + count). */
INLINE void attend(const int NH, const int NV, void *out, const void *q, const void *k, const void *v, const Run *run,
                   int64_t first, int64_t count, int64_t key_stride, float scale, float *scores, int64_t lines,
                   const int dtype) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    float totals[NH];
    score(NH, NV, scores, padded, q, k, run, first, count, key_stride, scale, totals, lines, dtype);
    vec sums[NH][NV];
    for (int h = 0; h < NH; h++)
        for (int d = 0; d < NV; d++) sums[h][d] = splat(0);
    for (int64_t j = 0; j < count; j++) {
        const void *value = at(v, slot_of(run, first + j) * key_stride, dtype);
        fetch_slot(v, run, first + j, first + count - 1, key_stride, lines, dtype);
        for (int d = 0; d < NV; d++) {
            vec part = load(value, d * LANES, dtype);
            for (int h = 0; h < NH; h++) sums[h][d] += scores[h * padded + j] * part;
        }
    }
    for (int h = 0; h < NH; h++)
        for (int d = 0; d < NV; d++) store(out, (h * NV + d) * LANES, sums[h][d] / totals[h], dtype);
}

INLINE void attend_row(const Attention *a, const Run *run, int64_t row, int64_t g, float *scores, const int dtype) {
    int64_t D = a->D, share = a->H / a->G, t = run->row + row;
    int64_t count = run->context_len - run->num_rows + row + 1;
    int64_t first = a->window && count > a->window ? count - a->window : 0;
    count -= first;
    const void *k = at(a->k, g * D, dtype), *v = at(a->v, g * D, dtype);
    /* A slot's heads lie side by side, and the first head's thread goes on to the others: it brings in all of them. */
    int64_t lines = g == 0 ? (a->G * D * ELEMENT_SIZE(dtype) + 63) / 64 : 0;
    int64_t most = D <= 64 ? MAX_SHARING : D == 128 ? 2 : 1; /* as many as keep their sums in registers */
    for (int64_t done = 0, now; done < share; done += now) {
        int64_t head = g * share + done;
        now = share - done < most ? share - done : most;
        const void *q = at(a->qkv, t * (a->H + 2 * a->G) * D + head * D, dtype);
        void *out = (void *)at(a->out, (t * a->H + head) * D, dtype);
#define ATTEND(nh, nv) attend(nh, nv, out, q, k, v, run, first, count, a->G * D, a->scale, scores, lines, dtype)
#define CASE(nh, nv) case nh * 100 + nv: ATTEND(nh, nv); break;
        switch (now * 100 + D / LANES) {
            CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1)
            CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2)
            CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4)
            CASE(1, 8) CASE(2, 8)
            default:
                for (int64_t h = 0; h < now; h++) {
                    ATTEND(1, D / LANES);
                    q = at(q, D, dtype);
                    out = (void *)at(out, D, dtype);
                }
        }
#undef CASE
#undef ATTEND
    }
}

int64_t *attention_runs(const Run *runs, int64_t num_runs, int64_t num_rows) {
    int64_t *run_of = malloc(sizeof(int64_t) * (size_t)(num_rows + 1)), filled = 0;
    for (int64_t r = 0; run_of && r < num_runs; r++)
        for (int64_t row = 0; row < runs[r].num_rows; row++) run_of[filled++] = r;
    return run_of;
}

int64_t attention_scratch(int64_t longest) {
    return MAX_SHARING * (longest + LANES);
}

int64_t attention_chunk(int64_t num_rows, int64_t G, int num_threads) {
    return num_rows >= 4 * num_threads ? G : 1;
}

void team_attention(const Attention *a, int64_t chunk, float *scratch, int dtype) {
#pragma omp for schedule(dynamic, chunk)
    for (int64_t item = 0; item < a->num_rows * a->G; item++) {
        const Run *run = a->runs + a->run_of[item / a->G];
        int64_t row = item / a->G - run->row;
        if (dtype == F32) attend_row(a, run, row, item % a->G, scratch, F32);
        else attend_row(a, run, row, item % a->G, scratch, BF16);
    }
}

/* out: [T, H, D]; qkv as left by trailmark_rope_kv; runs: [num_runs, 5]; window 0: all keys. Returns 0, or 1 when
memory ran out. */
EXPORT int trailmark_attention(void *out, const void *qkv, const void *k, const void *v, const int64_t *runs,
                               int64_t num_runs, int64_t longest, int64_t num_rows, int64_t H, int64_t G, int64_t D,
                               float scale, int64_t window, int dtype, int num_threads) {
    const Run *all = (const Run *)runs;
    int64_t *run_of = attention_runs(all, num_runs, num_rows), room = attention_scratch(longest);
    float *scratch = malloc(sizeof(float) * (size_t)(room * num_threads));
    int is_short = !run_of || !scratch;
    if (!is_short) {
        Attention a = {out, qkv, k, v, all, run_of, num_rows, H, G, D, window, scale};
#pragma omp parallel num_threads(num_threads)
        team_attention(&a, attention_chunk(num_rows, G, num_threads), scratch + room * omp_get_thread_num(), dtype);
    }
    free(scratch);
    free(run_of);
    return is_short;
}
