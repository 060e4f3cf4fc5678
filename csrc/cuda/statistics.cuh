// Statistics of each sample's softmax, from one reading of its row of logits: the accumulator and
// the outputs.
#pragma once

#include "classification_margin.cuh"
#include "common/statistics_math.h"
#include "statistics_launch.h"

namespace marginops::cuda {

// The two largest logits, and the sums of the exponentials of all classes but the first.
template <class Number>
struct StatisticsAccumulator : TopAccumulator<Number> {
  using Top = TopAccumulator<Number>;
  ExponentialSums<Number> sums;  // sums.maximum is first_value

  __device__ __forceinline__ void add(Number value, int32_t index) {
    Top::add(value, index);
    sums.add(value);
  }

  // Raises the maximum at most once for a pack.
  template <int kSize>
  __device__ __forceinline__ void add_pack(Number (&value)[kSize], int32_t index) {
    if (Top::matters(value)) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) Top::add(value[i], index + i);
      if (this->first_value > sums.maximum) sums.raise(this->first_value);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (index + i == this->first) value[i] = -std::numeric_limits<Number>::infinity();
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) add_below(value[i]);
  }

  template <class Row>
  __device__ __forceinline__ void add_row(const Row& row) {
    Top::add_row(row);
    sums.maximum = this->first_value;
    for (int32_t c = 0; c < row.classes; ++c)
      if (c != this->first) add_below(row[c]);
  }

  // The sums of the side that has the first class come first. So two lanes that exchange their sums
  // add them in the same order.
  __device__ __forceinline__ void merge(StatisticsAccumulator other) {
    if (Top::precedes(other.first_value, other.first, this->first_value, this->first)) {
      const ExponentialSums<Number> own_sums = sums;
      sums = other.sums;
      other.sums = own_sums;
    }
    sums.merge(other.sums);
    Top::merge(other);
  }

  __device__ __forceinline__ StatisticsAccumulator exchange(int distance) const {
    StatisticsAccumulator other;
    static_cast<Top&>(other) = Top::exchange(distance);
    other.sums.maximum = other.first_value;
    other.sums.plain = __shfl_xor_sync(kAllLanes, sums.plain, distance);
    other.sums.weighted = __shfl_xor_sync(kAllLanes, sums.weighted, distance);
    other.sums.squares = __shfl_xor_sync(kAllLanes, sums.squares, distance);
    return other;
  }

 private:
  // ExponentialSums::add() for a value that is not above the maximum. A step of -inf or NaN, for
  // example from a value of -inf, is replaced by one that adds 0.
  __device__ __forceinline__ void add_below(Number value) {
    constexpr Number kLowest = std::numeric_limits<Number>::lowest();
    Number step = value - sums.maximum;
    step = step > kLowest ? step : kLowest;
    const Number e = std::exp(step);
    sums.plain += e;
    sums.weighted += e * step;
    sums.squares += e * e;
  }
};

// All statistics of a sample. Its TargetOutput writes the margin and the rival.
template <class Number>
struct StatisticsOutput {
  using Accumulator = StatisticsAccumulator<Number>;
  static constexpr bool kWholeWarps = false;
  TargetOutput<Number> margins;
  Column<Number> input_norm;
  Number *top2, *loss, *confidence, *entropy;
  bool* correct;
  Number *el2n, *gradient_norm;
  bool* counted;
  Number *maximum, *log_sum;

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>& row) const {
    return margins.label(row);
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t label,
                                        const Accumulator& found, int lane, int threads) const {
    margins.write(row, label, found, lane, threads);
    if (!row.active || lane != 0) return;
    const int64_t n = row.position;
    const bool ignored = label == margins.target.ignore_index, valid = row.has(label);
    const Number label_logit = valid ? row[static_cast<int32_t>(label)] : 0;
    const SoftmaxStatistics<Number> result =
        ignored ? ignored_statistics<Number>()
                : softmax_statistics(found.sums, label_logit, found.nan || !valid);
    top2[n] =
        ignored ? std::numeric_limits<Number>::infinity() : margins.normalized(top2_margin(found));
    loss[n] = result.loss;
    confidence[n] = result.confidence;
    entropy[n] = result.entropy;
    correct[n] = ignored || (label == found.first && !found.nan);
    el2n[n] = result.el2n;
    if (gradient_norm != nullptr)
      gradient_norm[n] = ignored ? 0 : last_layer_gradient_norm(result.el2n, input_norm[n]);
    counted[n] = !ignored;
    maximum[n] = result.maximum;
    log_sum[n] = result.log_sum;
  }
};

template <class Number>
__device__ __forceinline__ ExponentialSums<Number> sums_of(
    const StatisticsAccumulator<Number>& found) {
  return found.sums;
}
template <class Number>
__device__ __forceinline__ ExponentialSums<Number> sums_of(const TopAccumulator<Number>&) {
  return {};
}

// What one piece of the classes adds to the statistics of a sample. With a TopAccumulator the sums
// are 0.
template <class Number, class Found>
struct ShardOutput {
  using Accumulator = Found;
  static constexpr bool kWholeWarps = false;
  IndexVector target;
  Number* values;    // [N, 6]
  int64_t* classes;  // [N, 2]

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>& row) const {
    return row.active ? __ldg(target.data + row.source * target.stride) : 0;
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t label,
                                        const Accumulator& found, int lane, int) const {
    if (!row.active || lane != 0) return;
    const ExponentialSums<Number> sums = sums_of(found);
    Number* value = values + 6 * row.position;
    value[0] = found.nan ? std::numeric_limits<Number>::quiet_NaN() : found.first_value;
    value[1] = found.second_value;
    value[2] = row.has(label) ? row[static_cast<int32_t>(label)] : 0;
    value[3] = sums.plain;
    value[4] = sums.weighted;
    value[5] = sums.squares;
    classes[2 * row.position] = found.first;
    classes[2 * row.position + 1] = row.classes > 1 ? found.second : -1;
  }
};

}  // namespace marginops::cuda
