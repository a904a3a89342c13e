// The softmax of attention, block by block of keys.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "native/vectors.h"

namespace jaxinfer {

constexpr float kLowest = -200.0f;  // of a power of two; below, it is zero anyway
constexpr int kMostColumns = 4;     // vectors of logits in a block

// 2^x for x <= 0, to the last bit or two.
INLINE inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(kLowest), x);  // NaN stays
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  constexpr float terms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                             2.4022651e-1f, 6.9314718e-1f, 1.0f};  // ln(2)^n / n!
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  for (float term : terms) {
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, whole);
}

// cap * tanh(x / cap)
INLINE inline __m512 capped(__m512 x, float cap) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(-2.88539008f / cap));  // -2 / ln(2)
  const __m512 low = _mm512_or_ps(y, _mm512_set1_ps(-0.0f));
  const __m512 part = power_of_two(low), one = _mm512_set1_ps(1.0f);
  const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, part), _mm512_add_ps(one, part));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  return _mm512_mul_ps(_mm512_or_ps(size, sign), _mm512_set1_ps(cap));
}

// A softmax that is not finished, of one query.
struct Softmax {
  float top = -std::numeric_limits<float>::infinity();  // a whole number above every logit so far
  float total = 0.0f;
};

// Logits of one query to weights, zero where it does not see; what is summed so far fades.
inline void weigh(float* logits, int64_t columns, int64_t first, int64_t seen_from, int64_t seen_to,
           float soft_cap, Softmax& softmax, float* out, int64_t width) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_set1_epi32(static_cast<int32_t>(seen_from - first));
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(seen_to - first));
  __mmask16 seen[kMostColumns], any = 0;
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int column = 0; column < columns; ++column) {
    const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(column * kLanes));
    seen[column] = _mm512_cmp_epi32_mask(at, low, _MM_CMPINT_NLT) &
                   _mm512_cmp_epi32_mask(at, high, _MM_CMPINT_LE);
    any |= seen[column];
    __m512 some = _mm512_load_ps(logits + column * kLanes);
    if (soft_cap > 0) {
      some = capped(some, soft_cap);
      _mm512_store_ps(logits + column * kLanes, some);
    }
    most = _mm512_mask_max_ps(most, seen[column], most, some);
  }
  if (!any) {
    for (int column = 0; column < columns; ++column) {
      _mm512_store_ps(logits + column * kLanes, _mm512_setzero_ps());
    }
    return;
  }
  const float top = std::max(softmax.top, std::ceil(_mm512_reduce_max_ps(most)));
  const __m512 base = _mm512_set1_ps(std::isinf(top) && top < 0 ? 0.0f : top);
  __m512 sum = _mm512_setzero_ps();
  for (int column = 0; column < columns; ++column) {
    const __m512 x = _mm512_sub_ps(_mm512_load_ps(logits + column * kLanes), base);
    const __m512 weight = _mm512_maskz_mov_ps(seen[column], power_of_two(x));
    _mm512_store_ps(logits + column * kLanes, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  if (top != softmax.top) {
    const float less = std::max(softmax.top - top, kLowest);
    const float fade = std::isinf(softmax.top) ? 0.0f : std::exp2(less);
    softmax.total *= fade;
    for (int64_t at = 0; at < width; at += kLanes) {
      _mm512_store_ps(out + at, _mm512_mul_ps(_mm512_load_ps(out + at), _mm512_set1_ps(fade)));
    }
    softmax.top = top;
  }
  softmax.total += _mm512_reduce_add_ps(sum);
}

}  // namespace jaxinfer
