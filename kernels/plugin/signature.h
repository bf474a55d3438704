// The tensors of one HydraHeads node, in TensorRT's order.
#pragma once

#include "specification.h"

namespace hydra::plugin {

constexpr int kMaxRank = 6;
constexpr int kMaxInputs = 2 + 7 * HYDRA_MAX_LAYERS;
constexpr int kMaxOutputs = 6;
constexpr int32_t kWords = -1;  // a type beside hydra_type: packed weights, as int32
constexpr int64_t kBatch = -1;  // a dimension that is only known when the node runs
constexpr int kAbsent = -1;     // an input that the node does not have

struct Tensor {
  const char* name;
  int layer;  // or kAbsent
  int32_t type;
  int rank;
  int64_t dims[kMaxRank];
};

// Which inputs of the node are those of a layer.
struct LayerInputs {
  int weight, bias, weight_scale, group_scale, x_scale, gamma, beta;
};

struct Dims {
  int rank;
  const int64_t* values;
};

struct Signature {
  int inputs, outputs;
  Tensor tensors[kMaxInputs + kMaxOutputs];  // inputs, x first; then outputs, y first
  LayerInputs layers[HYDRA_MAX_LAYERS];
  int y_scale;

  explicit Signature(const Specification& specification);

  hydra_status match_counts(int inputs, int outputs) const;

  // Refuses tensors, inputs and then outputs, that are not those of the node; else `rows` is B.
  hydra_status match(const Dims* found, int32_t* rows) const;
};

}  // namespace hydra::plugin
