// Bindings of the CUDA kernels for the ops in marginops/ops/margin*.py and class_sum.py.
#include "tensor.h"

#include "../binding/aten.h"

namespace marginops::cuda {

Tensor classification_margin_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index) {
  check_logits(logits);
  check_target(target, logits);
  check_log_norm(log_norm, logits);
  const Matrix rows = matrix(logits);
  const Launch launch(logits);
  Tensor margin = new_tensor(logits, {rows.rows}, result_type(logits));
  Tensor workspace = new_workspace(
      logits, classification_margin_workspace_bytes(rows, rows_of(std::nullopt, logits)));
  check_launch(classification_margin(rows, {index_vector(target), ignore_index},
                                     log_norm_of(log_norm), margin.mutable_data_ptr(),
                                     workspace.mutable_data_ptr(), launch.stream()));
  return margin;
}

Tensor minimal_margin_score_op(const Tensor& logits, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, bool nearest, bool softmax) {
  check_head(logits, weight, bias);
  const Matrix rows = matrix(logits);
  const Launch launch(logits);
  Tensor score = new_tensor(logits, {rows.rows}, result_type(logits));
  if (!weight) {
    Tensor workspace = new_workspace(logits, top2_margin_workspace_bytes(rows, softmax));
    check_launch(top2_margin(rows, softmax, score.mutable_data_ptr(), workspace.mutable_data_ptr(),
                             launch.stream()));
    return score;
  }
  const Head head{matrix(*weight), vector(bias)};
  Tensor workspace = new_workspace(
      logits, minimal_margin_workspace_bytes(rows, head, rows_of(std::nullopt, logits), nearest));
  check_launch(minimal_margin_score(rows, head, nearest, score.mutable_data_ptr(),
                                    workspace.mutable_data_ptr(), launch.stream()));
  return score;
}

namespace {

std::tuple<Tensor, Tensor> classification_margin_rival_op(const Tensor& logits,
                                                          const Tensor& target,
                                                          const std::optional<Tensor>& log_norm,
                                                          const std::optional<Tensor>& rows,
                                                          int64_t ignore_index) {
  check_logits(logits);
  check_target(target, logits);
  check_log_norm(log_norm, logits);
  check_rows(rows, logits);
  const Rows chosen = rows_of(rows, logits);
  const Launch launch(logits);
  Tensor margin = new_tensor(logits, {chosen.size}, result_type(logits));
  Tensor rival = new_tensor(logits, {chosen.size}, ScalarType::Long);
  Tensor workspace =
      new_workspace(logits, classification_margin_workspace_bytes(matrix(logits), chosen));
  check_launch(classification_margin_rival(matrix(logits), {index_vector(target), ignore_index},
                                           log_norm_of(log_norm), chosen, margin.mutable_data_ptr(),
                                           rival.mutable_data_ptr<int64_t>(),
                                           workspace.mutable_data_ptr(), launch.stream()));
  return {margin, rival};
}

std::tuple<Tensor, Tensor> minimal_margin_pair_op(const Tensor& logits, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& rows, bool nearest) {
  check_head(logits, weight, bias);
  check_rows(rows, logits);
  const Head head{matrix(weight), vector(bias)};
  const Rows chosen = rows_of(rows, logits);
  const Launch launch(logits);
  Tensor pair = new_tensor(logits, {chosen.size, 2}, ScalarType::Long);
  Tensor distance = new_tensor(logits, {chosen.size}, result_type(logits));
  Tensor workspace =
      new_workspace(logits, minimal_margin_workspace_bytes(matrix(logits), head, chosen, nearest));
  check_launch(minimal_margin_pair(matrix(logits), head, chosen, nearest,
                                   pair.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr(),
                                   workspace.mutable_data_ptr(), launch.stream()));
  return {pair, distance};
}

std::tuple<Tensor, Tensor> pair_gradient_op(const Tensor& key, const Tensor& coefficient,
                                            const Tensor& weight,
                                            const std::optional<Tensor>& bias) {
  check_pair_gradient(key, coefficient, weight, bias);
  const int64_t classes = weight.size(0);
  const Launch launch(key);
  const Tensor dense_key = contiguous(key, place_of(key));
  const Tensor dense_coefficient = contiguous(coefficient, place_of(coefficient));
  Tensor grad_weight = new_tensor(weight, {classes, weight.size(1)}, weight.scalar_type());
  Tensor grad_bias = new_tensor(weight, {classes}, weight.scalar_type());
  check_launch(pair_gradient(dense_key.const_data_ptr<int64_t>(),
                             dense_coefficient.const_data_ptr(), key.size(0),
                             {matrix(weight), vector(bias)}, grad_weight.mutable_data_ptr(),
                             grad_bias.mutable_data_ptr(), launch.stream()));
  return {grad_weight, grad_bias};
}

Tensor class_sum_op(const Tensor& key, const Tensor& coefficient, const Tensor& rows,
                    int64_t classes) {
  check_class_sum(key, coefficient, rows, classes);
  const Matrix summands = matrix(rows);
  const int64_t entries = key.size(0);
  const Launch launch(key);
  const Tensor dense_key = contiguous(key, place_of(key));
  const Tensor dense_coefficient = contiguous(coefficient, place_of(coefficient));
  Tensor result = new_tensor(rows, {classes, summands.cols}, result_type(rows));
  Tensor workspace = new_workspace(key, class_sum_workspace_bytes(entries, summands));
  check_launch(class_sum(dense_key.const_data_ptr<int64_t>(), dense_coefficient.const_data_ptr(),
                         entries, summands, classes, result.mutable_data_ptr(),
                         workspace.mutable_data_ptr(), launch.stream()));
  return result;
}

Tensor pair_distance_op(const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& pair) {
  check_layer(weight, bias, weight);
  check_pair(pair, weight);
  const IndexMatrix pairs{pair.const_data_ptr<int64_t>(), pair.size(0), pair.stride(0),
                          pair.stride(1)};
  const Launch launch(weight);
  Tensor distance = new_tensor(weight, {pairs.rows}, result_type(weight));
  check_launch(pair_distance({matrix(weight), vector(bias)}, pairs, distance.mutable_data_ptr(),
                             launch.stream()));
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
