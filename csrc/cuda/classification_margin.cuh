// The output of classification margins. It computes the margin and the rival from the two largest
// logits of a row and its label.
#pragma once

#include "margin_launch.h"
#include "rows.cuh"
#include "top2.cuh"

namespace marginops::cuda {

// Divides margins by the norm.
template <class Number>
struct Normalizer {
  const Number* log_norm;  // or null
  Number half;             // half_scale() of the log norm on the host, used if log_norm is null

  explicit Normalizer(const LogNorm& norm)
      : log_norm(static_cast<const Number*>(norm.device)),
        half(half_scale(static_cast<Number>(norm.host))) {}

  __device__ __forceinline__ Number operator()(Number margin) const {
    return normalize(margin, log_norm == nullptr ? half : half_scale(*log_norm));
  }
};

// The classification margin and the strongest wrong class.
template <class Number>
struct TargetOutput {
  using Accumulator = TopAccumulator<Number>;
  static constexpr bool kWholeWarps = false;
  Target target;
  Normalizer<Number> normalized;
  Number* margin;  // or null
  int64_t* rival;  // or null

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>& row) const {
    return row.active ? __ldg(target.index.data + row.source * target.index.stride) : 0;
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t label,
                                        const Top2<Number>& top, int lane, int) const {
    if (!row.active || lane != 0) return;
    const bool ignored = label == target.ignore_index, valid = row.has(label);
    MARGINOPS_DEVICE_ASSERT(ignored || valid);
    if (rival != nullptr) {
      int64_t other = label == top.first ? top.second : top.first;
      if (top.nan) other = label == 0;
      rival[row.position] = ignored || !valid ? 0 : other;
    }
    if (margin == nullptr) return;
    Number result = std::numeric_limits<Number>::quiet_NaN();
    if (!top.nan && valid) {
      const Number label_logit = row[static_cast<int32_t>(label)];
      result = label_logit - (label_logit == top.first_value ? top.second_value : top.first_value);
      result = normalized(result);
    }
    margin[row.position] = ignored ? std::numeric_limits<Number>::infinity() : result;
  }
};

}  // namespace marginops::cuda
