#include "configuration.h"

#include <algorithm>

#include "failure.h"

namespace hydra {

Variant variant_of(int x_type, int weight_type, int quantize_x) {
  const bool half = x_type == HYDRA_FLOAT16, bfloat = x_type == HYDRA_BFLOAT16;
  if (weight_type == HYDRA_FLOAT16 && half) return Variant::kHalf;
  if (weight_type == HYDRA_BFLOAT16 && bfloat) return Variant::kBfloat;
  if (weight_type == HYDRA_INT8 && x_type == HYDRA_INT8) return Variant::kInt8;
  if (weight_type == HYDRA_INT8 && quantize_x && (half || bfloat)) return Variant::kQuantizing;
  if (weight_type == HYDRA_INT8 && half) return Variant::kInt8Half;
  if (weight_type == HYDRA_INT8 && bfloat) return Variant::kInt8Bfloat;
  if (weight_type == HYDRA_INT4 && half) return Variant::kInt4Half;
  if (weight_type == HYDRA_INT4 && bfloat) return Variant::kInt4Bfloat;
  return Variant::kNone;
}

namespace {

constexpr int kWarps = 8;
constexpr int kMaxIntegerInputs = 131072;  // 127 * 128 * K stays below 2^31
constexpr int kMaxInputs = 1 << 24;        // offsets within 64 rows of x have 32 bits
constexpr int kMaxGridYZ = 65535;
constexpr int kMaxHeads = 3000;  // a summary keeps 16 bytes per head in 48 KB of shared memory

int blocks_of(const hydra_linear_shape& s, const hydra_linear_config& c) {
  return divided_up(s.outputs, 16 * c.row_tiles * c.row_warps) * s.heads *
         divided_up(s.batch, 8 * c.batch_tiles);
}

const char* kTypes[] = {"float32", "float16", "bfloat16", "int8", "int4"};
const char* type_name(int type) { return type >= 0 && type <= 4 ? kTypes[type] : "unknown"; }

}  // namespace

int staged_bytes(const hydra_linear_config& c) {
  const int rows = 16 * c.row_tiles * c.row_warps;
  return c.k_warps * 8 * c.batch_tiles * (rows + 4) * 4;
}

hydra_status check_linear(const hydra_linear_shape& s, int compute_capability) {
  if (s.heads < 1 || s.batch < 1 || s.inputs < 1 || s.outputs < 1) {
    return failure(HYDRA_INVALID,
                   "A layer of M=%d heads, B=%d, K=%d, N=%d. Each must be at least 1. Check the shape.",
                   s.heads, s.batch, s.inputs, s.outputs);
  }
  if (s.heads > kMaxGridYZ || (s.summary != HYDRA_NO_SUMMARY && s.heads > kMaxHeads)) {
    return failure(HYDRA_UNSUPPORTED,
                   "%d heads. One launch takes %d, %d with a summary. Split the heads.", s.heads,
                   kMaxGridYZ, kMaxHeads);
  }
  if (s.inputs > kMaxInputs) {
    return failure(HYDRA_UNSUPPORTED, "K=%d. One layer takes %d. Split K.", s.inputs, kMaxInputs);
  }
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  if (variant == Variant::kNone) {
    return failure(HYDRA_UNSUPPORTED,
                   "x in %s times weights in %s. The kernels multiply 16-bit x by weights of the "
                   "same type, int8 or int4, and int8 x by int8. Cast one of them.",
                   type_name(s.x_type), type_name(s.weight_type));
  }
  const bool bfloat = s.x_type == HYDRA_BFLOAT16 && variant != Variant::kQuantizing;
  if (bfloat && compute_capability < 80) {
    return failure(HYDRA_UNSUPPORTED,
                   "bfloat16 on compute capability %d.%d. Tensor cores multiply it from 8.0 on. Use "
                   "float16.",
                   compute_capability / 10, compute_capability % 10);
  }
  if (is_int4(variant) && s.group != 32 && s.group != 64 && s.group != 128) {
    return failure(HYDRA_UNSUPPORTED,
                   "int4 weights with a scale for every %d values. The kernels know 32, 64 and 128. "
                   "Quantize with one of those.",
                   s.group);
  }
  if ((variant == Variant::kInt8 || variant == Variant::kQuantizing) && s.inputs > kMaxIntegerInputs) {
    return failure(HYDRA_UNSUPPORTED,
                   "K=%d. int32 sums of int8 products are exact up to K=%d. Use int8 weights with "
                   "16-bit x.",
                   s.inputs, kMaxIntegerInputs);
  }
  if (s.y_type < HYDRA_FLOAT32 || s.y_type > HYDRA_INT8) {
    return failure(HYDRA_UNSUPPORTED, "y in %s. It can be float32, float16, bfloat16 or int8. Choose "
                   "one of those.", type_name(s.y_type));
  }
  if (s.activation < HYDRA_NONE || s.activation > HYDRA_TANH) {
    return failure(HYDRA_INVALID, "Activation %d. It is 0 to 4, see hydra_activation. Choose one.",
                   s.activation);
  }
  if (s.summary != HYDRA_NO_SUMMARY) {
    if (s.y_type != HYDRA_FLOAT32) {
      return failure(HYDRA_INVALID,
                     "A summary of y in %s. It is computed from float32 logits. Set y_type to "
                     "float32.", type_name(s.y_type));
    }
    return check_summary({s.summary, s.heads, s.batch, s.outputs, HYDRA_FLOAT32});
  }
  return HYDRA_OK;
}

hydra_status check_linear_config(const hydra_linear_shape& s, const hydra_linear_config& c) {
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  const bool known = (c.batch_tiles == 1 || c.batch_tiles == 2 || c.batch_tiles == 4 ||
                      c.batch_tiles == 8) &&
                     (c.row_tiles == 1 || c.row_tiles == 2);
  if (!known || !linear_exists(variant, c.batch_tiles)) {
    return failure(HYDRA_UNSUPPORTED,
                   "batch_tiles=%d with row_tiles=%d. No such kernel is compiled for these types. Ask "
                   "hydra_choose_linear.", c.batch_tiles, c.row_tiles);
  }
  if (c.row_warps < 1 || c.k_warps < 1 || c.row_warps > kWarps || c.k_warps > kWarps ||
      c.row_warps * c.k_warps > kWarps) {
    return failure(HYDRA_INVALID,
                   "row_warps=%d by k_warps=%d. A block has 1 to %d warps. Ask hydra_choose_linear.",
                   c.row_warps, c.k_warps, kWarps);
  }
  const int warps = c.row_warps * c.k_warps;
  if (s.summary != HYDRA_NO_SUMMARY && (warps & (warps - 1)) != 0) {
    return failure(HYDRA_UNSUPPORTED,
                   "A summary behind %d warps. It is shared out in powers of 2. Ask "
                   "hydra_choose_linear.", warps);
  }
  if (staged_bytes(c) > kSharedWithoutOptIn) {
    return failure(HYDRA_UNSUPPORTED,
                   "A configuration that needs %d bytes of shared memory. %d are at hand. Take fewer "
                   "warps or batch tiles.", staged_bytes(c), kSharedWithoutOptIn);
  }
  if (divided_up(s.outputs, 16 * c.row_tiles * c.row_warps) > kMaxGridYZ) {
    return failure(HYDRA_UNSUPPORTED, "N=%d. This configuration takes %d outputs. Take more warps.",
                   s.outputs, 16 * c.row_tiles * c.row_warps * kMaxGridYZ);
  }
  return HYDRA_OK;
}

hydra_status check_summary(const hydra_summary_shape& s) {
  if (s.kind < HYDRA_SOFTMAX || s.kind > HYDRA_GAUSSIAN) {
    return failure(HYDRA_INVALID, "Summary %d. It is 1 to 3, see hydra_summary_kind. Choose one.",
                   s.kind);
  }
  if (s.heads < 1 || s.batch < 1 || s.outputs < 1) {
    return failure(HYDRA_INVALID,
                   "Logits of M=%d heads, B=%d, C=%d. Each must be at least 1. Check the shape.",
                   s.heads, s.batch, s.outputs);
  }
  if (s.heads > kMaxHeads || s.batch > kMaxGridYZ) {
    return failure(HYDRA_UNSUPPORTED,
                   "A summary of %d heads and %d rows. One launch takes %d and %d. Split the batch.",
                   s.heads, s.batch, kMaxHeads, kMaxGridYZ);
  }
  if (s.kind == HYDRA_GAUSSIAN && s.outputs % 2 != 0) {
    return failure(HYDRA_INVALID,
                   "Gaussian parameters of width %d. It holds D means and D log variances. Make it "
                   "even.", s.outputs);
  }
  if (s.logits_type < HYDRA_FLOAT32 || s.logits_type > HYDRA_BFLOAT16) {
    return failure(HYDRA_UNSUPPORTED,
                   "Logits in %s. They can be float32, float16 or bfloat16. Cast them.",
                   type_name(s.logits_type));
  }
  return HYDRA_OK;
}

bool summary_is_slow(int heads, int outputs, int rows, int batch) {
  const int64_t worth_a_launch = 16 * 1024;  // bytes that one block makes something of meanwhile
  return int64_t(heads) * outputs * std::min(rows, batch) * 4 > worth_a_launch;
}

hydra_summary_config summary_behind(int heads, int outputs, int rows_at_hand, int threads) {
  const int budget = 16 * 1024;  // of shared memory: leaves occupancy alone
  hydra_summary_config c{};
  c.rows = std::max(1, std::min(rows_at_hand, budget / (16 * heads)));
  // A thread reads up to 32 logits in less time than a warp takes to add up its lanes.
  c.head_threads = outputs <= 32 ? 1 : 32;
  const int share = threads / power_of_2_up(std::min(c.rows, threads));
  c.class_threads = std::min(std::max(share, 4), power_of_2_up(std::min(outputs, threads)));
  c.slices = 1;
  return c;
}

}  // namespace hydra

using namespace hydra;

// 1. As many rows of the batch in a block as there are, up to 64: weights are then read once. Fewer
//    while there are fewer blocks than SMs, or few of those that an SM has to itself; weights that
//    are read again come from L2.
// 2. Two row tiles a warp, half the reads of x, where blocks for three of four places remain.
// 3. Warps side by side until a block reads no more x than weights from L2.
// 4. Then warps along K, as long as each has two tiles to hide the latency of the next behind; the
//    rest side by side. Fewer side by side while there are fewer blocks than SMs.
// 5. Half the warps where blocks would not all run at once: a second round that is not full takes as
//    long as a full one.
// With a summary behind it a block has four warps at least: the last one does it alone.
hydra_status hydra_choose_linear(const hydra_linear_shape* shape, const hydra_device* device,
                                 hydra_linear_config* config) {
  const hydra_linear_shape& s = *shape;
  if (hydra_status status = check_linear(s, device->compute_capability)) return status;
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  const int row_tiles = divided_up(s.outputs, 16), k_tiles = divided_up(s.inputs, depth_of(variant));

  hydra_linear_config c{};
  c.batch_tiles = c.row_warps = c.k_warps = 1;
  c.row_tiles = row_tiles > 1 ? 2 : 1;
  const int crowded = 8;  // rounds of blocks behind which an SM no longer misses its second block
  while (8 * c.batch_tiles < s.batch && c.batch_tiles < 8 &&
         linear_exists(variant, 2 * c.batch_tiles)) {
    c.batch_tiles *= 2;
    const bool alone = units_of(variant) * c.batch_tiles > 4;
    if (blocks_of(s, c) < (alone ? crowded : 1) * device->sm_count) {
      c.batch_tiles /= 2;
      break;
    }
  }
  if (2 * blocks_of(s, c) < 3 * device->sm_count) c.row_tiles = 1;
  const int warps = c.batch_tiles * c.row_tiles == 16 ? kWarps / 2 : kWarps;  // shared memory
  const auto widen = [&](int least) {
    while (2 * c.row_warps * c.k_warps <= warps && c.row_warps < least &&
           c.row_warps * c.row_tiles < row_tiles) {
      c.row_warps *= 2;
    }
  };
  widen(units_of(variant) * c.batch_tiles / (2 * c.row_tiles));
  while (2 * c.row_warps * c.k_warps <= warps && k_tiles >= 4 * c.k_warps) c.k_warps *= 2;
  widen(warps);
  while (c.row_warps > 1 && blocks_of(s, c) < device->sm_count) c.row_warps /= 2;
  while (2 * c.row_warps * c.k_warps <= warps && 2 * c.k_warps <= k_tiles) c.k_warps *= 2;
  if (c.row_warps * c.k_warps == kWarps && blocks_of(s, c) > 2 * device->sm_count) {
    (c.k_warps > 1 ? c.k_warps : c.row_warps) /= 2;
  }
  if (s.summary != HYDRA_NO_SUMMARY) {
    while (c.row_warps * c.k_warps < kWarps / 2) c.k_warps *= 2;
  }
  c.prefer_library = s.batch > 64;
  c.prefer_summary_alone = summary_is_slow(s.heads, s.outputs, 8 * c.batch_tiles, s.batch);
  *config = c;
  return HYDRA_OK;
}

hydra_status hydra_check_linear(const hydra_linear_shape* shape, const hydra_device* device,
                                const hydra_linear_config* config) {
  if (hydra_status status = check_linear(*shape, device->compute_capability)) return status;
  return check_linear_config(*shape, *config);
}

// One block per rows while they fill the device; a row of many logits that would keep few blocks
// busy is sliced, at the price of a second launch.
hydra_status hydra_choose_summary(const hydra_summary_shape* shape, const hydra_device* device,
                                  hydra_summary_config* config) {
  if (hydra_status status = check_summary(*shape)) return status;
  constexpr int kThreads = 256;
  const int64_t per_row = int64_t(shape->heads) * shape->outputs;
  const int rows = std::max<int>(1, std::min<int64_t>(divided_up(shape->batch, device->sm_count),
                                                      4096 / std::max<int64_t>(per_row, 1)));
  *config = summary_behind(shape->heads, shape->outputs, rows, kThreads);
  const int64_t worth_slicing = 4096;  // logits; one block took 39 us for 12000 on an H100
  if (shape->kind != HYDRA_GAUSSIAN && per_row > worth_slicing && shape->batch < device->sm_count) {
    config->slices = std::max<int>(
        2, std::min<int64_t>(device->sm_count / shape->batch, shape->outputs / kThreads));
    config->rows = 1;
    config->head_threads = config->class_threads = kThreads;
  }
  return HYDRA_OK;
}
