// Ragged paged attention on a CPU: see reference.py for what is computed.
//
// A piece of work is one kv head of one row, and some of the row's tokens: keys and values are
// read from their pages 64 at a time, made float32, and multiplied with all queries of the piece.
// Rows that decode and begin in the same pages are one piece, which reads what they share once.
// Every sum goes over channels, then keys, in order, and block edges are at fixed positions, so the
// bits of a query depend neither on its neighbours nor on how a prompt was cut. Old sums fade by
// whole powers of two, which rounds nothing.

#include <cstring>
#include <string>
#include <vector>

#include "native/threads.h"
#include "native/vectors.h"
#include "paged_attention/softmax.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int kKeys = 64;      // that are reduced at a time
constexpr int kQueries = 48;   // of a piece, or one token's where they are more
constexpr int kRows = 6;       // by
constexpr int kColumns = 4;    // vectors: what the registers hold of a product

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
  int64_t most_together() const { return std::max<int64_t>(1, kQueries / 2 / group()); }
  int64_t tiles() const { return (tokens + tile() - 1) / tile(); }

  // The first position that is read for a query: the edge of a block.
  int64_t read_from(int64_t position) const {
    return window ? std::max<int64_t>(0, position - window + 1) / kKeys * kKeys : 0;
  }
};

// What a row asks for that is not there; empty where all is. Callers see to it that it never is:
// where they err the step fails with words, and nobody reads what belongs to others.
std::string missing(const Attention& call) {
  const int64_t room = call.table_width * call.page_size;
  for (int64_t row = 0; row < call.rows; ++row) {
    if (call.lengths[row] == 0) continue;
    const auto name = [row] { return "attention: row " + std::to_string(row); };
    const int64_t start = call.starts[row];
    const int64_t end = start + std::min<int64_t>(call.lengths[row], call.tokens);
    if (start < 0 || end <= start || end > room) {
      return name() + " is at positions " + std::to_string(start) + " to " + std::to_string(end) +
             ", and its page table reaches to " + std::to_string(room);
    }
    const int32_t* table = call.table + row * call.table_width;
    uint32_t page = 0;  // the highest; a negative one is higher than any
    for (int64_t at = call.read_from(start) / call.page_size; at * call.page_size < end; ++at) {
      page = std::max(page, static_cast<uint32_t>(table[at]));
    }
    if (page >= call.pages) {
      return name() + " reads page " + std::to_string(static_cast<int32_t>(page)) + " of " +
             std::to_string(call.pages);
    }
  }
  return "";
}

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

// Rows that decode, and how many tokens at their start lie in the same pages; or one row.
struct Group {
  std::vector<int32_t> rows;
  int64_t shared = 0;  // in whole blocks

  // What a row has in common with the first one, in whole blocks that both see.
  int64_t common(const Attention& call, int64_t row) const {
    const int32_t* one = call.table + rows[0] * call.table_width;
    const int32_t* other = call.table + row * call.table_width;
    const int64_t pages = std::mismatch(one, one + call.table_width, other).first - one;
    const int64_t seen = std::min(call.starts[rows[0]], call.starts[row]) + 1;
    return std::min(pages * call.page_size, seen) / kKeys * kKeys;
  }
};

// Rows that begin in the same pages are one piece of work: what is shared is read once for all.
std::vector<Group> group_rows(const Attention& call) {
  std::vector<Group> groups;
  for (int64_t row = 0; row < call.rows; ++row) {
    bool is_in = false;
    for (Group& group : groups) {
      if (call.tokens > 1 || call.window || !call.lengths[row]) break;
      const auto most = static_cast<size_t>(call.most_together());
      if (group.rows.size() >= most || !call.lengths[group.rows[0]]) continue;
      const int64_t common = group.common(call, row);
      is_in = common && 2 * common >= group.shared;  // a little in common would undo more
      if (!is_in) continue;
      group.shared = group.rows.size() == 1 ? common : std::min(group.shared, common);
      group.rows.push_back(static_cast<int32_t>(row));
      break;
    }
    if (!is_in) groups.push_back({{static_cast<int32_t>(row)}});
  }
  return groups;
}

// Queries of one kv head, and what they have read so far.
struct Queries {
  float *keys, *values;  // of a block
  float *q, *out, *logits;
  Softmax* softmax;
  int64_t* positions;
};

// Positions [first, last] of a row's pages, for queries [begin, end); first is a block's edge.
template <Kind kind>
void read_keys(const Attention& call, const Queries& all, int64_t row, int64_t head, int64_t begin,
               int64_t end, int64_t first, int64_t last) {
  const int64_t width = call.width, count = end - begin;
  float *q = all.q + begin * width, *out = all.out + begin * width, *logits = all.logits;
  Block block(call, row, head, first, last);
  for (; first <= last; first += kKeys) {
    const int depth = block.count;
    load<kind>(call, block.k, block.v, depth, all.keys, all.values);
    if (first + kKeys <= last) block = Block(call, row, head, first + kKeys, last);
    const int64_t columns = (depth + kLanes - 1) / kLanes;
    std::memset(logits, 0, count * kKeys * sizeof(float));
    multiply_all(q, width, all.keys, kKeys, logits, kKeys, count, columns, width);
    for (int64_t one = 0; one < count; ++one) {
      const int64_t position = all.positions[begin + one];
      const int64_t seen_from = call.window ? position - call.window + 1 : 0;
      weigh(logits + one * kKeys, columns, first, seen_from, position, call.soft_cap,
            all.softmax[begin + one], out + one * width, width);
    }
    multiply_all(logits, kKeys, all.values, width, out, width, count, width / kLanes, depth);
  }
}

// Makes room for some queries.
Queries make_queries(int64_t count, int64_t width) {
  thread_local std::vector<Softmax> softmax;
  thread_local std::vector<int64_t> positions;
  softmax.assign(count, Softmax());
  positions.resize(count);
  Queries all;
  all.keys = reinterpret_cast<float*>(
      scratch(sizeof(float) * (2 * kKeys * width + count * (2 * width + kKeys))));
  all.values = all.keys + kKeys * width;
  all.q = all.values + kKeys * width;
  all.out = all.q + count * width;
  all.logits = all.out + count * width;
  all.softmax = softmax.data();
  all.positions = positions.data();
  std::memset(all.out, 0, count * width * sizeof(float));
  return all;
}

template <Kind kind>
void attend(const Attention& call, const Group& rows, int64_t head, int64_t first_token) {
  const int64_t width = call.width, group = call.group();
  const int64_t tokens = std::min(call.tile(), call.tokens - first_token);
  const int64_t length = call.lengths[rows.rows[0]];
  const int64_t real = std::clamp<int64_t>(length - first_token, 0, tokens);
  const int64_t each_row = real * group;
  const auto place = [&](int64_t row, int64_t token) {
    return ((row * call.tokens + first_token + token) * call.heads + head * group) * width;
  };
  for (int64_t token = real; token < tokens; ++token) {
    std::memset(call.out + place(rows.rows[0], token), 0, group * width * sizeof(float));
  }
  if (real == 0) return;
  const int64_t queries = each_row * static_cast<int64_t>(rows.rows.size());
  const Queries all = make_queries(queries, width);
  const auto each_query = [&](const auto& one) {
    for (int64_t query = 0; query < queries; ++query) {
      const int64_t row = rows.rows[query / each_row], token = query % each_row / group;
      one(query, row, token, place(row, token) + query % group * width);
    }
  };
  each_query([&](int64_t query, int64_t row, int64_t token, int64_t at) {
    all.positions[query] = call.starts[row] + first_token + token;
    for (int64_t channel = 0; channel < width; ++channel) {
      all.q[query * width + channel] = call.q[at + channel] * call.scale;
    }
  });
  if (rows.shared) {
    read_keys<kind>(call, all, rows.rows[0], head, 0, queries, 0, rows.shared - 1);
  }
  for (int64_t begin = 0; begin < queries; begin += each_row) {
    const int64_t start = all.positions[begin], end = begin + each_row;
    const int64_t first = std::max(rows.shared, call.read_from(start));
    read_keys<kind>(call, all, rows.rows[begin / each_row], head, begin, end, first,
                    all.positions[end - 1]);
  }
  each_query([&](int64_t query, int64_t, int64_t, int64_t at) {
    const float total = all.softmax[query].total;
    for (int64_t channel = 0; channel < width; ++channel) {
      const float sum = all.out[query * width + channel];
      call.out[at + channel] = total == 0.0f ? 0.0f : sum / total + 0.0f;
    }
  });
}

struct Work {
  Attention call;
  std::vector<Group> groups;
  Pieces pieces;

  void run() {
    pieces.share([&](int64_t piece) {
      const int64_t tiles = call.tiles(), rest = piece / tiles;
      const int64_t tile = tiles - 1 - piece % tiles;  // those with most keys first
      const Group& rows = groups[rest / call.kv_heads];
      const int64_t head = rest % call.kv_heads;
      const int64_t first = tile * call.tile();
      switch (call.kind) {
        case Kind::kFloat32: return attend<Kind::kFloat32>(call, rows, head, first);
        case Kind::kBfloat16: return attend<Kind::kBfloat16>(call, rows, head, first);
        case Kind::kInt8: return attend<Kind::kInt8>(call, rows, head, first);
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
  if (const std::string words = missing(work->call); !words.empty()) {
    return ffi::Error::InvalidArgument(words);
  }
  work->groups = group_rows(work->call);
  work->pieces.count = work->groups.size() * pool[0] * work->call.tiles();
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
