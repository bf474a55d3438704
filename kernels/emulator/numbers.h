// Numbers as the GPU rounds them: fp16 and bf16 as raw bits, to nearest even, NaN as 0x7fff.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace hydra {

inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

namespace emulator {

// Rounds once to a 16-bit format with `kMantissa` stored bits and exponents from `kMinimum` on.
template <int kMantissa, int kMinimum>
uint16_t narrow(double v) {
  constexpr uint32_t infinity = 0x7fff >> kMantissa << kMantissa;
  if (std::isnan(v)) return 0x7fff;
  uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  int exponent = int(bits >> 52) - 1023;
  if (exponent > 1 - kMinimum) return sign | infinity;
  if (exponent < kMinimum) exponent = kMinimum;
  // In units of the last place the significand is a small integer; that division is exact. Above
  // 2^52 a double has no fraction left, so adding it rounds to nearest even.
  double units = std::ldexp(v, kMantissa - exponent);
  uint32_t rounded = uint32_t(units + 0x1p52 - 0x1p52);
  // The hidden bit, if there, counts as one step of the exponent; so does a carry.
  uint32_t result = (uint32_t(exponent - kMinimum) << kMantissa) + rounded;
  return sign | uint16_t(result < infinity ? result : infinity);
}

// a b + c to odd: a b must be exact in a double. Rounding the result again, to fewer bits, then
// gives what one rounding gives. Boldo, Melquiond: Emulation of FMA and correctly rounded sums.
inline double fma_to_odd(double a, double b, double c) {
  double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  double part = sum - product;
  double error = (product - (sum - part)) + (c - part);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if (error != 0 && (bits & 1) == 0) {
    bits += (error > 0) == (sum > 0) ? 1 : -1;
    std::memcpy(&sum, &bits, sizeof sum);
  }
  return sum;
}

}  // namespace emulator

// A subnormal half becomes normal by the multiplication; infinity and NaN keep their mantissa.
inline float half_to_float(uint16_t half) {
  uint32_t bits = float_to_bits(bits_to_float(uint32_t(half & 0x7fff) << 13) * 0x1p112f);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  return bits_to_float(bits | uint32_t(half & 0x8000) << 16);
}

inline float bfloat_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
inline uint16_t float_to_half(float v) { return emulator::narrow<10, -14>(v); }
inline uint16_t float_to_bfloat(float v) { return emulator::narrow<7, -126>(v); }

inline uint32_t floats_to_bfloats(float low, float high) {
  return float_to_bfloat(low) | uint32_t(float_to_bfloat(high)) << 16;
}

namespace emulator {

template <class Operation>
uint32_t on_pairs(Operation operation, uint32_t a, uint32_t b, uint32_t c = 0) {
  uint32_t low = operation(uint16_t(a), uint16_t(b), uint16_t(c));
  uint32_t high = operation(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16));
  return low | high << 16;
}

}  // namespace emulator

// The difference and the product of two halves fit a double.
inline uint32_t half2_sub(uint32_t a, uint32_t b) {
  return emulator::on_pairs(
      [](uint16_t a, uint16_t b, uint16_t) {
        return emulator::narrow<10, -14>(double(half_to_float(a)) - half_to_float(b));
      },
      a, b);
}

inline uint32_t half2_mul(uint32_t a, uint32_t b) {
  return emulator::on_pairs(
      [](uint16_t a, uint16_t b, uint16_t) {
        return emulator::narrow<10, -14>(double(half_to_float(a)) * half_to_float(b));
      },
      a, b);
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return emulator::on_pairs(
      [](uint16_t a, uint16_t b, uint16_t c) {
        return emulator::narrow<10, -14>(
            emulator::fma_to_odd(half_to_float(a), half_to_float(b), half_to_float(c)));
      },
      a, b, c);
}

inline uint32_t bfloat2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return emulator::on_pairs(
      [](uint16_t a, uint16_t b, uint16_t c) {
        return emulator::narrow<7, -126>(
            emulator::fma_to_odd(bfloat_to_float(a), bfloat_to_float(b), bfloat_to_float(c)));
      },
      a, b, c);
}

// As __byte_perm: the top bit of a nibble is ignored.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    int chosen = selector >> (4 * i) & 7;
    result |= uint32_t(bytes >> (8 * chosen) & 0xff) << (8 * i);
  }
  return result;
}

inline int float_to_int8(float v) {
  if (std::isnan(v)) return 0;
  return int(std::nearbyint(std::fmin(std::fmax(v, -128.0f), 127.0f)));
}

}  // namespace hydra
