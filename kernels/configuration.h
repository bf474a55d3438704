// How a launch is shared out over the device: chosen from shape and device alone, without CUDA.
#pragma once

#include "hydra_kernels.h"

namespace hydra {

// The kernels that exist, by what they multiply; the order is that of the launchers' tables.
enum class Variant {
  kHalf,         // fp16 x, fp16 weights
  kBfloat,
  kInt8,         // int8 x, int8 weights
  kQuantizing,   // 16-bit x, quantized on the way; int8 weights
  kInt8Half,     // fp16 x, int8 weights
  kInt8Bfloat,
  kInt4Half,
  kInt4Bfloat,
  kNone
};

Variant variant_of(int x_type, int weight_type, int quantize_x);

constexpr bool is_int4(Variant v) { return v == Variant::kInt4Half || v == Variant::kInt4Bfloat; }
constexpr bool is_weight_only(Variant v) {
  return is_int4(v) || v == Variant::kInt8Half || v == Variant::kInt8Bfloat;
}

// K of a tile, as the formats say it.
constexpr int depth_of(Variant v) {
  return is_int4(v) ? 128 : v == Variant::kHalf || v == Variant::kBfloat ? 32 : 64;
}

// Chunks of x per lane and tile.
constexpr int units_of(Variant v) { return is_int4(v) ? 4 : is_weight_only(v) ? 2 : 1; }

// Which batch_tiles of `group_linear` are compiled. Quantizing x anew in every block does not pay
// for many rows.
constexpr bool linear_exists(Variant v, int batch_tiles) {
  return v != Variant::kQuantizing || batch_tiles <= 2;
}

constexpr int kSharedWithoutOptIn = 48 * 1024;

inline int divided_up(int a, int b) { return a / b + (a % b != 0); }
inline int power_of_2_up(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Shared memory of the sums of a block.
int staged_bytes(const hydra_linear_config& config);

hydra_status check_linear(const hydra_linear_shape& shape, int compute_capability);
hydra_status check_linear_config(const hydra_linear_shape& shape, const hydra_linear_config& config);
hydra_status check_summary(const hydra_summary_shape& shape);

// Whether the one block that summarises its rows takes longer for it than another launch would.
bool summary_is_slow(int heads, int outputs, int rows, int batch);

// Of a summary behind another kernel: `threads` threads take up to `rows_at_hand` rows.
hydra_summary_config summary_behind(int heads, int outputs, int rows_at_hand, int threads);

}  // namespace hydra
