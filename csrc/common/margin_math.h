// The arithmetic of margins. The CPU and the CUDA kernels share it so that both decide alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "platform.h"

namespace marginops {

// The two largest logits of a row and their classes. Among equal logits the lower class comes
// first. merge() is associative and commutative, so a row may be read in any order and in any
// pieces. A NaN anywhere in the row sets `nan` and makes the row's result NaN.
template <class Value>
struct Top2 {
  Value first_value = -std::numeric_limits<Value>::infinity();
  Value second_value = -std::numeric_limits<Value>::infinity();
  int32_t first = kNone;
  int32_t second = kNone;
  bool nan = false;

  static constexpr int32_t kNone = 0x7fffffff;

  MARGINOPS_FUNCTION static bool precedes(Value a, int32_t class_a, Value b, int32_t class_b) {
    return a > b || (a == b && class_a < class_b);
  }

  MARGINOPS_FUNCTION void add(Value value, int32_t index) {
    nan |= value != value;
    if (precedes(value, index, first_value, first)) {
      second_value = first_value;
      second = first;
      first_value = value;
      first = index;
    } else if (precedes(value, index, second_value, second)) {
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

// The difference of the two largest logits of a row. Adding 0 makes +0.0 of -0.0, which is the
// difference of -0.0 and +0.0.
template <class Value>
MARGINOPS_FUNCTION Value top2_margin(const Top2<Value>& top) {
  return top.nan ? std::numeric_limits<Value>::quiet_NaN()
                 : top.first_value - top.second_value + Value{0};
}

// normalize() returns margin * exp(-log_norm). It multiplies the margin twice by half_scale(),
// which is exp(-log_norm / 2) or, where that overflows, the largest finite number. So a margin of 0
// stays 0, and unless the margin is subnormal, the result over- or underflows only where the exact
// product does.
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

// The distance of a sample from the boundary between two classes, difference / distance. Two equal
// rows of weights have the distance 0: then 0 / 0 gives 0, and positive / 0 gives infinity.
template <class Value>
MARGINOPS_FUNCTION Value boundary_distance(Value difference, Value distance) {
  return difference == 0 && distance == 0 ? Value{0} : difference / distance;
}

// Whether the boundary of class a is nearer than that of class b: its score is smaller, or the
// scores are equal and a is the lower class. NaN comes before every number, so that it is not lost.
template <class Value>
MARGINOPS_FUNCTION bool is_nearer(Value a, int64_t class_a, Value b, int64_t class_b) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan && (!b_nan || class_a < class_b);
  return a < b || (a == b && class_a < class_b);
}

// Whether a sum of squares is far enough from overflow and underflow to take its root. If not, the
// caller computes the sum again, with scaled numbers or in float64.
template <class Value>
MARGINOPS_FUNCTION bool is_safe_square(Value square) {
  return square > std::numeric_limits<Value>::min() * Value(1e8) &&
         square < std::numeric_limits<Value>::max() / Value(1e8);
}

// Whether a class may have a nearer boundary than the best so far. The search for the nearest
// boundary skips the class otherwise. The radii are the distances of the two rows of weights from a
// common centre, which may be any point. Their sum is at least the distance between the rows, so
// difference / radius_sum is at most the score of the class. The factor 0.999 leaves a slack far
// above the rounding error of the radii and the quotient. The result is true for NaN, so that the
// search sees it.
template <class Value>
MARGINOPS_FUNCTION bool may_be_nearer(Value difference, Value radius_sum, Value best) {
  return !(difference * Value(0.999) > best * radius_sum);
}

}  // namespace marginops
