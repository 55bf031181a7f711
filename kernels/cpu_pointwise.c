/* RMS norm with the residual sum before it, and SiLU(gate) * up, on the CPU; fp32 inside, one rounding at the end. */
#include "cpu_team.h"

INLINE void norm_row(void *y, void *x, const void *delta, const void *weight, int64_t I, float eps, const int dtype) {
    vec squares = splat(0);
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= I; i += LANES) {
        vec value = load(x, i, dtype);
        if (delta) {
            store(x, i, value + load(delta, i, dtype), dtype);
            value = load(x, i, dtype);
        }
        squares += value * value;
    }
    for (; i < I; i++) {
        if (delta) store_one(x, i, load_one(x, i, dtype) + load_one(delta, i, dtype), dtype);
        rest += load_one(x, i, dtype) * load_one(x, i, dtype);
    }
    float factor = 1.0f / __builtin_sqrtf((sum_lanes(squares) + rest) / (float)I + eps);
    for (i = 0; i + LANES <= I; i += LANES) store(y, i, load(x, i, dtype) * factor * load(weight, i, dtype), dtype);
    for (; i < I; i++) store_one(y, i, load_one(x, i, dtype) * factor * load_one(weight, i, dtype), dtype);
}

void team_add_rms_norm(void *y, void *x, const void *delta, const void *weight, int64_t T, int64_t I, float eps,
                       int dtype) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        int64_t row = t * I;
        void *out = (void *)at(y, row, dtype), *in = (void *)at(x, row, dtype);
        const void *add = delta ? at(delta, row, dtype) : 0;
        if (dtype == F32) norm_row(out, in, add, weight, I, eps, F32);
        else norm_row(out, in, add, weight, I, eps, BF16);
    }
}

/* x += delta (unless NULL), in place; y = x / rms(x) * weight. x, y, delta: [T, I]. */
EXPORT void trailmark_add_rms_norm(void *y, void *x, const void *delta, const void *weight, int64_t T, int64_t I,
                                   float eps, int dtype, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    team_add_rms_norm(y, x, delta, weight, T, I, eps, dtype);
}

INLINE void silu_row(void *y, const void *gate, const void *up, int64_t n, const int dtype) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec g = load(gate, i, dtype);
        store(y, i, g / (1.0f + vec_exp(-g)) * load(up, i, dtype), dtype);
    }
    for (; i < n; i++) {
        float g = load_one(gate, i, dtype);
        store_one(y, i, g / (1.0f + vec_exp(splat(-g))[0]) * load_one(up, i, dtype), dtype);
    }
}

void team_silu_mul(void *y, const void *gate_up, int64_t T, int64_t n, int dtype) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        void *out = (void *)at(y, t * n, dtype);
        const void *gate = at(gate_up, t * 2 * n, dtype), *up = at(gate_up, t * 2 * n + n, dtype);
        if (dtype == F32) silu_row(out, gate, up, n, F32);
        else silu_row(out, gate, up, n, BF16);
    }
}

/* y = silu(gate_up[:, :n]) * gate_up[:, n:]. gate_up: [T, 2n], y: [T, n]. */
EXPORT void trailmark_silu_mul(void *y, const void *gate_up, int64_t T, int64_t n, int dtype, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    team_silu_mul(y, gate_up, T, n, dtype);
}
