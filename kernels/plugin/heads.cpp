#include "heads.h"

#include <initializer_list>

namespace hydra::plugin {

struct Heads::Call {
  int32_t rows;
  const void* const* inputs;
  void* const* outputs;
  unsigned char* workspace;
  void* stream;
  unsigned char* summary;  // its memory, which begins with
  int32_t counters;        // so many counters

  const void* input(int number) const { return number == kAbsent ? nullptr : inputs[number]; }
  const float* floats(int number) const { return static_cast<const float*>(input(number)); }
  uint32_t* fused_counters() const { return reinterpret_cast<uint32_t*>(summary); }

  hydra_summary_outputs summaries(int32_t kind) const {
    if (kind == HYDRA_NO_SUMMARY) return {};
    const auto output = [&](int number) { return static_cast<float*>(outputs[number]); };
    if (kind == HYDRA_GAUSSIAN) return {output(1), output(2), output(3), nullptr, nullptr};
    return {output(1), output(2), output(3), output(4), output(5)};
  }
};

Heads::Heads(const Specification& specification)
    : specification_(specification), signature_(specification) {}

Heads::Heads(const Heads& other)
    : specification_(other.specification_),
      signature_(other.signature_),
      usual_rows_(other.usual_rows_),
      tactic_(other.tactic_),
      plan_(other.plan_) {}

Heads::~Heads() { hydra_free(memory_); }

hydra_status Heads::configure(int32_t least_rows, int32_t usual_rows, int32_t most_rows) {
  for (int32_t rows : {least_rows, most_rows, usual_rows}) {
    if (hydra_status status = prepare(rows)) return status;
  }
  usual_rows_ = usual_rows;
  if (most_rows > specification_.most_rows) specification_.most_rows = most_rows;
  return HYDRA_OK;
}

hydra_status Heads::tactics(int32_t (&ids)[kMaxTactics], int* count) const {
  hydra_device device;
  if (hydra_status status = hydra_query_device(&device)) return status;
  *count = list_tactics(specification_, usual_rows_, device, ids);
  return HYDRA_OK;
}

hydra_status Heads::set_tactic(int32_t id) {
  if (hydra_status status = check_tactic(specification_, id)) return status;
  tactic_ = id;
  return HYDRA_OK;
}

hydra_status Heads::attach() {
  const size_t bytes = summary_bytes(specification_, specification_.most_rows);
  if (bytes == 0 || memory_) return HYDRA_OK;
  if (hydra_status status = hydra_allocate_zeros(bytes, &memory_)) return status;
  memory_rows_ = specification_.most_rows;
  return HYDRA_OK;
}

hydra_status Heads::prepare(int32_t rows) {
  if (plan_.rows == rows && plan_.tactic == tactic_) return HYDRA_OK;
  hydra_device device;
  if (hydra_status status = hydra_query_device(&device)) return status;
  return make_plan(specification_, tactic_, rows, device, &plan_);
}

hydra_status Heads::enqueue(int32_t rows, const void* const* inputs, void* const* outputs,
                            void* workspace, void* stream) {
  if (hydra_status status = prepare(rows)) return status;
  const Launches& launches = plan_.launches;
  const bool counts = launches.summary_alone ? launches.summary_config.slices > 1
                                             : specification_.summary != HYDRA_NO_SUMMARY;
  Call call{rows, inputs, outputs, static_cast<unsigned char*>(workspace), stream, nullptr, 0};
  if (counts && rows <= memory_rows_) {
    call.summary = static_cast<unsigned char*>(memory_);
    call.counters = memory_rows_;
  } else if (counts) {
    call.summary = call.workspace + plan_.workspace.summary;
    call.counters = rows;
    const size_t bytes = size_t(rows) * sizeof(uint32_t);
    if (hydra_status status = hydra_zero(call.summary, bytes, stream)) return status;
  }
  if (hydra_status status = launches.chain ? run_chain(call) : run_layers(call)) return status;
  return launches.summary_alone ? run_summary(call) : HYDRA_OK;
}

hydra_status Heads::run_chain(const Call& call) {
  const Specification& s = specification_;
  hydra_chain_shape shape = chain_shape(s, call.rows);
  if (plan_.launches.summary_alone) shape.summary = HYDRA_NO_SUMMARY;
  hydra_chain_arguments arguments{};
  arguments.x = call.inputs[0];
  for (int l = 0; l < s.layers; ++l) {
    const LayerInputs& of = signature_.layers[l];
    hydra_chain_layer& layer = arguments.layers[l];
    layer.weight = call.input(of.weight);
    layer.weight_scale = call.floats(of.weight_scale);
    layer.group_scale = call.input(of.group_scale);
    layer.bias = call.floats(of.bias);
    layer.x_scale = call.floats(of.x_scale);
    layer.x_scale_per_head = s.x_scales[l] > 1;
    layer.gamma = call.floats(of.gamma);
    layer.beta = call.floats(of.beta);
    layer.epsilon = s.epsilons[l];
  }
  arguments.y = static_cast<float*>(call.outputs[0]);
  arguments.summary = call.summaries(shape.summary);
  arguments.counters = call.fused_counters();
  return hydra_head_chain(&shape, &plan_.launches.chain_config, &arguments, call.stream);
}

hydra_status Heads::run_layers(const Call& call) {
  const Specification& s = specification_;
  const void* x = call.inputs[0];
  for (int l = 0; l < s.layers; ++l) {
    const bool last = l == s.layers - 1;
    const LayerInputs& of = signature_.layers[l];
    hydra_linear_shape shape = layer_shape(s, l, call.rows);
    if (plan_.launches.summary_alone) shape.summary = HYDRA_NO_SUMMARY;
    hydra_linear_arguments arguments{};
    arguments.x = x;
    arguments.weight = call.input(of.weight);
    arguments.weight_scale = call.floats(of.weight_scale);
    arguments.group_scale = call.input(of.group_scale);
    arguments.bias = call.floats(of.bias);
    arguments.x_scale = call.floats(of.x_scale);
    arguments.x_scale_per_head = s.x_scales[l] > 1;
    if (last) {
      arguments.y = call.outputs[0];
      arguments.y_scale = call.floats(signature_.y_scale);
      arguments.y_scale_per_head = s.y_scales > 1;
      arguments.summary = call.summaries(shape.summary);
      arguments.counters = call.fused_counters();
    } else {
      arguments.y = call.workspace + plan_.workspace.hidden[l % 2];
      arguments.y_scale = call.floats(signature_.layers[l + 1].x_scale);
      arguments.y_scale_per_head = s.x_scales[l + 1] > 1;
    }
    const hydra_linear_config& config = plan_.launches.layer_configs[l];
    if (hydra_status status = hydra_group_linear(&shape, &config, &arguments, call.stream)) {
      return status;
    }
    x = arguments.y;
  }
  return HYDRA_OK;
}

hydra_status Heads::run_summary(const Call& call) {
  const hydra_summary_shape shape = summary_shape(specification_, call.rows);
  const hydra_summary_outputs outputs = call.summaries(shape.kind);
  // The launch puts its statistics behind as many counters as it has rows. Those are the last of
  // ours, so that no other batch takes for counters what this one leaves behind.
  const size_t skipped = size_t(call.counters - call.rows) * sizeof(uint32_t);
  unsigned char* memory = call.summary ? call.summary + skipped : nullptr;
  return hydra_ensemble_summary(&shape, &plan_.launches.summary_config, call.outputs[0], &outputs,
                                memory, call.stream);
}

}  // namespace hydra::plugin
