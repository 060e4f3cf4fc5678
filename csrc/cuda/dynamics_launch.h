// Launcher of the kernels of training dynamics, without torch. The rules of margin_launch.h hold
// here too.
#pragma once

#include "../common/dynamics_math.h"
#include "margin_launch.h"

namespace marginops::cuda {

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
