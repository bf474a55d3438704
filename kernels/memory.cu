// Device memory for callers that link to no CUDA runtime of their own.
#include "failure.h"
#include "hydra/platform.cuh"

using namespace hydra;

namespace {

hydra_status finished(cudaError_t error, size_t bytes) {
  if (error == cudaSuccess) return HYDRA_OK;
  return failure(HYDRA_CUDA_ERROR,
                 "CUDA refused %zu bytes of device memory: %s. It may be used up, or an earlier "
                 "kernel failed. Close other programs on the device, or take smaller batches.",
                 bytes, cudaGetErrorString(error));
}

}  // namespace

hydra_status hydra_allocate_zeros(size_t bytes, void** memory) {
  *memory = nullptr;
  void* allocated = nullptr;
  cudaError_t error = cudaMalloc(&allocated, bytes);
  if (error != cudaSuccess) return finished(error, bytes);
  error = cudaMemsetAsync(allocated, 0, bytes, nullptr);
  // Streams that do not wait for the default stream find the zeros, too.
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  if (error == cudaSuccess) {
    *memory = allocated;
  } else {
    cudaFree(allocated);
  }
  return finished(error, bytes);
}

// cudaFree of nothing would start CUDA where nobody has yet.
hydra_status hydra_free(void* memory) { return memory ? finished(cudaFree(memory), 0) : HYDRA_OK; }

hydra_status hydra_zero(void* memory, size_t bytes, void* stream) {
  return finished(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), bytes);
}
