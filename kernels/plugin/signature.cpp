#include "signature.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>

namespace hydra::plugin {

namespace {

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// "weight of layer 1"
void title(const Tensor& tensor, char (&text)[64]) {
  if (tensor.layer == kAbsent) {
    std::snprintf(text, sizeof(text), "%s", tensor.name);
  } else {
    std::snprintf(text, sizeof(text), "%s of layer %d", tensor.name, tensor.layer);
  }
}

// "[3, B, 10]"
void print(int rank, const int64_t* dims, char (&text)[128]) {
  size_t used = size_t(std::snprintf(text, sizeof(text), "["));
  for (int i = 0; i < rank && used < sizeof(text); ++i) {
    const char* comma = i > 0 ? ", " : "";
    const size_t room = sizeof(text) - used;
    used += size_t(dims[i] == kBatch ? std::snprintf(text + used, room, "%sB", comma)
                                     : std::snprintf(text + used, room, "%s%lld", comma,
                                                     static_cast<long long>(dims[i])));
  }
  if (used < sizeof(text)) std::snprintf(text + used, sizeof(text) - used, "]");
}

}  // namespace

Signature::Signature(const Specification& s) : inputs(0), outputs(0), tensors(), layers() {
  const int64_t heads = s.heads;
  const auto add = [&](const char* name, int layer, int32_t type,
                       std::initializer_list<int64_t> dims) {
    Tensor& tensor = tensors[inputs + outputs];
    tensor = {name, layer, type, int(dims.size()), {}};
    std::copy(dims.begin(), dims.end(), tensor.dims);
    return inputs + outputs;
  };
  const auto input = [&](bool there, const char* name, int layer, int32_t type,
                         std::initializer_list<int64_t> dims) {
    if (!there) return kAbsent;
    const int number = add(name, layer, type, dims);
    ++inputs;
    return number;
  };
  const auto output = [&](const char* name, int32_t type, std::initializer_list<int64_t> dims) {
    add(name, kAbsent, type, dims);
    ++outputs;
  };

  if (s.x_per_head) {
    input(true, "x", kAbsent, s.x_type, {heads, kBatch, s.widths[0]});
  } else {
    input(true, "x", kAbsent, s.x_type, {kBatch, s.widths[0]});
  }
  const bool scaled = s.weight_type == HYDRA_INT8 || s.weight_type == HYDRA_INT4;
  for (int l = 0; l < s.layers; ++l) {
    const int64_t k = s.widths[l], n = s.widths[l + 1], tiles = up(n, 16);
    const int64_t depth = tile_depth(s.weight_type);
    const bool grouped = s.weight_type == HYDRA_INT4;
    LayerInputs& of = layers[l];
    of.weight = input(true, "weight", l, kWords, {heads, tiles, up(k, depth), 256});
    of.bias = input(true, "bias", l, HYDRA_FLOAT32, {heads, n});
    of.weight_scale = input(scaled, "weight_scale", l, HYDRA_FLOAT32, {heads, n});
    of.group_scale = input(grouped, "group_scale", l, s.x_type,
                           {heads, tiles, up(k, 128), grouped ? 128 / s.group : 0, 8, 2});
    of.x_scale = input(s.x_scales[l] > 0, "x_scale", l, HYDRA_FLOAT32, {s.x_scales[l]});
    of.gamma = input(s.norms[l] != 0, "gamma", l, HYDRA_FLOAT32, {heads, n});
    of.beta = input(s.norms[l] != 0, "beta", l, HYDRA_FLOAT32, {heads, n});
  }
  y_scale = input(s.y_scales > 0, "y_scale", kAbsent, HYDRA_FLOAT32, {s.y_scales});

  const int64_t n = s.outputs();
  output("y", s.y_type, {heads, kBatch, n});
  if (s.summary == HYDRA_GAUSSIAN) {
    for (const char* name : {"mean", "aleatoric_variance", "epistemic_variance"}) {
      output(name, HYDRA_FLOAT32, {kBatch, n / 2});
    }
  } else if (s.summary != HYDRA_NO_SUMMARY) {
    output("mean", HYDRA_FLOAT32, {kBatch, n});
    for (const char* name :
         {"predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio"}) {
      output(name, HYDRA_FLOAT32, {kBatch});
    }
  }
}

hydra_status Signature::match_counts(int found_inputs, int found_outputs) const {
  if (found_inputs == inputs && found_outputs == outputs) return HYDRA_OK;
  return fail(HYDRA_INVALID,
              "%d inputs and %d outputs. These heads have %d and %d. Compile the graph again, with "
              "the hydra-edge that this plugin is from.",
              found_inputs, found_outputs, inputs, outputs);
}

hydra_status Signature::match(const Dims* found, int32_t* rows) const {
  int64_t batch = kBatch;
  for (int i = 0; i < inputs + outputs; ++i) {
    const Tensor& tensor = tensors[i];
    bool equal = found[i].rank == tensor.rank;
    for (int d = 0; equal && d < tensor.rank; ++d) {
      const int64_t size = found[i].values[d];
      if (tensor.dims[d] != kBatch) {
        equal = size == tensor.dims[d];
      } else if (batch == kBatch && size >= 1 && size <= INT32_MAX) {
        batch = size;
      } else {
        equal = size == batch && size >= 1;
      }
    }
    if (equal) continue;
    char name[64], is[128], expected[128];
    title(tensor, name);
    print(found[i].rank, found[i].values, is);
    print(tensor.rank, tensor.dims, expected);
    return fail(HYDRA_INVALID,
                "%s is %s. That of these heads is %s, and B the same everywhere, 1 or more. "
                "Correct the shapes.",
                name, is, expected);
  }
  *rows = int32_t(batch);
  return HYDRA_OK;
}

}  // namespace hydra::plugin
