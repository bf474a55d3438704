// One warp multiplies row tiles of one head's weights by up to 8 NT rows of x, over a range of K.
//
//   sum[r][n] += W[16 r … , K range] x'[K range, 8 n …]        r < RT, n < NT
//
// Weights go from global memory to registers, `kAhead` tiles ahead of their use and past L1: each
// byte is read once, by one lane. What bounds the kernels is how many bytes are on their way, RT *
// kAhead KB a warp; nothing here waits for a barrier.
#pragma once

#include "formats.cuh"

namespace hydra {

// ---- where x comes from: chunk(n, tile, u) is what this lane multiplies in unit u of a tile
//
// Rows beyond the batch repeat its last row: a column of an MMA depends on no other, and what
// becomes of these is never stored.

// Whole tiles of rows in global memory that begin at multiples of 16 bytes.
template <class Format, int NT>
class AlignedX {
 public:
  HYDRA_DEVICE AlignedX(const uint8_t* rows, int batch, int inputs) : rows_(rows) {
    const int g = thread_index() % 32 / 4;
    HYDRA_UNROLL
    for (int n = 0; n < NT; ++n) {
      offset_[n] = min(n * kColumns + g, batch - 1) * inputs * Format::kXBytes;
    }
  }

  HYDRA_DEVICE uint4 chunk(int n, int tile, int u) const {
    const int t = thread_index() % 4;
    const int chunk = (tile * 4 + t) * Format::kUnits + unit_chunk<Format>(u, t);
    const uint8_t* from = rows_ + uint32_t(chunk * 16) + offset_[n];
    return read_activation(reinterpret_cast<const uint4*>(from));
  }

 private:
  const uint8_t* rows_;
  uint32_t offset_[NT];  // of this lane's rows; `check_linear` keeps K small enough
};

// Rows at any alignment, element by element. K beyond the inputs reads as 0: weights there are 0,
// too, but 0 times what lies behind might be NaN.
template <class Format, int NT>
class UnalignedX {
 public:
  HYDRA_DEVICE UnalignedX(const uint8_t* rows, int batch, int inputs)
      : rows_(rows), batch_(batch), inputs_(inputs) {}

  HYDRA_DEVICE uint4 chunk(int n, int tile, int u) const {
    constexpr int per_chunk = 16 / Format::kXBytes;
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
    const int chunk = t * Format::kUnits + unit_chunk<Format>(u, t);
    const int k = tile * Format::kDepth + chunk * per_chunk;
    const int64_t row = min(n * kColumns + g, batch_ - 1);
    const uint8_t* from = rows_ + (row * inputs_ + k) * Format::kXBytes;
    uint4 v = make_uint4(0, 0, 0, 0);
    HYDRA_NO_UNROLL  // or else the loads of many chunks are hoisted, and registers run out
    for (int first = 0; first < per_chunk; first += per_chunk / 2) {
      uint32_t words[2] = {0, 0};
      HYDRA_UNROLL
      for (int i = 0; i < per_chunk / 2; ++i) {
        uint32_t bits = 0;
        if (k + first + i < inputs_) bits = element(from, first + i);
        words[i * Format::kXBytes / 4] |= bits << (8 * (i * Format::kXBytes % 4));
      }
      if (first == 0) {
        v.x = words[0];
        v.y = words[1];
      } else {
        v.z = words[0];
        v.w = words[1];
      }
    }
    return v;
  }

 private:
  HYDRA_DEVICE static uint32_t element(const uint8_t* chunk, int i) {
    if constexpr (Format::kXBytes == 1) return read_activation(chunk + i);
    return read_activation(reinterpret_cast<const uint16_t*>(chunk) + i);
  }

  const uint8_t* rows_;
  int batch_, inputs_;
};

// How 16-bit x lies under a tile of int8: a lane's 16 values are two chunks.
struct WideChunks {
  static constexpr int kDepth = Int8Format::kDepth, kUnits = 2, kXBytes = 2;
};

// 16-bit x of either kind, quantized to int8 on the way.
template <template <class, int> class Rows, int NT>
class QuantizedX {
 public:
  HYDRA_DEVICE QuantizedX(const uint8_t* rows, int batch, int inputs, bool bfloat, float scale)
      : rows_(rows, batch, inputs), bfloat_(bfloat), scale_(scale), inverse_(1.0f / scale) {}

  HYDRA_DEVICE uint4 chunk(int n, int tile, int) const {
    const uint4 low = rows_.chunk(n, tile, 0), high = rows_.chunk(n, tile, 1);
    return make_uint4(four(low.x, low.y), four(low.z, low.w), four(high.x, high.y),
                      four(high.z, high.w));
  }

 private:
  HYDRA_DEVICE uint32_t at(uint32_t bits) const {
    const float v = bfloat_ ? bfloat_to_float(uint16_t(bits)) : half_to_float(uint16_t(bits));
    return uint32_t(quantized(v, scale_, inverse_)) & 0xff;
  }
  HYDRA_DEVICE uint32_t four(uint32_t a, uint32_t b) const {
    return at(a & 0xffff) | at(a >> 16) << 8 | at(b & 0xffff) << 16 | at(b >> 16) << 24;
  }

  Rows<WideChunks, NT> rows_;
  bool bfloat_;
  float scale_, inverse_;
};

// x in shared memory, in the order of `chunk_position`; every row and all of K are there.
template <class Format>
class SharedX {
 public:
  HYDRA_DEVICE SharedX(const uint8_t* rows, int stride) : stride_(stride) {
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
    chunks_ = rows + g * stride + t * 16;
  }

  HYDRA_DEVICE uint4 chunk(int n, int tile, int u) const {
    const int offset = n * kColumns * stride_ + (tile * Format::kUnits + u) * 64;
    return read_shared(reinterpret_cast<const uint4*>(chunks_ + offset));
  }

 private:
  const uint8_t* chunks_;
  int stride_;
};

// A head's packed weights.
struct Weights {
  const uint4* tiles;            // [row tiles, K tiles, 64]
  const uint32_t* group_scales;  // [row tiles, K tiles, groups, 8 g]: rows g and g + 8 as a pair
  int row_tiles;
  int k_tiles;
  int groups;  // of a K tile: 128 / group, 1 for group 128
};

template <class Format, int NT, int RT>
class WarpMultiply {
 public:
  using Sum = typename Format::Sum;
  // Of int4, whose widening takes registers, less.
  static constexpr int kAhead = !Format::kGroupScales ? 4 / RT : NT == 1 ? 4 - RT : NT == 8 ? 2 / RT : 2;

  // Tiles of K from `k_begin` to `k_end`, of which `run` takes those below `k_whole`. Asks for the
  // first: weights are constants, so this may happen before x is there.
  HYDRA_DEVICE WarpMultiply(const Weights& weights, int row_tile, int k_begin, int k_whole, int k_end)
      : weights_(weights),
        row_tile_(row_tile),
        k_begin_(k_begin),
        k_whole_(max(k_begin, min(k_whole, k_end))),
        k_end_(k_end) {
    HYDRA_UNROLL
    for (int i = 0; i < kAhead; ++i) ask(i, k_begin + i, k_whole_);
    HYDRA_UNROLL
    for (int r = 0; r < RT; ++r) {
      const bool there = k_whole_ < k_end && row_tile + r < weights.row_tiles;
      if (there && lane() < 8) prefetch(tile_at(r, k_whole_) + lane() * 8);
    }
    HYDRA_UNROLL
    for (int r = 0; r < RT; ++r) {
      HYDRA_UNROLL
      for (int n = 0; n < NT; ++n) {
        HYDRA_UNROLL
        for (int i = 0; i < 4; ++i) sum[r][n][i] = 0;
      }
    }
  }

  template <class X>
  HYDRA_DEVICE void run(const X& x) {
    for (int k = k_begin_; k < k_whole_; k += kAhead) {
      HYDRA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (k + i >= k_whole_) break;
        use(i, k + i, x);
        ask(i, k + i + kAhead, k_whole_);
      }
    }
  }

  // One tile at a time: a small loop for what is rare, the end of K and x that is not aligned.
  template <class X>
  HYDRA_DEVICE void run_rest(const X& x) {
    HYDRA_NO_UNROLL
    for (int k = k_whole_; k < k_end_; ++k) {
      ask(0, k, k_end_);
      use(0, k, x);
    }
  }

  Sum sum[RT][NT][4];

 private:
  HYDRA_DEVICE static int lane() { return thread_index() % 32; }

  template <class X>
  HYDRA_DEVICE void use(int slot, int k, const X& x) {
    HYDRA_UNROLL
    for (int u = 0; u < Format::kUnits; ++u) {
      Unit unit[RT];
      HYDRA_UNROLL
      for (int r = 0; r < RT; ++r) Format::expand(tile_[slot][r], u, scale_[slot][r], unit[r]);
      HYDRA_UNROLL
      for (int n = 0; n < NT; ++n) {
        const uint4 chunk = x.chunk(n, k, u);
        HYDRA_UNROLL
        for (int r = 0; r < RT; ++r) {
          Format::mma(sum[r][n], unit[r].a[0], chunk.x, chunk.y);
          Format::mma(sum[r][n], unit[r].a[1], chunk.z, chunk.w);
        }
      }
    }
  }

  HYDRA_DEVICE const uint4* tile_at(int r, int k) const {
    return weights_.tiles + index_of(r, k) * kTileVectors;
  }
  HYDRA_DEVICE int64_t index_of(int r, int k) const {
    return int64_t(row_tile_ + r) * weights_.k_tiles + k;
  }

  HYDRA_DEVICE void ask(int slot, int k, int k_end) {
    HYDRA_UNROLL
    for (int r = 0; r < RT; ++r) {
      tile_[slot][r] = Tile{};  // 0: what is multiplied by it does not count
      scale_[slot][r][0] = scale_[slot][r][1] = 0;
      if (k >= k_end || row_tile_ + r >= weights_.row_tiles) continue;
      tile_[slot][r].step[0] = read_stream(tile_at(r, k) + lane());
      tile_[slot][r].step[1] = read_stream(tile_at(r, k) + lane() + 32);
      if (Format::kGroupScales) {
        const int group = lane() % 4 * weights_.groups / 4;
        const int64_t index = index_of(r, k) * weights_.groups + group;
        const uint32_t pair = read_input(weights_.group_scales + index * 8 + lane() / 4);
        scale_[slot][r][0] = permute_bytes(pair, 0, 0x1010);
        scale_[slot][r][1] = permute_bytes(pair, 0, 0x3232);
      }
    }
  }

  Weights weights_;
  int row_tile_, k_begin_, k_whole_, k_end_;
  Tile tile_[kAhead][RT];
  uint32_t scale_[kAhead][RT][2];
};

}  // namespace hydra
