// The arithmetic of margins, shared by the CPU and the CUDA kernels so that both decide alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "platform.h"

namespace marginops {

// The two largest logits of a row and their classes; the lower class comes first among equals.
// merge() is associative and commutative, so rows may be read in any order and in any pieces.
// A NaN anywhere in the row is kept in `nan` and makes the row's result NaN.
template <class Value>
struct Top2 {
  Value first_value = -std::numeric_limits<Value>::infinity();
  Value second_value = -std::numeric_limits<Value>::infinity();
  int32_t first = kNone;
  int32_t second = kNone;
  bool nan = false;

  static constexpr int32_t kNone = 0x7fffffff;

  MARGINOPS_FUNCTION static bool before(Value a, int32_t class_a, Value b, int32_t class_b) {
    return a > b || (a == b && class_a < class_b);
  }

  MARGINOPS_FUNCTION void add(Value value, int32_t index) {
    nan |= value != value;
    if (before(value, index, first_value, first)) {
      second_value = first_value;
      second = first;
      first_value = value;
      first = index;
    } else if (before(value, index, second_value, second)) {
      second_value = value;
      second = index;
    }
  }

  MARGINOPS_FUNCTION void merge(const Top2& other) {
    add(other.first_value, other.first);
    add(other.second_value, other.second);
    nan |= other.nan;
  }
};

// margin * exp(-log_norm). Half the exponent goes into each factor and the factors stay finite, so
// the result of a margin that is not subnormal over- or underflows only where the product does, and
// 0 stays 0.
template <class Value>
MARGINOPS_FUNCTION Value half_scale(Value log_norm) {
  Value half = exp(-log_norm / 2);
  Value largest = std::numeric_limits<Value>::max();
  return half > largest ? largest : half;
}
template <class Value>
MARGINOPS_FUNCTION Value normalize(Value margin, Value half) {
  return margin * half * half;
}

// Distance to the boundary between two classes: difference / distance, where two equal rows of
// weights give 0 / 0 = 0 and positive / 0 = inf.
template <class Value>
MARGINOPS_FUNCTION Value boundary_distance(Value difference, Value distance) {
  return difference == 0 && distance == 0 ? Value{0} : difference / distance;
}

// Whether class a's boundary takes the place of class b's as the nearest: a smaller score, NaN
// before all so that it is seen, and the lower class among equals.
template <class Value>
MARGINOPS_FUNCTION bool is_nearer(Value a, int64_t class_a, Value b, int64_t class_b) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan && (!b_nan || class_a < class_b);
  return a < b || (a == b && class_a < class_b);
}

// Whether a sum of squares is far enough from over- and underflow to take its root; if not, the
// caller sums again with the differences scaled by their largest.
template <class Value>
MARGINOPS_FUNCTION bool is_safe_square(Value square) {
  return square > std::numeric_limits<Value>::min() * Value(1e8) &&
         square < std::numeric_limits<Value>::max() / Value(1e8);
}

// The search for the nearest boundary skips class j when even the upper bound
// radius_i + radius_j >= ||w_i - w_j|| (radii around any common centre) leaves it farther than the
// best so far. The slack is far above the rounding error of the radii and the quotient. NaN is
// never skipped, so it is seen.
template <class Value>
MARGINOPS_FUNCTION bool may_be_nearer(Value difference, Value radius_sum, Value best) {
  return !(difference * Value(0.999) > best * radius_sum);
}

}  // namespace marginops
