// What several kernels do with vectors of sixteen.
#pragma once

#include <immintrin.h>

#include <utility>

#define INLINE __attribute__((always_inline))

namespace jaxinfer {

constexpr int kLanes = 16;

// one(0), one(1)... with numbers that the compiler knows: a loop's arrays would stay in memory.
template <typename One, int... Index>
INLINE inline void each(std::integer_sequence<int, Index...>, const One& one) {
  (one(std::integral_constant<int, Index>{}), ...);
}

template <int Count, typename One>
INLINE inline void each(const One& one) {
  each(std::make_integer_sequence<int, Count>{}, one);
}

// Turns a square of 16 by 16 whole numbers over.
INLINE inline void transpose(__m512i* v) {
  __m512i t[kLanes];
  each<kLanes / 2>([&](auto half) INLINE {
    constexpr int i = 2 * half;
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  });
  each<kLanes / 4>([&](auto quarter) INLINE {
    constexpr int i = 4 * quarter;
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  });
  each<4>([&](auto i) INLINE {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
  });
  each<4>([&](auto i) INLINE {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  });
}

}  // namespace jaxinfer
