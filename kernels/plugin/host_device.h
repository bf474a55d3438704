// Device memory for the programs that test the plugin: on a GPU, or with the emulator's checks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulator/hydra_emulator.h"
#include "hydra_kernels.h"
#ifndef HYDRA_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace hydra::plugin {

using Bytes = std::vector<unsigned char>;

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "%s\n%s\n", what, hydra_last_error());
#ifdef HYDRA_EMULATED
  std::fprintf(stderr, "%s\n", hydra_emulator_fault());
#endif
  std::exit(1);
}

inline void require(bool truth, const char* what) {
  if (!truth) stop(what);
}

#ifdef HYDRA_EMULATED

inline void* allocate(size_t bytes) { return std::aligned_alloc(256, bytes); }
inline void release(void* memory) { std::free(memory); }
inline void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess) stop(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}

#endif

// Bytes on the device between two guards, aligned to 256 as TensorRT's are.
class Buffer {
 public:
  enum Kind { kConstant, kInput, kWritten };

  // What is written holds NaN before.
  Buffer(const char* name, Kind kind, size_t bytes, const void* values = nullptr)
      : name_(name), kind_(kind), bytes_(bytes), room_(bytes + 2 * kGuard, kPoison) {
    room_.resize((room_.size() + 255) / 256 * 256, kPoison);
    memory_ = static_cast<unsigned char*>(allocate(room_.size()));
    if (values) std::memcpy(room_.data() + kGuard, values, bytes);
    reset();
  }
  ~Buffer() {
#ifdef HYDRA_EMULATED
    hydra_emulator_forget(at());
#endif
    release(memory_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* at() const { return bytes_ > 0 ? memory_ + kGuard : nullptr; }

  // Values, or poison, as at the start.
  void reset() {
    copy(memory_, room_.data(), room_.size());
#ifdef HYDRA_EMULATED
    hydra_emulator_forget(at());
    const int kind = kind_ == kConstant ? HYDRA_EMULATOR_CONSTANT
                     : kind_ == kInput  ? HYDRA_EMULATOR_INPUT
                                        : HYDRA_EMULATOR_UNINITIALISED;
    if (bytes_ > 0 && hydra_emulator_register(at(), bytes_, name_, kind)) stop(name_);
#endif
  }

  // What it holds now. Stops if the guards, or what is only read, changed.
  Bytes read() const {
    Bytes now(room_.size());
    copy(now.data(), memory_, now.size());
    const auto same = [&](size_t from, size_t to) {
      return std::equal(now.begin() + ptrdiff_t(from), now.begin() + ptrdiff_t(to),
                        room_.begin() + ptrdiff_t(from));
    };
    const bool intact = same(0, kGuard) && same(kGuard + bytes_, room_.size());
    if (!intact || (kind_ != kWritten && !same(0, room_.size()))) stop(name_);
    return {now.begin() + kGuard, now.begin() + ptrdiff_t(kGuard + bytes_)};
  }

  // Bytes that were written since `reset`, as far as values tell.
  size_t touched() const {
    const Bytes now = read();
    size_t count = 0;
    for (size_t i = 0; i < bytes_; ++i) count += now[i] != room_[kGuard + i];
    return count;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPoison = 0xFF;

  const char* name_;
  Kind kind_;
  size_t bytes_;
  Bytes room_;  // what it holds after `reset`, with the guards
  unsigned char* memory_;
};

// A stream that does not wait for the default stream.
class Stream {
 public:
#ifdef HYDRA_EMULATED
  void* handle() const { return nullptr; }
  void wait() const {}
  template <class Work>
  void run_captured(Work work) const {
    work();
  }
#else
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void* handle() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_)); }

  // Captures the work as a CUDA graph, and launches that.
  template <class Work>
  void run_captured(Work work) const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    work();
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiateWithFlags(&executable, graph, 0));
    check(cudaGraphLaunch(executable, stream_));
    wait();
    check(cudaGraphExecDestroy(executable));
    check(cudaGraphDestroy(graph));
  }

 private:
  cudaStream_t stream_ = nullptr;
#endif
};

// What happened on the device meanwhile. On a GPU nobody counts.
class Watch {
 public:
  uint64_t launches() const { return now().launches - before_.launches; }
  uint64_t blocks() const { return now().blocks - before_.blocks; }
  uint64_t memsets() const { return now().memsets - before_.memsets; }
  uint64_t allocations() const { return now().allocations - before_.allocations; }
  uint64_t frees() const { return now().frees - before_.frees; }
  uint64_t waits() const { return now().waits - before_.waits; }

 private:
  static hydra_emulator_counters now() {
    hydra_emulator_counters counters{};
#ifdef HYDRA_EMULATED
    hydra_emulator_read_counters(&counters);
#endif
    return counters;
  }

  hydra_emulator_counters before_ = now();
};

}  // namespace hydra::plugin
