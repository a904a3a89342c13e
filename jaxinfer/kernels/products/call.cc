// The custom call that XLA makes for a product.

#include <memory>

#include "native/threads.h"
#include "products/product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int64_t kPieces = 6, kLongest = 480;
constexpr int64_t kFewToRound = 1 << 14;  // values that one thread rounds sooner than two

// One product under way: first all rows are rounded, then whoever is free sums some outputs.
struct Work {
  Product product;
  Tokens tokens;
  Pieces rounding, summing;
  int64_t chunk;  // outputs of a piece

  void run() {
    rounding.share([&](int64_t piece) {
      const int64_t size = rounding.count == 1 ? product.rows : kPanel, first = piece * size;
      round_rows(product, tokens, first, std::min(product.rows, first + size));
    });
    rounding.wait();
    summing.share([&](int64_t piece) {
      const int64_t first = piece * chunk, last = std::min(product.outer, first + chunk);
      if (tokens.many) many_rows(product, tokens, first, last);
      else few_rows(product, tokens, first, last);
    });
  }

  void wait() const { summing.wait(); }
};

// Few rows wait for weights, and memory is read faster in long pieces; many rows compute.
int64_t chunk_of(const Product& product) {
  if (is_many(product)) return kChunk;
  const int64_t even = product.outer / kPieces / kChunk * kChunk;
  return std::clamp<int64_t>(even, kChunk, kLongest);
}

Tokens make_tokens(const Product& product) {
  const bool many = is_many(product);
  const int64_t rows = many ? (product.rows + kPanel - 1) / kPanel * kPanel : product.rows;
  const int64_t bytes = (rows * product.digits * width(product) + 63) / 64 * 64;
  uint8_t* memory = scratch(bytes + 4 * rows * (product.digits + 1));
  auto* sums = reinterpret_cast<int32_t*>(memory + bytes);
  auto* scale = reinterpret_cast<float*>(sums + rows * product.digits);
  return {memory, sums, scale, width(product), many};
}

ffi::Error call(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> codes,
                ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> out, int64_t digits,
                int64_t block) {
  const auto dims = x.dimensions(), table = codes.dimensions();
  if (dims.size() != 2 || table.size() != 2 || dims[1] != table[1] ||
      static_cast<int64_t>(scale.element_count()) != table[0] || (digits != 1 && digits != 2) ||
      block < 1 || dims[1] % block || (block & (block - 1))) {
    return ffi::Error::InvalidArgument("a product is of [rows, K] with [N, K] and [N]");
  }
  auto work = std::make_shared<Work>();
  Product& product = work->product;
  product = {x.typed_data(), codes.typed_data(), scale.typed_data(), out->typed_data(), dims[0],
             dims[1], table[0], static_cast<int>(digits), static_cast<int>(block)};
  if (product.rows == 0 || product.outer == 0) return ffi::Error::Success();
  work->tokens = make_tokens(product);
  const bool few = product.rows * product.inner <= kFewToRound;
  work->rounding.count = few ? 1 : (product.rows + kPanel - 1) / kPanel;
  work->chunk = chunk_of(product);
  work->summing.count = (product.outer + work->chunk - 1) / work->chunk;
  run_together(threads, work->summing.count, work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

JAXINFER_EXPORT(jaxinfer_product);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_product, jaxinfer::call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("digits")
                                  .Attr<int64_t>("block"));
