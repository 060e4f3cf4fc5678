// The arithmetic of training dynamics, the same bits on every device. The columns are those of
// DynamicsState in marginops/ops/dynamics.py.
#pragma once

#include <cstdint>

#include "platform.h"

namespace marginops {

constexpr int kDynamicsValues = 8, kDynamicsCounts = 4;

// Contiguous tensors: values [N, 8], counts [N, 4], last_seen [N], totals [2].
struct DynamicsState {
  float* values;
  int32_t* counts;
  int64_t* last_seen;
  int64_t* totals;
  int64_t samples;
};

// A sample's place in last_seen: a later step is larger, and so is a lower row of the same step.
MARGINOPS_FUNCTION int64_t visit_key(int64_t step, int64_t row) {
  return step * (int64_t{1} << 32) + ((int64_t{1} << 32) - 1 - row);
}

// A product that is rounded. The compiler may not fuse it with a sum.
MARGINOPS_FUNCTION float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

MARGINOPS_FUNCTION bool is_finite(float value) { return value - value == 0; }

struct Visit {
  float margin, score, loss, confidence, el2n;
  bool correct;
};

// What a moving average keeps of its last value, and what it takes of a new one.
struct Decay {
  float kept, taken;

  MARGINOPS_FUNCTION explicit Decay(double decay)
      : kept(static_cast<float>(decay)), taken(static_cast<float>(1 - decay)) {}
};

// Adds a visit to the `values` and `counts` of its sample. Returns whether the visit is finite. If
// not, only the values of the last visit change.
MARGINOPS_FUNCTION bool add_visit(const Visit& visit, Decay decay, float* values, int32_t* counts) {
  values[0] = visit.margin;
  values[1] = visit.score;
  values[2] = visit.loss;
  if (!is_finite(visit.margin) || !is_finite(visit.confidence) || !is_finite(visit.el2n))
    return false;
  const bool was_correct = counts[2] - counts[3] == 1;
  values[3] = counts[0] == 0 ? visit.margin
                             : rounded_product(decay.kept, values[3]) +
                                   rounded_product(decay.taken, visit.margin);
  const float count = static_cast<float>(++counts[0]);
  values[4] += (visit.margin - values[4]) / count;
  const float step = visit.confidence - values[5];
  values[5] += step / count;
  values[6] += rounded_product(step, visit.confidence - values[5]);
  values[7] += (visit.el2n - values[7]) / count;
  counts[1] += visit.correct;
  counts[2] += visit.correct && !was_correct;
  counts[3] += !visit.correct && was_correct;
  return true;
}

}  // namespace marginops
