// The order of scores. Scores ascend by value. -0.0 and +0.0 are equal. NaN of either sign comes
// last, after +inf. sort_key() returns an unsigned integer, and these integers compare as the
// scores do. Among equal keys the selections take the lowest index first: cpu/selector.h,
// cuda/select_*.cuh and cuda/select_ops.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace marginops {

template <class Score>
struct SortKey;
template <>
struct SortKey<float> {
  using type = uint32_t;
};
template <>
struct SortKey<double> {
  using type = uint64_t;
};

template <class Score>
MARGINOPS_FUNCTION typename SortKey<Score>::type sort_key(Score score) {
  using Key = typename SortKey<Score>::type;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  if (score != score) return ~Key{0};
  score += Score{0};  // -0.0 + 0.0 is +0.0
  Key bits;
  memcpy(&bits, &score, sizeof bits);
  return bits & kSign ? ~bits : bits | kSign;
}

}  // namespace marginops
