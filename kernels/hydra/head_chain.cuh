// A whole MLP head in one launch: 1 to 3 hidden layers and the output layer, for all M heads.
//
//   h_0 = x                                     [B, K] or [M, B, K]
//   h_l = activation(norm(h_(l-1) W_l + b_l))   norm: none, or LayerNorm over the layer's outputs
//   y   = h_L W + b                             [M, B, C]
//
// Weights as in group_linear.cuh, every layer in the same format. With int8 the hidden activations
// are quantized again, each layer with the x_scale of the next.
//
// Block (batch tile of 8 NT rows, slice of the outputs, head). Hidden activations stay in shared
// memory, in the order of `chunk_position`. Every slice computes the hidden layers anew, so slices
// pay where the output layer is much larger than the rest; its weights for them come from L2.
// Bytes moved from DRAM: all weights of a head once, for further batch tiles read them from L2, x, and y. One launch instead of
// one per layer: worth it while a single SM can stream a head in about the time of a launch.
#pragma once

#include "ensemble_summary.cuh"
#include "epilogue.cuh"

namespace hydra {

constexpr int kMaxLayers = 4;

struct ChainLayer {
  const uint4* tiles;
  const uint32_t* group_scales;
  int groups;
  int inputs;
  Epilogue epilogue;
  const float* gamma;  // [M, N] of LayerNorm, or null: no norm
  const float* beta;   // [M, N]
  float epsilon;
  Split split;
};

struct HeadChain {
  const void* x;
  int x_per_head;
  Real x_real;      // of 16-bit x
  int x_quantized;  // x is int8 already
  int heads, batch;
  int layers;
  ChainLayer layer[kMaxLayers];
  float* y;  // [M, B, C]
  // Bytes into shared memory: activations of even and odd layers, sums, values before LayerNorm.
  int odd_offset, staged_offset, norm_offset;
  SummaryParameters summary;
  uint32_t* counters;  // [batch tiles] with a summary: 0 before and after
};

// Shared memory of one layer's input, 8 NT rows.
template <class Format, int NT>
HYDRA_HOST_DEVICE int activation_bytes(int inputs) {
  return NT * kColumns * row_stride<Format>((inputs + Format::kDepth - 1) / Format::kDepth);
}

// The input of a layer in shared memory.
template <class Format>
struct Activations {
  uint8_t* rows;
  int stride;
  float scale, inverse;  // of int8

  HYDRA_DEVICE void put(int b, int k, float v) const {
    uint8_t* to = rows + b * stride + chunk_position<Format>(k);
    if constexpr (Format::kXBytes == 1) {
      write_shared(reinterpret_cast<int8_t*>(to), int8_t(quantized(v, scale, inverse)));
    } else {
      write_shared(reinterpret_cast<uint16_t*>(to), Format::X::from_float(v));
    }
  }
};

template <class Format, int NT>
class ChainBlock {
 public:
  HYDRA_DEVICE ChainBlock(const HeadChain& p, unsigned char* shared)
      : p_(p),
        shared_(shared),
        staged_(reinterpret_cast<typename Format::Sum*>(shared + p.staged_offset)),
        normed_(reinterpret_cast<float*>(shared + p.norm_offset)),
        head_(block_z()),
        first_b_(block_x() * kBatch),
        here_(min(kBatch, p.batch - first_b_)) {}

  HYDRA_DEVICE void run() {
    for (int l = 0; l < p_.layers; ++l) {
      const ChainLayer& layer = p_.layer[l];
      const Activations<Format> in = input_of(l);
      const int rows = layer.split.row_warps * kRows;
      const int groups = (layer.epilogue.outputs + rows - 1) / rows;
      const bool last = l == p_.layers - 1;
      const int per_slice = last ? (groups + grid_y() - 1) / grid_y() : groups;
      const int begin = last ? block_y() * per_slice : 0;
      for (int group = begin; group < min(begin + per_slice, groups); ++group) {
        const bool first = l == 0 && group == begin;
        multiply(layer, in, group * layer.split.row_warps, first);
        if (last) {
          write_outputs(layer, group * rows, rows);
        } else {
          write_hidden(layer, input_of(l + 1), group * rows, rows);
        }
        sync_block();  // the sums have been read, and what became of them can be
      }
      if (!last) {
        if (layer.gamma) normalise(layer, input_of(l + 1));
        clear_tail(input_of(l + 1), layer.epilogue.outputs);
        sync_block();
      }
    }
  }

  HYDRA_DEVICE int first_row() const { return first_b_; }
  HYDRA_DEVICE int end_row() const { return first_b_ + here_; }

 private:
  static constexpr int kBatch = NT * kColumns;

  HYDRA_DEVICE static int k_tiles(int inputs) {
    return (inputs + Format::kDepth - 1) / Format::kDepth;
  }

  HYDRA_DEVICE Activations<Format> input_of(int l) const {
    const ChainLayer& layer = p_.layer[l];
    // That of x itself is read after the previous kernel: see `read_x`.
    const float scale = Format::kXBytes == 1 && l > 0 ? layer.epilogue.x_scale.of(head_) : 1.0f;
    return {shared_ + (l % 2 ? p_.odd_offset : 0), row_stride<Format>(k_tiles(layer.inputs)), scale,
            1.0f / scale};
  }

  // The sums of `row_warps` row tiles, staged. The first call brings x, while weights are coming.
  HYDRA_DEVICE void multiply(const ChainLayer& layer, const Activations<Format>& in, int row_tile,
                             bool bring_x) {
    const int warp = thread_index() / 32;
    const int depth = k_tiles(layer.inputs);
    const int row_tiles = (layer.epilogue.outputs + kRows - 1) / kRows;
    const int64_t head_tiles = int64_t(row_tiles) * depth * head_;
    const int per_warp = (depth + layer.split.k_warps - 1) / layer.split.k_warps;
    const int begin = warp / layer.split.row_warps * per_warp;
    // Where K is short and outputs are few, some warps have nothing to do.
    const bool works = warp < layer.split.row_warps * layer.split.k_warps;
    const Weights weights = {layer.tiles + head_tiles * kTileVectors,
                             layer.group_scales + head_tiles * layer.groups * 8, row_tiles, depth,
                             layer.groups};
    WarpMultiply<Format, NT, 1> product(weights, row_tile + warp % layer.split.row_warps, begin,
                                        depth, works ? min(begin + per_warp, depth) : begin);
    if (bring_x) {
      start_next_kernel();
      wait_for_previous_kernel();
      read_x(in);
      sync_block();
    }
    if (works) {
      product.run(SharedX<Format>(in.rows, in.stride));
      stage(product.sum, staged_, layer.split);
    }
    sync_block();
  }

  // x into shared memory; rows that do not exist and what is missing to a full tile are 0.
  HYDRA_DEVICE void read_x(const Activations<Format>& in) {
    const float scale = Format::kXBytes == 1 ? p_.layer[0].epilogue.x_scale.of(head_) : 1.0f;
    const int inputs = p_.layer[0].inputs, padded = k_tiles(inputs) * Format::kDepth;
    const int64_t first = (int64_t(head_) * p_.x_per_head * p_.batch + first_b_) * inputs;
    constexpr int per_chunk = 16 / Format::kXBytes;
    const bool as_it_is = Format::kXBytes == 2 || p_.x_quantized;
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p_.x) | uintptr_t(inputs) * Format::kXBytes) % 16 == 0;
    if (as_it_is && aligned) {
      const uint8_t* x = static_cast<const uint8_t*>(p_.x) + first * Format::kXBytes;
      const int chunks = padded / per_chunk;
      for (int i = thread_index(); i < kBatch * chunks; i += block_threads()) {
        const int b = i / chunks, k = i % chunks * per_chunk;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (b < here_ && k < inputs) {
          v = read_activation(reinterpret_cast<const uint4*>(x + (int64_t(b) * inputs + k) * Format::kXBytes));
        }
        write_shared(reinterpret_cast<uint4*>(in.rows + b * in.stride + chunk_position<Format>(k)), v);
      }
      return;
    }
    for (int i = thread_index(); i < kBatch * padded; i += block_threads()) {
      const int b = i / padded, k = i % padded;
      uint8_t* to = in.rows + b * in.stride + chunk_position<Format>(k);
      const bool exists = b < here_ && k < inputs;
      const int64_t from = first + int64_t(b) * inputs + k;
      if (Format::kXBytes == 1 && p_.x_quantized) {
        write_shared(to, exists ? read_activation(static_cast<const uint8_t*>(p_.x) + from) : uint8_t(0));
        continue;
      }
      const uint16_t bits = exists ? read_activation(static_cast<const uint16_t*>(p_.x) + from) : uint16_t(0);
      if (Format::kXBytes == 2) {
        write_shared(reinterpret_cast<uint16_t*>(to), bits);
      } else {
        const float v = p_.x_real == Real::kBfloat ? bfloat_to_float(bits) : half_to_float(bits);
        write_shared(reinterpret_cast<int8_t*>(to), int8_t(quantized(v, scale, 1.0f / scale)));
      }
    }
  }

  HYDRA_DEVICE void write_hidden(const ChainLayer& layer, const Activations<Format>& out, int first,
                                 int rows) {
    const int outputs = layer.epilogue.outputs, row = thread_index() % rows, n = first + row;
    if (n >= outputs) return;
    const Column column = layer.epilogue.column(head_, n);
    for (int b = thread_index() / rows; b < kBatch; b += block_threads() / rows) {
      const auto sum = staged_sum<NT>(staged_, layer.split, staged_stride(rows), b, row);
      const float v = column.linear(sum);
      if (layer.gamma) {
        write_shared(normed_ + b * outputs + n, v);
      } else {
        out.put(b, n, activated(v, layer.epilogue.activation));
      }
    }
  }

  HYDRA_DEVICE void write_outputs(const ChainLayer& layer, int first, int rows) {
    const int outputs = layer.epilogue.outputs, row = thread_index() % rows, n = first + row;
    if (n >= outputs) return;
    const Column column = layer.epilogue.column(head_, n);
    for (int b = thread_index() / rows; b < here_; b += block_threads() / rows) {
      const auto sum = staged_sum<NT>(staged_, layer.split, staged_stride(rows), b, row);
      const float v = activated(column.linear(sum), layer.epilogue.activation);
      write_global(p_.y + (int64_t(head_) * p_.batch + first_b_ + b) * outputs + n, v);
    }
  }

  HYDRA_DEVICE static float warp_sum(float v) {
    for (int mask = 1; mask < 32; mask *= 2) v += shuffle_xor(v, mask);
    return v;
  }

  // LayerNorm, a warp per row: mean, then the variance about it.
  HYDRA_DEVICE void normalise(const ChainLayer& layer, const Activations<Format>& out) {
    const int outputs = layer.epilogue.outputs, lane = thread_index() % 32;
    for (int b = thread_index() / 32; b < kBatch; b += block_threads() / 32) {
      const float* row = normed_ + b * outputs;
      float sum = 0;
      for (int n = lane; n < outputs; n += 32) sum += read_shared(row + n);
      const float mean = warp_sum(sum) / outputs;
      float squares = 0;
      for (int n = lane; n < outputs; n += 32) {
        const float offset = read_shared(row + n) - mean;
        squares += offset * offset;
      }
      const float factor = 1.0f / sqrtf(warp_sum(squares) / outputs + layer.epsilon);
      for (int n = lane; n < outputs; n += 32) {
        const int64_t index = int64_t(head_) * outputs + n;
        const float v = (read_shared(row + n) - mean) * factor * read_input(layer.gamma + index) +
                        read_input(layer.beta + index);
        out.put(b, n, activated(v, layer.epilogue.activation));
      }
    }
  }

  // What is missing to full tiles of the next layer: its weights there are 0, and 0 * NaN is not.
  HYDRA_DEVICE void clear_tail(const Activations<Format>& out, int outputs) {
    const int tail = k_tiles(outputs) * Format::kDepth - outputs;
    for (int i = thread_index(); i < kBatch * tail; i += block_threads()) {
      uint8_t* to = out.rows + i / tail * out.stride + chunk_position<Format>(outputs + i % tail);
      if (Format::kXBytes == 1) {
        write_shared(to, uint8_t(0));
      } else {
        write_shared(reinterpret_cast<uint16_t*>(to), uint16_t(0));
      }
    }
  }

  const HeadChain& p_;
  unsigned char* shared_;
  typename Format::Sum* staged_;
  float* normed_;
  int head_, first_b_, here_;
};

template <class Format, int NT>
HYDRA_KERNEL(256, NT * Format::kUnits < 8 ? 2 : 1) head_chain(HeadChain p) {
  HYDRA_SHARED(shared);
  ChainBlock<Format, NT> block(p, shared);
  block.run();
  if (p.summary.kind == Summary::kNone) return;
  const int blocks = grid_y() * grid_z();
  if (!SummaryBlock::last_to_arrive(p.counters + block_x(), blocks, reinterpret_cast<int*>(shared))) {
    return;
  }
  SummaryBlock(p.summary, shared).rows(block.first_row(), block.end_row());
}

}  // namespace hydra
