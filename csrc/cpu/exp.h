// The exponential of a vector of floats or doubles, within 1.5 units in the last place.
#pragma once

#include "simd.h"

namespace marginops::cpu {

template <class Value>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -87.33f;         // smaller arguments give 0, not a subnormal
  static constexpr float kRound = 0x1.8p23f + 127;  // a sum with it ends in the biased exponent
  static constexpr float kLog2High = 0x1.63p-1f;    // few bits: a product with an exponent is exact
  static constexpr float kLog2Low = -0x1.bd0106p-13f;
  static constexpr int kDegree = 7, kMantissa = 23;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -708.3;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLog2High = 0x1.62e42feep-1;
  static constexpr double kLog2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kDegree = 13, kMantissa = 52;
};

constexpr double factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }

// The argument is at most 88 (float) or 709 (double). exp(-inf) is 0 and exp(NaN) is NaN.
template <class Value, class Vector = VectorOf<Value>>
inline Vector exp(Vector x) {
  using Constants = ExpConstants<Value>;
  // x = exponent * log(2) + rest. A Taylor polynomial gives exp(rest).
  const Vector rounded = x * static_cast<Value>(1.4426950408889634) + Constants::kRound;
  const Vector exponent = rounded - Constants::kRound;
  const Vector rest = (x - exponent * Constants::kLog2High) - exponent * Constants::kLog2Low;
  Vector sum = Vector{} + static_cast<Value>(1 / factorial(Constants::kDegree));
#pragma GCC unroll 16
  for (int power = Constants::kDegree - 1; power >= 0; --power) {
    sum = sum * rest + static_cast<Value>(1 / factorial(power));
  }
  typename Simd<Value>::Bits bits;
  memcpy(&bits, &rounded, sizeof bits);
  bits <<= Constants::kMantissa;
  Vector scale;
  memcpy(&scale, &bits, sizeof scale);
  return x < Constants::kLowest ? Vector{} : sum * scale;
}

}  // namespace marginops::cpu
