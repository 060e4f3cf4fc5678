// Bindings of the CUDA kernels for the ops in marginops/ops/margin*.py.
#include <algorithm>

#include "binding.h"

namespace marginops::cuda {

Tensor classification_margin_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index) {
  const Matrix matrix = logits_of(logits);
  const Target classes = target_of(target, matrix, logits, ignore_index);
  const LogNorm norm = log_norm_of(log_norm, matrix, logits);
  const Launch launch(logits);
  Tensor margin = new_tensor(logits, {matrix.rows}, result_type(matrix.dtype));
  Tensor workspace = new_workspace(
      logits, classification_margin_workspace_bytes(matrix, {nullptr, matrix.rows, 0}));
  check_launch(classification_margin(matrix, classes, norm, margin.mutable_data_ptr(),
                                     workspace.mutable_data_ptr(), launch.stream()));
  return margin;
}

Tensor minimal_margin_score_op(const Tensor& logits, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, bool nearest, bool softmax) {
  const Matrix matrix = logits_of(logits);
  const Launch launch(logits);
  Tensor score = new_tensor(logits, {matrix.rows}, result_type(matrix.dtype));
  if (!weight.has_value()) {
    Tensor workspace = new_workspace(logits, top2_margin_workspace_bytes(matrix, softmax));
    check_launch(top2_margin(matrix, softmax, score.mutable_data_ptr(),
                             workspace.mutable_data_ptr(), launch.stream()));
    return score;
  }
  const HeadArguments arguments(*weight, bias, logits);
  const Head& head = arguments.head_for(matrix);
  Tensor workspace = new_workspace(
      logits, minimal_margin_workspace_bytes(matrix, head, {nullptr, matrix.rows, 0}, nearest));
  check_launch(minimal_margin_score(matrix, head, nearest, score.mutable_data_ptr(),
                                    workspace.mutable_data_ptr(), launch.stream()));
  return score;
}

namespace {

std::tuple<Tensor, Tensor> classification_margin_rival_op(const Tensor& logits,
                                                          const Tensor& target,
                                                          const std::optional<Tensor>& log_norm,
                                                          const std::optional<Tensor>& rows,
                                                          int64_t ignore_index) {
  const Matrix matrix = logits_of(logits);
  const Target classes = target_of(target, matrix, logits, ignore_index);
  const LogNorm norm = log_norm_of(log_norm, matrix, logits);
  const Rows chosen = rows_of(rows, matrix, logits);
  const Launch launch(logits);
  Tensor margin = new_tensor(logits, {chosen.size}, result_type(matrix.dtype));
  Tensor rival = new_tensor(logits, {chosen.size}, ScalarType::Long);
  Tensor workspace = new_workspace(logits, classification_margin_workspace_bytes(matrix, chosen));
  check_launch(classification_margin_rival(matrix, classes, norm, chosen, margin.mutable_data_ptr(),
                                           rival.mutable_data_ptr<int64_t>(),
                                           workspace.mutable_data_ptr(), launch.stream()));
  return {margin, rival};
}

std::tuple<Tensor, Tensor> minimal_margin_pair_op(const Tensor& logits, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& rows, bool nearest) {
  const Matrix matrix = logits_of(logits);
  const HeadArguments arguments(weight, bias, logits);
  const Head& head = arguments.head_for(matrix);
  const Rows chosen = rows_of(rows, matrix, logits);
  const Launch launch(logits);
  Tensor pair = new_tensor(logits, {chosen.size, 2}, ScalarType::Long);
  Tensor distance = new_tensor(logits, {chosen.size}, result_type(matrix.dtype));
  Tensor workspace =
      new_workspace(logits, minimal_margin_workspace_bytes(matrix, head, chosen, nearest));
  check_launch(minimal_margin_pair(matrix, head, chosen, nearest, pair.mutable_data_ptr<int64_t>(),
                                   distance.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                   launch.stream()));
  return {pair, distance};
}

void check_coefficient(const Tensor& coefficient, const IndexVector& key, Dtype dtype,
                       const Tensor& like) {
  check_place(coefficient, "coefficient", 1, like);
  check_size("coefficient", coefficient, key.size, "the values of key");
  check_dtype("coefficient", coefficient, result_type(dtype));
}

std::tuple<Tensor, Tensor> pair_gradient_op(const Tensor& key, const Tensor& coefficient,
                                            const Tensor& weight,
                                            const std::optional<Tensor>& bias) {
  const HeadArguments arguments(weight, bias, key);
  const Matrix& matrix = arguments.get().weight;
  const IndexVector entries = index_vector(key, "key", key);
  check_coefficient(coefficient, entries, matrix.dtype, key);
  MARGINOPS_CHECK(matrix.rows <= INT32_MAX, "weight: expected fewer than 2**31 rows, got ",
                  matrix.rows);
  const Launch launch(key);
  const Tensor dense_key = contiguous(key, place_of(key));
  const Tensor dense_coefficient = contiguous(coefficient, place_of(coefficient));
  Tensor grad_weight = new_tensor(weight, {matrix.rows, matrix.cols}, weight.scalar_type());
  Tensor grad_bias = new_tensor(weight, {matrix.rows}, weight.scalar_type());
  check_launch(pair_gradient(dense_key.const_data_ptr<int64_t>(),
                             dense_coefficient.const_data_ptr(), entries.size, arguments.get(),
                             grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                             launch.stream()));
  return {grad_weight, grad_bias};
}

Tensor class_sum_op(const Tensor& key, const Tensor& coefficient, const Tensor& rows,
                    int64_t classes) {
  const Matrix summands = matrix(rows, "rows", key);
  const IndexVector entries = index_vector(key, "key", key);
  check_coefficient(coefficient, entries, summands.dtype, key);
  MARGINOPS_CHECK(classes >= 0 && classes <= INT64_MAX / std::max<int64_t>(summands.rows, 1),
                  "classes: expected at least 0, and keys below 2**63, got ", classes);
  MARGINOPS_CHECK(entries.size == 0 || summands.rows > 0, "rows: expected at least one for ",
                  entries.size, " keys, got none");
  const Launch launch(key);
  const Tensor dense_key = contiguous(key, place_of(key));
  const Tensor dense_coefficient = contiguous(coefficient, place_of(coefficient));
  Tensor result = new_tensor(rows, {classes, summands.cols}, result_type(summands.dtype));
  Tensor workspace = new_workspace(key, class_sum_workspace_bytes(entries.size, summands));
  check_launch(class_sum(dense_key.const_data_ptr<int64_t>(), dense_coefficient.const_data_ptr(),
                         entries.size, summands, classes, result.mutable_data_ptr(),
                         workspace.mutable_data_ptr(), launch.stream()));
  return result;
}

Tensor pair_distance_op(const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& pair) {
  const HeadArguments arguments(weight, bias, weight);
  check_place(pair, "pair", 2, weight);
  MARGINOPS_CHECK(pair.size(1) == 2, "pair: expected shape [K, 2], got ", shape_of(pair));
  check_dtype("pair", pair, ScalarType::Long);
  const IndexMatrix pairs{pair.const_data_ptr<int64_t>(), pair.size(0), pair.stride(0),
                          pair.stride(1)};
  const Launch launch(weight);
  Tensor distance = new_tensor(weight, {pairs.rows}, result_type(arguments.get().weight.dtype));
  check_launch(pair_distance(arguments.get(), pairs, distance.mutable_data_ptr(), launch.stream()));
  return distance;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("classification_margin", MARGINOPS_BOX(&classification_margin_op));
  m.impl("classification_margin_rival", MARGINOPS_BOX(&classification_margin_rival_op));
  m.impl("minimal_margin_score", MARGINOPS_BOX(&minimal_margin_score_op));
  m.impl("minimal_margin_pair", MARGINOPS_BOX(&minimal_margin_pair_op));
  m.impl("pair_gradient", MARGINOPS_BOX(&pair_gradient_op));
  m.impl("pair_distance", MARGINOPS_BOX(&pair_distance_op));
  m.impl("class_sum", MARGINOPS_BOX(&class_sum_op));
}

}  // namespace marginops::cuda
