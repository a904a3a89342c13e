// Products of activations with bfloat16 weights, which are read as they lie.
//
// A sum is thirty-two channels at a time: sixteen sums of pairs, each in order, which are added up
// in one way at the end. No step of it knows of other rows or outputs, so the bits of a row depend
// neither on how many there are nor on how the work is cut.

#include <immintrin.h>

#include <algorithm>
#include <memory>

#include "native/threads.h"
#include "native/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

struct FloatProduct {
  const float* x;           // [rows, inner]
  const uint16_t* weights;  // [outer, inner], bfloat16
  float* out;               // [rows, outer]
  int64_t rows, inner, outer;

  int64_t width() const { return (inner + 31) / 32 * 32; }
};

#ifdef __AVX512BF16__

constexpr int kStep = 32;      // channels of a vector
constexpr int kRows = 6;       // of a tile
constexpr int kOutputs = 4;    // by
constexpr int kRounded = 16;   // rows that a thread rounds at a time
constexpr int kMostFew = 8;    // rows that wait for weights; more of them compute
constexpr int64_t kPieces = 6, kShort = 48, kLong = 480;  // outputs of a piece: whole cache lines
constexpr int64_t kNear = 24 << 10;   // bytes of rows that stay in the nearest cache
constexpr int64_t kAhead = 6144;      // bytes by which weights are asked for before they are needed

// Rows to bfloat16, zeros behind `inner`.
void round_rows(const FloatProduct& product, uint16_t* to, int64_t first, int64_t last) {
  const int64_t width = product.width();
  for (int64_t row = first; row < last; ++row) {
    const float* x = product.x + row * product.inner;
    for (int64_t at = 0; at < width; at += kLanes) {
      const int64_t left = std::clamp<int64_t>(product.inner - at, 0, kLanes);
      const auto some = static_cast<__mmask16>((1u << left) - 1);
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + at));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + row * width + at), (__m256i)rounded);
    }
  }
}

// The sum of all lanes of four vectors, the halves first.
INLINE inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto pairs = [](__m512 one, __m512 other) INLINE {
    return _mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
  };
  const __m512d ab = _mm512_castps_pd(pairs(a, b)), cd = _mm512_castps_pd(pairs(c, d));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Some outputs of some rows that are rounded.
struct Tile {
  const uint16_t* x;
  const uint16_t* weights[kOutputs];
  float* out;
  int64_t width, inner, outer;
  __mmask8 kept;  // which of the outputs are stored
};

template <int Rows, bool Ask>
__attribute__((noinline)) void sum_tile(const Tile& tile) {
  __m512 sums[Rows][kOutputs];
  each<Rows>([&](auto row) INLINE {
    each<kOutputs>([&](auto output) INLINE { sums[row][output] = _mm512_setzero_ps(); });
  });
  const int64_t width = tile.width;
  const auto add = [&](int64_t at, auto load) INLINE {
    __m512bh w[kOutputs];
    each<kOutputs>([&](auto output) INLINE {
      const uint16_t* from = tile.weights[output] + at;
      if (Ask) _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      w[output] = (__m512bh)load(from);
    });
    each<Rows>([&](auto row) INLINE {
      const __m512bh x = (__m512bh)_mm512_load_si512(tile.x + row * width + at);
      each<kOutputs>([&](auto output) INLINE {
        sums[row][output] = _mm512_dpbf16_ps(sums[row][output], x, w[output]);
      });
    });
  };
  int64_t at = 0;
  for (; at + kStep <= tile.inner; at += kStep) {
    add(at, [](const uint16_t* from) INLINE { return _mm512_loadu_si512(from); });
  }
  if (at < tile.inner) {
    const auto left = static_cast<__mmask32>((uint64_t{1} << (tile.inner - at)) - 1);
    add(at, [=](const uint16_t* from) INLINE { return _mm512_maskz_loadu_epi16(left, from); });
  }
  each<Rows>([&](auto row) INLINE {
    const __m512* s = sums[row];
    const __m128 found = sum_lanes(s[0], s[1], s[2], s[3]);
    _mm_mask_storeu_ps(tile.out + row * tile.outer, tile.kept, found);
  });
}

using Sum = void (*)(const Tile&);
template <bool Ask>
constexpr Sum kSums[kRows] = {sum_tile<1, Ask>, sum_tile<2, Ask>, sum_tile<3, Ask>,
                              sum_tile<4, Ask>, sum_tile<5, Ask>, sum_tile<6, Ask>};

// Outputs [first, last) of all rows, as many rows at a time as stay near.
void sum_outputs(const FloatProduct& product, const uint16_t* x, int64_t first, int64_t last) {
  const int64_t width = product.width(), inner = product.inner, outer = product.outer;
  const int64_t near = std::max<int64_t>(1, kNear / 2 / width / kRows) * kRows;
  for (int64_t begin = 0; begin < product.rows; begin += near) {
    const int64_t end = std::min(product.rows, begin + near);
    for (int64_t output = first; output < last; output += kOutputs) {
      const int64_t count = std::min<int64_t>(kOutputs, last - output);
      Tile tile{nullptr, {}, nullptr, width, inner, outer, static_cast<__mmask8>((1 << count) - 1)};
      for (int64_t one = 0; one < kOutputs; ++one) {
        tile.weights[one] = product.weights + (output + std::min(one, count - 1)) * inner;
      }
      for (int64_t row = begin; row < end;) {
        const int64_t tiles = (end - row + kRows - 1) / kRows, some = (end - row + tiles - 1) / tiles;
        tile.x = x + row * width;
        tile.out = product.out + row * outer + output;
        (row == 0 ? kSums<true> : kSums<false>)[some - 1](tile);
        row += some;
      }
    }
  }
}

// One product under way: first all rows are rounded, then whoever is free sums some outputs.
struct Work {
  FloatProduct product;
  uint16_t* x;
  Pieces rounding, summing;
  int64_t chunk;  // outputs of a piece

  void run() {
    rounding.share([&](int64_t piece) {
      const int64_t size = rounding.count == 1 ? product.rows : kRounded, first = piece * size;
      round_rows(product, x, first, std::min(product.rows, first + size));
    });
    rounding.wait();
    summing.share([&](int64_t piece) {
      const int64_t first = piece * chunk;
      sum_outputs(product, x, first, std::min(product.outer, first + chunk));
    });
  }

  void wait() const { summing.wait(); }
};

ffi::Error multiply(ffi::ThreadPool& threads, const FloatProduct& product) {
  auto work = std::make_shared<Work>();
  work->product = product;
  work->x = reinterpret_cast<uint16_t*>(scratch(2 * product.rows * product.width()));
  work->rounding.count = product.rows <= kRounded ? 1 : (product.rows + kRounded - 1) / kRounded;
  const int64_t even = product.outer / kPieces / kShort * kShort;
  work->chunk = std::clamp(even, kShort, product.rows <= kMostFew ? kLong : kShort);
  work->summing.count = (product.outer + work->chunk - 1) / work->chunk;
  run_together(threads, work->summing.count, work);
  return ffi::Error::Success();
}

#else

ffi::Error multiply(ffi::ThreadPool&, const FloatProduct&) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "this was built without AVX-512 BF16");
}

#endif

ffi::Error call(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> weights,
                ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions(), table = weights.dimensions();
  if (dims.size() != 2 || table.size() != 2 || dims[1] != table[1]) {
    return ffi::Error::InvalidArgument("a product is of [rows, K] with [N, K]");
  }
  if (dims[0] == 0 || table[0] == 0) return ffi::Error::Success();
  return multiply(threads, {x.typed_data(), static_cast<const uint16_t*>(weights.untyped_data()),
                            out->typed_data(), dims[0], dims[1], table[0]});
}

}  // namespace
}  // namespace jaxinfer

JAXINFER_EXPORT(jaxinfer_float_product);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_float_product, jaxinfer::call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
