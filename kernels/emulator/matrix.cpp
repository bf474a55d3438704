// The layouts are those of mma.m16n8k16 and m16n8k32 in the PTX manual. With lane l = 4 g + t,
// register i of A holds row g + 8 (i & 1) and, from column w t + 4 w (i >> 1) on, w values, where w
// is 2 for 16-bit floats and 4 for int8. B holds column g in the same order along k.
#include "matrix.h"

#include <climits>
#include <cstring>

#include "numbers.h"

namespace hydra::emulator {

namespace {

struct Exchange {
  const void* value;
  void* result;
  size_t bytes;
  int mask;
};

struct Fragments {
  void* c;
  const uint32_t* a;
  uint32_t b[2];
};

constexpr int kRows = 16, kColumns = 8;

void exchange(Warp& warp) {
  for (int lane = 0; lane < kLanes; ++lane) {
    auto& to = *static_cast<Exchange*>(warp.arguments[lane]);
    auto& from = *static_cast<Exchange*>(warp.arguments[lane ^ to.mask]);
    std::memcpy(to.result, from.value, to.bytes);
  }
}

// `Value` as stored in A and B once `widen` has turned the bits into a number.
template <int kDepth, class Value, class Widen>
void gather(const Warp& warp, Widen widen, Value (&a)[kRows][kDepth], Value (&b)[kDepth][kColumns]) {
  constexpr int width = kDepth / 8, bits = 32 / width;
  for (int lane = 0; lane < kLanes; ++lane) {
    auto& fragments = *static_cast<const Fragments*>(warp.arguments[lane]);
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < width; ++j) {
        a[g + 8 * (i & 1)][width * (t + 4 * (i >> 1)) + j] = widen(fragments.a[i] >> (bits * j));
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < width; ++j) {
        b[width * (t + 4 * i) + j][g] = widen(fragments.b[i] >> (bits * j));
      }
    }
  }
}

// Calls `store` with each lane's element of C, its number there, and the sum of products.
template <int kDepth, class Sum, class Value, class Store>
void multiply(const Value (&a)[kRows][kDepth], const Value (&b)[kDepth][kColumns], Store store) {
  ++machine.counters.matrix_products;
  for (int row = 0; row < kRows; ++row) {
    Sum sums[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < kColumns; ++column) {
      store(row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, sums[column]);
    }
  }
}

// Products and their sum in double, C added, one rounding to float. The hardware aligns and cuts
// the terms differently from one generation to the next; this is what all of them approximate.
template <float (*kWiden)(uint16_t)>
void multiply_floats(Warp& warp) {
  double a[kRows][16], b[16][kColumns];
  gather(warp, [](uint32_t bits) { return double(kWiden(uint16_t(bits))); }, a, b);
  multiply<16, double>(a, b, [&](int lane, int i, double sum) {
    float& c = static_cast<float*>(static_cast<Fragments*>(warp.arguments[lane])->c)[i];
    c = float(sum + c);
  });
}

void multiply_integers(Warp& warp) {
  int a[kRows][32], b[32][kColumns];
  gather(warp, [](uint32_t bits) { return int(int8_t(uint8_t(bits))); }, a, b);
  multiply<32, int>(a, b, [&](int lane, int i, int sum) {
    int& c = static_cast<int*>(static_cast<Fragments*>(warp.arguments[lane])->c)[i];
    int64_t total = int64_t(sum) + c;
    if (total < INT_MIN || total > INT_MAX) {
      const Thread& thread = machine.lane(warp, lane);
      machine.fault(thread, thread.where,
                    "mma_int8 adds " + std::to_string(sum) + " to " + std::to_string(c) + " in c[" +
                        std::to_string(i) +
                        "], which overflows int32. Convert to float after fewer steps.");
    }
    c = int(total);
  });
}

}  // namespace

void shuffle_xor(const void* value, void* result, size_t bytes, int mask, Where where) {
  if (mask < 0 || mask >= kLanes) {
    machine.fault(where, "shuffle_xor with mask " + std::to_string(mask) +
                             ": a lane number differs in bits 0 to 4. Use a mask from 0 to 31.");
  }
  Exchange argument{value, result, bytes, mask};
  machine.rendezvous(Wait::shuffle_xor, mask + kLanes * int(bytes), &argument, exchange, where);
}

void mma(Wait kind, void* c, const uint32_t* a, uint32_t b0, uint32_t b1, Where where) {
  Fragments argument{c, a, {b0, b1}};
  auto complete = kind == Wait::mma_half     ? multiply_floats<half_to_float>
                  : kind == Wait::mma_bfloat ? multiply_floats<bfloat_to_float>
                                             : multiply_integers;
  // The line is part of what must agree: on the GPU all lanes execute the same instruction.
  machine.rendezvous(kind, where.line, &argument, complete, where);
}

}  // namespace hydra::emulator
