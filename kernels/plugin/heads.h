// The heads of one HydraHeads node, ready to run: everything that the TensorRT plugin does, without
// TensorRT. All of it goes through hydra_kernels.h; a failure leaves its text in hydra_last_error.
#pragma once

#include "plan.h"
#include "signature.h"

namespace hydra::plugin {

class Heads {
 public:
  // Of a specification that `parse` has read.
  explicit Heads(const Specification& specification);
  Heads(const Heads& other);  // without the memory of `attach`
  Heads& operator=(const Heads&) = delete;
  ~Heads();

  const Specification& specification() const { return specification_; }
  const Signature& signature() const { return signature_; }
  const Plan& plan() const { return plan_; }  // of the batch that was prepared last

  // The batches of an engine: whether this device runs them, which one its tactics are timed at,
  // and how large they get.
  hydra_status configure(int32_t least_rows, int32_t usual_rows, int32_t most_rows);

  // The tactics worth timing at the usual batch.
  hydra_status tactics(int32_t (&ids)[kMaxTactics], int* count) const;
  hydra_status set_tactic(int32_t id);

  // Of this batch and all smaller ones.
  size_t workspace_bytes(int32_t rows) const { return workspace_of(specification_, rows).bytes; }

  // Allocates the counters of summaries, so that no launch has to clear them first. Without, and
  // for batches larger than `most_rows`, they lie in the workspace and are cleared each time.
  hydra_status attach();

  // Chooses how a batch runs; `enqueue` does it for a batch that is not the last prepared.
  hydra_status prepare(int32_t rows);

  // Only launches. The workspace may hold anything, and is aligned to 256 bytes as TensorRT's is.
  hydra_status enqueue(int32_t rows, const void* const* inputs, void* const* outputs,
                       void* workspace, void* stream);

 private:
  struct Call;  // the arguments of `enqueue`

  hydra_status run_chain(const Call& call);
  hydra_status run_layers(const Call& call);
  hydra_status run_summary(const Call& call);

  Specification specification_;
  Signature signature_;
  int32_t usual_rows_ = 1;
  int32_t tactic_ = 0;
  Plan plan_{};  // of no rows
  void* memory_ = nullptr;
  int32_t memory_rows_ = 0;
};

}  // namespace hydra::plugin
