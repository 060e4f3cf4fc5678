// Selects samples on the CPU: those with the k smallest scores, margins or minimal margin scores.
#include <tuple>

#include "boundary_selection.h"
#include "margin.h"
#include "selector.h"

namespace marginops::cpu {
namespace {

std::tuple<Tensor, Tensor> select_smallest(const Tensor& scores, int64_t k) {
  check_dim("scores", scores, 1, "[N]");
  check_floating("scores", scores);
  const int64_t size = scores.size(0);
  check_k(k, size);
  Tensor chosen = new_tensor({k}, scores.scalar_type());
  Tensor indices = new_tensor({k}, ScalarType::Long);
  auto* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  for_dtype(scores, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const Vector<T> view = vector<T>(scores);
    if (std::is_same_v<T, Value> && (view.stride == 1 || size < 2)) {
      select_indices(reinterpret_cast<const Value*>(view.data), size, k, index);
    } else {
      const auto values = uninitialized<Value>(size);
      parallel(size, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) values[i] = value_of(view[i]);
      });
      select_indices<Value>(values.get(), size, k, index);
    }
    auto* score = static_cast<T*>(chosen.mutable_data_ptr());
    for (int64_t i = 0; i < k; ++i) score[i] = view[index[i]];
  });
  return {chosen, indices};
}

std::tuple<Tensor, Tensor> select_minimal_margin(const Tensor& logits,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& bias, int64_t k,
                                                 bool nearest, bool softmax) {
  check_head(logits, weight, bias);
  check_k(k, logits.size(0));
  if (!weight || nearest || !bounds_pay_off(logits, *weight, k)) {
    return select_smallest(minimal_margin_score(logits, weight, bias, nearest, softmax), k);
  }
  Tensor chosen = new_tensor({k}, result_type(logits));
  Tensor indices = new_tensor({k}, ScalarType::Long);
  for_dtype(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const auto distances = weight_distances<Value>(*weight, bias);
    select_nearest_to_boundary(matrix<T>(logits), *distances, k,
                               static_cast<Value*>(chosen.mutable_data_ptr()),
                               static_cast<int64_t*>(indices.mutable_data_ptr()));
  });
  return {chosen, indices};
}

std::tuple<Tensor, Tensor> select_classification_margin(const Tensor& logits, const Tensor& target,
                                                        const std::optional<Tensor>& log_norm,
                                                        int64_t k, int64_t ignore_index) {
  check_logits(logits);
  check_k(k, logits.size(0));
  return select_smallest(classification_margin(logits, target, log_norm, ignore_index), k);
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("select_smallest", MARGINOPS_BOX(&select_smallest));
  m.impl("select_minimal_margin", MARGINOPS_BOX(&select_minimal_margin));
  m.impl("select_classification_margin", MARGINOPS_BOX(&select_classification_margin));
}

}  // namespace
}  // namespace marginops::cpu
