// Adds a batch to the training dynamics of samples on the CPU, row by row, so that the result does
// not depend on the number of threads.
#include "../common/dynamics_math.h"
#include "tensor.h"

namespace marginops::cpu {
namespace {

constexpr int64_t kAhead = 8;  // rows whose sample is on its way from memory

// Checks a tensor of the state: [samples, columns], or one dimension without columns.
template <class T>
T* state(const char* name, const Tensor& tensor, int64_t samples, int64_t columns,
         ScalarType type) {
  check_dtype(name, tensor, type);
  const bool fits = tensor.dim() == (columns > 0 ? 2 : 1) && tensor.size(0) == samples &&
                    (columns == 0 || tensor.size(1) == columns);
  MARGINOPS_CHECK(tensor.is_cpu() && fits && tensor.is_contiguous(), name,
                  ": expected a contiguous tensor [", samples,
                  columns > 0 ? ", " + std::to_string(columns) : "", "] on the CPU, got ",
                  tensor.is_contiguous() ? "shape " : "strided shape ", shape_of(tensor), " on ",
                  device_of(tensor));
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
Vector<T> column(const char* name, const Tensor& tensor, const Tensor& indices, ScalarType type) {
  check_dtype(name, tensor, type);
  check_size(name, tensor, indices.size(0), "the rows of indices");
  return vector<T>(tensor);
}

void update_dynamics(const Tensor& values, const Tensor& counts, const Tensor& last_seen,
                     const Tensor& totals, const Tensor& indices, const Tensor& margin,
                     const Tensor& score, const Tensor& loss, const Tensor& confidence,
                     const Tensor& el2n, const Tensor& correct, const Tensor& counted,
                     double decay) {
  check_dim("last_seen", last_seen, 1, "[N]");
  const int64_t samples = last_seen.size(0);
  auto* all_values = state<float>("values", values, samples, kDynamicsValues, ScalarType::Float);
  auto* all_counts = state<int32_t>("counts", counts, samples, kDynamicsCounts, ScalarType::Int);
  auto* seen = state<int64_t>("last_seen", last_seen, samples, 0, ScalarType::Long);
  auto* total = state<int64_t>("totals", totals, 2, 0, ScalarType::Long);
  check_dim("indices", indices, 1, "[B]");
  const auto ids = column<int64_t>("indices", indices, indices, ScalarType::Long);
  const auto is_correct = column<bool>("correct", correct, indices, ScalarType::Bool);
  const auto is_counted = column<bool>("counted", counted, indices, ScalarType::Bool);
  const ScalarType type = result_type(margin);
  const auto update = [&](auto* null) {
    using Value = std::remove_pointer_t<decltype(null)>;
    const auto margins = column<Value>("margin", margin, indices, type),
               scores = column<Value>("score", score, indices, type),
               losses = column<Value>("loss", loss, indices, type),
               confidences = column<Value>("confidence", confidence, indices, type),
               el2ns = column<Value>("el2n", el2n, indices, type);
    for (int64_t row = 0; row < ids.size; ++row) {
      MARGINOPS_CHECK(0 <= ids[row] && ids[row] < samples, "indices: expected values in [0, ",
                      samples, "), got ", ids[row]);
    }
    const int64_t step = total[0];
    for (int64_t row = 0; row < ids.size; ++row) {
      if (row + kAhead < ids.size) {
        const int64_t next = ids[row + kAhead];
        __builtin_prefetch(seen + next, 1);
        __builtin_prefetch(all_values + kDynamicsValues * next, 1);
        __builtin_prefetch(all_counts + kDynamicsCounts * next, 1);
      }
      // An earlier row with the same index has a larger key.
      const int64_t id = ids[row], key = visit_key(step, row);
      if (!is_counted[row] || seen[id] > key) continue;
      seen[id] = key;
      const Visit visit{static_cast<float>(margins[row]), static_cast<float>(scores[row]),
                        static_cast<float>(losses[row]),  static_cast<float>(confidences[row]),
                        static_cast<float>(el2ns[row]),   is_correct[row]};
      total[1] += !add_visit(visit, Decay(decay), all_values + kDynamicsValues * id,
                             all_counts + kDynamicsCounts * id);
    }
    total[0] = step + 1;
  };
  if (type == ScalarType::Double) {
    update(static_cast<double*>(nullptr));
  } else {
    update(static_cast<float*>(nullptr));
  }
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("update_dynamics", MARGINOPS_BOX(&update_dynamics));
}

}  // namespace
}  // namespace marginops::cpu
