// Bindings of the CUDA kernels for the ops in marginops/ops/statistics*.py and row_sums.py.
#include "tensor.h"

#include "../binding/statistics.h"
#include "statistics_launch.h"

namespace marginops::cuda {
namespace {

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics sample_statistics_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& input_norm,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index,
                                bool with_mean) {
  check_logits(logits);
  check_target(target, logits);
  check_values("input_norm", input_norm, logits);
  check_log_norm(log_norm, logits);
  const Launch launch(logits);
  const ScalarType type = result_type(logits);
  const auto values = [&](int64_t size) { return new_tensor(logits, {size}, type); };
  const int64_t rows = logits.size(0);
  Tensor margin = values(rows), top2_margin = values(rows);
  Tensor loss = values(rows), confidence = values(rows);
  Tensor entropy = values(rows), el2n = values(rows), maximum = values(rows);
  Tensor log_sum = values(rows), gradient_norm = values(input_norm.has_value() ? rows : 0);
  Tensor rival = new_tensor(logits, {rows}, ScalarType::Long);
  Tensor correct = new_tensor(logits, {rows}, ScalarType::Bool);
  Tensor counted = new_tensor(logits, {rows}, ScalarType::Bool);
  const auto number = [&] { return with_mean ? new_tensor(logits, {}, type) : values(0); };
  Tensor mean_loss = number(), num_counted = number();
  Tensor workspace = new_workspace(logits, statistics_workspace_bytes(matrix(logits), with_mean));
  const StatisticsResult result{margin.mutable_data_ptr(),
                                rival.mutable_data_ptr<int64_t>(),
                                top2_margin.mutable_data_ptr(),
                                loss.mutable_data_ptr(),
                                confidence.mutable_data_ptr(),
                                entropy.mutable_data_ptr(),
                                static_cast<bool*>(correct.mutable_data_ptr()),
                                el2n.mutable_data_ptr(),
                                input_norm.has_value() ? gradient_norm.mutable_data_ptr() : nullptr,
                                static_cast<bool*>(counted.mutable_data_ptr()),
                                maximum.mutable_data_ptr(),
                                log_sum.mutable_data_ptr(),
                                with_mean ? mean_loss.mutable_data_ptr() : nullptr,
                                num_counted.mutable_data_ptr()};
  check_launch(sample_statistics(matrix(logits), {index_vector(target), ignore_index},
                                 vector(input_norm), log_norm_of(log_norm), result,
                                 workspace.mutable_data_ptr(), launch.stream()));
  return {margin, rival,         top2_margin, loss,    confidence, entropy,   correct,
          el2n,   gradient_norm, counted,     maximum, log_sum,    mean_loss, num_counted};
}

Tensor sample_statistics_gradient_op(
    const Tensor& logits, const Tensor& target, const Tensor& rival, const Tensor& confidence,
    const Tensor& entropy, const Tensor& maximum, const Tensor& log_sum,
    const std::optional<Tensor>& log_norm, const std::optional<Tensor>& grad_margin,
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_confidence,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_mean_loss,
    const std::optional<Tensor>& num_counted, int64_t ignore_index) {
  check_statistics_gradient(logits, target, rival, confidence, entropy, maximum, log_sum, log_norm,
                            grad_margin, grad_loss, grad_confidence, grad_entropy, grad_mean_loss,
                            num_counted);
  const auto number = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
  };
  const StatisticsGradient gradient{
      index_vector(rival),  vector(confidence),     vector(entropy),    vector(maximum),
      vector(log_sum),      vector(grad_margin),    vector(grad_loss),  vector(grad_confidence),
      vector(grad_entropy), number(grad_mean_loss), number(num_counted)};
  const Launch launch(logits);
  Tensor grad_logits = new_tensor(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  check_launch(sample_statistics_gradient(matrix(logits), {index_vector(target), ignore_index},
                                          log_norm_of(log_norm), gradient,
                                          grad_logits.mutable_data_ptr(), launch.stream()));
  return grad_logits;
}

std::tuple<Tensor, Tensor> row_sums_op(const Tensor& logits, const Tensor& target, bool with_sums) {
  check_logits(logits, 1);
  check_target(target, logits);
  const Matrix rows = matrix(logits);
  const Launch launch(logits);
  Tensor values = new_tensor(logits, {rows.rows, 6}, result_type(logits));
  Tensor classes = new_tensor(logits, {rows.rows, 2}, ScalarType::Long);
  Tensor workspace = new_workspace(logits, statistics_workspace_bytes(rows));
  check_launch(row_sums(rows, index_vector(target), with_sums, values.mutable_data_ptr(),
                        classes.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
                        launch.stream()));
  return {values, classes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("sample_statistics", MARGINOPS_BOX(&sample_statistics_op));
  m.impl("sample_statistics_gradient", MARGINOPS_BOX(&sample_statistics_gradient_op));
  m.impl("row_sums", MARGINOPS_BOX(&row_sums_op));
}

}  // namespace marginops::cuda
