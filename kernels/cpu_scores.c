/* Inner products of quantised gradient rows with float queries, on the CPU. */
#include "cpu_vector.h"

#define BLOCK 64
#define MAX_GROUP 8

typedef int8_t code_vec __attribute__((vector_size(16)));
typedef int8_t code_memory __attribute__((vector_size(16), aligned(1), may_alias));

INLINE vec codes_at(const int8_t *codes) {
    return __builtin_convertvector(__builtin_convertvector(*(const code_memory *)codes, ivec), vec);
}

/* One row against `count` queries that lie `stride` apart; a constant count keeps their sums in registers. */
INLINE void score_row(float *out, int64_t out_stride, const int8_t *codes, const uint8_t *scales, float unit,
                      const float *query, int64_t stride, int64_t num_blocks, const int count) {
    vec sums[MAX_GROUP];
    for (int g = 0; g < count; g++) sums[g] = splat(0);
    for (int64_t block = 0; block < num_blocks; block++) {
        const int8_t *here = codes + block * BLOCK;
        float scale = (float)scales[block];
        vec a = codes_at(here) * scale, b = codes_at(here + 16) * scale;
        vec c = codes_at(here + 32) * scale, d = codes_at(here + 48) * scale;
        for (int g = 0; g < count; g++) {
            const float *q = query + g * stride + block * BLOCK;
            sums[g] += a * load(q, 0, F32) + b * load(q, 16, F32);
            sums[g] += c * load(q, 32, F32) + d * load(q, 48, F32);
        }
    }
    for (int g = 0; g < count; g++) out[g * out_stride] = sum_lanes(sums[g]) * unit;
}

/* out[g, i] = unit[i] * sum over j of codes[i, j] * scales[i, j / 64] * query[g, j].
   codes: int8 [n, 64 * num_blocks], scales: uint8 [n, num_blocks], units: [n], query: [groups, 64 * num_blocks].
   A row's result is the same bits in any batch, at any number of threads. */
EXPORT void trailmark_score_rows(float *out, const int8_t *codes, const uint8_t *scales, const float *units,
                                 const float *query, int64_t n, int64_t num_blocks, int64_t groups, int num_threads) {
    int64_t dim = num_blocks * BLOCK;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        int64_t g = 0;
        for (; g + MAX_GROUP <= groups; g += MAX_GROUP)
            score_row(out + g * n + i, n, codes + i * dim, scales + i * num_blocks, units[i], query + g * dim, dim,
                      num_blocks, MAX_GROUP);
        for (; g < groups; g++)
            score_row(out + g * n + i, n, codes + i * dim, scales + i * num_blocks, units[i], query + g * dim, dim,
                      num_blocks, 1);
    }
}
