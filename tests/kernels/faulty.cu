// Kernels that do one thing wrong each, and some that do not; test_emulator.py runs them.
#include "hydra/platform.cuh"

using namespace hydra;

#define KERNEL(name, threads, blocks, shared, ...)                                    \
  static void name##_kernel(float* data) {                                            \
    (void)data;                                                                       \
    HYDRA_SHARED(bytes);                                                              \
    float* cells = reinterpret_cast<float*>(bytes);                                   \
    (void)cells;                                                                      \
    const int i = thread_index();                                                     \
    (void)i;                                                                          \
    __VA_ARGS__                                                                       \
  }                                                                                   \
  extern "C" int name(float* data) {                                                  \
    return launch(name##_kernel, {dim3(blocks), threads, shared, false, nullptr}, data); \
  }

KERNEL(good, 64, 2, 256, {
  wait_for_previous_kernel();
  write_shared(cells + i, float(i));
  sync_block();
  float sum = read_shared(cells + 63 - i);
  for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
  if (block_x() == 0) write_global(data + i, sum);
})
KERNEL(race_between_warps, 64, 1, 256, {
  write_shared(cells + i, 0.0f);
  sync_block();
  write_shared(cells + i, float(i));
  read_shared(cells + 63 - i);
})
KERNEL(race_between_lanes, 32, 1, 256, {
  write_shared(cells + i, 0.0f);
  sync_block();
  write_shared(cells + i, float(i));
  read_shared(cells + 31 - i);
})
KERNEL(lanes_meet_in_between, 32, 1, 256, {
  write_shared(cells + i, float(i));
  shuffle_xor(1.0f, 1);
  read_shared(cells + 31 - i);
})
KERNEL(write_after_read, 64, 1, 256, {
  write_shared(cells + i, 0.0f);
  sync_block();
  read_shared(cells + 63 - i);
  write_shared(cells + i, 1.0f);
})
KERNEL(poison, 32, 1, 256, { read_shared(cells + i); })
KERNEL(shared_outside, 64, 1, 128, { write_shared(cells + i, 1.0f); })
KERNEL(shared_misaligned, 32, 1, 256, { write_shared(reinterpret_cast<uint4*>(bytes + 8), uint4{}); })
KERNEL(global_outside, 32, 1, 0, {
  wait_for_previous_kernel();
  write_global(data + 70 + i, 1.0f);
})
KERNEL(global_misaligned, 32, 1, 0, {
  wait_for_previous_kernel();
  read_input(reinterpret_cast<const uint4*>(data + 1));
})
KERNEL(before_the_wait, 32, 1, 0, { write_global(data + i, 1.0f); })
KERNEL(read_only_cache, 32, 1, 0, {
  wait_for_previous_kernel();
  write_global(data + i, 1.0f);
  sync_block();
  read_input(data + i);
})
KERNEL(no_fence, 32, 2, 0, {
  wait_for_previous_kernel();
  if (block_x() == 0) write_global(data + i, 1.0f);
  if (block_x() == 1) read_fresh(data + i);
})
KERNEL(some_skip_the_barrier, 64, 1, 0, {
  if (i < 40) sync_block();
})
KERNEL(some_skip_the_shuffle, 32, 1, 0, {
  if (i != 7) shuffle_xor(1.0f, 1);
})
KERNEL(different_masks, 32, 1, 0, { shuffle_xor(1.0f, i < 16 ? 1 : 2); })
KERNEL(different_operations, 32, 1, 0, {
  uint32_t a[4] = {0, 0, 0, 0};
  float c[4] = {0, 0, 0, 0};
  if (i < 16) mma_half(c, a, 0, 0);
  else shuffle_xor(1.0f, 1);
})
KERNEL(overflow, 32, 1, 0, {
  uint32_t a[4] = {0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f};
  int c[4] = {2147483647, 0, 0, 0};
  mma_int8(c, a, a[0], a[1]);
})
KERNEL(odd_block, 33, 1, 0, {})
KERNEL(too_much_shared, 32, 1, 1 << 20, {})

extern "C" int read_nobody_wrote(float* data) {
  return launch(+[](float* p) {
    wait_for_previous_kernel();
    read_fresh(p + thread_index());
  }, {dim3(1), 32, 0, false, nullptr}, data);
}

// a, b, c: one warp's fragments, [32 lanes][registers].
extern "C" int multiply_half(const uint32_t* a, const uint32_t* b, float* c) {
  return launch(+[](const uint32_t* a, const uint32_t* b, float* c) {
    const int i = thread_index();
    uint32_t mine[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
    float sum[4] = {c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]};
    mma_half(sum, mine, b[2 * i], b[2 * i + 1]);
    for (int r = 0; r < 4; ++r) c[4 * i + r] = sum[r];
  }, {dim3(1), 32, 0, false, nullptr}, a, b, c);
}
extern "C" int multiply_bfloat(const uint32_t* a, const uint32_t* b, float* c) {
  return launch(+[](const uint32_t* a, const uint32_t* b, float* c) {
    const int i = thread_index();
    uint32_t mine[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
    float sum[4] = {c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]};
    mma_bfloat(sum, mine, b[2 * i], b[2 * i + 1]);
    for (int r = 0; r < 4; ++r) c[4 * i + r] = sum[r];
  }, {dim3(1), 32, 0, false, nullptr}, a, b, c);
}
extern "C" int multiply_int8(const uint32_t* a, const uint32_t* b, int* c) {
  return launch(+[](const uint32_t* a, const uint32_t* b, int* c) {
    const int i = thread_index();
    uint32_t mine[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
    int sum[4] = {c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]};
    mma_int8(sum, mine, b[2 * i], b[2 * i + 1]);
    for (int r = 0; r < 4; ++r) c[4 * i + r] = sum[r];
  }, {dim3(1), 32, 0, false, nullptr}, a, b, c);
}

extern "C" void halves_to_floats(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}
extern "C" void floats_to_halves(const float* in, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
}
extern "C" void floats_to_bfloats_each(const float* in, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bfloat(in[i]);
}
extern "C" void floats_to_int8s(const float* in, int8_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = int8_t(float_to_int8(in[i]));
}
