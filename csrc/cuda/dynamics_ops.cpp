// Bindings of the CUDA kernels for the op in marginops/ops/dynamics.py.
#include "tensor.h"

#include "../binding/dynamics.h"
#include "dynamics_launch.h"

namespace marginops::cuda {
namespace {

void update_dynamics_op(const Tensor& values, const Tensor& counts, const Tensor& last_seen,
                        const Tensor& totals, const Tensor& indices, const Tensor& margin,
                        const Tensor& score, const Tensor& loss, const Tensor& confidence,
                        const Tensor& el2n, const Tensor& correct, const Tensor& counted,
                        double decay) {
  const DynamicsState samples = dynamics_state(values, counts, last_seen, totals);
  check_visits(indices, margin, score, loss, confidence, el2n, correct, counted, values);
  const auto flags = [](const Tensor& tensor) {
    return BoolVector{static_cast<const bool*>(tensor.const_data_ptr()), tensor.stride(0)};
  };
  const DynamicsBatch batch{index_vector(indices), vector(margin), vector(score),  vector(loss),
                            vector(confidence),    vector(el2n),   flags(correct), flags(counted)};
  const Launch launch(values);
  Tensor step = new_tensor(values, {1}, ScalarType::Long);
  check_launch(
      update_dynamics(samples, batch, decay, step.mutable_data_ptr<int64_t>(), launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("update_dynamics", MARGINOPS_BOX(&update_dynamics_op));
}

}  // namespace marginops::cuda
