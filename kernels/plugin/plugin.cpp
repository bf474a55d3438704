// The TensorRT plugin HydraHeads, version 1, namespace hydra: `Heads` behind IPluginV3.
//
// Compiled once per major version of TensorRT. Calls no function of its library, only what it hands
// over, so that nothing of it need be linked. What fails says why to TensorRT's logger, and leaves
// it in hydra_last_error: a plugin that TensorRT gave no logger has no business on stderr.
#include <NvInferRuntime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>

#include "heads.h"

#define HYDRA_EXPORT extern "C" __attribute__((visibility("default")))
#define HYDRA_TEXT(x) #x
#define HYDRA_VERSION(major, minor, patch) \
  HYDRA_TEXT(major) "." HYDRA_TEXT(minor) "." HYDRA_TEXT(patch)

using namespace nvinfer1;

namespace hydra::plugin {

namespace {

constexpr char kName[] = "HydraHeads";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "hydra";

std::atomic<ILoggerFinder*> logger_finder{nullptr};

// 0, or 1 when it is done with telling why.
int32_t told(hydra_status status, const char* node = kName) noexcept {
  if (status == HYDRA_OK) return 0;
  ILoggerFinder* finder = logger_finder.load();
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    char text[640];
    std::snprintf(text, sizeof(text), "%s: %s", node, hydra_last_error());
    logger->log(ILogger::Severity::kERROR, text);
  }
  return 1;
}

DataType data_type(int32_t type) {
  switch (type) {
    case kWords: return DataType::kINT32;
    case HYDRA_FLOAT16: return DataType::kHALF;
    case HYDRA_BFLOAT16: return DataType::kBF16;
    case HYDRA_INT8: return DataType::kINT8;
    default: return DataType::kFLOAT;
  }
}

PluginFieldType field_type(FieldType type) {
  switch (type) {
    case FieldType::kInts: return PluginFieldType::kINT32;
    case FieldType::kFloats: return PluginFieldType::kFLOAT32;
    case FieldType::kText: return PluginFieldType::kCHAR;
    default: return PluginFieldType::kUNKNOWN;
  }
}

FieldType field_type(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kINT32: return FieldType::kInts;
    case PluginFieldType::kFLOAT32: return FieldType::kFloats;
    case PluginFieldType::kCHAR: return FieldType::kText;
    default: return FieldType::kOther;
  }
}

// Fields of a specification as TensorRT wants them, the first `count`.
class Fields {
 public:
  const PluginFieldCollection* of(const Specification& specification, int count) {
    Field fields[kEngineFields];
    fields_of(specification, fields);
    for (int i = 0; i < count; ++i) {
      const void* data = specification.layers > 0 ? fields[i].data : nullptr;  // else names alone
      fields_[i] = {fields[i].name, data, field_type(fields[i].type), fields[i].count};
    }
    collection_ = {count, fields_};
    return &collection_;
  }

 private:
  PluginField fields_[kEngineFields];
  PluginFieldCollection collection_{};
};

class HeadsPlugin final : public IPluginV3,
                          public IPluginV3OneCore,
                          public IPluginV3OneBuildV2,
                          public IPluginV3OneRuntime {
 public:
  explicit HeadsPlugin(const Specification& specification) : heads_(specification) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  HeadsPlugin* clone() noexcept override { return new (std::nothrow) HeadsPlugin(heads_); }

  // ---- core

  const AsciiChar* getPluginName() const noexcept override { return kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  // ---- build

  int32_t getNbOutputs() const noexcept override { return heads_.signature().outputs; }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType*,
                             int32_t inputs) const noexcept override {
    const Signature& signature = heads_.signature();
    if (told(signature.match_counts(inputs, outputs))) return 1;
    for (int i = 0; i < outputs; ++i) types[i] = data_type(signature.tensors[inputs + i].type);
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* from, int32_t inputs, const DimsExprs*, int32_t,
                          DimsExprs* to, int32_t outputs, IExprBuilder& build) noexcept override {
    const Signature& signature = heads_.signature();
    if (told(signature.match_counts(inputs, outputs))) return 1;
    const int rank = signature.tensors[0].rank;
    if (from[0].nbDims != rank) {
      return told(fail(HYDRA_INVALID,
                       "x has %d dimensions. Theirs is [B, K], or [M, B, K] with x_per_head. Give "
                       "these heads %d.", from[0].nbDims, rank));
    }
    for (int i = 0; i < outputs; ++i) {
      const Tensor& tensor = signature.tensors[inputs + i];
      to[i].nbDims = tensor.rank;
      for (int d = 0; d < tensor.rank; ++d) {
        const int64_t size = tensor.dims[d];
        to[i].d[d] = size == kBatch ? from[0].d[rank - 2] : build.constant(size);
      }
    }
    return 0;
  }

  // Bytes as they are: of int8 only the specification's scales count, not those of the network.
  bool supportsFormatCombination(int32_t number, const DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override {
    const Signature& signature = heads_.signature();
    if (told(signature.match_counts(inputs, outputs))) return false;
    const PluginTensorDesc& found = tensors[number].desc;
    return found.format == TensorFormat::kLINEAR &&
           found.type == data_type(signature.tensors[number].type);
  }

  int32_t getFormatCombinationLimit() noexcept override { return 1; }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                          const DynamicPluginTensorDesc*, int32_t outputs) noexcept override {
    // Of x alone: what TensorRT promises of constants, outputs and fixed batches here, no header says.
    const Signature& signature = heads_.signature();
    if (told(signature.match_counts(inputs, outputs))) return 1;
    const int32_t least = rows_of(in[0], &DynamicPluginTensorDesc::min);
    const int32_t usual = rows_of(in[0], &DynamicPluginTensorDesc::opt);
    const int32_t most = rows_of(in[0], &DynamicPluginTensorDesc::max);
    if (least < 1 || usual < 1 || most < 1) {
      return told(fail(HYDRA_INVALID,
                       "x has %d to %d rows, %d as a rule. A batch has at least 1. Give the engine "
                       "an optimization profile.", least, most, usual));
    }
    return told(heads_.configure(least, usual, most));
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    int32_t rows = heads_.specification().most_rows;
    if (inputs >= 1) rows = std::max(rows, rows_of(in[0], &DynamicPluginTensorDesc::max));
    return heads_.workspace_bytes(rows);
  }

  int32_t getNbTactics() noexcept override {
    int32_t ids[kMaxTactics];
    int count = 0;
    return told(heads_.tactics(ids, &count)) ? 0 : count;
  }

  int32_t getValidTactics(int32_t* tactics, int32_t room) noexcept override {
    int32_t ids[kMaxTactics];
    int count = 0;
    if (told(heads_.tactics(ids, &count))) return 1;
    for (int i = 0; i < count && i < room; ++i) tactics[i] = ids[i];
    return 0;
  }

  const char* getTimingCacheID() noexcept override { return identity(); }
  const char* getMetadataString() noexcept override { return identity(); }

  // ---- runtime

  int32_t setTactic(int32_t tactic) noexcept override { return told(heads_.set_tactic(tactic)); }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
                        int32_t outputs) noexcept override {
    int32_t rows = 0;
    if (told(match(inputs, outputs, &rows,
                   [&](int i) { return i < inputs ? &in[i].dims : &out[i - inputs].dims; }))) {
      return 1;
    }
    return told(heads_.prepare(rows));
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return told(heads_.enqueue(rows_of(in[0].dims), inputs, outputs, workspace, stream));
  }

  HeadsPlugin* attachToContext(IPluginResourceContext*) noexcept override {
    HeadsPlugin* attached = clone();
    if (attached) told(attached->heads_.attach());  // without it counters lie in the workspace
    return attached;
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return fields_.of(heads_.specification(), kEngineFields);
  }

 private:
  explicit HeadsPlugin(const Heads& heads) : heads_(heads) {}

  static int32_t rows_of(const nvinfer1::Dims& x) {
    return x.nbDims >= 2 ? int32_t(x.d[x.nbDims - 2]) : 0;
  }

  // Of a range, or where TensorRT left it open, of the tensor itself; 0 or less if that is, too.
  static int32_t rows_of(const DynamicPluginTensorDesc& x,
                         nvinfer1::Dims DynamicPluginTensorDesc::*range) {
    const int32_t rows = rows_of(x.*range);
    return rows >= 1 ? rows : rows_of(x.desc.dims);
  }

  template <class DimsOf>
  hydra_status match(int32_t inputs, int32_t outputs, int32_t* rows, DimsOf dims_of) const {
    const Signature& signature = heads_.signature();
    if (hydra_status status = signature.match_counts(inputs, outputs)) return status;
    Dims dims[kMaxInputs + kMaxOutputs];
    for (int i = 0; i < inputs + outputs; ++i) {
      const nvinfer1::Dims* found = dims_of(i);
      dims[i] = {found->nbDims, found->d};
    }
    return signature.match(dims, rows);
  }

  const char* identity() {
    describe(heads_.specification(), identity_, sizeof(identity_));
    return identity_;
  }

  Heads heads_;
  Fields fields_;
  char identity_[1024];
};

class Creator final : public IPluginCreatorV3One {
 public:
  Creator() : names_(fields_.of(Specification{}, kGraphFields)) {}

  const AsciiChar* getPluginName() const noexcept override { return kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  // What TensorRT's parser takes from a node.
  const PluginFieldCollection* getFieldNames() noexcept override { return names_; }

  IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* given,
                          TensorRTPhase) noexcept override {
    constexpr int kMost = 64;  // more than there are
    Field fields[kMost];
    const int count = given ? given->nbFields : 0;
    if (count > kMost) {
      told(fail(HYDRA_INVALID, "%d fields. HydraHeads has %d. Compile the graph again, with the "
                "hydra-edge that this plugin is from.", count, kGraphFields), name);
      return nullptr;
    }
    for (int i = 0; i < count; ++i) {
      const PluginField& field = given->fields[i];
      fields[i] = {field.name, field_type(field.type), field.data, field.length};
    }
    Specification specification;
    if (told(parse(fields, count, &specification), name)) return nullptr;
    return new (std::nothrow) HeadsPlugin(specification);
  }

 private:
  Fields fields_;
  const PluginFieldCollection* names_;
};

}  // namespace

}  // namespace hydra::plugin

HYDRA_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static hydra::plugin::Creator creator;
  static IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

HYDRA_EXPORT void setLoggerFinder(ILoggerFinder* finder) { hydra::plugin::logger_finder = finder; }

// For checks before anything is built: which weights the kernels read, what this was compiled for.
HYDRA_EXPORT const char* hydra_plugin_layout() { return hydra_weight_layout(); }
HYDRA_EXPORT const char* hydra_plugin_tensorrt() {
  return HYDRA_VERSION(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH);
}
