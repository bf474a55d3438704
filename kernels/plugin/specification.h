// What one HydraHeads node computes, read from its fields and checked. Knows no TensorRT, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hydra_kernels.h"

namespace hydra::plugin {

// Numbers are those of hydra_kernels.h.
struct Specification {
  int32_t layers;  // not a field: the length of those per layer
  int32_t heads;
  int32_t widths[HYDRA_MAX_LAYERS + 1];  // K, hidden widths, N
  int32_t x_type;
  int32_t weight_type;  // of all layers
  int32_t x_per_head;   // 0: x is [B, K]; 1: [M, B, K]
  int32_t quantize_x;
  int32_t group;
  int32_t activations[HYDRA_MAX_LAYERS];
  int32_t norms[HYDRA_MAX_LAYERS];
  float epsilons[HYDRA_MAX_LAYERS];
  int32_t x_scales[HYDRA_MAX_LAYERS];  // scales of the layer's int8 input: 0 (none), 1 or M
  int32_t y_type;                      // other than FLOAT32 only for one layer without summary
  int32_t y_scales;                    // of INT8 y: 1 or M
  int32_t summary;
  int32_t most_rows;  // the largest batch that the engine was built for; 0 before it is known

  bool integer() const { return x_type == HYDRA_INT8 || quantize_x != 0; }  // int8 times int8
  int32_t hidden_type() const { return integer() ? int32_t(HYDRA_INT8) : x_type; }
  int32_t outputs() const { return widths[layers]; }
  bool has_norms() const;
};

enum class FieldType { kInts, kFloats, kText, kOther };

struct Field {
  const char* name;
  FieldType type;
  const void* data;
  int32_t count;
};

constexpr int kGraphFields = 15;              // what a graph must say,
constexpr int kEngineFields = kGraphFields + 1;  // and what an engine says beside: most_rows

// All fields, which point into `specification`.
void fields_of(const Specification& specification, Field (&fields)[kEngineFields]);

// Reads fields, and refuses what no device can run.
hydra_status parse(const Field* fields, int count, Specification* specification);

// In one line, with the layout of weights: equal lines, equal computations.
void describe(const Specification& specification, char* text, size_t size);

// What the launches of `rows` rows of the batch are asked for. Between layers that multiply
// integers activations are int8, in the scale of the layer that reads them.
hydra_chain_shape chain_shape(const Specification& specification, int32_t rows);
hydra_linear_shape layer_shape(const Specification& specification, int layer, int32_t rows);
hydra_summary_shape summary_shape(const Specification& specification, int32_t rows);

const char* type_name(int32_t type);

// K of a tile of packed weights, 64 bytes.
int32_t tile_depth(int32_t weight_type);

// hydra_fail, as printf would have it.
__attribute__((format(printf, 2, 3))) hydra_status fail(hydra_status status, const char* format,
                                                        ...);

}  // namespace hydra::plugin
