// Bindings of the CUDA kernels for the op in marginops/ops/dynamics.py.
#include "dynamics_launch.h"

#include "../common/dynamics_math.h"
#include "binding.h"

namespace marginops::cuda {
namespace {

// Checks a tensor of the state: [samples, columns], or one dimension without columns.
template <class T>
T* state(const char* name, const Tensor& tensor, int64_t samples, int64_t columns, ScalarType type,
         const Tensor& like) {
  check_place(tensor, name, columns > 0 ? 2 : 1, like);
  check_dtype(name, tensor, type);
  const bool fits = tensor.size(0) == samples && (columns == 0 || tensor.size(1) == columns);
  MARGINOPS_CHECK(fits && tensor.is_contiguous(), name, ": expected a contiguous tensor of ",
                  samples, " rows", columns > 0 ? " and the columns of the state" : "", ", got ",
                  tensor.is_contiguous() ? "shape " : "strided shape ", shape_of(tensor));
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void update_dynamics_op(const Tensor& values, const Tensor& counts, const Tensor& last_seen,
                        const Tensor& totals, const Tensor& indices, const Tensor& margin,
                        const Tensor& score, const Tensor& loss, const Tensor& confidence,
                        const Tensor& el2n, const Tensor& correct, const Tensor& counted,
                        double decay) {
  check_place(last_seen, "last_seen", 1, values);
  const int64_t samples = last_seen.size(0);
  const DynamicsState samples_state{
      state<float>("values", values, samples, kDynamicsValues, ScalarType::Float, values),
      state<int32_t>("counts", counts, samples, kDynamicsCounts, ScalarType::Int, values),
      state<int64_t>("last_seen", last_seen, samples, 0, ScalarType::Long, values),
      state<int64_t>("totals", totals, 2, 0, ScalarType::Long, values), samples};
  const IndexVector ids = index_vector(indices, "indices", values);
  const ScalarType type =
      margin.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto numbers = [&](const Tensor& tensor, const char* name) {
    check_dtype(name, tensor, type);
    check_size(name, tensor, ids.size, "the rows of indices");
    return vector(tensor, name, values);
  };
  const auto flags = [&](const Tensor& tensor, const char* name) {
    check_place(tensor, name, 1, values);
    check_dtype(name, tensor, ScalarType::Bool);
    check_size(name, tensor, ids.size, "the rows of indices");
    return BoolVector{static_cast<const bool*>(tensor.const_data_ptr()), tensor.stride(0)};
  };
  const DynamicsBatch batch{ids,
                            numbers(margin, "margin"),
                            numbers(score, "score"),
                            numbers(loss, "loss"),
                            numbers(confidence, "confidence"),
                            numbers(el2n, "el2n"),
                            flags(correct, "correct"),
                            flags(counted, "counted")};
  const Launch launch(values);
  Tensor step = new_tensor(values, {1}, ScalarType::Long);
  check_launch(update_dynamics(samples_state, batch, decay, step.mutable_data_ptr<int64_t>(),
                               launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("update_dynamics", MARGINOPS_BOX(&update_dynamics_op));
}

}  // namespace marginops::cuda
