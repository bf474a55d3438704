// The C interface: checks, picks the compiled kernel, and launches it.
#include <algorithm>

#include "configuration.h"
#include "failure.h"
#include "hydra/summary_kernels.cuh"
#include "tables.h"

using namespace hydra;

namespace {

Real real_of(int type) {
  return type == HYDRA_FLOAT16 ? Real::kHalf
                               : type == HYDRA_BFLOAT16 ? Real::kBfloat : Real::kFloat;
}

Output output_of(int type) {
  return type == HYDRA_INT8 ? Output::kInt8
                            : type == HYDRA_FLOAT16 ? Output::kHalf
                                                    : type == HYDRA_BFLOAT16 ? Output::kBfloat
                                                                             : Output::kFloat;
}

hydra_status finished(cudaError_t error) {
  if (error == cudaSuccess) return HYDRA_OK;
  return failure(HYDRA_CUDA_ERROR,
                 "CUDA refused the launch: %s. The device, the stream or the library's "
                 "architectures may not fit. Run `hydra-edge doctor`.",
                 cudaGetErrorString(error));
}

hydra_status missing(const char* what) {
  return failure(HYDRA_INVALID, "%s is NULL. The kernel would read or write it. Pass a device pointer.",
                 what);
}

SummaryParameters summary_of(const hydra_summary_shape& shape, const hydra_summary_config& config,
                             const void* logits, const hydra_summary_outputs& outputs) {
  SummaryParameters p{};
  p.kind = Summary(shape.kind);
  p.type = real_of(shape.logits_type);
  p.logits = logits;
  p.heads = shape.heads;
  p.batch = shape.batch;
  p.outputs = shape.outputs;
  p.mean = outputs.mean;
  p.predictive_entropy = outputs.predictive_entropy;
  p.expected_entropy = outputs.expected_entropy;
  p.mutual_information = outputs.mutual_information;
  p.variation_ratio = outputs.variation_ratio;
  p.rows = config.rows;
  p.head_threads = config.head_threads;
  p.class_threads = config.class_threads;
  p.slices = config.slices;
  return p;
}

hydra_status check_outputs(int kind, const hydra_summary_outputs& outputs) {
  if (!outputs.mean) return missing("summary.mean");
  if (!outputs.predictive_entropy) return missing("summary.predictive_entropy");
  if (!outputs.expected_entropy) return missing("summary.expected_entropy");
  if (kind == HYDRA_GAUSSIAN) return HYDRA_OK;
  if (!outputs.mutual_information) return missing("summary.mutual_information");
  if (!outputs.variation_ratio) return missing("summary.variation_ratio");
  return HYDRA_OK;
}

hydra_status check_weights(Variant variant, const void* weight, const float* weight_scale,
                           const void* group_scale, const float* x_scale) {
  if (!weight) return missing("weight");
  if (reinterpret_cast<uintptr_t>(weight) % 16 != 0) {
    return failure(HYDRA_INVALID,
                   "weight is at %p. Packed weights are read 16 bytes at a time. Align them to 16.",
                   weight);
  }
  const bool floats = variant == Variant::kHalf || variant == Variant::kBfloat;
  if (!floats && !weight_scale) return missing("weight_scale");
  if (is_int4(variant) && !group_scale) return missing("group_scale");
  if (!floats && !is_weight_only(variant) && !x_scale) return missing("x_scale");
  return HYDRA_OK;
}

}  // namespace

const char* hydra_last_error(void) { return error_text(); }

hydra_status hydra_fail(hydra_status status, const char* message) {
  return failure(status, "%s", message);
}

const char* hydra_weight_layout(void) { return "hydra-mma16-2"; }

hydra_status hydra_query_device(hydra_device* device) {
  int current = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, current);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&device->sm_count, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->compute_capability = 10 * major + minor;
  if (error == cudaSuccess) return HYDRA_OK;
  return failure(HYDRA_CUDA_ERROR,
                 "No CUDA device answers: %s. The kernels need one. Run `hydra-edge doctor`.",
                 cudaGetErrorString(error));
}

size_t hydra_linear_shared_bytes(const hydra_linear_shape* shape, const hydra_linear_config* config) {
  const hydra_linear_shape& s = *shape;
  const hydra_linear_config& c = *config;
  if (s.summary == HYDRA_NO_SUMMARY) return staged_bytes(c);
  const int threads = 32 * c.row_warps * c.k_warps;
  const int rows =
      summary_behind(s.heads, s.outputs, std::min(8 * c.batch_tiles, s.batch), threads).rows;
  return std::max(staged_bytes(c), summary_shared_bytes(rows, s.heads, threads));
}

hydra_status hydra_group_linear(const hydra_linear_shape* shape, const hydra_linear_config* config,
                                const hydra_linear_arguments* arguments, void* stream) {
  const hydra_linear_shape& s = *shape;
  const hydra_linear_arguments& a = *arguments;
  hydra_device device;
  if (hydra_status status = hydra_query_device(&device)) return status;
  if (hydra_status status = check_linear(s, device.compute_capability)) return status;
  hydra_linear_config c;
  if (config) {
    c = *config;
  } else if (hydra_status status = hydra_choose_linear(shape, &device, &c)) {
    return status;
  }
  if (hydra_status status = check_linear_config(s, c)) return status;
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  if (!a.x) return missing("x");
  if (!a.y) return missing("y");
  if (hydra_status status =
          check_weights(variant, a.weight, a.weight_scale, a.group_scale, a.x_scale)) {
    return status;
  }
  if (s.y_type == HYDRA_INT8 && !a.y_scale) return missing("y_scale");

  GroupLinear p{};
  p.x = a.x;
  p.x_per_head = s.x_per_head != 0;
  p.x_real = real_of(s.x_type);
  p.x_scale = {a.x_scale, a.x_scale_per_head != 0};
  p.tiles = static_cast<const uint4*>(a.weight);
  p.group_scales = static_cast<const uint32_t*>(a.group_scale);
  p.groups = is_int4(variant) ? 128 / s.group : 0;
  p.heads = s.heads;
  p.batch = s.batch;
  p.inputs = s.inputs;
  const HeadScale x_scale = is_weight_only(variant) ? HeadScale{nullptr, 0} : p.x_scale;
  p.epilogue = {a.weight_scale, a.bias, x_scale, Activation(s.activation), s.outputs};
  p.y = a.y;
  p.y_type = output_of(s.y_type);
  p.y_scale = {a.y_scale, a.y_scale_per_head != 0};
  p.split = {c.row_warps, c.k_warps};
  const int threads = 32 * c.row_warps * c.k_warps;
  const int rows = 16 * c.row_tiles * c.row_warps, batch_rows = 8 * c.batch_tiles;
  if (s.summary != HYDRA_NO_SUMMARY) {
    if (!a.counters) return missing("counters");
    if (hydra_status status = check_outputs(s.summary, a.summary)) return status;
    const hydra_summary_config behind =
        summary_behind(s.heads, s.outputs, std::min(batch_rows, s.batch), threads);
    p.summary = summary_of({s.summary, s.heads, s.batch, s.outputs, HYDRA_FLOAT32}, behind, a.y,
                           a.summary);
    p.counters = a.counters;
  }
  const dim3 grid(divided_up(s.batch, batch_rows), divided_up(s.outputs, rows), s.heads);
  const Launch how = {grid, threads, hydra_linear_shared_bytes(shape, &c), c.overlap != 0,
                      static_cast<cudaStream_t>(stream)};
  return finished(launch(linear_kernel(variant, c.batch_tiles, c.row_tiles), how, p));
}

// ---- the chain

namespace {

// A block's warps over one layer: side by side as far as there are row tiles, the rest along K.
Split chain_split(int outputs, int k_tiles, int warps) {
  Split split{1, 1};
  while (split.row_warps < warps && split.row_warps < divided_up(outputs, kRows)) split.row_warps *= 2;
  while (split.row_warps * split.k_warps < warps && split.k_warps < k_tiles) split.k_warps *= 2;
  return split;
}

struct ChainMemory {
  int odd, staged, norm, end;  // bytes; the even activations begin at 0
};

ChainMemory chain_memory(const hydra_chain_shape& s, const hydra_chain_config& c, Variant variant) {
  const int units = units_of(variant);
  const int batch = 8 * c.batch_tiles, depth = depth_of(variant);
  int activations[2] = {0, 0}, staged = 0, norm = 0;
  for (int l = 0; l < s.layers; ++l) {
    const int k_tiles = divided_up(s.widths[l], depth), outputs = s.widths[l + 1];
    const Split split = chain_split(outputs, k_tiles, c.warps);
    activations[l % 2] = std::max(activations[l % 2], batch * (k_tiles * units | 1) * 64);
    staged = std::max(staged, split.k_warps * batch * staged_stride(split.row_warps * kRows) * 4);
    if (s.norms[l]) norm = std::max(norm, batch * outputs * 4);
  }
  ChainMemory memory;
  memory.odd = activations[0];
  memory.staged = memory.odd + activations[1];
  memory.norm = memory.staged + staged;
  memory.end = memory.norm + norm;
  return memory;
}

// A kernel of one layer's shape says whether types and sizes are fine.
hydra_linear_shape layer_shape(const hydra_chain_shape& s, int l) {
  hydra_linear_shape layer{};
  layer.heads = s.heads;
  layer.batch = s.batch;
  layer.inputs = s.widths[l];
  layer.outputs = s.widths[l + 1];
  layer.x_type = s.x_type;
  layer.weight_type = s.weight_type;
  layer.y_type = HYDRA_FLOAT32;
  layer.quantize_x = s.quantize_x;
  layer.group = s.group;
  layer.activation = s.activations[l];
  layer.summary = l == s.layers - 1 ? s.summary : int(HYDRA_NO_SUMMARY);
  return layer;
}

hydra_status check_chain(const hydra_chain_shape& s, int compute_capability) {
  if (s.layers < 2 || s.layers > HYDRA_MAX_LAYERS) {
    return failure(HYDRA_UNSUPPORTED,
                   "A head of %d layers. A chain has 2 to %d, the output layer included. Launch one "
                   "hydra_group_linear per layer.", s.layers, HYDRA_MAX_LAYERS);
  }
  for (int l = 0; l < s.layers; ++l) {
    if (hydra_status status = check_linear(layer_shape(s, l), compute_capability)) return status;
  }
  if (s.norms[s.layers - 1]) {
    return failure(HYDRA_UNSUPPORTED,
                   "LayerNorm behind the output layer. It is known behind hidden layers. Apply it "
                   "yourself.");
  }
  return HYDRA_OK;
}

hydra_status check_chain_config(const hydra_chain_shape& s, const hydra_chain_config& c,
                                Variant variant, int shared_bytes) {
  if ((c.batch_tiles != 1 && c.batch_tiles != 2 && c.batch_tiles != 4) ||
      (c.warps != 4 && c.warps != 8) || c.slices < 1 || c.slices > divided_up(s.widths[s.layers], kRows)) {
    return failure(HYDRA_INVALID,
                   "batch_tiles=%d, warps=%d, slices=%d. They are 1, 2 or 4; 4 or 8; 1 to the row "
                   "tiles of the output. Ask hydra_choose_chain.", c.batch_tiles, c.warps, c.slices);
  }
  const int bytes = chain_memory(s, c, variant).end;
  if (bytes > shared_bytes) {
    return failure(HYDRA_UNSUPPORTED,
                   "A chain whose activations take %d bytes of shared memory. A block of this device "
                   "has %d. Launch one hydra_group_linear per layer.", bytes, shared_bytes);
  }
  return HYDRA_OK;
}

}  // namespace

// One block per head and rows. Slices while there are fewer blocks than SMs and the hidden layers,
// which every slice computes anew, stay below a quarter of a slice's work.
hydra_status hydra_choose_chain(const hydra_chain_shape* shape, const hydra_device* device,
                                hydra_chain_config* config) {
  const hydra_chain_shape& s = *shape;
  if (hydra_status status = check_chain(s, device->compute_capability)) return status;
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  hydra_chain_config c{};
  c.batch_tiles = 1;
  c.warps = 8;
  c.slices = 1;
  while (8 * c.batch_tiles < s.batch && c.batch_tiles < 4) {
    c.batch_tiles *= 2;
    if (chain_memory(s, c, variant).end > device->shared_bytes) {
      c.batch_tiles /= 2;
      break;
    }
  }
  const int64_t output = int64_t(s.widths[s.layers - 1]) * s.widths[s.layers];
  int64_t hidden = 0;
  for (int l = 0; l + 1 < s.layers; ++l) hidden += int64_t(s.widths[l]) * s.widths[l + 1];
  const int blocks = s.heads * divided_up(s.batch, 8 * c.batch_tiles);
  const int output_groups = divided_up(s.widths[s.layers], kRows * c.warps);
  while (2 * c.slices <= output_groups && 2 * c.slices * blocks <= device->sm_count &&
         8 * hidden * c.slices <= output) {
    c.slices *= 2;
  }
  if (hydra_status status = check_chain_config(s, c, variant, device->shared_bytes)) return status;
  // One SM streams some 64 KB in the time of a launch; what lies beyond is faster on all of them.
  const int bits = is_int4(variant) ? 4 : variant == Variant::kHalf || variant == Variant::kBfloat ? 16 : 8;
  const int64_t block_bytes = (hidden + output / c.slices) * bits / 8;
  const int64_t worth_a_launch = 64 * 1024;
  c.prefer_layers = block_bytes > worth_a_launch * (s.layers - 1) || s.batch > 64;
  c.prefer_summary_alone =
      summary_is_slow(s.heads, s.widths[s.layers], 8 * c.batch_tiles, s.batch);
  *config = c;
  return HYDRA_OK;
}

hydra_status hydra_check_chain(const hydra_chain_shape* shape, const hydra_device* device,
                               const hydra_chain_config* config) {
  const hydra_chain_shape& s = *shape;
  if (hydra_status status = check_chain(s, device->compute_capability)) return status;
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  return check_chain_config(s, *config, variant, device->shared_bytes);
}

size_t hydra_chain_shared_bytes(const hydra_chain_shape* shape, const hydra_chain_config* config) {
  const hydra_chain_shape& s = *shape;
  const hydra_chain_config& c = *config;
  const int bytes = chain_memory(s, c, variant_of(s.x_type, s.weight_type, s.quantize_x)).end;
  if (s.summary == HYDRA_NO_SUMMARY) return bytes;
  const int threads = 32 * c.warps;
  const int rows = summary_behind(s.heads, s.widths[s.layers], std::min(8 * c.batch_tiles, s.batch),
                                  threads).rows;
  return std::max(bytes, summary_shared_bytes(rows, s.heads, threads));
}

hydra_status hydra_head_chain(const hydra_chain_shape* shape, const hydra_chain_config* config,
                              const hydra_chain_arguments* arguments, void* stream) {
  const hydra_chain_shape& s = *shape;
  const hydra_chain_arguments& a = *arguments;
  hydra_device device;
  if (hydra_status status = hydra_query_device(&device)) return status;
  if (hydra_status status = check_chain(s, device.compute_capability)) return status;
  hydra_chain_config c;
  if (config) {
    c = *config;
  } else if (hydra_status status = hydra_choose_chain(shape, &device, &c)) {
    return status;
  }
  const Variant variant = variant_of(s.x_type, s.weight_type, s.quantize_x);
  if (hydra_status status = check_chain_config(s, c, variant, device.shared_bytes)) return status;
  if (!a.x) return missing("x");
  if (!a.y) return missing("y");

  HeadChain p{};
  p.x = a.x;
  p.x_per_head = s.x_per_head != 0;
  p.x_real = real_of(s.x_type);
  p.x_quantized = s.x_type == HYDRA_INT8;
  p.heads = s.heads;
  p.batch = s.batch;
  p.layers = s.layers;
  p.y = a.y;
  for (int l = 0; l < s.layers; ++l) {
    const hydra_chain_layer& from = a.layers[l];
    if (hydra_status status = check_weights(variant, from.weight, from.weight_scale,
                                            from.group_scale, from.x_scale)) {
      return status;
    }
    if (s.norms[l] && !(from.gamma && from.beta)) return missing("gamma or beta");
    ChainLayer& layer = p.layer[l];
    layer.tiles = static_cast<const uint4*>(from.weight);
    layer.group_scales = static_cast<const uint32_t*>(from.group_scale);
    layer.groups = is_int4(variant) ? 128 / s.group : 0;
    layer.inputs = s.widths[l];
    HeadScale x_scale = {nullptr, 0};
    if (!is_weight_only(variant)) x_scale = {from.x_scale, from.x_scale_per_head != 0};
    layer.epilogue = {from.weight_scale, from.bias, x_scale, Activation(s.activations[l]),
                      s.widths[l + 1]};
    layer.gamma = s.norms[l] ? from.gamma : nullptr;
    layer.beta = from.beta;
    layer.epsilon = from.epsilon;
    layer.split = chain_split(s.widths[l + 1], divided_up(s.widths[l], depth_of(variant)), c.warps);
  }
  const ChainMemory memory = chain_memory(s, c, variant);
  p.odd_offset = memory.odd;
  p.staged_offset = memory.staged;
  p.norm_offset = memory.norm;
  const int threads = 32 * c.warps, batch_rows = 8 * c.batch_tiles, outputs = s.widths[s.layers];
  if (s.summary != HYDRA_NO_SUMMARY) {
    if (!a.counters) return missing("counters");
    if (hydra_status status = check_outputs(s.summary, a.summary)) return status;
    const hydra_summary_config behind =
        summary_behind(s.heads, outputs, std::min(batch_rows, s.batch), threads);
    p.summary =
        summary_of({s.summary, s.heads, s.batch, outputs, HYDRA_FLOAT32}, behind, a.y, a.summary);
    p.counters = a.counters;
  }
  const dim3 grid(divided_up(s.batch, batch_rows), c.slices, s.heads);
  const Launch how = {grid, threads, hydra_chain_shared_bytes(shape, &c), c.overlap != 0,
                      static_cast<cudaStream_t>(stream)};
  return finished(launch(chain_kernel(variant, c.batch_tiles), how, p));
}

// ---- the summary

namespace {

// Workspace of a sliced summary: counters, then statistics, then parts.
struct SummaryWorkspace {
  size_t statistics, parts, end;
};

SummaryWorkspace summary_workspace(const hydra_summary_shape& s, const hydra_summary_config& c) {
  if (c.slices <= 1) return {0, 0, 0};
  SummaryWorkspace w;
  w.statistics = size_t(s.batch) * sizeof(uint32_t);
  w.parts = w.statistics + size_t(s.batch) * s.heads * sizeof(HeadStatistics);
  w.end = w.parts + size_t(s.batch) * c.slices * sizeof(RowPart);
  return w;
}

bool power_of_2(int n) { return n > 0 && (n & (n - 1)) == 0; }

}  // namespace

size_t hydra_summary_workspace(const hydra_summary_shape* shape, const hydra_summary_config* config) {
  return summary_workspace(*shape, *config).end;
}

hydra_status hydra_ensemble_summary(const hydra_summary_shape* shape,
                                    const hydra_summary_config* config, const void* logits,
                                    const hydra_summary_outputs* outputs, void* workspace,
                                    void* stream) {
  const hydra_summary_shape& s = *shape;
  if (hydra_status status = check_summary(s)) return status;
  hydra_summary_config c;
  if (config) {
    c = *config;
  } else {
    hydra_device device;
    if (hydra_status status = hydra_query_device(&device)) return status;
    if (hydra_status status = hydra_choose_summary(shape, &device, &c)) return status;
  }
  const bool sliced = c.slices > 1;
  const bool head_threads = c.head_threads == 1 || c.head_threads == 32 || c.head_threads == kSummaryThreads;
  if (c.rows < 1 || c.slices < 1 || !head_threads || !power_of_2(c.class_threads) ||
      c.class_threads > kSummaryThreads ||
      (sliced && (s.kind == HYDRA_GAUSSIAN || c.rows != 1 || c.class_threads != kSummaryThreads))) {
    return failure(HYDRA_INVALID,
                   "rows=%d, head_threads=%d, class_threads=%d, slices=%d. No kernel shares out its "
                   "work so. Ask hydra_choose_summary.",
                   c.rows, c.head_threads, c.class_threads, c.slices);
  }
  const int shared_bytes = summary_shared_bytes(c.rows, s.heads, kSummaryThreads);
  if (shared_bytes > 2 * kSharedWithoutOptIn) {
    return failure(HYDRA_UNSUPPORTED,
                   "rows=%d of %d heads. They need %d bytes of shared memory. Take fewer rows.",
                   c.rows, s.heads, shared_bytes);
  }
  if (!logits) return missing("logits");
  if (hydra_status status = check_outputs(s.kind, *outputs)) return status;
  if (sliced && !workspace) return missing("workspace");

  SummaryParameters p = summary_of(s, c, logits, *outputs);
  Launch how = {dim3(divided_up(s.batch, c.rows)), kSummaryThreads, size_t(shared_bytes), false,
                static_cast<cudaStream_t>(stream)};
  if (!sliced) return finished(launch(summary_rows, how, p));

  const SummaryWorkspace w = summary_workspace(s, c);
  unsigned char* bytes = static_cast<unsigned char*>(workspace);
  p.counters = reinterpret_cast<uint32_t*>(bytes);
  p.statistics = reinterpret_cast<HeadStatistics*>(bytes + w.statistics);
  p.parts = reinterpret_cast<RowPart*>(bytes + w.parts);
  if (s.kind == HYDRA_SOFTMAX) {
    how.grid = dim3(s.heads, s.batch);
    if (hydra_status status = finished(launch(summary_heads, how, p))) return status;
  }
  how.grid = dim3(c.slices, s.batch);
  return finished(launch(summary_classes, how, p));
}
