// Bindings of the CUDA kernels for the ops in marginops/ops/select*.py.
#include "tensor.h"

#include "../binding/aten.h"
#include "select_launch.h"

namespace marginops::cuda {
namespace {

std::tuple<Tensor, Tensor> empty_selection(const Tensor& like, ScalarType dtype) {
  return {new_tensor(like, {0}, dtype), new_tensor(like, {0}, ScalarType::Long)};
}

// A small k of few scores takes one launch. Otherwise the kernels choose the scores, and torch's
// sort orders them.
std::tuple<Tensor, Tensor> select_smallest_op(const Tensor& scores, int64_t k) {
  check_dim("scores", scores, 1, "[N]");
  check_floating("scores", scores);
  const Vector all = vector(scores);
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
  const Place place = place_of(scores);
  index = index_select(index, stable_sort(key, place).second, place);
  return {index_select(scores, index, place), index};
}

std::tuple<Tensor, Tensor> select_minimal_margin_op(const Tensor& logits,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, int64_t k,
                                                    bool nearest, bool softmax) {
  check_head(logits, weight, bias);
  check_k(k, logits.size(0));
  if (k == 0) return empty_selection(logits, result_type(logits));
  return select_smallest_op(minimal_margin_score_op(logits, weight, bias, nearest, softmax), k);
}

std::tuple<Tensor, Tensor> select_classification_margin_op(const Tensor& logits,
                                                           const Tensor& target,
                                                           const std::optional<Tensor>& log_norm,
                                                           int64_t k, int64_t ignore_index) {
  check_logits(logits);
  check_target(target, logits);
  check_log_norm(log_norm, logits);
  check_k(k, logits.size(0));
  if (k == 0) return empty_selection(logits, result_type(logits));
  return select_smallest_op(classification_margin_op(logits, target, log_norm, ignore_index), k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("select_smallest", MARGINOPS_BOX(&select_smallest_op));
  m.impl("select_minimal_margin", MARGINOPS_BOX(&select_minimal_margin_op));
  m.impl("select_classification_margin", MARGINOPS_BOX(&select_classification_margin_op));
}

}  // namespace marginops::cuda
