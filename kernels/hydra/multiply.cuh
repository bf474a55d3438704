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

// x in global memory, rows of K elements, any alignment.
template <class Format>
struct GlobalX {
  const uint8_t* rows;  // of this head, first row of the batch tile
  int batch;            // rows that exist
  int inputs;           // K
  bool aligned;         // 16 bytes, in every row

  // Elements k… of row b, 16 bytes; 0 where there are none.
  HYDRA_DEVICE uint4 chunk(int b, int tile, int u, int t) const {
    constexpr int per_chunk = 16 / Format::kXBytes;
    const int k = tile * Format::kDepth + (t * Format::kUnits + u) * per_chunk;
    const uint8_t* row = rows + int64_t(b) * inputs * Format::kXBytes;
    if (b >= batch || k >= inputs) return make_uint4(0, 0, 0, 0);
    if (aligned) return read_input(reinterpret_cast<const uint4*>(row + k * Format::kXBytes));
    uint32_t words[4] = {0, 0, 0, 0};
    HYDRA_UNROLL
    for (int i = 0; i < per_chunk; ++i) {
      if (k + i >= inputs) break;
      const uint32_t bits = Format::kXBytes == 1
                                ? read_input(row + k + i)
                                : read_input(reinterpret_cast<const uint16_t*>(row) + k + i);
      words[i * Format::kXBytes / 4] |= bits << (8 * (i * Format::kXBytes % 4));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// 16-bit x in global memory, quantized to int8 on the way.
struct QuantizedX {
  const uint16_t* rows;
  int batch;
  int inputs;
  bool aligned;
  bool bfloat;
  float scale, inverse;

  HYDRA_DEVICE int at(uint16_t bits) const {
    return quantized(bfloat ? bfloat_to_float(bits) : half_to_float(bits), scale, inverse);
  }
  HYDRA_DEVICE uint32_t four(uint32_t low, uint32_t high) const {
    return (at(low & 0xffff) & 0xff) | (at(low >> 16) & 0xff) << 8 | (at(high & 0xffff) & 0xff) << 16 |
           uint32_t(at(high >> 16)) << 24;
  }
  HYDRA_DEVICE uint4 chunk(int b, int tile, int, int t) const {
    const int k = tile * Int8Format::kDepth + t * 16;
    const uint16_t* row = rows + int64_t(b) * inputs;
    if (b >= batch || k >= inputs) return make_uint4(0, 0, 0, 0);
    uint32_t words[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    HYDRA_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (k + 8 * half >= inputs) break;
      if (aligned) {
        const uint4 v = read_input(reinterpret_cast<const uint4*>(row + k + 8 * half));
        words[4 * half] = v.x;
        words[4 * half + 1] = v.y;
        words[4 * half + 2] = v.z;
        words[4 * half + 3] = v.w;
      } else {
        HYDRA_UNROLL
        for (int i = 8 * half; i < 8 * half + 8; ++i) {
          if (k + i < inputs) words[i / 2] |= uint32_t(read_input(row + k + i)) << (16 * (i % 2));
        }
      }
    }
    return make_uint4(four(words[0], words[1]), four(words[2], words[3]),
                      four(words[4], words[5]), four(words[6], words[7]));
  }
};

// x in shared memory, in the order of `chunk_position`; every row and all of K are there.
template <class Format>
struct SharedX {
  const uint8_t* rows;
  int stride;

  HYDRA_DEVICE uint4 chunk(int b, int tile, int u, int t) const {
    const int offset = b * stride + (tile * Format::kUnits + u) * 64 + t * 16;
    return read_shared(reinterpret_cast<const uint4*>(rows + offset));
  }
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
  static constexpr int kAhead = 4 / RT;

  // Asks for the first tiles. Weights are constants, so this may run before x is there.
  HYDRA_DEVICE WarpMultiply(const Weights& weights, int row_tile, int k_begin, int k_end)
      : weights_(weights), row_tile_(row_tile), k_begin_(k_begin), k_end_(k_end) {
    HYDRA_UNROLL
    for (int i = 0; i < kAhead; ++i) ask(i, k_begin + i);
  }

  template <class X>
  HYDRA_DEVICE void run(const X& x) {
    const int g = lane() / 4, t = lane() % 4;
    HYDRA_UNROLL
    for (int r = 0; r < RT; ++r) {
      HYDRA_UNROLL
      for (int n = 0; n < NT; ++n) {
        HYDRA_UNROLL
        for (int i = 0; i < 4; ++i) sum[r][n][i] = 0;
      }
    }
    for (int k = k_begin_; k < k_end_; k += kAhead) {
      HYDRA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (k + i >= k_end_) break;
        HYDRA_UNROLL
        for (int u = 0; u < Format::kUnits; ++u) {
          Unit unit[RT];
          HYDRA_UNROLL
          for (int r = 0; r < RT; ++r) Format::expand(tile_[i][r], u, scale_[i][r], unit[r]);
          HYDRA_UNROLL
          for (int n = 0; n < NT; ++n) {
            const uint4 chunk = x.chunk(n * kColumns + g, k + i, u, t);
            HYDRA_UNROLL
            for (int r = 0; r < RT; ++r) {
              Format::mma(sum[r][n], unit[r].a[0], chunk.x, chunk.y);
              Format::mma(sum[r][n], unit[r].a[1], chunk.z, chunk.w);
            }
          }
        }
        ask(i, k + i + kAhead);
      }
    }
  }

  Sum sum[RT][NT][4];

 private:
  HYDRA_DEVICE static int lane() { return thread_index() % 32; }

  HYDRA_DEVICE void ask(int slot, int k) {
    HYDRA_UNROLL
    for (int r = 0; r < RT; ++r) {
      if (k >= k_end_ || row_tile_ + r >= weights_.row_tiles) {
        tile_[slot][r] = Tile{};  // 0: what is multiplied by it does not count
        scale_[slot][r][0] = scale_[slot][r][1] = 0;
        continue;
      }
      const int64_t index = int64_t(row_tile_ + r) * weights_.k_tiles + k;
      const uint4* tile = weights_.tiles + index * kTileVectors + lane();
      tile_[slot][r].step[0] = read_stream(tile);
      tile_[slot][r].step[1] = read_stream(tile + 32);
      if (Format::kGroupScales) {
        const int group = lane() % 4 * weights_.groups / 4;
        const uint32_t pair =
            read_input(weights_.group_scales + (index * weights_.groups + group) * 8 + lane() / 4);
        scale_[slot][r][0] = permute_bytes(pair, 0, 0x1010);
        scale_[slot][r][1] = permute_bytes(pair, 0, 0x3232);
      }
    }
  }

  Weights weights_;
  int row_tile_, k_begin_, k_end_;
  Tile tile_[kAhead][RT];
  uint32_t scale_[kAhead][RT][2];
};

}  // namespace hydra
