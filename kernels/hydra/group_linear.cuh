// One linear layer of M heads.
//
//   y[m, b, n] = activation(sum_k x[m, b, k] weight[m, k, n] * scales + bias[m, n])
//
//   x        [B, K] shared by the heads, or [M, B, K]; fp16, bf16 or int8; any alignment
//   weight   packed, hydra_edge/ops/packing.py; aligned to 16 bytes
//   y        [M, B, N]; fp32, fp16, bf16 or int8
//
// Bytes moved: the weights once per batch tile of 8 NT rows, from DRAM past L1; x once per block,
// from L2 or L1; y once. With 8 NT >= B the weights are everything: the time is their bytes over
// the bandwidth. Beyond 64 rows further batch tiles read the weights again, at about the same time,
// and so from L2.
//
// Block (batch tile, group of row tiles, head); its warps stand `row_warps` by `k_warps`. With a
// summary the last block of a batch tile turns the logits, which are still in L2, into it.
#pragma once

#include "ensemble_summary.cuh"
#include "epilogue.cuh"

namespace hydra {

struct GroupLinear {
  const void* x;
  int x_per_head;  // 0 or 1
  Real x_real;     // of 16-bit x that is quantized here
  HeadScale x_scale;
  const uint4* tiles;
  const uint32_t* group_scales;
  int groups;
  int heads, batch, inputs;
  Epilogue epilogue;
  void* y;
  Output y_type;
  HeadScale y_scale;
  Split split;
  SummaryParameters summary;
  uint32_t* counters;  // [batch tiles] with a summary: 0 before and after
};

constexpr int kMaxThreads = 256;

// How x is read: as it is, or quantized on the way.
template <class Format>
struct DirectRead {
  static constexpr int kBytes = Format::kXBytes;
  template <template <class, int> class Rows, int NT>
  HYDRA_DEVICE static Rows<Format, NT> make(const GroupLinear& p, const uint8_t* rows, int batch, int) {
    return {rows, batch, p.inputs};
  }
};

struct QuantizingRead {
  static constexpr int kBytes = 2;
  template <template <class, int> class Rows, int NT>
  HYDRA_DEVICE static QuantizedX<Rows, NT> make(const GroupLinear& p, const uint8_t* rows, int batch,
                                                int head) {
    return {rows, batch, p.inputs, p.x_real == Real::kBfloat, p.x_scale.of(head)};
  }
};

// Two blocks share an SM, except where 128 registers a thread are not enough.
template <class Format, int NT, int RT>
constexpr int kLinearBlocks =
    NT == 8 || (Format::kUnits > 1 && (NT == 4 || NT * RT * Format::kUnits == 16)) ? 1 : 2;

template <class Format, class Read, int NT, int RT>
HYDRA_KERNEL(kMaxThreads, (kLinearBlocks<Format, NT, RT>)) group_linear(GroupLinear p) {
  HYDRA_SHARED(shared);
  const int head = block_z(), first_b = block_x() * NT * kColumns;
  const int warp = thread_index() / 32;
  const int rows = p.split.row_warps * RT * kRows, first_row = block_y() * rows;
  const int outputs = p.epilogue.outputs;
  const int row_tiles = (outputs + kRows - 1) / kRows;
  const int k_tiles = (p.inputs + Format::kDepth - 1) / Format::kDepth;
  const int64_t head_tiles = int64_t(row_tiles) * k_tiles * head;

  const int per_warp = (k_tiles + p.split.k_warps - 1) / p.split.k_warps;
  const int k_begin = warp / p.split.row_warps * per_warp;
  const Weights weights = {p.tiles + head_tiles * kTileVectors,
                           p.group_scales + head_tiles * p.groups * 8, row_tiles, k_tiles, p.groups};
  const int64_t row_bytes = int64_t(p.inputs) * Read::kBytes;
  const bool aligned = (reinterpret_cast<uintptr_t>(p.x) | row_bytes) % 16 == 0;
  WarpMultiply<Format, NT, RT> multiply(
      weights, first_row / kRows + warp % p.split.row_warps * RT, k_begin,
      aligned ? p.inputs / Format::kDepth : 0, min(k_begin + per_warp, k_tiles));

  start_next_kernel();
  wait_for_previous_kernel();
  const uint8_t* x_rows = static_cast<const uint8_t*>(p.x) +
                          (int64_t(head) * p.x_per_head * p.batch + first_b) * row_bytes;
  const int here = min(NT * kColumns, p.batch - first_b);
  multiply.run(Read::template make<AlignedX, NT>(p, x_rows, here, head));
  multiply.run_rest(Read::template make<UnalignedX, NT>(p, x_rows, here, head));

  using Sum = typename Format::Sum;
  Sum* staged = reinterpret_cast<Sum*>(shared);
  stage(multiply.sum, staged, p.split);
  sync_block();

  const int stride = staged_stride(rows);
  const float y_scale = p.y_type == Output::kInt8 ? p.y_scale.of(head) : 1.0f;
  const int row = thread_index() % rows, n = first_row + row;
  if (n < outputs) {
    const Column column = p.epilogue.column(head, n);
    for (int b = thread_index() / rows; b < here; b += block_threads() / rows) {
      const Sum sum = staged_sum<NT>(staged, p.split, stride, b, row);
      const float v = activated(column.linear(sum), p.epilogue.activation);
      store(p.y, (int64_t(head) * p.batch + first_b + b) * outputs + n, v, p.y_type, y_scale,
            1.0f / y_scale);
    }
  }

  if (p.summary.kind == Summary::kNone) return;
  const int blocks = grid_y() * grid_z();
  if (!SummaryBlock::last_to_arrive(p.counters + block_x(), blocks, reinterpret_cast<int*>(shared))) {
    return;
  }
  SummaryBlock(p.summary, shared).rows(first_b, min(first_b + NT * kColumns, p.batch));
}

}  // namespace hydra
