// Bindings of the CUDA kernels for the ops in marginops/ops/statistics.py.
#include "statistics_launch.h"

#include "binding.h"

namespace marginops::cuda {
namespace {

// An optional argument: a value of the result type for each sample.
class ColumnArgument {
 public:
  ColumnArgument(const std::optional<Tensor>& tensor, const char* name, const Matrix& logits,
                 const Tensor& like)
      : given_(tensor.has_value()) {
    if (!given_) return;
    vector_ = vector(*tensor, name, like);
    check_size(name, *tensor, logits.rows, "the rows of logits");
    check_dtype(name, *tensor, result_type(logits.dtype));
  }
  ColumnArgument(const ColumnArgument&) = delete;
  const Vector* get() const { return given_ ? &vector_ : nullptr; }

 private:
  bool given_;
  Vector vector_{};
};

Vector column_of(const Tensor& tensor, const char* name, const Matrix& logits, const Tensor& like) {
  return *ColumnArgument(tensor, name, logits, like).get();
}

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics sample_statistics_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& input_norm,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index,
                                bool with_mean) {
  const Matrix matrix = logits_of(logits);
  const Target labels = target_of(target, matrix, logits, ignore_index);
  const ColumnArgument norms(input_norm, "input_norm", matrix, logits);
  const LogNorm norm = log_norm_of(log_norm, matrix, logits);
  const Launch launch(logits);
  const auto values = [&](int64_t size) {
    return new_tensor(logits, {size}, result_type(matrix.dtype));
  };
  const int64_t rows = matrix.rows;
  Tensor margin = values(rows), top2_margin = values(rows);
  Tensor loss = values(rows), confidence = values(rows);
  Tensor entropy = values(rows), el2n = values(rows), maximum = values(rows);
  Tensor log_sum = values(rows), gradient_norm = values(input_norm.has_value() ? rows : 0);
  Tensor rival = new_tensor(logits, {rows}, ScalarType::Long);
  Tensor correct = new_tensor(logits, {rows}, ScalarType::Bool);
  Tensor counted = new_tensor(logits, {rows}, ScalarType::Bool);
  const auto number = [&] {
    return with_mean ? new_tensor(logits, {}, result_type(matrix.dtype)) : values(0);
  };
  Tensor mean_loss = number(), num_counted = number();
  Tensor workspace = new_workspace(logits, statistics_workspace_bytes(matrix, with_mean));
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
  check_launch(sample_statistics(matrix, labels, norms.get(), norm, result,
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
  const Matrix matrix = logits_of(logits, 1);
  const Target labels = target_of(target, matrix, logits, ignore_index);
  const LogNorm norm = log_norm_of(log_norm, matrix, logits);
  const auto column = [&](const Tensor& tensor, const char* name) {
    return column_of(tensor, name, matrix, logits);
  };
  const ColumnArgument grad_margins(grad_margin, "grad_margin", matrix, logits);
  const ColumnArgument grad_losses(grad_loss, "grad_loss", matrix, logits);
  const ColumnArgument grad_confidences(grad_confidence, "grad_confidence", matrix, logits);
  const ColumnArgument grad_entropies(grad_entropy, "grad_entropy", matrix, logits);
  const auto number = [&](const std::optional<Tensor>& tensor, const char* name) -> const void* {
    if (!tensor.has_value()) return nullptr;
    check_place(*tensor, name, 0, logits);
    check_dtype(name, *tensor, result_type(matrix.dtype));
    return tensor->const_data_ptr();
  };
  const StatisticsGradient gradient{index_vector(rival, "rival", logits),
                                    column(confidence, "confidence"),
                                    column(entropy, "entropy"),
                                    column(maximum, "maximum"),
                                    column(log_sum, "log_sum"),
                                    grad_margins.get(),
                                    grad_losses.get(),
                                    grad_confidences.get(),
                                    grad_entropies.get(),
                                    number(grad_mean_loss, "grad_mean_loss"),
                                    number(num_counted, "num_counted")};
  check_size("rival", rival, matrix.rows, "the rows of logits");
  const Launch launch(logits);
  Tensor grad_logits = new_tensor(logits, {matrix.rows, matrix.cols}, logits.scalar_type());
  check_launch(sample_statistics_gradient(matrix, labels, norm, gradient,
                                          grad_logits.mutable_data_ptr(), launch.stream()));
  return grad_logits;
}

std::tuple<Tensor, Tensor> row_sums_op(const Tensor& logits, const Tensor& target, bool with_sums) {
  const Matrix matrix = logits_of(logits, 1);
  const Target labels = target_of(target, matrix, logits, 0);
  const Launch launch(logits);
  Tensor values = new_tensor(logits, {matrix.rows, 6}, result_type(matrix.dtype));
  Tensor classes = new_tensor(logits, {matrix.rows, 2}, ScalarType::Long);
  Tensor workspace = new_workspace(logits, statistics_workspace_bytes(matrix));
  check_launch(row_sums(matrix, labels.index, with_sums, values.mutable_data_ptr(),
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
