#include "machine.h"

#include <algorithm>
#include <mutex>

namespace hydra::emulator {

Machine machine;

namespace {

std::mutex launching;

std::string text(const dim3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(Where where) { return std::string(where.file) + ":" + std::to_string(where.line); }

// Why a launch is refused; empty if it is not.
std::string refuse(const dim3& grid, int threads, size_t shared_bytes, size_t shared_limit) {
  if (threads <= 0 || threads > kMaxThreads || threads % kLanes != 0) {
    return "launch with " + std::to_string(threads) +
           " threads a block: use a multiple of 32 from 32 to 1024.";
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return "launch with grid " + text(grid) + ": a dimension is 0. Skip the launch if it has no work.";
  }
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return "launch with grid " + text(grid) +
           ": y and z end at 65535, x at 2147483647. Put the longest axis on x or loop over it.";
  }
  if (shared_bytes > shared_limit) {
    return "launch with " + std::to_string(shared_bytes) + " bytes of shared memory, the device has " +
           std::to_string(shared_limit) + " for a block. Use a smaller tile.";
  }
  return "";
}

}  // namespace

const char* name(Wait wait) {
  switch (wait) {
    case Wait::nothing: return "nothing";
    case Wait::sync_block: return "sync_block";
    case Wait::shuffle_xor: return "shuffle_xor";
    case Wait::mma_half: return "mma_half";
    case Wait::mma_bfloat: return "mma_bfloat";
    case Wait::mma_int8: return "mma_int8";
    case Wait::end: return "the end";
  }
  return "?";
}

// ---- launch

cudaError_t Machine::run(const dim3& grid, int threads, size_t shared_bytes, void (*body)(void*),
                         void* arguments) {
  std::lock_guard<std::mutex> lock(launching);
  message = refuse(grid, threads, shared_bytes, shared_limit);
  if (!message.empty()) {
    return shared_bytes > shared_limit ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
  }
  ++counters.launches;
  grid_ = grid;
  body_ = body;
  arguments_ = arguments;
  threads_.resize(threads);
  warps_.resize(threads / kLanes);
  shared.start_launch(shared_bytes);
  global.start_launch();
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && message.empty(); ++i) {
    uint64_t number = reverse ? blocks - 1 - i : i;
    block_.x = unsigned(number % grid.x);
    block_.y = unsigned(number / grid.x % grid.y);
    block_.z = unsigned(number / grid.x / grid.y);
    run_block();
  }
  thread_ = nullptr;
  return message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void Machine::run_block() {
  // The shadow of shared memory needs the top bit.
  if (next_interval_ > 1u << 30) {
    next_interval_ = 1;
    shared.forget();
  }
  block_start_ = synced_ = next_interval_;
  owners_.clear();
  waiting_ = finished_ = 0;
  shared.start_block();
  global.start_block();
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.index = int(i);
    thread.wait = Wait::nothing;
    thread.interval = thread.writes = 0;
    thread.previous_kernel_done = thread.counted = false;
    stacks_.assign(thread.context, i);
    prepare(thread.context, enter);
  }
  for (Warp& warp : warps_) {
    warp.runnable = ~0u;
    warp.arrived = 0;
    warp.met = next_interval_;
  }
  ++counters.blocks;
  thread_ = next_in_block();
  switch_context(host_, thread_->context);
}

void Machine::enter() {
  arrive();
  machine.body_(machine.arguments_);
  machine.stop_running(Wait::end, {});
  ++machine.finished_;
  Thread& me = *machine.thread_;
  if (machine.finished_ == machine.threads()) leave(me.context, machine.host_);
  machine.thread_ = machine.next();
  leave(me.context, machine.thread_->context);
}

// ---- waiting

void Machine::sync_block(Where where) {
  stop_running(Wait::sync_block, where);
  if (++waiting_ < threads()) return go_on(next());
  waiting_ = 0;
  synced_ = next_interval_;
  ++counters.barriers;
  for (Warp& warp : warps_) warp.runnable = ~0u;
  go_on(next_in_block());
}

void Machine::rendezvous(Wait wait, int detail, void* argument, void (*complete)(Warp&),
                         Where where) {
  Warp& all = warp();
  if (all.arrived == 0) {
    all.first = thread_->lane();
    all.detail = detail;
  }
  const Thread& first = lane(all, all.first);
  if (all.arrived > 0 && (wait != first.wait || detail != all.detail)) {
    fault(where, std::string("divergence: this lane is in ") + name(wait) + ", lane " +
                     std::to_string(all.first) + " of its warp is in " + name(first.wait) + " at " +
                     text(first.where) + (wait == Wait::shuffle_xor && wait == first.wait
                                              ? " with another mask or type"
                                              : "") +
                     ". All 32 lanes must execute the same operation.");
  }
  all.arguments[thread_->lane()] = argument;
  stop_running(wait, where);
  if (++all.arrived < kLanes) return go_on(next());
  complete(all);
  all.arrived = 0;
  all.met = next_interval_;
  all.runnable = ~0u;
  ++counters.rendezvous;
  go_on(next_in(all));
}

void Machine::stop_running(Wait wait, Where where) {
  thread_->wait = wait;
  thread_->where = where;
  warp().runnable &= ~(1u << thread_->lane());
}

void Machine::go_on(Thread* to) {
  Thread& me = *thread_;
  if (to == &me) return;
  thread_ = to;
  switch_context(me.context, to->context);
}

// Greedy, for the greatest skew: one warp as far as it gets, and in it one lane.

Thread* Machine::next_in(const Warp& warp) {
  if (warp.runnable == 0) return nullptr;
  return &lane(warp, reverse ? 31 - __builtin_clz(warp.runnable) : __builtin_ctz(warp.runnable));
}

Thread* Machine::next_in_block() {
  int count = int(warps_.size());
  for (int i = 0; i < count; ++i) {
    if (Thread* thread = next_in(warps_[reverse ? count - 1 - i : i])) return thread;
  }
  report_deadlock();
}

Thread* Machine::next() {
  Thread* thread = next_in(warp());
  return thread ? thread : next_in_block();
}

// ---- order of accesses

Interval Machine::interval() {
  if (thread_->interval < std::max(synced_, warp().met)) {
    thread_->interval = next_interval_++;
    owners_.push_back(uint16_t(thread_->index));
  }
  return thread_->interval;
}

// ---- faults

void Machine::fault(const Thread& thread, Where where, std::string what) {
  message = "block " + text(block_) + ", thread " + std::to_string(thread.index) + " (warp " +
            std::to_string(thread.warp()) + ", lane " + std::to_string(thread.lane()) + "), " +
            text(where) + ": " + what;
  // Nothing on this stack is destroyed.
  std::string().swap(what);
  leave(thread_->context, host_);
  __builtin_unreachable();
}

void Machine::report_deadlock() {
  std::string what = "deadlock: no thread can go on.";
  const Thread* waiting = nullptr;
  size_t groups = 0;
  for (size_t i = 0; i < threads_.size();) {
    const Thread& thread = threads_[i];
    if (waiting == nullptr && thread.wait != Wait::end) waiting = &thread;
    size_t end = i + 1;
    while (end < threads_.size() && threads_[end].wait == thread.wait &&
           threads_[end].where.line == thread.where.line) {
      ++end;
    }
    if (++groups <= 12) {
      what += " Threads " + std::to_string(i) + " to " + std::to_string(end - 1) + " (warp " +
              std::to_string(thread.warp()) + ", lane " + std::to_string(thread.lane()) + " on) ";
      what += thread.wait == Wait::end
                  ? std::string("have finished.")
                  : std::string("wait in ") + name(thread.wait) + " at " + text(thread.where) + ".";
    }
    i = end;
  }
  if (groups > 12) what += " And " + std::to_string(groups - 12) + " more groups.";
  what += " All threads of a block must reach sync_block, all lanes of a warp a warp operation.";
  fault(*waiting, waiting->where, std::move(what));
}

}  // namespace hydra::emulator
