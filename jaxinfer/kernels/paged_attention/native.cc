// Ragged paged attention on a CPU: see reference.py for what is computed.
//
// A piece of work is one kv head of one row, and some of the row's tokens: keys and values are
// read from their pages 64 at a time, made float32, and multiplied with all queries of the piece.
// Every sum goes over channels, then keys, in order, and block edges are at fixed positions, so the
// bits of a query depend neither on its neighbours nor on how a prompt was cut. Old sums fade by
// whole powers of two, which rounds nothing.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "native/threads.h"
#include "native/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int kKeys = 64;      // that are reduced at a time
constexpr int kQueries = 48;   // of a piece, or one token's where they are more
constexpr int kRows = 6;       // by
constexpr int kColumns = 4;    // vectors: what the registers hold of a product
constexpr float kLowest = -200.0f;  // of a power of two; below, it is zero anyway

enum class Kind { kFloat32, kBfloat16, kInt8 };

struct Attention {
  const float* q;  // [rows, tokens, heads, width]
  const uint8_t *k, *v;  // [kv_heads, pages, page_size, stored width]
  const int32_t *table, *starts, *lengths;
  float* out;
  int64_t rows, tokens, heads, width, kv_heads, pages, page_size, table_width, stored, window;
  float scale, soft_cap;
  Kind kind;

  int64_t group() const { return heads / kv_heads; }
  int64_t tile() const { return std::max<int64_t>(1, kQueries / group()); }
  int64_t tiles() const { return (tokens + tile() - 1) / tile(); }
};

// Sixteen values of a stored head, from channel `at` on.
template <Kind kind>
INLINE inline __m512 read(const uint8_t* head, int64_t at, float scale) {
  if constexpr (kind == Kind::kFloat32) return _mm512_loadu_ps(head + 4 * at);
  if constexpr (kind == Kind::kBfloat16) {
    const auto* from = reinterpret_cast<const __m256i*>(head + 2 * at);
    const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
  }
  const auto* from = reinterpret_cast<const __m128i*>(head + at);
  const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
  return _mm512_mul_ps(codes, _mm512_set1_ps(scale));
}

template <Kind kind>
float scale_of(const uint8_t* head, int64_t width) {
  float scale = 1.0f;
  if constexpr (kind == Kind::kInt8) std::memcpy(&scale, head + width, sizeof scale);
  return scale;
}

// Keys to [channel, key] and values to [key, channel]; keys from `count` on are zeros.
template <Kind kind>
void load(const Attention& call, const uint8_t* const* k, const uint8_t* const* v, int count,
          float* keys, float* values) {
  for (int first = 0; first < count; first += kLanes) {
    const int some = std::min(kLanes, count - first);
    float scales[kLanes];
    for (int one = 0; one < some; ++one) scales[one] = scale_of<kind>(k[first + one], call.width);
    for (int64_t at = 0; at < call.width; at += kLanes) {
      __m512i square[kLanes];
      if (some == kLanes) {
        each<kLanes>([&](auto one) INLINE {
          square[one] = _mm512_castps_si512(read<kind>(k[first + one], at, scales[one]));
        });
      } else {
        for (int one = 0; one < kLanes; ++one) {
          const bool is_there = one < some;
          const __m512 row = is_there ? read<kind>(k[first + one], at, scales[one])
                                      : _mm512_setzero_ps();
          square[one] = _mm512_castps_si512(row);
        }
      }
      transpose(square);
      each<kLanes>([&](auto one) INLINE {
        _mm512_store_si512(keys + (at + one) * kKeys + first, square[one]);
      });
    }
  }
  for (int one = 0; one < count; ++one) {
    const float scale = scale_of<kind>(v[one], call.width);
    for (int64_t at = 0; at < call.width; at += kLanes) {
      _mm512_store_ps(values + one * call.width + at, read<kind>(v[one], at, scale));
    }
  }
}

// c[row, column] += sum over depth of a[row, depth] * b[depth, column], in order.
template <int Rows, int Columns>
__attribute__((noinline)) void multiply(const float* a, int64_t a_width, const float* b,
                                        int64_t b_width, float* c, int64_t c_width,
                                        int64_t depth) {
  __m512 sums[Rows][Columns];
  each<Rows>([&](auto row) INLINE {
    each<Columns>([&](auto column) INLINE {
      sums[row][column] = _mm512_load_ps(c + row * c_width + column * kLanes);
    });
  });
  for (int64_t at = 0; at < depth; ++at) {
    __m512 right[Columns];
    each<Columns>([&](auto column) INLINE {
      right[column] = _mm512_load_ps(b + at * b_width + column * kLanes);
    });
    each<Rows>([&](auto row) INLINE {
      const __m512 left = _mm512_set1_ps(a[row * a_width + at]);
      each<Columns>([&](auto column) INLINE {
        sums[row][column] = _mm512_fmadd_ps(left, right[column], sums[row][column]);
      });
    });
  }
  each<Rows>([&](auto row) INLINE {
    each<Columns>([&](auto column) INLINE {
      _mm512_store_ps(c + row * c_width + column * kLanes, sums[row][column]);
    });
  });
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t);
template <int Rows>
constexpr Multiply kOfRows[kColumns] = {multiply<Rows, 1>, multiply<Rows, 2>, multiply<Rows, 3>,
                                        multiply<Rows, 4>};
constexpr const Multiply* kMultiply[kRows] = {kOfRows<1>, kOfRows<2>, kOfRows<3>,
                                              kOfRows<4>, kOfRows<5>, kOfRows<6>};

void multiply_all(const float* a, int64_t a_width, const float* b, int64_t b_width, float* c,
                  int64_t c_width, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some = std::min<int64_t>(kRows, rows - row);
    for (int64_t column = 0; column < columns; column += kColumns) {
      const int64_t wide = std::min<int64_t>(kColumns, columns - column);
      kMultiply[some - 1][wide - 1](a + row * a_width, a_width, b + column * kLanes, b_width,
                                    c + row * c_width + column * kLanes, c_width, depth);
    }
  }
}

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
void weigh(float* logits, int64_t columns, int64_t first, int64_t seen_from, int64_t seen_to,
           float soft_cap, Softmax& softmax, float* out, int64_t width) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_set1_epi32(static_cast<int32_t>(seen_from - first));
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(seen_to - first));
  __mmask16 seen[kColumns], any = 0;
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

// Where the keys and values of some positions lie; they are asked for as soon as that is known.
struct Block {
  const uint8_t *k[kKeys], *v[kKeys];
  int count;

  Block(const Attention& call, int64_t row, int64_t head, int64_t first, int64_t last) {
    count = static_cast<int>(std::min<int64_t>(kKeys, last + 1 - first));
    const int32_t* table = call.table + row * call.table_width;
    int64_t page = first / call.page_size, offset = first % call.page_size;
    for (int one = 0; one < count; ++page, offset = 0) {
      int64_t place = (head * call.pages + table[page]) * call.page_size + offset;
      for (; offset < call.page_size && one < count; ++offset, ++one, ++place) {
        k[one] = call.k + place * call.stored;
        v[one] = call.v + place * call.stored;
        for (int64_t at = 0; at < call.stored; at += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(k[one] + at), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(v[one] + at), _MM_HINT_T0);
        }
      }
    }
  }
};

template <Kind kind>
void attend(const Attention& call, int64_t row, int64_t head, int64_t first_token) {
  const int64_t width = call.width, group = call.group(), length = call.lengths[row];
  const int64_t tokens = std::min(call.tile(), call.tokens - first_token);
  const int64_t real = std::clamp<int64_t>(length - first_token, 0, tokens);
  float* to = call.out + ((row * call.tokens + first_token) * call.heads + head * group) * width;
  for (int64_t token = real; token < tokens; ++token) {
    std::memset(to + token * call.heads * width, 0, group * width * sizeof(float));
  }
  if (real == 0) return;
  const int64_t queries = real * group;
  float* keys = reinterpret_cast<float*>(
      scratch(sizeof(float) * (2 * kKeys * width + queries * (2 * width + kKeys))));
  float *values = keys + kKeys * width, *q = values + kKeys * width, *out = q + queries * width;
  float* logits = out + queries * width;
  thread_local std::vector<Softmax> softmax;
  softmax.assign(queries, Softmax());
  std::memset(out, 0, queries * width * sizeof(float));
  const float* from = call.q + (to - call.out);
  for (int64_t one = 0; one < queries; ++one) {
    const float* query = from + ((one / group) * call.heads + one % group) * width;
    for (int64_t at = 0; at < width; ++at) q[one * width + at] = query[at] * call.scale;
  }
  const int64_t start = call.starts[row] + first_token, last = start + real - 1;
  const int64_t oldest = call.window ? std::max<int64_t>(0, start - call.window + 1) : 0;
  Block block(call, row, head, oldest / kKeys * kKeys, last);
  for (int64_t first = oldest / kKeys * kKeys; first <= last; first += kKeys) {
    const int count = block.count;
    load<kind>(call, block.k, block.v, count, keys, values);
    if (first + kKeys <= last) block = Block(call, row, head, first + kKeys, last);
    const int64_t columns = (count + kLanes - 1) / kLanes;
    std::memset(logits, 0, queries * kKeys * sizeof(float));
    multiply_all(q, width, keys, kKeys, logits, kKeys, queries, columns, width);
    for (int64_t one = 0; one < queries; ++one) {
      const int64_t position = start + one / group;
      const int64_t seen_from = call.window ? position - call.window + 1 : 0;
      weigh(logits + one * kKeys, columns, first, seen_from, position, call.soft_cap, softmax[one],
            out + one * width, width);
    }
    multiply_all(logits, kKeys, values, width, out, width, queries, width / kLanes, count);
  }
  for (int64_t one = 0; one < queries; ++one) {
    float* result = to + ((one / group) * call.heads + one % group) * width;
    const float total = softmax[one].total;
    for (int64_t at = 0; at < width; ++at) {
      result[at] = total == 0.0f ? 0.0f : out[one * width + at] / total + 0.0f;
    }
  }
}

struct Work {
  Attention call;
  Pieces pieces;

  void run() {
    pieces.share([&](int64_t piece) {
      const int64_t tiles = call.tiles(), rest = piece / tiles;
      const int64_t tile = tiles - 1 - piece % tiles;  // those with most keys first
      const int64_t row = rest / call.kv_heads, head = rest % call.kv_heads;
      const int64_t first = tile * call.tile();
      switch (call.kind) {
        case Kind::kFloat32: return attend<Kind::kFloat32>(call, row, head, first);
        case Kind::kBfloat16: return attend<Kind::kBfloat16>(call, row, head, first);
        case Kind::kInt8: return attend<Kind::kInt8>(call, row, head, first);
      }
    });
  }

  void wait() const { pieces.wait(); }
};

ffi::Error call(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k,
                ffi::AnyBuffer v, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> starts,
                ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> out, int64_t window,
                float scale, float soft_cap) {
  const auto dims = q.dimensions(), pool = k.dimensions();
  if (dims.size() != 4 || pool.size() != 4 || dims[3] % kLanes || dims[2] % pool[0]) {
    return ffi::Error::InvalidArgument("attention is of [B, T, N, H] to [K, P, C, H]");
  }
  auto work = std::make_shared<Work>();
  Kind kind;
  int64_t size;
  switch (k.element_type()) {
    case ffi::F32: kind = Kind::kFloat32, size = 4; break;
    case ffi::BF16:
    case ffi::U16: kind = Kind::kBfloat16, size = 2; break;
    case ffi::S8: kind = Kind::kInt8, size = 1; break;
    default: return ffi::Error::InvalidArgument("pages are float32, bfloat16 or int8");
  }
  work->call = {q.typed_data(),
                static_cast<const uint8_t*>(k.untyped_data()),
                static_cast<const uint8_t*>(v.untyped_data()),
                table.typed_data(),
                starts.typed_data(),
                lengths.typed_data(),
                out->typed_data(),
                dims[0],
                dims[1],
                dims[2],
                dims[3],
                pool[0],
                pool[1],
                pool[2],
                table.dimensions()[1],
                pool[3] * size,
                window,
                scale,
                soft_cap,
                kind};
  work->pieces.count = dims[0] * pool[0] * work->call.tiles();
  run_together(threads, work->pieces.count, work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

JAXINFER_EXPORT(jaxinfer_attention);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attention, jaxinfer::call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap"));
