// The ensemble summary as kernels of its own; see ensemble_summary.cuh.
#pragma once

#include "ensemble_summary.cuh"

namespace hydra {

constexpr int kSummaryThreads = 256;

// Block x takes `rows` rows.
HYDRA_KERNEL(kSummaryThreads, 2) summary_rows(SummaryParameters p) {
  HYDRA_SHARED(shared);
  wait_for_previous_kernel();
  const int first = block_x() * p.rows;
  SummaryBlock(p, shared).rows(first, min(first + p.rows, p.batch));
}

// Block (m, b) reads head m of row b.
HYDRA_KERNEL(kSummaryThreads, 2) summary_heads(SummaryParameters p) {
  HYDRA_SHARED(shared);
  wait_for_previous_kernel();
  SummaryBlock(p, shared).head(block_y(), block_x());
}

// Block (s, b) takes slice s of the classes of row b.
HYDRA_KERNEL(kSummaryThreads, 2) summary_classes(SummaryParameters p) {
  HYDRA_SHARED(shared);
  wait_for_previous_kernel();
  SummaryBlock(p, shared).slice(block_y(), block_x());
}

}  // namespace hydra
