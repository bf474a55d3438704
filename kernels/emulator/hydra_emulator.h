/* What a test harness says to the emulator, and hears from it. Plain C, for ctypes. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HYDRA_EMULATOR_API __attribute__((visibility("default")))

enum hydra_emulator_kind {
  HYDRA_EMULATOR_CONSTANT = 0,     /* weights: read-only, also before wait_for_previous_kernel */
  HYDRA_EMULATOR_INPUT = 1,        /* read-only, written by the previous kernel */
  HYDRA_EMULATOR_OUTPUT = 2,       /* writable; its bytes count as written */
  HYDRA_EMULATOR_UNINITIALISED = 3 /* writable; reading a byte before its first write is a fault */
};

/* Summed since the last clear. */
struct hydra_emulator_counters {
  uint64_t matrix_products; /* mma instructions, one per warp */
  uint64_t stream_bytes;    /* read_stream */
  uint64_t input_bytes;     /* read_input */
  uint64_t fresh_bytes;     /* read_fresh */
  uint64_t written_bytes;   /* write_global */
  uint64_t barriers;        /* sync_block, one per block */
  uint64_t rendezvous;      /* shuffles and mma, one per warp */
  uint64_t shared_read_bytes;
  uint64_t shared_written_bytes;
  uint64_t blocks;
  uint64_t launches;
  uint64_t allocations; /* cudaMalloc */
  uint64_t frees;       /* cudaFree */
  uint64_t memsets;     /* cudaMemsetAsync */
  uint64_t waits;       /* cudaStreamSynchronize */
};

/* From the first buffer on, kernels may touch registered global memory only. What a kernel wrote to
   an uninitialised buffer stays initialised for the next one. Returns 0, or 1 with a message in
   hydra_emulator_fault() when the buffer is empty, overlaps another or has an unknown kind. */
HYDRA_EMULATOR_API int hydra_emulator_register(const void* p, size_t bytes, const char* name,
                                               int kind);

/* Forgets the buffer that begins at `p`, if there is one. */
HYDRA_EMULATOR_API void hydra_emulator_forget(const void* p);

/* Forgets all buffers, the fault and the counters; schedule and shared limit stay. */
HYDRA_EMULATOR_API void hydra_emulator_clear(void);

/* 0: blocks, warps and lanes from the lowest; 1: from the highest. */
HYDRA_EMULATOR_API void hydra_emulator_schedule(int reverse);

/* Shared memory a block may ask for; 227 KB at the start, as on sm_90. */
HYDRA_EMULATOR_API void hydra_emulator_shared_limit(size_t bytes);

/* The device that the launchers find; sets the shared limit, too. An AGX Orin at the start. */
HYDRA_EMULATOR_API void hydra_emulator_device(int compute_capability, int multiprocessors,
                                              int shared_bytes);

/* What went wrong in the last launch, "" if nothing; valid until the next call of any function. */
HYDRA_EMULATOR_API const char* hydra_emulator_fault(void);

HYDRA_EMULATOR_API void hydra_emulator_read_counters(struct hydra_emulator_counters* counters);

#ifdef __cplusplus
}
#endif
