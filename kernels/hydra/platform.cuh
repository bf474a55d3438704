// What the kernels need from the machine, and nothing more: one source for nvcc and for the CPU.
//
// The kernels touch memory and other threads only through the functions below. Under nvcc each is
// one instruction or a few; with HYDRA_EMULATED the same names come from emulator/platform.h, where
// every access is checked and every barrier counted. Values of 16 bits travel as raw bits, so that
// the CPU needs no CUDA header.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef HYDRA_EMULATED
#include "../emulator/platform.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define HYDRA_DEVICE __device__ __forceinline__
#define HYDRA_HOST_DEVICE __host__ __device__ __forceinline__
// Threads per block at most, and blocks that must fit on one SM with their registers.
#define HYDRA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Dynamic shared memory as bytes, aligned to 16.
#define HYDRA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define HYDRA_UNROLL _Pragma("unroll")
#define HYDRA_NO_UNROLL _Pragma("unroll 1")

namespace hydra {

// ---- threads

HYDRA_DEVICE int thread_index() { return threadIdx.x; }
// The same, read anew: what follows from it need not wait in registers.
HYDRA_DEVICE int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
HYDRA_DEVICE int block_threads() { return blockDim.x; }
HYDRA_DEVICE int block_x() { return blockIdx.x; }
HYDRA_DEVICE int block_y() { return blockIdx.y; }
HYDRA_DEVICE int block_z() { return blockIdx.z; }
HYDRA_DEVICE int grid_y() { return gridDim.y; }
HYDRA_DEVICE int grid_z() { return gridDim.z; }

// All threads of the block arrive; what they wrote is seen by all.
HYDRA_DEVICE void sync_block() { __syncthreads(); }

// The value of the lane whose number differs in `mask`; all 32 lanes take part.
template <class T>
HYDRA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- memory

// 16 bytes that are read once: kept out of L1.
HYDRA_DEVICE uint4 read_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Brings the 128 bytes around an address as far as L2.
HYDRA_DEVICE void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
}

// Global memory that no thread writes while the kernel runs.
template <class T>
HYDRA_DEVICE T read_input(const T* p) {
  return __ldg(p);
}

// What the previous kernel wrote, after `wait_for_previous_kernel`: no read-only load, for with
// programmatic dependent launch it was still being written when this kernel began.
template <class T>
HYDRA_DEVICE T read_activation(const T* p) {
  return *p;
}

// Global memory that other blocks of this kernel wrote: past L1.
template <class T>
HYDRA_DEVICE T read_fresh(const T* p) {
  return __ldcg(p);
}

template <class T>
HYDRA_DEVICE void write_global(T* p, T value) {
  *p = value;
}

template <class T>
HYDRA_DEVICE T read_shared(const T* p) {
  return *p;
}

template <class T>
HYDRA_DEVICE void write_shared(T* p, T value) {
  *p = value;
}

// This thread's writes are seen by whoever sees what it does next.
HYDRA_DEVICE void fence() { __threadfence(); }

// Adds 1 and returns what was there; wraps to 0 after `last`.
HYDRA_DEVICE uint32_t count_up(uint32_t* p, uint32_t last) { return atomicInc(p, last); }

// With programmatic dependent launch, the next kernel may begin once every block has come here. It
// reads its weights, which nobody writes, and then waits for all of this kernel.
HYDRA_DEVICE void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// With programmatic dependent launch, everything before this line overlaps the previous kernel.
HYDRA_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- 16-bit floats, as bits; pairs hold the first in the low half

HYDRA_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
HYDRA_DEVICE float bfloat_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
HYDRA_DEVICE uint16_t float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }
HYDRA_DEVICE uint16_t float_to_bfloat(float v) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
HYDRA_DEVICE uint32_t floats_to_bfloats(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}

// Lane-wise on two halves; one rounding each.
HYDRA_DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
HYDRA_DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
HYDRA_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
HYDRA_DEVICE uint32_t bfloat2_fma(uint32_t a, uint32_t b, uint32_t c) {
#if __CUDA_ARCH__ >= 800
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#else
  __trap();  // the launcher refuses bfloat16 below sm_80
  return 0;
#endif
}

// ---- bits and integers

// Bytes of (b, a), 0 to 7, chosen by four nibbles of `selector`.
HYDRA_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
HYDRA_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
HYDRA_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }

// Rounded to nearest even, clamped to -128…127; NaN becomes 0.
HYDRA_DEVICE int float_to_int8(float v) {
  int r;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// ---- tensor cores: D = A B + C, A 16 outputs by k, B k by 8 rows of the batch.
// Fragments as in PTX: with lane l = 4 g + t, C holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).

// fp16 in, fp32 out; k = 16.
HYDRA_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// bf16 in, fp32 out; k = 16; sm_80 and later.
HYDRA_DEVICE void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// int8 in, int32 out; k = 32. Below sm_80 four of 8 by 8 by 16.
HYDRA_DEVICE void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  HYDRA_UNROLL
  for (int half = 0; half < 4; ++half) {
    int row = (half & 1) * 2;
    asm volatile(
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[row]), "+r"(c[row + 1])
        : "r"(a[half]), "r"(half < 2 ? b0 : b1));
  }
#endif
}

// ---- launching

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  bool overlap;  // programmatic dependent launch: start while the previous kernel drains
  cudaStream_t stream;
};

// Enqueues; no allocation, no synchronisation. More than 48 KB of shared memory need an opt-in, which
// stream capture allows: always to all that a block can have, so that threads cannot disagree.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Parameters... values) {
  if (how.shared_bytes > 48 * 1024) {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error != cudaSuccess) return error;
  }
  bool overlap = how.overlap;
  if (overlap) {  // code for less than 9.0 does not wait, on whatever device it is compiled at load
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    overlap = attributes.ptxVersion >= 90;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, values...);
}

}  // namespace hydra

#endif
