// Rows of activations to whole numbers: rotated block by block, then rounded by one scale a row.
//
// Each row goes through the same vector operations in the same order, whatever rows there are
// beside it and whichever thread does it: its bits are its own.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "native/vectors.h"
#include "products/product.h"

namespace jaxinfer {
namespace {

constexpr float kSmallest = 1e-30f;  // rows whose values are all smaller count as zero

// Sums and differences of lanes that are `Step` apart.
template <int Step>
__m512 within(__m512 x) {
  __m512 other;
  if constexpr (Step == 1) other = _mm512_permute_ps(x, 0xB1);
  if constexpr (Step == 2) other = _mm512_permute_ps(x, 0x4E);
  if constexpr (Step == 4) other = _mm512_shuffle_f32x4(x, x, 0xB1);
  if constexpr (Step == 8) other = _mm512_shuffle_f32x4(x, x, 0x4E);
  constexpr __mmask16 upper = Step == 1 ? 0xAAAA : Step == 2 ? 0xCCCC : Step == 4 ? 0xF0F0 : 0xFF00;
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

// The Hadamard transform of one block, without its factor 1 / sqrt(block).
template <int Vectors>
INLINE inline void rotate_vectors(const float* from, float* to) {
  __m512 v[Vectors];
  each<Vectors>([&](auto at) INLINE {
    v[at] = within<8>(within<4>(within<2>(within<1>(_mm512_loadu_ps(from + at * kLanes)))));
  });
  const auto meet = [&](auto step) INLINE {
    each<Vectors>([&](auto at) INLINE {
      if constexpr (step < Vectors && (at & step) == 0) {
        const __m512 a = v[at], b = v[at + step];
        v[at] = _mm512_add_ps(a, b);
        v[at + step] = _mm512_sub_ps(a, b);
      }
    });
  };
  meet(std::integral_constant<int, 1>{});
  meet(std::integral_constant<int, 2>{});
  meet(std::integral_constant<int, 4>{});
  each<Vectors>([&](auto at) INLINE { _mm512_storeu_ps(to + at * kLanes, v[at]); });
}

void rotate_values(float* x, int block) {
  for (int step = 1; step < block; step *= 2) {
    for (int at = 0; at < block; at += 2 * step) {
      for (int lane = at; lane < at + step; ++lane) {
        float a = x[lane], b = x[lane + step];
        x[lane] = a + b;
        x[lane + step] = a - b;
      }
    }
  }
}

// The largest magnitude; NaN counts as infinite.
float largest(const float* x, int64_t size) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 is_nan = 0;
  for (int64_t at = 0; at < size; at += kLanes) {
    __m512 v = _mm512_abs_ps(_mm512_loadu_ps(x + at));
    is_nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, v);
  }
  return is_nan ? std::numeric_limits<float>::infinity() : _mm512_reduce_max_ps(most);
}

// A row with its blocks rotated, zeros behind it.
void rotate_row(const Product& product, const float* from, float* to, int64_t padded) {
  const int64_t inner = product.inner, block = product.block;
  for (int64_t at = 0; at < inner; at += block) {
    switch (block) {
      case 16: rotate_vectors<1>(from + at, to + at); break;
      case 32: rotate_vectors<2>(from + at, to + at); break;
      case 64: rotate_vectors<4>(from + at, to + at); break;
      case 128: rotate_vectors<8>(from + at, to + at); break;
      default:
        std::memcpy(to + at, from + at, block * sizeof(float));
        rotate_values(to + at, block);
    }
  }
  std::memset(to + inner, 0, (padded - inner) * sizeof(float));
}

// Rounds a row of `width` values; the second digit goes behind the first.
float round_row(const Product& product, const float* x, int64_t width, int8_t* to, int32_t* sums) {
  const bool two = product.digits == 2;
  const float norm = 1.0f / std::sqrt(static_cast<float>(product.block));
  const float top = two ? 127.0f * 257.0f : 127.0f;
  const float most = largest(x, width) * norm;
  const __m512 inverse = _mm512_set1_ps(most < kSmallest ? 0.0f : top / most * norm);
  __m512i first_sum = _mm512_setzero_si512(), second_sum = first_sum;
  const auto put = [&](int8_t* at, __m512i whole) INLINE {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(whole));
  };
  for (int64_t at = 0; at < width; at += kLanes) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + at), inverse));
    if (two) {
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
      put(to + width + at, low);
      second_sum = _mm512_add_epi32(second_sum, low);
      whole = high;
    }
    put(to + at, whole);
    first_sum = _mm512_add_epi32(first_sum, whole);
  }
  sums[0] = _mm512_reduce_add_epi32(first_sum);
  sums[1] = _mm512_reduce_add_epi32(second_sum);
  return most * (1.0f / top) * (two ? 256.0f : 1.0f);
}

// Rows of bytes, `apart` from each other, as a panel with 128 added.
void make_panel(const int8_t* rows, int64_t apart, int64_t inner, uint8_t* panel) {
  for (int64_t at = 0; at < inner; at += 4 * kLanes) {
    __m512i square[kLanes];
    each<kLanes>([&](auto row) INLINE {
      const __m512i bytes = _mm512_loadu_si512(rows + row * apart + at);
      square[row] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
    });
    transpose(square);
    const int64_t fours = std::min<int64_t>(kLanes, (inner - at) / 4);
    for (int64_t four = 0; four < fours; ++four) {
      _mm512_store_si512(panel + (at / 4 + four) * 4 * kPanel, square[four]);
    }
  }
}

// Memory that a thread keeps.
struct Rows {
  std::vector<float> values;
  std::vector<int8_t> bytes;
};

}  // namespace

bool is_many(const Product& product) {
  return product.rows * product.digits > kMostFew && product.inner % 4 == 0 &&
         product.outer >= kOutputs;
}

int64_t width(const Product& product) {
  return is_many(product) ? product.inner : (product.inner + 63) / 64 * 64;
}

void round_rows(const Product& product, const Tokens& tokens, int64_t first, int64_t last) {
  const int64_t padded = (product.inner + 63) / 64 * 64, digits = product.digits;
  thread_local Rows own;
  own.values.resize(std::max<size_t>(own.values.size(), padded));
  own.bytes.resize(std::max<size_t>(own.bytes.size(), kPanel * digits * padded));
  for (int64_t row = first; row < last; ++row) {
    rotate_row(product, product.x + row * product.inner, own.values.data(), padded);
    int32_t sums[2];
    int8_t* to = own.bytes.data() + row % kPanel * digits * padded;
    if (!tokens.many) to = reinterpret_cast<int8_t*>(tokens.digits) + row * digits * padded;
    tokens.scale[row] = round_row(product, own.values.data(), padded, to, sums);
    if (!tokens.many) std::copy(sums, sums + digits, tokens.sums + row * digits);
    if (tokens.many && (row + 1 == last || (row + 1) % kPanel == 0)) {
      for (int64_t digit = 0; digit < digits; ++digit) {
        uint8_t* panel = tokens.digits + (row / kPanel * digits + digit) * kPanel * product.inner;
        make_panel(own.bytes.data() + digit * padded, digits * padded, product.inner, panel);
      }
    }
  }
}

}  // namespace jaxinfer
