// Launcher of the kernels of training dynamics, without torch. The rules of margin_launch.h hold
// here too.
#pragma once

#include "margin_launch.h"

namespace marginops::cuda {

// Contiguous tensors: values [N, 8], counts [N, 4], last_seen [N], totals [2].
struct DynamicsState {
  float* values;
  int32_t* counts;
  int64_t* last_seen;
  int64_t* totals;
  int64_t samples;
};

struct BoolVector {
  const bool* data;
  int64_t stride;
};

// [B] each. The numbers are float32 or float64, all of one dtype.
struct DynamicsBatch {
  IndexVector indices;
  Vector margin, score, loss, confidence, el2n;
  BoolVector correct, counted;
};

// `step` is a workspace for one number.
cudaError_t update_dynamics(const DynamicsState& state, const DynamicsBatch& batch, double decay,
                            int64_t* step, cudaStream_t stream);

}  // namespace marginops::cuda
