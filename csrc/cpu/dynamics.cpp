// Adds a batch to the training dynamics of samples on the CPU, row by row, so that the result does
// not depend on the number of threads.
#include "../binding/dynamics.h"

#include "tensor.h"

namespace marginops::cpu {
namespace {

constexpr int64_t kAhead = 8;  // rows whose sample is on its way from memory

void update_dynamics(const Tensor& values, const Tensor& counts, const Tensor& last_seen,
                     const Tensor& totals, const Tensor& indices, const Tensor& margin,
                     const Tensor& score, const Tensor& loss, const Tensor& confidence,
                     const Tensor& el2n, const Tensor& correct, const Tensor& counted,
                     double decay) {
  const DynamicsState all = dynamics_state(values, counts, last_seen, totals);
  check_visits(indices, margin, score, loss, confidence, el2n, correct, counted, values);
  const auto ids = vector<int64_t>(indices);
  const auto is_correct = vector<bool>(correct), is_counted = vector<bool>(counted);
  const auto update = [&](auto* null) {
    using Value = std::remove_pointer_t<decltype(null)>;
    const auto margins = vector<Value>(margin), scores = vector<Value>(score),
               losses = vector<Value>(loss), confidences = vector<Value>(confidence),
               el2ns = vector<Value>(el2n);
    for (int64_t row = 0; row < ids.size; ++row) {
      MARGINOPS_CHECK(0 <= ids[row] && ids[row] < all.samples, "indices: expected values in [0, ",
                      all.samples, "), got ", ids[row]);
    }
    const int64_t step = all.totals[0];
    for (int64_t row = 0; row < ids.size; ++row) {
      if (row + kAhead < ids.size) {
        const int64_t next = ids[row + kAhead];
        __builtin_prefetch(all.last_seen + next, 1);
        __builtin_prefetch(all.values + kDynamicsValues * next, 1);
        __builtin_prefetch(all.counts + kDynamicsCounts * next, 1);
      }
      // An earlier row with the same index has a larger key.
      const int64_t id = ids[row], key = visit_key(step, row);
      if (!is_counted[row] || all.last_seen[id] > key) continue;
      all.last_seen[id] = key;
      const Visit visit{static_cast<float>(margins[row]), static_cast<float>(scores[row]),
                        static_cast<float>(losses[row]),  static_cast<float>(confidences[row]),
                        static_cast<float>(el2ns[row]),   is_correct[row]};
      all.totals[1] += !add_visit(visit, Decay(decay), all.values + kDynamicsValues * id,
                                  all.counts + kDynamicsCounts * id);
    }
    all.totals[0] = step + 1;
  };
  if (margin.scalar_type() == ScalarType::Double) {
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
