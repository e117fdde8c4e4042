// Vectors of floats for cpu_kernels.cpp, and the functions of them that its kernels need.
//
// Written with the compiler's vector types (GCC, Clang), as wide as the target's registers. Intrinsics stand only where these
// have no word for what the processor can do: masked additions, quick reciprocals, streaming stores.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 2048;  // columns: of two models 16 KiB in floats, and as much again that is fetched ahead
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef uint32_t Word __attribute__((vector_size(LANES * 4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2)));

template <class V> inline V load(const void* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
inline Vec fill(float x) { return Vec{} + x; }

// Past the caches, to an address that is a whole number of vectors.
#if defined(__AVX512F__)
inline void stream(void* to, Vec v) { _mm512_stream_ps((float*)to, (__m512)v); }
#elif defined(__AVX__)
inline void stream(void* to, Vec v) { _mm256_stream_ps((float*)to, (__m256)v); }
#elif defined(__SSE2__)
inline void stream(void* to, Vec v) { _mm_stream_ps((float*)to, (__m128)v); }
#else
inline void stream(void* to, Vec v) { store(to, v); }
#endif

// The larger and the smaller; b where either is NaN.
#if defined(__AVX512F__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif

inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}

inline float maximum(Vec v) {
    float m = -INF;
    for (int i = 0; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// e^x for x <= 88, as 2^n times a polynomial in the rest. Relative error 1e-7 + 1.3e-8 |x|; 0 below -87.3; NaN stays.
inline Vec exp(Vec x) {
    const Vec magic = fill(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to an integer; 127: a float's bias
    Vec shifted = x * 1.44269504f + magic, n = shifted - magic, r = x * 1.44269504f - n;
    Vec p = fill(0.00132647273f);
    p = p * r + 0.00967151299f;
    p = p * r + 0.0555073358f;
    p = p * r + 0.240222424f;
    p = p * r + 0.693147004f;
    p = p * r + 1.0f;
    Vec e = p * (Vec)((Int)shifted << 23);
    return x < -87.3f ? Vec{} : e;
}

// log(y + c) for y > 0 and a correction c of the size of y's rounding. Finite for y = 0 and for NaN: callers' weights are
// 0 and NaN there.
inline Vec log_near(Vec y, Vec c) {
    Int bits = (Int)y, e = (bits - 0x3f3504f3) >> 23;
    Vec scale = (Vec)((127 - e) << 23);
    Vec f = (Vec)(bits - (e << 23)) - 1.0f + c * scale;
    Vec p = fill(0.0870043486f);
    p = p * f + -0.142674863f;
    p = p * f + 0.149147689f;
    p = p * f + -0.16577585f;
    p = p * f + 0.199630633f;
    p = p * f + -0.250013381f;
    p = p * f + 0.333339095f;
    return f + (f * f) * (p * f - 0.5f) + __builtin_convertvector(e, Vec) * 0.693147181f;
}

// 1 / x for a normal x > 0; NaN stays.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    Vec near = (Vec)_mm512_rcp14_ps((__m512)x);  // a division takes as long as all else in a mixture
    return near + near * (1.0f - x * near);
#else
    return 1.0f / x;
#endif
}

// log(share), share = 1 + excess, by whichever of the two is precise.
inline Vec log_share(Vec share, Vec excess) {
    Vec near = excess + 1.0f;
    auto small = share < 0.5f;
    return log_near(small ? share : near, small ? Vec{} : excess - (near - 1.0f));
}

// total + weight * value, and total where the weight is 0: 0 * inf = 0.
inline Vec add_weighted(Vec total, Vec weight, Vec value) {
#if defined(__AVX512F__)
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return (Vec)_mm512_mask3_fmadd_ps((__m512)weight, (__m512)value, (__m512)total, counts);
#else
    return total + (weight == 0.0f ? Vec{} : weight * value);
#endif
}

inline Vec add_product(Vec total, Vec weight, Vec value) { return total + weight * value; }

inline Vec weighted(Vec weight, Vec value) { return weight == 0.0f ? Vec{} : weight * value; }

}  // namespace
