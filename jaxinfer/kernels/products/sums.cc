// Whole-number products: exact in any order, so the order is chosen for speed.
//
// vpdpbusd multiplies bytes without a sign by bytes with one. 128 is added to one side, and what
// that adds to a sum, 128 times the sum of the other side, is taken off at the end. Sums may wrap
// around on the way; the last one fits.

#include <immintrin.h>

#include <algorithm>

#include "native/vectors.h"
#include "products/product.h"

namespace jaxinfer {
namespace {

constexpr int kBytes = 64;    // of a vector
constexpr int kStream = 4;    // outputs that are summed side by side for few rows
constexpr int kAtOnce = 4;    // rows, each digit one, that a loaded weight is multiplied by
constexpr int64_t kAhead = 6144;  // bytes by which weights are asked for before they are needed

// The sum of all lanes of four vectors.
__m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

__mmask64 bytes_left(int64_t count) {
  return count >= kBytes ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Sums of `Rows` rows with kStream outputs, into sums[row * kLanes + output].
template <int Rows>
void stream(const Tokens& tokens, const int8_t* const* weights, int64_t inner, int row,
            int32_t* sums) {
  __m512i total[Rows][kStream];
  each<Rows>([&](auto one) INLINE {
    each<kStream>([&](auto output) INLINE { total[one][output] = _mm512_setzero_si512(); });
  });
  const __m512i shift = _mm512_set1_epi8(-128);
  const uint8_t* x = tokens.digits + row * tokens.width;
  const int64_t width = tokens.width;
  const auto add = [&](int64_t at, auto load) INLINE {
    __m512i digits[Rows];
    each<Rows>([&](auto one) INLINE { digits[one] = _mm512_loadu_si512(x + one * width + at); });
    each<kStream>([&](auto output) INLINE {
      const int8_t* from = weights[output] + at;
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
      const __m512i w = _mm512_xor_si512(load(from), shift);
      each<Rows>([&](auto one) INLINE {
        total[one][output] = _mm512_dpbusd_epi32(total[one][output], w, digits[one]);
      });
    });
  };
  int64_t at = 0;
  for (; at + kBytes <= inner; at += kBytes) {
    add(at, [](const int8_t* from) INLINE { return _mm512_loadu_si512(from); });
  }
  if (at < inner) {
    const __mmask64 left = (__mmask64{1} << (inner - at)) - 1;
    add(at, [=](const int8_t* from) INLINE { return _mm512_maskz_loadu_epi8(left, from); });
  }
  each<Rows>([&](auto one) INLINE {
    const __m512i* t = total[one];
    __m128i found = sum_lanes(t[0], t[1], t[2], t[3]);
    __m128i added = _mm_set1_epi32(static_cast<int32_t>(128u * tokens.sums[row + one]));
    _mm_store_si128(reinterpret_cast<__m128i*>(sums + one * kLanes), _mm_sub_epi32(found, added));
  });
}

using Stream = void (*)(const Tokens&, const int8_t* const*, int64_t, int, int32_t*);
constexpr Stream kStreams[] = {stream<1>, stream<2>, stream<3>, stream<4>};

// Whole sums of each digit to values of the product.
__m512 finish(const Product& product, __m512i first, __m512i second, float token, __m512 scale) {
  __m512 value = _mm512_cvtepi32_ps(first);
  if (product.digits == 2) {
    __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(second), _mm512_set1_ps(1.0f / 256));
    value = _mm512_add_ps(value, part);
  }
  return _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(token)), scale);
}

// The sum of each of kOutputs outputs' weights.
void sum_weights(const int8_t* codes, int64_t inner, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int output = 0; output < kOutputs; output += kStream) {
    __m512i total[kStream];
    for (int one = 0; one < kStream; ++one) {
      total[one] = _mm512_setzero_si512();
      const int8_t* from = codes + (output + one) * inner;
      for (int64_t at = 0; at < inner; at += kBytes) {
        __m512i w = _mm512_maskz_loadu_epi8(bytes_left(inner - at), from + at);
        total[one] = _mm512_dpbusd_epi32(total[one], ones, w);
      }
    }
    __m128i found = sum_lanes(total[0], total[1], total[2], total[3]);
    _mm_store_si128(reinterpret_cast<__m128i*>(sums + output), found);
  }
}

// Sums of kOutputs outputs with `Panels` vectors of 16 rows: found[panel][output] has the rows.
template <int Panels>
__attribute__((noinline)) void sum_tile(const uint8_t* x, int64_t between, const int8_t* codes,
                                        int64_t inner, bool ask, __m512i (*found)[kLanes]) {
  __m512i total[Panels][kOutputs];
  each<Panels>([&](auto panel) INLINE {
    each<kOutputs>([&](auto output) INLINE { total[panel][output] = _mm512_setzero_si512(); });
  });
  for (int64_t begin = 0; begin < inner; begin += kBytes) {
    if (ask) {  // the weights of the next tile
      for (int output = 0; output < kOutputs; ++output) {
        const int8_t* next = codes + (kOutputs + output) * inner + begin;
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      }
    }
    const int64_t end = std::min(inner, begin + kBytes);
    for (int64_t at = begin; at < end; at += 4) {
      __m512i digits[Panels];
      each<Panels>([&](auto panel) INLINE {
        digits[panel] = _mm512_load_si512(x + panel * between + at * kPanel);
      });
      each<kOutputs>([&](auto output) INLINE {
        int32_t four;
        __builtin_memcpy(&four, codes + output * inner + at, 4);
        const __m512i w = _mm512_set1_epi32(four);
        each<Panels>([&](auto panel) INLINE {
          total[panel][output] = _mm512_dpbusd_epi32(total[panel][output], digits[panel], w);
        });
      });
    }
  }
  each<Panels>([&](auto panel) INLINE {
    each<kOutputs>([&](auto output) INLINE { found[panel][output] = total[panel][output]; });
    each<kLanes - kOutputs>([&](auto rest) INLINE {
      found[panel][kOutputs + rest] = _mm512_setzero_si512();
    });
  });
}

// kOutputs outputs of many rows.
struct Tile {
  const int8_t* codes;
  int64_t output;  // the first
  __mmask16 kept;
  __m512i extra;  // what the 128 that were added to activations add to a sum
  __m512 scale;
};

// The last tile begins early, and does some outputs again without storing them.
Tile make_tile(const Product& product, int64_t output, int64_t last) {
  const int64_t begin = std::min(output, product.outer - kOutputs);
  const int64_t count = std::min<int64_t>(kOutputs, last - begin);
  const __mmask16 kept = static_cast<__mmask16>((1u << count) - (1u << (output - begin)));
  const int8_t* codes = product.codes + begin * product.inner;
  alignas(64) int32_t sums[kLanes] = {};
  sum_weights(codes, product.inner, sums);
  const __m512i extra = _mm512_slli_epi32(_mm512_load_si512(sums), 7);
  return {codes, begin, kept, extra, _mm512_maskz_loadu_ps(kept, product.scale + begin)};
}

// Rows [row, end) of a tile, given the sums of each row.
void store(const Product& product, const Tokens& tokens, const Tile& tile,
           const __m512i (*found)[kLanes], int64_t row, int64_t end) {
  const bool two = product.digits == 2;
  float* out = product.out + row * product.outer + tile.output;
  for (int64_t one = 0; row + one < end; ++one, out += product.outer) {
    const int lane = static_cast<int>(one % kPanel);
    const __m512i high = _mm512_sub_epi32(found[two ? 0 : one / kPanel][lane], tile.extra);
    const __m512i low = _mm512_sub_epi32(found[two ? 1 : 0][lane], tile.extra);
    const __m512 values = finish(product, high, low, tokens.scale[row + one], tile.scale);
    _mm512_mask_storeu_ps(out, tile.kept, values);
  }
}

// Writes `count` outputs, 16 at most, of the rows [begin, end), two digits counted twice kMostFew.
void some_rows(const Product& product, const Tokens& tokens, int64_t begin, int64_t end,
               int64_t output, int count) {
  const int64_t inner = product.inner, digits = product.digits;
  alignas(64) int32_t sums[kMostFew * kLanes] = {};
  for (int part = 0; part < count; part += kStream) {
    const int8_t* weights[kStream];
    for (int one = 0; one < kStream; ++one) {
      weights[one] = product.codes + (output + std::min(part + one, count - 1)) * inner;
    }
    int32_t* to = sums + part;
    for (int64_t row = begin * digits; row < end * digits; row += kAtOnce, to += kAtOnce * kLanes) {
      const int64_t some = std::min<int64_t>(kAtOnce, end * digits - row);
      kStreams[some - 1](tokens, weights, inner, row, to);
    }
  }
  const __mmask16 kept = static_cast<__mmask16>((1u << count) - 1);
  const __m512 scale = _mm512_maskz_loadu_ps(kept, product.scale + output);
  const int32_t* found = sums;
  for (int64_t row = begin; row < end; ++row, found += digits * kLanes) {
    __m512i high = _mm512_load_si512(found);
    __m512i low = digits == 2 ? _mm512_load_si512(found + kLanes) : high;
    __m512 values = finish(product, high, low, tokens.scale[row], scale);
    _mm512_mask_storeu_ps(product.out + row * product.outer + output, kept, values);
  }
}

}  // namespace

void few_rows(const Product& product, const Tokens& tokens, int64_t first, int64_t last) {
  const int64_t digits = product.digits, at_once = kMostFew / digits;
  for (int64_t output = first; output < last; output += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, last - output));
    for (int64_t row = 0; row < product.rows; row += at_once) {
      some_rows(product, tokens, row, std::min(product.rows, row + at_once), output, count);
    }
  }
}

void many_rows(const Product& product, const Tokens& tokens, int64_t first, int64_t last) {
  const int64_t size = product.inner * kPanel, digits = product.digits;
  const int count = static_cast<int>((last - first + kOutputs - 1) / kOutputs);
  Tile tiles[kChunk / kOutputs];
  __m512i found[2][kLanes];
  // All tiles of some rows, then of the next: what a row gets lies in whole cache lines.
  for (int64_t row = 0; row < product.rows;) {
    const uint8_t* x = tokens.digits + row / kPanel * digits * size;
    const bool pair = digits == 2 || product.rows - row > kPanel, ask = row == 0;
    const int64_t most = pair && digits == 1 ? 2 * kPanel : kPanel;
    const int64_t end = std::min(product.rows, row + most);
    for (int index = 0; index < count; ++index) {
      Tile& one = tiles[index];
      if (row == 0) one = make_tile(product, first + index * kOutputs, last);
      if (pair) sum_tile<2>(x, size, one.codes, product.inner, ask, found);
      else sum_tile<1>(x, size, one.codes, product.inner, ask, found);
      for (int panel = 0; panel < 1 + pair; ++panel) transpose(found[panel]);
      store(product, tokens, one, found, row, end);
    }
    row = end;
  }
}

}  // namespace jaxinfer
