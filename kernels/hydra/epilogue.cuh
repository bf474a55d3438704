// From the sums of the tensor cores to what the next layer reads.
//
//   v = sum * (x_scale * weight_scale[m, n]) + bias[m, n]      scales 1 and bias 0 where absent
//   y = activation(v), stored in fp32, fp16, bf16, or int8: clamp(round_half_even(v / y_scale))
//
// A thread has one output, for a block's threads are a multiple of its outputs, and some rows of the
// batch: it waits for bias and scale once.
//
// The sums of a block's warps first meet in shared memory, [splits of K, 8 NT rows of x, outputs],
// and are added in the order of K. Outputs there are `staged_stride` apart: 4 or 20 more than a
// multiple of 32, so that the fragments of one MMA fall into 32 different banks.
#pragma once

#include "multiply.cuh"

namespace hydra {

enum class Activation : int { kNone, kRelu, kGelu, kSilu, kTanh };

HYDRA_DEVICE float activated(float v, Activation activation) {
  switch (activation) {
    case Activation::kNone: return v;
    case Activation::kRelu: return v < 0 ? 0.0f : v;  // NaN stays
    case Activation::kGelu: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case Activation::kSilu: return v / (1.0f + expf(-v));
    case Activation::kTanh: return tanhf(v);
  }
  return v;
}

// A number for all heads, or one for each; absent counts as 1.
struct HeadScale {
  const float* values;
  int per_head;  // 0 or 1

  HYDRA_DEVICE float of(int head) const {
    return values ? read_activation(values + head * per_head) : 1.0f;
  }
};

struct Column {
  float scale, bias;

  // Before the activation.
  template <class Sum>
  HYDRA_DEVICE float linear(Sum sum) const {
    return float(sum) * scale + bias;
  }
};

struct Epilogue {
  const float* weight_scale;  // [M, N] or null
  const float* bias;          // [M, N] or null
  HeadScale x_scale;
  Activation activation;
  int outputs;  // N

  // What output n of a head is scaled by and added to; asked once, before its rows of the batch.
  HYDRA_DEVICE Column column(int head, int n) const {
    const int64_t index = int64_t(head) * outputs + n;
    return {weight_scale ? x_scale.of(head) * read_input(weight_scale + index) : 1.0f,
            bias ? read_input(bias + index) : 0.0f};
  }
};

// Where a block's warps stand: `row_warps` side by side, `k_warps` along K.
struct Split {
  int row_warps;
  int k_warps;
};

HYDRA_HOST_DEVICE int staged_stride(int rows) { return rows + 4; }

// What one split of K has to say, into shared memory.
template <class Sum, int NT, int RT>
HYDRA_DEVICE void stage(const Sum (&sum)[RT][NT][4], Sum* staged, const Split& split) {
  const int thread = thread_index_again(), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int stride = staged_stride(split.row_warps * RT * kRows);
  Sum* plane = staged + warp / split.row_warps * NT * kColumns * stride +
               warp % split.row_warps * RT * kRows;
  HYDRA_UNROLL
  for (int r = 0; r < RT; ++r) {
    HYDRA_UNROLL
    for (int n = 0; n < NT; ++n) {
      HYDRA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = r * kRows + g + 8 * (i / 2), b = n * kColumns + 2 * t + i % 2;
        write_shared(plane + b * stride + row, sum[r][n][i]);
      }
    }
  }
}

// The sum over all splits, in the order of K.
template <int NT, class Sum>
HYDRA_DEVICE Sum staged_sum(const Sum* staged, const Split& split, int stride, int b, int row) {
  Sum sum = read_shared(staged + b * stride + row);
  for (int k = 1; k < split.k_warps; ++k) {
    sum += read_shared(staged + (k * NT * kColumns + b) * stride + row);
  }
  return sum;
}

enum class Output : int { kFloat, kHalf, kBfloat, kInt8 };

HYDRA_DEVICE void store(void* y, int64_t index, float v, Output type, float scale, float inverse) {
  switch (type) {
    case Output::kFloat: return write_global(static_cast<float*>(y) + index, v);
    case Output::kHalf: return write_global(static_cast<uint16_t*>(y) + index, float_to_half(v));
    case Output::kBfloat: return write_global(static_cast<uint16_t*>(y) + index, float_to_bfloat(v));
    case Output::kInt8:
      return write_global(static_cast<int8_t*>(y) + index, int8_t(quantized(v, scale, inverse)));
  }
}

}  // namespace hydra
