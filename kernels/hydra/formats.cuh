// How weights and activations are stored, and how one tile of weights meets one chunk of x.
//
// A tile is 16 outputs by 64 bytes of K, 1024 bytes, in the order of hydra_edge/ops/packing.py: in
// step s = 0, 1 lane l = 4 g + t holds 16 bytes, rows g and g + 8 at words 4 t + 2 s and 4 t + 2 s + 1.
// The unit of work is two MMAs against one 16-byte chunk of x. A tile has kUnits of them:
//
//   weights, x           K of a tile   units   a unit's A fragments
//   16 bit, 16 bit                32       1   the words as they are
//   int8,   int8                  64       1   the words as they are
//   int8,   16 bit                64       2   one step, widened
//   int4,   16 bit               128       4   one word of each row, widened and scaled by group
//
// Of a row of x in memory lane t takes kUnits consecutive chunks, in unit u chunk
// kUnits * t + `unit_chunk(u, t)`. Of four, the lanes of a row begin with different ones: or else
// two of them would read from the same banks of L1. `chunk_position` is the order in shared memory.
#pragma once

#include "platform.cuh"

namespace hydra {

constexpr int kRows = 16;        // outputs of a tile
constexpr int kTileVectors = 64;  // 16-byte vectors of a tile
constexpr int kColumns = 8;      // rows of the batch in one MMA

struct Tile {
  uint4 step[2];
};

// Fragments of A for two MMAs.
struct Unit {
  uint32_t a[2][4];
};

// The chunk, of its own kUnits, that lane t multiplies in unit u; and the other way round.
template <class Format>
HYDRA_HOST_DEVICE int unit_chunk(int u, int t) {
  return Format::kUnits == 4 ? u ^ t : u;
}

// ---- 16-bit floats

struct Half {
  HYDRA_DEVICE static float to_float(uint16_t bits) { return half_to_float(bits); }
  HYDRA_DEVICE static uint16_t from_float(float v) { return float_to_half(v); }
  HYDRA_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_half(c, a, b0, b1);
  }

  // Four int8 to two pairs. 0x6400 is 1024, whose last bit counts 1: 0x64vv is 1024 + vv.
  HYDRA_DEVICE static void widen_int8(uint32_t word, uint32_t (&pair)[2]) {
    const uint32_t biased = word ^ 0x80808080u;
    pair[0] = half2_sub(permute_bytes(biased, 0x64646464u, 0x4140), 0x64806480u);  // - 1152
    pair[1] = half2_sub(permute_bytes(biased, 0x64646464u, 0x4342), 0x64806480u);
  }

  // Eight int4 to four pairs. Packing puts K in the order 0 2 4 6 1 3 5 7, so that one mask takes
  // two neighbours. The upper nibble of a byte counts 16: it is divided again by the same FMA that
  // takes the offset away.
  HYDRA_DEVICE static void widen_int4(uint32_t word, uint32_t scale, uint32_t (&pair)[4]) {
    HYDRA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = ((word >> (8 * i)) & 0x000f000fu) ^ 0x64086408u;
      const uint32_t high = ((word >> (8 * i)) & 0x00f000f0u) ^ 0x64806480u;
      pair[2 * i] = half2_mul(half2_sub(low, 0x64086408u), scale);  // - 1032
      pair[2 * i + 1] = half2_mul(half2_fma(high, 0x2c002c00u, 0xd480d480u), scale);  // / 16 - 72
    }
  }
};

struct Bfloat {
  HYDRA_DEVICE static float to_float(uint16_t bits) { return bfloat_to_float(bits); }
  HYDRA_DEVICE static uint16_t from_float(float v) { return float_to_bfloat(v); }
  HYDRA_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bfloat(c, a, b0, b1);
  }

  // bfloat16 has 8 bits, one too few for 128 + int8 with an offset: by way of fp32, 2^23 + v + 128.
  HYDRA_DEVICE static void widen_int8(uint32_t word, uint32_t (&pair)[2]) {
    const uint32_t biased = word ^ 0x80808080u;
    float v[4];
    HYDRA_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] = bits_to_float(permute_bytes(biased, 0x4b000000u, 0x7650 + i)) - 8388736.0f;
    }
    pair[0] = floats_to_bfloats(v[0], v[1]);
    pair[1] = floats_to_bfloats(v[2], v[3]);
  }

  // As `Half::widen_int4`; 0x4300 is 128, whose last bit counts 1.
  HYDRA_DEVICE static void widen_int4(uint32_t word, uint32_t scale, uint32_t (&pair)[4]) {
    const uint32_t one = 0x3f803f80u;
    HYDRA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t biased = ((word >> (4 * i)) & 0x000f000fu) ^ 0x43084308u;
      const uint32_t value = bfloat2_fma(biased, one, 0xc308c308u);  // - 136
      pair[i] = bfloat2_fma(value, scale, 0x80008000u);              // + (-0): a multiplication
    }
  }
};

// ---- formats of a layer
//
// kDepth        K of a tile                 kUnits      units of a tile = chunks of x per lane
// kXBytes       bytes of an element of x    Sum         type of the accumulators
// kGroupScales  whether tiles carry scales  expand      unit u of a tile, ready for the MMAs

template <class Real>
struct Float16Format {
  using Sum = float;
  using X = Real;
  static constexpr int kDepth = 32, kUnits = 1, kXBytes = 2;
  static constexpr bool kGroupScales = false;
  HYDRA_DEVICE static void expand(const Tile& tile, int, const uint32_t (&)[2], Unit& unit) {
    HYDRA_UNROLL
    for (int s = 0; s < 2; ++s) {
      unit.a[s][0] = tile.step[s].x;
      unit.a[s][1] = tile.step[s].y;
      unit.a[s][2] = tile.step[s].z;
      unit.a[s][3] = tile.step[s].w;
    }
  }
  HYDRA_DEVICE static void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Real::mma(c, a, b0, b1);
  }
};

struct Int8Format {
  using Sum = int;
  struct X {};
  static constexpr int kDepth = 64, kUnits = 1, kXBytes = 1;
  static constexpr bool kGroupScales = false;
  HYDRA_DEVICE static void expand(const Tile& tile, int u, const uint32_t (&s)[2], Unit& unit) {
    Float16Format<Half>::expand(tile, u, s, unit);  // words as they are, too
  }
  HYDRA_DEVICE static void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_int8(c, a, b0, b1);
  }
};

template <class Real>
struct Int8WeightFormat {
  using Sum = float;
  using X = Real;
  static constexpr int kDepth = 64, kUnits = 2, kXBytes = 2;
  static constexpr bool kGroupScales = false;
  HYDRA_DEVICE static void expand(const Tile& tile, int u, const uint32_t (&)[2], Unit& unit) {
    const uint4 step = tile.step[u];
    const uint32_t words[4] = {step.x, step.y, step.z, step.w};
    HYDRA_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[2];
      Real::widen_int8(words[i], pair);
      unit.a[i / 2][i % 2] = pair[0];
      unit.a[i / 2][i % 2 + 2] = pair[1];
    }
  }
  HYDRA_DEVICE static void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Real::mma(c, a, b0, b1);
  }
};

template <class Real>
struct Int4WeightFormat {
  using Sum = float;
  using X = Real;
  static constexpr int kDepth = 128, kUnits = 4, kXBytes = 2;
  static constexpr bool kGroupScales = true;
  // `scale`: of rows g and g + 8, each twice in a word.
  HYDRA_DEVICE static void expand(const Tile& tile, int u, const uint32_t (&scale)[2], Unit& unit) {
    const uint4 step = tile.step[u / 2];
    HYDRA_UNROLL
    for (int row = 0; row < 2; ++row) {
      const uint32_t word = u % 2 == 0 ? (row == 0 ? step.x : step.y) : (row == 0 ? step.z : step.w);
      uint32_t pair[4];
      Real::widen_int4(word, scale[row], pair);
      HYDRA_UNROLL
      for (int i = 0; i < 4; ++i) unit.a[i / 2][row + 2 * (i % 2)] = pair[i];
    }
  }
  HYDRA_DEVICE static void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Real::mma(c, a, b0, b1);
  }
};

// ---- activations in shared memory

// Bytes from the start of a row to element k. Chunks of 16 bytes are reordered within a tile such
// that the four lanes of a row read 64 consecutive bytes in every unit.
template <class Format>
HYDRA_HOST_DEVICE int chunk_position(int k) {
  constexpr int per_chunk = 16 / Format::kXBytes;
  const int tile = k / Format::kDepth;
  const int chunk = k % Format::kDepth / per_chunk, t = chunk / Format::kUnits;
  const int place = unit_chunk<Format>(chunk % Format::kUnits, t) * 4 + t;
  return tile * 64 * Format::kUnits + place * 16 + k % per_chunk * Format::kXBytes;
}

// Bytes from row to row: 64 more or less than a multiple of 128, so that the two rows which a
// quarter of a warp reads at once lie in different banks.
template <class Format>
HYDRA_HOST_DEVICE int row_stride(int tiles) {
  return (tiles * Format::kUnits | 1) * 64;
}

// Round to nearest even of v / scale, clamped. One correction makes the product with the inverse
// the quotient in fp32, as `QuantizeLinear` defines it, for a third of a division's instructions.
HYDRA_DEVICE int quantized(float v, float scale, float inverse) {
  const float guess = v * inverse;
  const float rest = fmaf(-guess, scale, v);
  return float_to_int8(fabsf(guess) < 1e6f ? fmaf(rest, inverse, guess) : guess);
}

}  // namespace hydra
