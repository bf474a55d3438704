// Drives a plugin library as TensorRT does, without TensorRT: host PLUGIN CASE RESULTS.
//
// In the order of a build: creator, plugin, clone, outputs, formats, batches; tactics, each run on
// a plugin that belongs to no context. Then what an engine does: fields written and read again, a
// new plugin of them, attached to a context, its shapes and tactic set, run.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <set>

#include "host_case.h"

using namespace nvinfer1;
using hydra::plugin::Array;
using hydra::plugin::Bench;
using hydra::plugin::Case;
using hydra::plugin::kWords;
using hydra::plugin::require;
using hydra::plugin::Results;
using hydra::plugin::stop;
using hydra::plugin::Watch;

namespace {

class Logger final : public ILogger, public ILoggerFinder {
 public:
  explicit Logger(Results& results) : results_(results) {}
  ILogger* findLogger() override { return this; }
  void log(Severity severity, const AsciiChar* text) noexcept override {
    results_.line(severity == Severity::kERROR ? "log %s" : "log (not an error) %s", text);
  }
#if NV_TENSORRT_MAJOR >= 11
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
#endif

 private:
  Results& results_;
};

class Context final : public IPluginResourceContext {
 public:
  IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// A constant, or the batch.
class Expression final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : value_(value) { mImpl = this; }
  static bool is_batch(const IDimensionExpr& e) { return e.getConstantValue() < 0; }

 private:
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  int64_t value_;
};

class Builder final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const IDimensionExpr* make(int64_t value) {
    made_.push_back(std::make_unique<Expression>(value));
    return made_.back().get();
  }

 private:
  const IDimensionExpr* constant(int64_t value) override { return make(value); }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                  const IDimensionExpr&) override {
    stop("shapes of heads need no arithmetic");
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    stop("heads have no size tensors");
  }

  std::vector<std::unique_ptr<Expression>> made_;
};

// A plugin by its three faces; TensorRT owns it, and deletes it.
struct Plugin {
  std::unique_ptr<IPluginV3> whole;
  IPluginV3OneCore* core;
  IPluginV3OneBuild* build;
  IPluginV3OneRuntime* runtime;

  explicit Plugin(IPluginV3* plugin) : whole(plugin) {
    require(plugin, "no plugin");
    core = face<IPluginV3OneCore>(PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
    build = face<IPluginV3OneBuild>(PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
    runtime = face<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
    require(!std::strcmp(core->getPluginName(), "HydraHeads"), "the plugin's name");
    require(!std::strcmp(core->getPluginVersion(), "1"), "the plugin's version");
    require(!std::strcmp(core->getPluginNamespace(), "hydra"), "the plugin's namespace");
  }

  template <class Face>
  Face* face(PluginCapabilityType type, const char* kind) {
    auto* capability = whole->getCapabilityInterface(type);
    require(capability, kind);
    require(!std::strcmp(capability->getInterfaceInfo().kind, kind), kind);
    return static_cast<Face*>(capability);
  }
};

constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16,
                               DataType::kINT8,  DataType::kINT32, DataType::kINT64,
                               DataType::kFP8,   DataType::kBOOL};

DataType data_type(int32_t type) { return type == kWords ? DataType::kINT32 : kTypes[type]; }

int32_t type_of(DataType type) {
  for (int32_t known = kWords; known <= HYDRA_INT8; ++known) {
    if (data_type(known) == type) return known;
  }
  stop("a type that heads do not have");
}

nvinfer1::Dims dims_of(const std::vector<int64_t>& dims) {
  nvinfer1::Dims found{};
  found.nbDims = int32_t(dims.size());
  std::copy(dims.begin(), dims.end(), found.d);
  return found;
}

// The network around the plugin: its tensors, at any batch.
class Network {
 public:
  Network(const Case& given, Plugin& plugin) : given_(given) {
    inputs_ = int32_t(given.constants.size()) + 1;
    outputs_ = plugin.build->getNbOutputs();
    types_ = {data_type(given.xs[0].type)};
    for (const Array& array : given.constants) types_.push_back(data_type(array.type));
    infer(plugin);
  }

  int32_t inputs() const { return inputs_; }
  int32_t outputs() const { return outputs_; }

  std::vector<std::vector<int64_t>> dims(int64_t rows) const {
    std::vector<std::vector<int64_t>> all = {given_.xs[0].dims};
    all[0][all[0].size() - 2] = rows;
    for (const Array& array : given_.constants) all.push_back(array.dims);
    for (const auto& shape : shapes_) {
      all.push_back(shape);
      std::replace(all.back().begin(), all.back().end(), int64_t(-1), rows);
    }
    return all;
  }

  std::vector<PluginTensorDesc> tensors(int64_t rows) const {
    std::vector<PluginTensorDesc> all;
    for (const auto& of : dims(rows)) {
      all.push_back({dims_of(of), types_[all.size()], TensorFormat::kLINEAR, -1.0F});
    }
    return all;
  }

  std::vector<DynamicPluginTensorDesc> ranges() const {
    std::vector<DynamicPluginTensorDesc> all;
    const auto any = tensors(-1), least = tensors(given_.rows[0]), usual = tensors(given_.rows[1]),
               most = tensors(given_.rows[2]);
    for (size_t i = 0; i < any.size(); ++i) {
      all.push_back({any[i], least[i].dims, most[i].dims, usual[i].dims});
    }
    return all;
  }

  std::vector<Array> arrays(int64_t rows) const {
    std::vector<Array> all;
    const auto sizes = dims(rows);
    for (size_t i = size_t(inputs_); i < sizes.size(); ++i) {
      all.push_back({"output", type_of(types_[i]), sizes[i], {}});
    }
    return all;
  }

 private:
  // Types and shapes of the outputs, as the plugin says them.
  void infer(Plugin& plugin) {
    types_.resize(size_t(inputs_ + outputs_));
    IPluginV3OneBuild& build = *plugin.build;
    require(!build.getOutputDataTypes(&types_[size_t(inputs_)], outputs_, types_.data(), inputs_),
            "getOutputDataTypes");
    Builder builder;
    std::vector<DimsExprs> from, to(size_t(outputs_) + 1);
    for (const auto& of : dims(-1)) {
      from.emplace_back();
      from.back().nbDims = int32_t(of.size());
      for (size_t d = 0; d < of.size(); ++d) from.back().d[d] = builder.make(of[d]);
    }
    require(!build.getOutputShapes(from.data(), inputs_, nullptr, 0, to.data(), outputs_, builder),
            "getOutputShapes");
    for (int32_t i = 0; i < outputs_; ++i) {
      shapes_.emplace_back();
      for (int32_t d = 0; d < to[size_t(i)].nbDims; ++d) {
        const IDimensionExpr& size = *to[size_t(i)].d[d];
        shapes_.back().push_back(Expression::is_batch(size) ? -1 : size.getConstantValue());
      }
    }
    require(build.getOutputDataTypes(types_.data(), outputs_, types_.data(), inputs_ - 1) != 0,
            "an input too few is accepted");
  }

  const Case& given_;
  int32_t inputs_ = 0, outputs_ = 0;
  std::vector<DataType> types_;
  std::vector<std::vector<int64_t>> shapes_;  // of the outputs; -1: the batch
};

// Asks for each tensor in turn, and settles it, as TensorRT does; then for what must be refused.
void check_formats(Plugin& plugin, const Network& network) {
  auto tensors = network.ranges();
  for (int32_t i = 0; i < int32_t(tensors.size()); ++i) {
    PluginTensorDesc& desc = tensors[size_t(i)].desc;
    const DataType right = desc.type;
    const auto supported = [&] {
      return plugin.build->supportsFormatCombination(i, tensors.data(), network.inputs(),
                                                     network.outputs());
    };
    for (const DataType type : kTypes) {
      desc.type = type;
      require(supported() == (type == right), "supportsFormatCombination of a type");
    }
    desc.type = right;
    for (const auto format : {TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32}) {
      desc.format = format;
      require(!supported(), "supportsFormatCombination of a format");
    }
    desc.format = TensorFormat::kLINEAR;
  }
}

std::vector<int32_t> tactics_of(Plugin& plugin) {
  const int32_t count = plugin.build->getNbTactics();
  std::vector<int32_t> tactics(size_t(std::max(0, count)));
  require(!plugin.build->getValidTactics(tactics.data(), count), "getValidTactics");
  const std::set<int32_t> unique(tactics.begin(), tactics.end());
  require(!tactics.empty() && unique.size() == tactics.size() && *unique.begin() > 0,
          "tactics are unique and above 0");
  return tactics;
}

// All batches, with the tactic that was set.
void run(const Case& given, const char* how, int32_t tactic, Plugin& plugin, const Network& network,
         size_t workspace_bytes, Bench& bench) {
  for (const Array& x : given.xs) {
    const int32_t rows = rows_of(x);
    const auto tensors = network.tensors(rows);
    const PluginTensorDesc *in = tensors.data(), *out = in + network.inputs();
    require(!plugin.runtime->onShapeChange(in, network.inputs(), out, network.outputs()),
            "onShapeChange");
    bench.run(how, tactic, x, network.arrays(rows), workspace_bytes,
              [&](const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
                return plugin.runtime->enqueue(in, out, inputs, outputs, workspace,
                                               static_cast<cudaStream_t>(stream));
              });
  }
}

void run_all(const Case& given, const char* how, Plugin& plugin, const Network& network,
             const std::vector<int32_t>& tactics, size_t workspace_bytes, Bench& bench) {
  for (const int32_t tactic : tactics) {
    require(!plugin.runtime->setTactic(tactic), "setTactic");
    run(given, how, tactic, plugin, network, workspace_bytes, bench);
  }
}

// What an engine file would hold.
struct Serialized {
  hydra::plugin::Kept kept;
  std::vector<PluginField> fields;

  explicit Serialized(const PluginFieldCollection& collection) {
    for (int32_t i = 0; i < collection.nbFields; ++i) {
      const PluginField& field = collection.fields[i];
      const size_t size = field.type == PluginFieldType::kCHAR ? 1 : 4;
      const auto* bytes = static_cast<const unsigned char*>(field.data);
      const void* data = kept.keep(field.name, {bytes, bytes + size * size_t(field.length)});
      fields.emplace_back(kept.names.back().c_str(), data, field.type, field.length);
    }
  }
};

PluginFieldType field_type(hydra::plugin::FieldType type) {
  switch (type) {
    case hydra::plugin::FieldType::kInts: return PluginFieldType::kINT32;
    case hydra::plugin::FieldType::kFloats: return PluginFieldType::kFLOAT32;
    case hydra::plugin::FieldType::kText: return PluginFieldType::kCHAR;
    default: return PluginFieldType::kFLOAT64;
  }
}

// Those of the node that the creator names, as TensorRT's parser gives them.
std::vector<PluginField> parsed(const Case& given, const PluginFieldCollection& names) {
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < names.nbFields; ++i) {
    for (const hydra::plugin::Field& field : given.fields) {
      if (std::strcmp(field.name, names.fields[i].name) != 0) continue;
      fields.emplace_back(field.name, field.data, field_type(field.type), field.count);
    }
  }
  return fields;
}

IPluginV3* create(IPluginCreatorV3One& creator, const std::vector<PluginField>& fields,
                  TensorRTPhase phase) {
  const PluginFieldCollection collection{int32_t(fields.size()), fields.data()};
  return creator.createPlugin("heads", &collection, phase);
}

IPluginCreatorV3One& load(const char* path, ILoggerFinder& finder) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  require(library, library ? "" : dlerror());
  const auto find = [&](const char* name) {
    void* symbol = dlsym(library, name);
    require(symbol, name);
    return symbol;
  };
  reinterpret_cast<void (*)(ILoggerFinder*)>(find("setLoggerFinder"))(&finder);
  int32_t count = 0;
  auto* creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(
      find("getCreators"))(count);
  require(count == 1, "one creator");
  require(!std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"), "its kind");
  return *static_cast<IPluginCreatorV3One*>(creators[0]);
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 4, "host PLUGIN CASE RESULTS");
  const Case given(arguments[2]);
  Results results(arguments[3]);
  Logger logger(results);
  IPluginCreatorV3One& creator = load(arguments[1], logger);
  const auto refused = [&] {
    results.line("refused");
    return 0;
  };

  const Watch watch;
  {
    Bench bench(given, results);
    IPluginV3* parsed_plugin =
        create(creator, parsed(given, *creator.getFieldNames()), TensorRTPhase::kBUILD);
    if (!parsed_plugin) return refused();
    Plugin built(parsed_plugin->clone());
    delete parsed_plugin;
    results.line("identity %s", built.build->getTimingCacheID());

    const Network network(given, built);
    check_formats(built, network);
    require(built.build->getFormatCombinationLimit() >= 1, "no format would be timed");
    const auto ranges = network.ranges();
    const DynamicPluginTensorDesc *in = ranges.data(), *out = in + network.inputs();
    const int32_t inputs = network.inputs(), outputs = network.outputs();
    if (built.build->configurePlugin(in, inputs, out, outputs)) return refused();
    const size_t workspace_bytes = built.build->getWorkspaceSize(in, inputs, out, outputs);
    results.line("workspace %zu", workspace_bytes);
    std::vector<int32_t> tactics = tactics_of(built);
    for (const int32_t tactic : tactics) results.line("tactic %d", tactic);
    const int32_t last = tactics.back();
    tactics.push_back(0);
    if (!given.only.empty()) tactics = given.only;
    run_all(given, "detached", built, network, tactics, workspace_bytes, bench);

    const Serialized serialized(*built.runtime->getFieldsToSerialize());
    built.whole.reset();
    Plugin read(create(creator, serialized.fields, TensorRTPhase::kRUNTIME));
    Context context;
    Plugin attached(read.runtime->attachToContext(&context));
    run_all(given, "attached", attached, network, tactics, workspace_bytes, bench);

    require(!read.runtime->setTactic(last), "setTactic");
    Plugin inheriting(read.runtime->attachToContext(&context));
    read.whole.reset();
    run(given, "inheriting", last, inheriting, network, workspace_bytes, bench);

    require(attached.runtime->setTactic(1 << 20) != 0, "an unknown tactic is accepted");
    auto wrong = network.tensors(given.rows[1]);
    wrong[1].dims.d[0] += 1;
    const PluginTensorDesc* first = wrong.data();
    require(attached.runtime->onShapeChange(first, inputs, first + inputs, outputs) != 0,
            "weights of another shape are accepted");
  }
  results.line("memory %llu %llu", static_cast<unsigned long long>(watch.allocations()),
               static_cast<unsigned long long>(watch.frees()));
  return 0;
}
