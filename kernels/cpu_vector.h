/* Vectors of 16 floats in GCC's vector extension: the compiler maps them to AVX-512, two AVX2 or four NEON registers.

Every function that reads memory takes the element type as a constant (F32 or BF16), so that the branch is gone after
inlining. Arithmetic is float32 whatever the type in memory. */
#ifndef TRAILMARK_CPU_VECTOR_H
#define TRAILMARK_CPU_VECTOR_H

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LANES 16
enum { F32 = 0, BF16 = 1 };
#define ELEMENT_SIZE(dtype) ((dtype) == BF16 ? 2 : 4)

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
/* The same as they lie in memory: any address. */
typedef float vec_memory __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(32)));
typedef uint16_t half_memory __attribute__((vector_size(32), aligned(2), may_alias));
typedef float float_memory __attribute__((may_alias));

INLINE float float_of(uint32_t bits) {
    union { uint32_t u; float f; } both = {.u = bits};
    return both.f;
}

INLINE uint32_t bits_of(float value) {
    union { float f; uint32_t u; } both = {.f = value};
    return both.u;
}

INLINE const void *at(const void *base, int64_t index, const int dtype) {
    return (const char *)base + index * ELEMENT_SIZE(dtype);
}

INLINE vec load(const void *base, int64_t index, const int dtype) {
    if (dtype == BF16)
        return (vec)(__builtin_convertvector(*(const half_memory *)at(base, index, BF16), uvec) << 16);
    return *(const vec_memory *)at(base, index, F32);
}

INLINE float load_one(const void *base, int64_t index, const int dtype) {
    if (dtype == BF16)
        return float_of((uint32_t)((const uint16_t *)base)[index] << 16);
    return ((const float_memory *)base)[index];
}

/* Nearest bfloat16, ties to even, NaN stays NaN. */
INLINE void store(void *base, int64_t index, vec value, const int dtype) {
    if (dtype == BF16) {
        uvec bits = (uvec)value;
        uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        uvec is_nan = (uvec)(value != value);
        rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0);
        *(half_memory *)at(base, index, BF16) = __builtin_convertvector(rounded, half_vec);
    } else {
        *(vec_memory *)at(base, index, F32) = value;
    }
}

INLINE void store_one(void *base, int64_t index, float value, const int dtype) {
    if (dtype == BF16) {
        uint32_t bits = bits_of(value);
        ((uint16_t *)base)[index] = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    } else {
        ((float_memory *)base)[index] = value;
    }
}

INLINE vec splat(float value) {
    return value - (vec){0};
}

/* Lanes of `yes` where the mask (all ones or all zeros per lane) is set, else of `no`. */
INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

/* Sum of the lanes in a fixed order (halves, quarters, ...). */
INLINE float sum_lanes(vec v) {
    typedef float vec8 __attribute__((vector_size(32)));
    typedef float vec4 __attribute__((vector_size(16)));
    union { vec whole; vec8 half[2]; } a = {.whole = v};
    union { vec8 whole; vec4 half[2]; } b = {.whole = a.half[0] + a.half[1]};
    vec4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* The sums of four vectors' lanes, each in the order of sum_lanes, written to `sums`. */
INLINE void sum_lanes_of_four(float *sums, vec a, vec b, vec c, vec d) {
    vec ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vec cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vec quarters = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                   SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    vec pairs = quarters + SHUFFLE(quarters, quarters, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    vec whole = pairs + SHUFFLE(pairs, pairs, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    for (int i = 0; i < 4; i++) sums[i] = whole[4 * i];
}

/* exp to about 1e-7 relative; 0 below -87, exp(88) above 88, NaN for NaN. Range reduction and polynomial after Cephes' expf
(https://www.netlib.org/cephes/). */
INLINE vec vec_exp(vec x) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest whole number */
    ivec is_tiny = x < -87.0f;
    vec clamped = choose(is_tiny, splat(-87.0f), choose(x > 88.0f, splat(88.0f), x));
    vec whole = (clamped * 1.44269504088896341f + magic) - magic;
    vec r = clamped - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (__builtin_convertvector(whole, ivec) + 127) << 23;
    vec result = p * (vec)exponent;
    return choose(is_tiny, splat(0), result);
}

#endif
