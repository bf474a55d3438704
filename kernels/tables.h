// The compiled kernels, by variant and tile sizes.
#pragma once

#include "configuration.h"
#include "hydra/group_linear.cuh"
#include "hydra/head_chain.cuh"

namespace hydra {

using LinearKernel = void (*)(GroupLinear);
using ChainKernel = void (*)(HeadChain);

// Null where `linear_exists` says so.
LinearKernel linear_kernel(Variant variant, int batch_tiles, int row_tiles);

ChainKernel chain_kernel(Variant variant, int batch_tiles);

}  // namespace hydra
