// Checks of the arguments of update_dynamics, for the kernels of every device.
#pragma once

#include "../common/dynamics_math.h"
#include "checks.h"

namespace marginops {

inline DynamicsState dynamics_state(const Tensor& values, const Tensor& counts,
                                    const Tensor& last_seen, const Tensor& totals) {
  check_dim("last_seen", last_seen, 1, "[N]");
  const int64_t samples = last_seen.size(0);
  return {state<float>("values", values, {samples, kDynamicsValues}, ScalarType::Float, values),
          state<int32_t>("counts", counts, {samples, kDynamicsCounts}, ScalarType::Int, values),
          state<int64_t>("last_seen", last_seen, {samples}, ScalarType::Long, values),
          state<int64_t>("totals", totals, {2}, ScalarType::Long, values), samples};
}

inline void check_visits(const Tensor& indices, const Tensor& margin, const Tensor& score,
                         const Tensor& loss, const Tensor& confidence, const Tensor& el2n,
                         const Tensor& correct, const Tensor& counted, const Tensor& values) {
  check_vector("indices", indices, "[B]", ScalarType::Long, values);
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType type) {
    check_vector(name, tensor, indices.size(0), "the rows of indices", type, values);
  };
  const ScalarType type = result_type(margin);
  check("margin", margin, type);
  check("score", score, type);
  check("loss", loss, type);
  check("confidence", confidence, type);
  check("el2n", el2n, type);
  check("correct", correct, ScalarType::Bool);
  check("counted", counted, ScalarType::Bool);
}

}  // namespace marginops
