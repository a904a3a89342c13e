// The largest few of each row, largest first, in the order of XLA's top-k: by value, -0 below 0,
// then by place. Which they are is exact, so nothing here has any bits of its own.

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "native/threads.h"
#include "native/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int64_t kBlock = 64;  // values whose maximum says whether they are looked at

struct Rows {
  const float* values;  // [rows, width]
  float* found;         // [rows, count]
  int32_t* places;      // [rows, count]
  int64_t rows, width, count;
};

// Memory that a thread keeps.
struct Own {
  std::vector<float> tops, sorted;
  std::vector<uint64_t> keys;
};

// Larger for a larger value, and for an earlier place of the same value.
uint64_t key_of(float value, int64_t place) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~place);
}

INLINE inline __m512 read(const float* from, int64_t left) {
  if (left >= kLanes) return _mm512_loadu_ps(from);
  const auto some = static_cast<__mmask16>((1u << std::max<int64_t>(left, 0)) - 1);
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  return _mm512_mask_loadu_ps(lowest, some, from);
}

// A bound that `count` values reach, or nothing: as many blocks have their largest at or above it.
float bound_of(const Rows& rows, const float* x, Own& own) {
  const int64_t blocks = (rows.width + kBlock - 1) / kBlock;
  own.tops.resize(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* from = x + block * kBlock;
    const int64_t left = rows.width - block * kBlock;
    __m512 most = read(from, left);
    for (int64_t at = kLanes; at < std::min(kBlock, left); at += kLanes) {
      most = _mm512_max_ps(most, read(from + at, left - at));
    }
    own.tops[block] = _mm512_reduce_max_ps(most);
  }
  if (blocks < rows.count) return -std::numeric_limits<float>::infinity();
  own.sorted = own.tops;
  const auto last = own.sorted.begin() + (rows.count - 1);
  std::nth_element(own.sorted.begin(), last, own.sorted.end(), std::greater<float>());
  return *last;
}

// A row with NaN may get any places: its log probabilities are NaN whatever they are.
void find(const Rows& rows, int64_t row) {
  thread_local Own own;
  const float* x = rows.values + row * rows.width;
  const float bound = bound_of(rows, x, own);
  own.keys.clear();
  for (size_t block = 0; block < own.tops.size(); ++block) {
    if (own.tops[block] < bound) continue;
    const int64_t first = block * kBlock, last = std::min(rows.width, first + kBlock);
    for (int64_t at = first; at < last; ++at) {
      if (!(x[at] < bound)) own.keys.push_back(key_of(x[at], at));
    }
  }
  for (int64_t at = 0; static_cast<int64_t>(own.keys.size()) < rows.count; ++at) {
    own.keys.push_back(key_of(x[at], at));
  }
  const auto last = own.keys.begin() + rows.count;
  std::partial_sort(own.keys.begin(), last, own.keys.end(), std::greater<uint64_t>());
  for (int64_t rank = 0; rank < rows.count; ++rank) {
    const auto place = static_cast<int32_t>(~static_cast<uint32_t>(own.keys[rank]));
    rows.places[row * rows.count + rank] = place;
    rows.found[row * rows.count + rank] = x[place];
  }
}

struct Work {
  Rows rows;
  Pieces pieces;

  void run() {
    pieces.share([&](int64_t row) { find(rows, row); });
  }

  void wait() const { pieces.wait(); }
};

ffi::Error call(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> values,
                ffi::ResultBuffer<ffi::F32> found, ffi::ResultBuffer<ffi::S32> places) {
  const auto dims = values.dimensions(), wanted = found->dimensions();
  if (dims.size() != 2 || wanted.size() != 2 || dims[0] != wanted[0] || wanted[1] > dims[1] ||
      found->element_count() != places->element_count()) {
    return ffi::Error::InvalidArgument("the likeliest are [rows, count] of [rows, V]");
  }
  auto work = std::make_shared<Work>();
  work->rows = {values.typed_data(), found->typed_data(), places->typed_data(), dims[0], dims[1],
                wanted[1]};
  if (wanted[1] == 0) return ffi::Error::Success();
  work->pieces.count = dims[0];
  run_together(threads, dims[0], work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

JAXINFER_EXPORT(jaxinfer_likeliest);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_likeliest, jaxinfer::call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
