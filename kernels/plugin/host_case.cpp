#include "host_case.h"

#include <cstdarg>
#include <fstream>
#include <iterator>
#include <sstream>

namespace hydra::plugin {

namespace {

const char* const kTypes[] = {"words", "float32", "float16", "bfloat16", "int8"};  // from kWords on

int32_t type_of(const std::string& name) {
  for (int32_t type = kWords; type <= HYDRA_INT8; ++type) {
    if (name == kTypes[type - kWords]) return type;
  }
  stop(name.c_str());
}

FieldType field_type_of(const std::string& name) {
  if (name == "ints") return FieldType::kInts;
  if (name == "floats") return FieldType::kFloats;
  if (name == "text") return FieldType::kText;
  return FieldType::kOther;
}

Bytes read_bytes(std::istream& from, size_t count) {
  Bytes bytes(count);
  from.read(reinterpret_cast<char*>(bytes.data()), std::streamsize(count));
  require(bool(from), "the case ends early");
  return bytes;
}

Array read_array(std::istream& line, std::istream& from, const std::string& name) {
  Array array{name, 0, {}, {}};
  std::string type;
  size_t rank = 0;
  line >> type >> rank;
  array.type = type_of(type);
  array.dims.resize(rank);
  for (int64_t& size : array.dims) line >> size;
  array.bytes = read_bytes(from, bytes_of(array.type, array.dims));
  return array;
}

}  // namespace

size_t bytes_of(int32_t type, const std::vector<int64_t>& dims) {
  size_t bytes = type == HYDRA_INT8 ? 1 : type == HYDRA_FLOAT16 || type == HYDRA_BFLOAT16 ? 2 : 4;
  for (int64_t size : dims) bytes *= size_t(size);
  return bytes;
}

const void* Kept::keep(const std::string& name, Bytes bytes) {
  names.push_back(name);
  values.push_back(std::move(bytes));
  return values.back().data();
}

Case::Case(const char* path) {
  std::ifstream file(path, std::ios::binary);
  require(bool(file), path);
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string what, name, type;
    line >> what;
    if (what == "field") {
      int32_t count = 0;
      line >> name >> type >> count;
      const FieldType kind = field_type_of(type);
      const size_t size = kind == FieldType::kText ? 1 : 4;
      const void* data = kept.keep(name, read_bytes(file, size * size_t(count)));
      fields.push_back({kept.names.back().c_str(), kind, data, count});
    } else if (what == "rows") {
      line >> rows[0] >> rows[1] >> rows[2];
    } else if (what == "tensor") {
      line >> name;
      constants.push_back(read_array(line, file, name));
    } else if (what == "x") {
      xs.push_back(read_array(line, file, "x"));
    } else if (what == "only") {
      only.emplace_back();
      line >> only.back();
    } else if (what == "device") {
      int capability = 0, sm_count = 0, shared_bytes = 0;
      line >> capability >> sm_count >> shared_bytes;
#ifdef HYDRA_EMULATED
      hydra_emulator_device(capability, sm_count, shared_bytes);
#endif
    } else {
      stop(text.c_str());
    }
  }
}

Results::Results(const char* path) : file_(std::fopen(path, "wb")) { require(file_, path); }

Results::~Results() { std::fclose(file_); }

void Results::line(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vfprintf(file_, format, values);
  va_end(values);
  std::fputc('\n', file_);
}

void Results::output(int32_t type, const std::vector<int64_t>& dims, const Bytes& bytes) {
  std::fprintf(file_, "output %s %zu", kTypes[type - kWords], dims.size());
  for (int64_t size : dims) std::fprintf(file_, " %lld", static_cast<long long>(size));
  std::fputc('\n', file_);
  std::fwrite(bytes.data(), 1, bytes.size(), file_);
}

Bench::Bench(const Case& given, Results& results) : results_(results) {
  for (const Array& array : given.constants) {
    constants_.push_back(std::make_unique<Buffer>(array.name.c_str(), Buffer::kConstant,
                                                  array.bytes.size(), array.bytes.data()));
  }
}

void Bench::run(const char* how, int32_t tactic, const Array& x, const std::vector<Array>& outputs,
                size_t workspace_bytes, const Enqueue& enqueue) {
  const Buffer input("x", Buffer::kInput, x.bytes.size(), x.bytes.data());
  Buffer workspace("workspace", Buffer::kWritten, workspace_bytes);
  std::vector<std::unique_ptr<Buffer>> written;
  std::vector<const void*> inputs = {input.at()};
  std::vector<void*> addresses;
  for (const auto& constant : constants_) inputs.push_back(constant->at());
  for (const Array& output : outputs) {
    const size_t bytes = bytes_of(output.type, output.dims);
    written.push_back(std::make_unique<Buffer>(output.name.c_str(), Buffer::kWritten, bytes));
    addresses.push_back(written.back()->at());
  }
  const auto launch = [&] {
    const int status = enqueue(inputs.data(), addresses.data(), workspace.at(), stream_.handle());
    require(status == 0, "enqueue failed");
  };
  const auto results = [&] {
    std::vector<Bytes> found;
    for (const auto& buffer : written) found.push_back(buffer->read());
    return found;
  };
  const auto reset = [&] {
    workspace.reset();
    for (const auto& buffer : written) buffer->reset();
  };

  const Watch watch;
  launch();
  stream_.wait();
  require(watch.allocations() + watch.frees() + watch.waits() == 0, "enqueue did more than launch");
  results_.line("run %s %d %d %llu %llu %llu %zu", how, tactic, rows_of(x),
                static_cast<unsigned long long>(watch.launches()),
                static_cast<unsigned long long>(watch.blocks()),
                static_cast<unsigned long long>(watch.memsets()), workspace.touched());
  const auto first = results();
  reset();
  launch();
  stream_.wait();
  require(results() == first, "the second run gives other bits");
  reset();
  stream_.run_captured(launch);
  require(results() == first, "the captured run gives other bits");
  input.read();
  for (const auto& constant : constants_) constant->read();
  for (size_t i = 0; i < outputs.size(); ++i) {
    results_.output(outputs[i].type, outputs[i].dims, first[i]);
  }
}

}  // namespace hydra::plugin
