// The output of margins without a label and without a last layer: the difference of the two largest
// logits of a row, or of their probabilities. The accumulator decides which.
#pragma once

#include "statistics.cuh"

namespace marginops::cuda {

template <class Number>
__device__ __forceinline__ Number margin_of(const TopAccumulator<Number>& found) {
  return top2_margin(found);
}
template <class Number>
__device__ __forceinline__ Number margin_of(const StatisticsAccumulator<Number>& found) {
  return top2_margin(found, found.sums);
}

template <class Number, class Found>
struct Top2MarginOutput {
  using Accumulator = Found;
  static constexpr bool kWholeWarps = false;
  Number* margin;

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>&) const {
    return 0;
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t, const Found& found,
                                        int lane, int) const {
    if (row.active && lane == 0) margin[row.position] = margin_of(found);
  }
};

}  // namespace marginops::cuda
