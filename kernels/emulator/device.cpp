// The device that the launchers find: an AGX Orin, unless a test says otherwise.
#include "cuda_types.h"
#include "hydra_emulator.h"

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

void hydra_emulator_device(int compute_capability, int multiprocessors, int shared) {
  capability = compute_capability;
  sm_count = multiprocessors;
  shared_bytes = shared;
  hydra_emulator_shared_limit(size_t(shared));
}
