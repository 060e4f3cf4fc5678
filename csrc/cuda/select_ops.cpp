// Bindings of the CUDA kernels for the ops in marginops/ops/select.py.
#include <array>

#include "binding.h"
#include "select_launch.h"

namespace marginops::cuda {
namespace {

void check_k(int64_t k, int64_t count) {
  MARGINOPS_CHECK(0 <= k && k <= count, "k: expected 0 <= k <= ", count, ", got ", k);
}

Tensor index_select(const Tensor& tensor, const Tensor& index) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(tensor), from(int64_t{0}), from(index)};
  call_torch("aten::index_select", "", stack, place_of(tensor));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor stable_argsort(const Tensor& key) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(key), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  call_torch("aten::sort", "stable", stack, place_of(key));
  const Tensor sorted =
      torch::stable::detail::to<Tensor>(stack[0]);  // owns the values, to free them
  return torch::stable::detail::to<Tensor>(stack[1]);
}

std::tuple<Tensor, Tensor> empty_selection(const Tensor& like, ScalarType dtype) {
  return {new_tensor(like, {0}, dtype), new_tensor(like, {0}, ScalarType::Long)};
}

// A small k of few scores takes one launch. Otherwise the kernels choose the scores, and torch's
// sort orders them.
std::tuple<Tensor, Tensor> select_smallest_op(const Tensor& scores, int64_t k) {
  const Vector all = vector(scores, "scores", scores);
  check_k(k, all.size);
  if (k == 0) return empty_selection(scores, scores.scalar_type());
  const Launch launch(scores);
  Tensor index = new_tensor(scores, {k}, ScalarType::Long);
  if (fits_one_block(all.size, k)) {
    Tensor values = new_tensor(scores, {k}, scores.scalar_type());
    check_launch(select_sorted(all, k, values.mutable_data_ptr(), index.mutable_data_ptr<int64_t>(),
                               launch.stream()));
    return {values, index};
  }
  const ScalarType key_type = all.dtype == Dtype::kFloat64 ? ScalarType::Long : ScalarType::Int;
  Tensor key = new_tensor(scores, {k}, key_type);
  Tensor workspace = new_workspace(scores, select_workspace_bytes(all));
  check_launch(select_unsorted(all, k, key.mutable_data_ptr(), index.mutable_data_ptr<int64_t>(),
                               workspace.mutable_data_ptr(), launch.stream()));
  index = index_select(index, stable_argsort(key));
  return {index_select(scores, index), index};
}

std::tuple<Tensor, Tensor> select_minimal_margin_op(const Tensor& logits,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, int64_t k,
                                                    bool nearest, bool softmax) {
  const Matrix matrix = logits_of(logits);
  check_k(k, matrix.rows);
  if (k == 0) return empty_selection(logits, result_type(matrix.dtype));
  return select_smallest_op(minimal_margin_score_op(logits, weight, bias, nearest, softmax), k);
}

std::tuple<Tensor, Tensor> select_classification_margin_op(const Tensor& logits,
                                                           const Tensor& target,
                                                           const std::optional<Tensor>& log_norm,
                                                           int64_t k, int64_t ignore_index) {
  const Matrix matrix = logits_of(logits);
  check_k(k, matrix.rows);
  if (k == 0) return empty_selection(logits, result_type(matrix.dtype));
  return select_smallest_op(classification_margin_op(logits, target, log_norm, ignore_index), k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("select_smallest", MARGINOPS_BOX(&select_smallest_op));
  m.impl("select_minimal_margin", MARGINOPS_BOX(&select_minimal_margin_op));
  m.impl("select_classification_margin", MARGINOPS_BOX(&select_classification_margin_op));
}

}  // namespace marginops::cuda
