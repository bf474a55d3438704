// Operations of a whole warp: shuffles and matrix products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"
#include "where.h"

namespace hydra::emulator {

void shuffle_xor(const void* value, void* result, size_t bytes, int mask, Where where);

// D = A B + C on PTX fragments; `c` points to four floats, or to four ints for int8.
void mma(Wait kind, void* c, const uint32_t* a, uint32_t b0, uint32_t b1, Where where);

}  // namespace hydra::emulator
