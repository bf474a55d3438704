// What a test asks of the plugin, and what it hears: files of lines, each followed by the bytes
// that it announces. tests/kernels/plugin_case.py writes the one and reads the other.
//
//   field NAME ints|floats|text COUNT     + COUNT values
//   rows MIN OPT MAX                      of the batch
//   tensor NAME TYPE RANK DIMS...         + bytes: the inputs behind x, in order
//   x TYPE RANK DIMS...                   + bytes: for each batch to run
//   only TACTIC                           runs this one; without, all that are valid
//   device CAPABILITY SMS SHARED_BYTES    that the emulator poses as
//
//   refused / log TEXT                    why there are no heads; what TensorRT's logger is told
//   identity TEXT                         equal for equal computations
//   memory ALLOCATIONS FREES              of device memory, by the plugin
//   workspace BYTES
//   tactic ID
//   plan TACTIC ROWS LAUNCHES...          as in plan.h
//   run HOW TACTIC ROWS LAUNCHES BLOCKS MEMSETS TOUCHED    TOUCHED: bytes of the workspace
//   output TYPE RANK DIMS...              + bytes
#pragma once

#include <cstdio>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "host_device.h"
#include "plugin/signature.h"

namespace hydra::plugin {

struct Array {
  std::string name;
  int32_t type;  // hydra_type, or kWords
  std::vector<int64_t> dims;
  Bytes bytes;
};

size_t bytes_of(int32_t type, const std::vector<int64_t>& dims);
inline int32_t rows_of(const Array& x) { return int32_t(x.dims[x.dims.size() - 2]); }

// What fields point to.
struct Kept {
  std::deque<std::string> names;
  std::deque<Bytes> values;

  // Returns where the copy of `bytes` is; that of the name is the last of `names`.
  const void* keep(const std::string& name, Bytes bytes);
};

struct Case {
  Kept kept;
  std::vector<Field> fields;
  int32_t rows[3] = {1, 1, 1};
  std::vector<Array> constants;
  std::vector<Array> xs;
  std::vector<int32_t> only;

  explicit Case(const char* path);

};

class Results {
 public:
  explicit Results(const char* path);
  ~Results();
  __attribute__((format(printf, 2, 3))) void line(const char* format, ...);
  void output(int32_t type, const std::vector<int64_t>& dims, const Bytes& bytes);

 private:
  std::FILE* file_;
};

// The inputs of a case on the device, and inferences on them.
class Bench {
 public:
  using Enqueue = std::function<int(const void* const* inputs, void* const* outputs,
                                    void* workspace, void* stream)>;

  Bench(const Case& given, Results& results);

  // Runs the same thing twice, and a third time from a CUDA graph: each must give the same bits.
  void run(const char* how, int32_t tactic, const Array& x, const std::vector<Array>& outputs,
           size_t workspace_bytes, const Enqueue& enqueue);

 private:
  Results& results_;
  std::vector<std::unique_ptr<Buffer>> constants_;
  Stream stream_;
};

}  // namespace hydra::plugin
