// The machine that kernels run on: one block after another, a fiber for each thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "fibers.h"
#include "global_memory.h"
#include "hydra_emulator.h"
#include "shared_memory.h"
#include "where.h"

namespace hydra::emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;

enum class Wait : uint8_t { nothing, sync_block, shuffle_xor, mma_half, mma_bfloat, mma_int8, end };

const char* name(Wait wait);

// A stretch of one thread between two points where it meets others is an interval. Intervals are
// numbered as they first touch memory, so one comparison says on which side of a meeting they lie.
using Interval = uint32_t;

struct Thread {
  Context context;
  int index = 0;
  Wait wait = Wait::nothing;  // the last one
  Where where;
  Interval interval = 0;              // of its last access to memory
  uint32_t writes = 0;                // its record in global memory
  bool previous_kernel_done = false;  // has called wait_for_previous_kernel
  bool counted = false;               // has called count_up

  int warp() const { return index / kLanes; }
  int lane() const { return index % kLanes; }
};

struct Warp {
  uint32_t runnable = 0;  // a bit per lane
  int arrived = 0;
  int first = 0;     // the lane that arrived first
  int detail = 0;    // must be equal in all lanes
  Interval met = 0;  // intervals below ended before the last rendezvous
  void* arguments[kLanes] = {};
};

class Machine {
 public:
  // ---- for kernels

  Thread& thread() { return *thread_; }
  int threads() const { return int(threads_.size()); }
  const dim3& block() const { return block_; }
  const dim3& grid() const { return grid_; }

  void sync_block(Where where);
  // Waits for all lanes of the warp; the last one runs `complete` on what each brought.
  void rendezvous(Wait wait, int detail, void* argument, void (*complete)(Warp&), Where where);

  // ---- for the parts of the machine

  // Ends the launch: names the place and the thread, then what is wrong.
  [[noreturn]] void fault(const Thread& thread, Where where, std::string what);
  [[noreturn]] void fault(Where where, std::string what) {
    fault(*thread_, where, std::move(what));
  }

  Warp& warp() { return warps_[thread_->warp()]; }
  Thread& lane(const Warp& warp, int lane) {
    return threads_[size_t(&warp - warps_.data()) * kLanes + lane];
  }
  uint32_t block_number() const { return (block_.z * grid_.y + block_.y) * grid_.x + block_.x; }

  // The interval of the running thread.
  Interval interval();
  int owner(Interval interval) const { return owners_[interval - block_start_]; }
  Interval block_start() const { return block_start_; }
  // Intervals below ended before the last sync_block.
  Interval synced() const { return synced_; }
  // Whether what happened then in this block comes before what the running thread does now.
  bool before(Interval interval, int owner) {
    return interval < synced_ || owner == thread_->index ||
           (owner / kLanes == thread_->warp() && interval < warp().met);
  }

  // ---- for the host

  cudaError_t run(const dim3& grid, int threads, size_t shared_bytes, void (*body)(void*),
                  void* arguments);

  bool reverse = false;
  size_t shared_limit = 227 * 1024;
  hydra_emulator_counters counters = {};
  std::string message;
  GlobalMemory global;
  SharedMemory shared;

 private:
  static void enter();
  void run_block();
  void stop_running(Wait wait, Where where);
  void go_on(Thread* to);
  Thread* next_in(const Warp& warp);
  Thread* next_in_block();
  Thread* next();
  [[noreturn]] void report_deadlock();

  Thread* thread_ = nullptr;
  Context host_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<uint16_t> owners_;  // of the intervals of this block
  Interval next_interval_ = 1, block_start_ = 1, synced_ = 1;
  int waiting_ = 0, finished_ = 0;
  dim3 grid_, block_;
  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;
};

// One launch at a time: `run` holds a lock.
__attribute__((visibility("hidden"))) extern Machine machine;

}  // namespace hydra::emulator
