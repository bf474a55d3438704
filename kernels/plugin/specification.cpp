#include "specification.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace hydra::plugin {

namespace {

enum class Length { kOne, kLayers, kWidths };

struct Row {
  const char* name;
  FieldType type;
  Length length;
  size_t offset;
};

#define INTS(name, length) \
  { #name, FieldType::kInts, Length::length, offsetof(Specification, name) }
constexpr Row kRows[kEngineFields] = {
    {"layout", FieldType::kText, Length::kOne, 0},
    INTS(heads, kOne),
    INTS(widths, kWidths),
    INTS(x_type, kOne),
    INTS(weight_type, kOne),
    INTS(x_per_head, kOne),
    INTS(quantize_x, kOne),
    INTS(group, kOne),
    INTS(activations, kLayers),
    INTS(norms, kLayers),
    {"epsilons", FieldType::kFloats, Length::kLayers, offsetof(Specification, epsilons)},
    INTS(x_scales, kLayers),
    INTS(y_type, kOne),
    INTS(y_scales, kOne),
    INTS(summary, kOne),
    INTS(most_rows, kOne),
};
#undef INTS
constexpr int kActivations = 8;  // the row that says how many layers there are

static_assert(sizeof(float) == sizeof(int32_t), "values of fields are copied alike");

int length_of(const Row& row, int layers) {
  return row.length == Length::kOne ? 1 : row.length == Length::kLayers ? layers : layers + 1;
}

const char* kinds(FieldType type) {
  switch (type) {
    case FieldType::kInts: return "ints";
    case FieldType::kFloats: return "floats";
    case FieldType::kText: return "text";
    case FieldType::kOther: return "something else";
  }
  return "?";
}

int row_of(const char* name) {
  for (int i = 0; i < kEngineFields; ++i) {
    if (std::strcmp(kRows[i].name, name) == 0) return i;
  }
  return -1;
}

hydra_status check_layout(const Field& field) {
  const char* text = static_cast<const char*>(field.data);
  const size_t length = strnlen(text, size_t(field.count));
  const char* ours = hydra_weight_layout();
  if (length == std::strlen(ours) && std::memcmp(text, ours, length) == 0) return HYDRA_OK;
  return fail(HYDRA_UNSUPPORTED,
              "Weights packed as '%.*s'. These kernels read '%s'. Compile the graph again, with "
              "the hydra-edge that this plugin is from.", int(length), text, ours);
}

hydra_status check_flag(const char* name, int32_t value) {
  if (value == 0 || value == 1) return HYDRA_OK;
  return fail(HYDRA_INVALID, "%s is %d. It says yes or no. Set it to 1 or 0.", name, value);
}

hydra_status check_scales(const char* of, int32_t found, bool needed, int32_t heads) {
  if (needed ? found == 1 || found == heads : found == 0) return HYDRA_OK;
  return fail(HYDRA_INVALID,
              "%d scales of %s. Where it is int8 there is 1, or one for each of %d heads; else "
              "there are 0. Correct the number.", found, of, heads);
}

hydra_status check_layers(const Specification& s) {
  for (int l = 0; l < s.layers; ++l) {
    if (hydra_status status = check_flag("norms", s.norms[l])) return status;
    char input[32];
    std::snprintf(input, sizeof(input), "the input of layer %d", l);
    if (hydra_status status = check_scales(input, s.x_scales[l], s.integer(), s.heads)) {
      return status;
    }
    if (s.norms[l] && l == s.layers - 1) {
      return fail(HYDRA_UNSUPPORTED,
                  "LayerNorm behind the output layer. It is known behind hidden layers. Leave it "
                  "to another node.");
    }
    if (s.norms[l] && !(s.epsilons[l] > 0)) {
      return fail(HYDRA_INVALID,
                  "LayerNorm of layer %d with epsilon %g. Rows of equal values would divide by 0. "
                  "Set it above 0.", l, double(s.epsilons[l]));
    }
  }
  return HYDRA_OK;
}

// What the kernels themselves refuse, on every device.
hydra_status check_kernels(const Specification& s) {
  const hydra_device any = {120, 1, INT32_MAX};
  if (s.layers > 1) {
    const hydra_chain_shape shape = chain_shape(s, 1);
    hydra_chain_config config;
    return hydra_choose_chain(&shape, &any, &config);
  }
  const hydra_linear_shape shape = layer_shape(s, 0, 1);
  hydra_linear_config config;
  return hydra_choose_linear(&shape, &any, &config);
}

hydra_status check(const Specification& s) {
  if (hydra_status status = check_flag("x_per_head", s.x_per_head)) return status;
  if (hydra_status status = check_flag("quantize_x", s.quantize_x)) return status;
  if (s.quantize_x && (s.x_type == HYDRA_INT8 || s.weight_type != HYDRA_INT8)) {
    return fail(HYDRA_INVALID,
                "quantize_x of x in %s with weights in %s. x of 16 bits is quantized on the way to "
                "int8 weights, and nothing else. Set it to 0.",
                type_name(s.x_type), type_name(s.weight_type));
  }
  if (s.group != 0 && s.weight_type != HYDRA_INT4) {
    return fail(HYDRA_INVALID, "group %d of weights in %s. Only int4 has groups. Set it to 0.",
                s.group, type_name(s.weight_type));
  }
  if (s.y_type != HYDRA_FLOAT32 && (s.layers > 1 || s.summary != HYDRA_NO_SUMMARY)) {
    return fail(HYDRA_UNSUPPORTED,
                "y in %s. Heads of several layers, and heads with a summary, give float32. Set "
                "y_type to float32, and let another node convert it.", type_name(s.y_type));
  }
  if (hydra_status status = check_layers(s)) return status;
  if (hydra_status status = check_scales("y", s.y_scales, s.y_type == HYDRA_INT8, s.heads)) {
    return status;
  }
  if (s.most_rows < 0) {
    return fail(HYDRA_INVALID,
                "most_rows is %d. It is the largest batch of an engine. Leave it out of graphs.",
                s.most_rows);
  }
  return check_kernels(s);
}

hydra_status copy(const Field& field, const Row& row, Specification* s) {
  const int length = length_of(row, s->layers);
  if (field.count != length) {
    return fail(HYDRA_INVALID,
                "Field '%s' has %d values. Of %d layers it has %d. Correct its length.",
                row.name, field.count, s->layers, length);
  }
  std::memcpy(reinterpret_cast<char*>(s) + row.offset, field.data, size_t(length) * 4);
  return HYDRA_OK;
}

}  // namespace

hydra_status fail(hydra_status status, const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  return hydra_fail(status, text);
}

const char* type_name(int32_t type) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "int8", "int4"};
  return type >= 0 && type <= HYDRA_INT4 ? names[type] : "an unknown type";
}

int32_t tile_depth(int32_t weight_type) {
  return weight_type == HYDRA_INT4 ? 128 : weight_type == HYDRA_INT8 ? 64 : 32;
}

bool Specification::has_norms() const {
  for (int l = 0; l < layers; ++l) {
    if (norms[l]) return true;
  }
  return false;
}

void fields_of(const Specification& specification, Field (&fields)[kEngineFields]) {
  const char* layout = hydra_weight_layout();
  fields[0] = {kRows[0].name, FieldType::kText, layout, int32_t(std::strlen(layout))};
  for (int i = 1; i < kEngineFields; ++i) {
    const Row& row = kRows[i];
    const void* data = reinterpret_cast<const char*>(&specification) + row.offset;
    fields[i] = {row.name, row.type, data, length_of(row, specification.layers)};
  }
}

hydra_status parse(const Field* fields, int count, Specification* specification) {
  const Field* given[kEngineFields] = {};
  for (int i = 0; i < count; ++i) {
    const int row = row_of(fields[i].name);
    if (row < 0) {
      return fail(HYDRA_INVALID,
                  "Field '%s'. HydraHeads has none of that name. Compile the graph again, with the "
                  "hydra-edge that this plugin is from.", fields[i].name);
    }
    if (fields[i].type != kRows[row].type) {
      return fail(HYDRA_INVALID,
                  "Field '%s' holds %s. HydraHeads reads %s there. Correct its type.",
                  fields[i].name, kinds(fields[i].type), kinds(kRows[row].type));
    }
    given[row] = &fields[i];
  }
  for (int i = 0; i < kGraphFields; ++i) {
    if (given[i] && given[i]->data) continue;
    return fail(HYDRA_INVALID,
                "Field '%s' is missing. HydraHeads has no defaults. Compile the graph again, with "
                "the hydra-edge that this plugin is from.", kRows[i].name);
  }
  if (hydra_status status = check_layout(*given[0])) return status;

  Specification s{};
  s.layers = given[kActivations]->count;
  if (s.layers < 1 || s.layers > HYDRA_MAX_LAYERS) {
    return fail(HYDRA_UNSUPPORTED,
                "Heads of %d layers. HydraHeads computes 1 to %d. Split them into several nodes.",
                s.layers, int(HYDRA_MAX_LAYERS));
  }
  for (int i = 1; i < kEngineFields; ++i) {
    if (!given[i]) continue;
    if (hydra_status status = copy(*given[i], kRows[i], &s)) return status;
  }
  if (hydra_status status = check(s)) return status;
  *specification = s;
  return HYDRA_OK;
}

void describe(const Specification& specification, char* text, size_t size) {
  Field fields[kEngineFields];
  fields_of(specification, fields);
  size_t used = size_t(std::snprintf(text, size, "%s", hydra_weight_layout()));
  const auto append = [&](const char* format, auto value) {
    if (used < size) used += size_t(std::snprintf(text + used, size - used, format, value));
  };
  for (int i = 1; i < kGraphFields; ++i) {
    append(" %s=", fields[i].name);
    for (int j = 0; j < fields[i].count; ++j) {
      if (j > 0) append("%s", ",");
      if (fields[i].type == FieldType::kFloats) {
        append("%.9g", double(static_cast<const float*>(fields[i].data)[j]));
      } else {
        append("%d", static_cast<const int32_t*>(fields[i].data)[j]);
      }
    }
  }
}

hydra_chain_shape chain_shape(const Specification& s, int32_t rows) {
  hydra_chain_shape shape{};
  shape.heads = s.heads;
  shape.batch = rows;
  shape.layers = s.layers;
  std::memcpy(shape.widths, s.widths, sizeof(shape.widths));
  shape.x_type = s.x_type;
  shape.weight_type = s.weight_type;
  shape.x_per_head = s.x_per_head;
  shape.quantize_x = s.quantize_x;
  shape.group = s.group;
  std::memcpy(shape.activations, s.activations, sizeof(shape.activations));
  std::memcpy(shape.norms, s.norms, sizeof(shape.norms));
  shape.summary = s.summary;
  return shape;
}

hydra_linear_shape layer_shape(const Specification& s, int layer, int32_t rows) {
  const bool first = layer == 0, last = layer == s.layers - 1;
  hydra_linear_shape shape{};
  shape.heads = s.heads;
  shape.batch = rows;
  shape.inputs = s.widths[layer];
  shape.outputs = s.widths[layer + 1];
  shape.x_type = first ? s.x_type : s.hidden_type();
  shape.weight_type = s.weight_type;
  shape.y_type = last ? s.y_type : s.hidden_type();
  shape.x_per_head = first ? s.x_per_head : 1;
  shape.quantize_x = s.quantize_x;  // says nothing of int8
  shape.group = s.group;
  shape.activation = s.activations[layer];
  shape.summary = last ? s.summary : int32_t(HYDRA_NO_SUMMARY);
  return shape;
}

hydra_summary_shape summary_shape(const Specification& s, int32_t rows) {
  return {s.summary, s.heads, rows, s.outputs(), HYDRA_FLOAT32};
}

}  // namespace hydra::plugin
