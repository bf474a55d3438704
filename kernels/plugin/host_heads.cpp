// Runs a case on `Heads` alone: host_heads CASE RESULTS. Needs no TensorRT.
#include "host_case.h"
#include "plugin/heads.h"

using namespace hydra::plugin;

namespace {

// Shapes of all tensors of the node with this x: those of the case, then what the heads give.
std::vector<std::vector<int64_t>> dims_of(const Case& given, const Array& x,
                                          const Signature& signature) {
  std::vector<std::vector<int64_t>> all = {x.dims};
  for (const Array& array : given.constants) all.push_back(array.dims);
  for (int i = 0; i < signature.outputs; ++i) {
    const Tensor& tensor = signature.tensors[signature.inputs + i];
    all.emplace_back(tensor.dims, tensor.dims + tensor.rank);
    std::replace(all.back().begin(), all.back().end(), kBatch, int64_t(rows_of(x)));
  }
  return all;
}

hydra_status check_tensors(const Case& given, const Signature& signature) {
  for (const Array& x : given.xs) {
    const auto dims = dims_of(given, x, signature);
    std::vector<Dims> tensors;
    for (const auto& of : dims) tensors.push_back({int(of.size()), of.data()});
    const int inputs = int(tensors.size()) - signature.outputs;
    if (hydra_status status = signature.match_counts(inputs, signature.outputs)) return status;
    int32_t rows = 0;
    if (hydra_status status = signature.match(tensors.data(), &rows)) return status;
    require(rows == rows_of(x), "the batch is read off x");
  }
  return HYDRA_OK;
}

void write_plans(const Case& given, Heads& heads, int32_t tactic, Results& results) {
  for (const Array& x : given.xs) {
    require(heads.prepare(rows_of(x)) == HYDRA_OK, "prepare");
    const Plan& plan = heads.plan();
    require(plan.tactic == tactic && plan.rows == rows_of(x), "the plan is that of another batch");
    int32_t numbers[sizeof(Launches) / sizeof(int32_t)];
    std::memcpy(numbers, &plan.launches, sizeof(numbers));
    std::string text;
    for (const int32_t number : numbers) text += " " + std::to_string(number);
    results.line("plan %d %d%s", plan.tactic, plan.rows, text.c_str());
  }
}

void run_all(const Case& given, Heads& heads, const char* how, const std::vector<int32_t>& tactics,
             Bench& bench) {
  const Signature& signature = heads.signature();
  int32_t most_rows = given.rows[2];
  for (const Array& x : given.xs) most_rows = std::max(most_rows, rows_of(x));
  for (const int32_t tactic : tactics) {
    require(heads.set_tactic(tactic) == HYDRA_OK, "a valid tactic is refused");
    for (const Array& x : given.xs) {
      const auto dims = dims_of(given, x, signature);
      std::vector<Array> outputs;
      for (int i = signature.inputs; i < signature.inputs + signature.outputs; ++i) {
        const Tensor& tensor = signature.tensors[i];
        outputs.push_back({tensor.name, tensor.type, dims[size_t(i)], {}});
      }
      bench.run(how, tactic, x, outputs, heads.workspace_bytes(most_rows),
                [&](const void* const* in, void* const* out, void* workspace, void* stream) {
                  return heads.enqueue(rows_of(x), in, out, workspace, stream);
                });
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 3, "host_heads CASE RESULTS");
  const Case given(arguments[1]);
  Results results(arguments[2]);
  const auto refused = [&] {
    results.line("refused %s", hydra_last_error());
    return 0;
  };
  Specification specification;
  if (parse(given.fields.data(), int(given.fields.size()), &specification)) return refused();
  char identity[1024];
  describe(specification, identity, sizeof(identity));
  results.line("identity %s", identity);

  const Watch watch;
  {
    Heads heads(specification);
    if (check_tensors(given, heads.signature())) return refused();
    Bench bench(given, results);
    if (heads.configure(given.rows[0], given.rows[1], given.rows[2])) return refused();
    results.line("workspace %zu", heads.workspace_bytes(given.rows[2]));
    int32_t ids[kMaxTactics];
    int found = 0;
    if (heads.tactics(ids, &found)) return refused();
    for (int i = 0; i < found; ++i) results.line("tactic %d", ids[i]);
    std::vector<int32_t> tactics = given.only;
    if (tactics.empty()) {
      tactics.assign(ids, ids + found);
      tactics.push_back(0);
    }
    for (const int32_t tactic : tactics) {
      if (heads.set_tactic(tactic)) return refused();
      write_plans(given, heads, tactic, results);
    }
    run_all(given, heads, "detached", tactics, bench);
    heads.set_tactic(tactics.front());
    Heads attached(heads);
    require(attached.prepare(given.rows[0]) == HYDRA_OK, "prepare");
    require(attached.plan().tactic == tactics.front(), "a copy has another tactic");
    require(attached.attach() == HYDRA_OK, "attach");
    run_all(given, attached, "attached", tactics, bench);
  }
  results.line("memory %llu %llu", static_cast<unsigned long long>(watch.allocations()),
               static_cast<unsigned long long>(watch.frees()));
  return 0;
}
