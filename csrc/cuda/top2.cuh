// The accumulator of the two largest logits of a row. It is used alone or as part of a larger
// accumulator. An accumulator adds classes in ascending order and merges with others in any order.
#pragma once

#include "common/margin_math.h"
#include "device.cuh"

namespace marginops::cuda {

template <class Number>
struct TopAccumulator : Top2<Number> {
  using Top = Top2<Number>;

  // Top2::add() for classes in ascending order, in which an equal value never comes first. It never
  // adds -inf; see settle().
  __device__ __forceinline__ void add(Number value, int32_t index) {
    this->nan |= value != value;
    const bool is_first = value > this->first_value;
    const bool is_second = value > this->second_value;
    this->second_value = is_first ? this->first_value : is_second ? value : this->second_value;
    this->second = is_first ? this->first : is_second ? index : this->second;
    this->first_value = is_first ? value : this->first_value;
    this->first = is_first ? index : this->first;
  }

  template <int kSize>
  __device__ __forceinline__ void add_pack(const Number (&value)[kSize], int32_t index) {
    if (!matters(value)) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) add(value[i], index + i);
  }

  // Adds a whole row, which lies in shared memory.
  template <class Row>
  __device__ __forceinline__ void add_row(const Row& row) {
    for (int32_t c = 0; c < row.classes; ++c) add(row[c], c);
  }

  // Whether a pack changes anything. Most packs of a long row do not.
  template <int kSize>
  __device__ __forceinline__ bool matters(const Number (&value)[kSize]) const {
    bool result = false;
#pragma unroll
    for (int i = 0; i < kSize; ++i) result |= !(value[i] <= this->second_value);
    return result;
  }

  // The accumulator of the lane at this distance, except for `nan`. The whole warp takes part.
  __device__ __forceinline__ TopAccumulator exchange(int distance) const {
    TopAccumulator other;
    other.first_value = __shfl_xor_sync(kAllLanes, this->first_value, distance);
    other.second_value = __shfl_xor_sync(kAllLanes, this->second_value, distance);
    other.first = __shfl_xor_sync(kAllLanes, this->first, distance);
    other.second = __shfl_xor_sync(kAllLanes, this->second, distance);
    return other;
  }

  // Fills the places that are still empty. All classes that were never added are -inf (or NaN, and
  // then the result of the row is NaN anyway), so the lowest of them come next. Afterwards both
  // places hold classes of the row, if it has two.
  __device__ __forceinline__ void settle() {
    if (this->first == Top::kNone) this->first = 0;
    if (this->second == Top::kNone) this->second = this->first == 0 ? 1 : 0;
  }
};

}  // namespace marginops::cuda
