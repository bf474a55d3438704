// The device that the launchers find: an AGX Orin, unless a test says otherwise; and its memory.
#include <cstdlib>
#include <cstring>

#include "cuda_types.h"
#include "hydra_emulator.h"
#include "machine.h"

using hydra::emulator::machine;

namespace {
int capability = 87, sm_count = 16, shared_bytes = 163 * 1024;
}

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = sm_count; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes; break;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  ++machine.counters.allocations;
  constexpr size_t alignment = 256;
  *memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  machine.message = machine.global.add(*memory, bytes, "cudaMalloc", HYDRA_EMULATOR_UNINITIALISED);
  return machine.message.empty() ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaFree(void* memory) {
  ++machine.counters.frees;
  machine.global.remove(memory);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  ++machine.counters.memsets;
  machine.message = machine.global.overwrite(memory, bytes, "cudaMemsetAsync");
  if (!machine.message.empty()) return cudaErrorInvalidValue;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++machine.counters.waits;
  return cudaSuccess;
}

void hydra_emulator_device(int compute_capability, int multiprocessors, int shared) {
  capability = compute_capability;
  sm_count = multiprocessors;
  shared_bytes = shared;
  hydra_emulator_shared_limit(size_t(shared));
}
