// The names of hydra/platform.cuh on the CPU. No CUDA needed; every access is checked.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda_types.h"
#include "machine.h"
#include "matrix.h"
#include "numbers.h"
#include "where.h"

#define HYDRA_DEVICE inline
#define HYDRA_HOST_DEVICE inline
#define HYDRA_KERNEL(threads, blocks) void
#define HYDRA_SHARED(name) unsigned char* name = ::hydra::emulator::machine.shared.data()
#define HYDRA_UNROLL
#define HYDRA_NO_UNROLL

namespace hydra {

// ---- threads

inline int thread_index() { return emulator::machine.thread().index; }
inline int thread_index_again() { return thread_index(); }
inline int block_threads() { return emulator::machine.threads(); }
inline int block_x() { return int(emulator::machine.block().x); }
inline int block_y() { return int(emulator::machine.block().y); }
inline int block_z() { return int(emulator::machine.block().z); }
inline int grid_y() { return int(emulator::machine.grid().y); }
inline int grid_z() { return int(emulator::machine.grid().z); }

inline void sync_block(emulator::Where where = emulator::Where::here()) {
  emulator::machine.sync_block(where);
}

template <class T>
T shuffle_xor(T value, int mask, emulator::Where where = emulator::Where::here()) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "__shfl_xor_sync takes numbers of 4 or 8 bytes");
  T result;
  emulator::shuffle_xor(&value, &result, sizeof(T), mask, where);
  return result;
}

// ---- memory; copied as bytes, because kernels see the same bytes as different types

namespace emulator {

template <class T>
T load(const T* p) {
  static_assert(std::is_trivially_copyable<T>::value, "memory holds plain values");
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0,
                "one access is 1, 2, 4, 8 or 16 bytes");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
void store(T* p, const T& value) {
  static_assert(std::is_trivially_copyable<T>::value, "memory holds plain values");
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0,
                "one access is 1, 2, 4, 8 or 16 bytes");
  std::memcpy(p, &value, sizeof(T));
}

}  // namespace emulator

inline uint4 read_stream(const uint4* p, emulator::Where where = emulator::Where::here()) {
  emulator::machine.global.read(p, sizeof(uint4), emulator::Read::stream, where);
  return emulator::load(p);
}

inline void prefetch(const void*) {}  // reads nothing

template <class T>
T read_input(const T* p, emulator::Where where = emulator::Where::here()) {
  emulator::machine.global.read(p, sizeof(T), emulator::Read::input, where);
  return emulator::load(p);
}

template <class T>
T read_activation(const T* p, emulator::Where where = emulator::Where::here()) {
  return read_input(p, where);
}

template <class T>
T read_fresh(const T* p, emulator::Where where = emulator::Where::here()) {
  emulator::machine.global.read(p, sizeof(T), emulator::Read::fresh, where);
  return emulator::load(p);
}

template <class T>
void write_global(T* p, T value, emulator::Where where = emulator::Where::here()) {
  emulator::machine.global.write(p, sizeof(T), where);
  emulator::store(p, value);
}

template <class T>
T read_shared(const T* p, emulator::Where where = emulator::Where::here()) {
  emulator::machine.shared.read(p, sizeof(T), where);
  return emulator::load(p);
}

template <class T>
void write_shared(T* p, T value, emulator::Where where = emulator::Where::here()) {
  emulator::machine.shared.write(p, sizeof(T), where);
  emulator::store(p, value);
}

inline void fence() { emulator::machine.global.fence(); }

inline uint32_t count_up(uint32_t* p, uint32_t last,
                         emulator::Where where = emulator::Where::here()) {
  emulator::machine.global.count_up(p, where);
  uint32_t before = emulator::load(p);
  emulator::store(p, before >= last ? 0 : before + 1);
  return before;
}

inline void start_next_kernel() {}
inline void wait_for_previous_kernel() {
  emulator::machine.thread().previous_kernel_done = true;
}

// ---- tensor cores

inline void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulator::Where where = emulator::Where::here()) {
  emulator::mma(emulator::Wait::mma_half, c, a, b0, b1, where);
}

inline void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       emulator::Where where = emulator::Where::here()) {
  emulator::mma(emulator::Wait::mma_bfloat, c, a, b0, b1, where);
}

inline void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulator::Where where = emulator::Where::here()) {
  emulator::mma(emulator::Wait::mma_int8, c, a, b0, b1, where);
}

// ---- launching

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  bool overlap;  // no effect: the checks on wait_for_previous_kernel are always on
  cudaStream_t stream;
};

// Runs to the end before it returns.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Parameters... values) {
  auto body = [&] { kernel(values...); };
  return emulator::machine.run(
      how.grid, how.threads, how.shared_bytes,
      [](void* body_) { (*static_cast<decltype(body)*>(body_))(); }, &body);
}

}  // namespace hydra
