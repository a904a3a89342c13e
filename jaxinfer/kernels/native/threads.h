// How XLA's threads share the work of one custom call.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

// Pieces of work that whoever comes first takes; done when all that were taken are finished.
struct Pieces {
  std::atomic<int64_t> taken{0}, finished{0};
  int64_t count = 0;

  template <typename Do>
  void share(const Do& piece) {
    for (int64_t index; (index = taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
      piece(index);
      finished.fetch_add(1, std::memory_order_release);
    }
  }

  // Every piece that was taken is with a thread that runs, so this ends.
  void wait() const {
    for (int spins = 0; finished.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 4096) _mm_pause();
      else sched_yield();
    }
  }
};

// Rounds and flushes in one way on all threads while it lives: a row's bits depend on no thread.
class FloatMode {
 public:
  FloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x9FC0); }  // nearest even, no denormals
  ~FloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// Runs `work` here and on up to `most - 1` threads of the pool, until all its pieces are done.
//
// Work has run() and wait(). It is shared because it outlives the call: a thread that comes too
// late finds nothing to take. Nobody waits for a thread that has not begun, so a pool that is busy,
// or has this thread alone, costs speed and no more.
template <typename Work>
void run_together(xla::ffi::ThreadPool& threads, int64_t most, const std::shared_ptr<Work>& work) {
  const int64_t helpers = std::min(threads.num_threads(), most) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) {
    threads.Schedule([work] {
      FloatMode mode;
      work->run();
    });
  }
  FloatMode mode;
  work->run();
  work->wait();
}

// Memory that a thread keeps for its next call.
inline uint8_t* scratch(int64_t size) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t have = 0;
  if (have < size) {
    have = (size + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, have));
  }
  return static_cast<uint8_t*>(memory.get());
}

}  // namespace jaxinfer

#define JAXINFER_EXPORT(name) \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*)
