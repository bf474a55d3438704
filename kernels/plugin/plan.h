// How one tactic runs one batch: which launches, shared out how, and where in memory.
//
// A tactic is a number that an engine keeps, so the meaning of its bits does not change:
//
//   bits 0-1  form      1: the whole chain in one launch; 2: one launch per layer
//   bits 2-3  summary   0: there is none; 1: behind the last launch; 2: a launch of its own
//   bits 4-6  variant   of the configuration, where the kernels know it, else as in variant 0:
//                       group_linear                              head_chain
//                       0  as hydra_choose_linear says            as hydra_choose_chain says
//                       1  more warps along K, fewer in a row     twice the slices
//                       2  fewer warps along K, more in a row     half the slices
//                       3  the other row_tiles                    the other number of warps
//                       4  half the batch_tiles                   half the batch_tiles
//
// Tactic 0 is what hydra_choose_... prefers at each batch.
#pragma once

#include "specification.h"

namespace hydra::plugin {

constexpr int kMaxTactics = 2 * 2 * 5;

// Only int32, so that two can be compared.
struct Launches {
  int32_t chain;          // 1: head_chain; 0: group_linear per layer
  int32_t summary_alone;  // 1: ensemble_summary behind them
  hydra_chain_config chain_config;
  hydra_linear_config layer_configs[HYDRA_MAX_LAYERS];
  hydra_summary_config summary_config;
};

// Memory of a summary begins with a counter per row of the largest batch it is for; they are 0
// between launches. What else a summary keeps lies behind.
struct Workspace {
  size_t hidden[2];  // activations between layers, by turns
  size_t summary;
  size_t bytes;
};

struct Plan {
  int32_t tactic, rows;
  Launches launches;
  Workspace workspace;
};

hydra_status check_tactic(const Specification& specification, int32_t tactic);

// What a tactic cannot do at this batch, on this device, is done in another way.
hydra_status make_plan(const Specification& specification, int32_t tactic, int32_t rows,
                       const hydra_device& device, Plan* plan);

// The tactics that differ at this batch, on this device. Returns their number.
int list_tactics(const Specification& specification, int32_t rows, const hydra_device& device,
                 int32_t (&tactics)[kMaxTactics]);

// On every device, and enough for smaller batches, too.
Workspace workspace_of(const Specification& specification, int32_t rows);
size_t summary_bytes(const Specification& specification, int32_t rows);

}  // namespace hydra::plugin
