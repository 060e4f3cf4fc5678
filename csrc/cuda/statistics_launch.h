// Launchers of the statistics kernels, without torch. The rules of margin_launch.h hold here too.
#pragma once

#include "margin_launch.h"

namespace marginops::cuda {

// Each field is [N], but mean_loss and num_counted are one value. All but rival, correct and
// counted have the result type.
struct StatisticsResult {
  void* margin;
  int64_t* rival;
  void* top2_margin;
  void* loss;
  void* confidence;
  void* entropy;
  bool* correct;
  void* el2n;
  void* gradient_norm;  // null without input_norm
  bool* counted;
  void* maximum;
  void* log_sum;
  void* mean_loss;  // null if the mean is not wanted
  void* num_counted;
};

// The workspace of sample_statistics() and of row_sums().
size_t statistics_workspace_bytes(const Matrix& logits, bool with_mean = false);

// input_norm [N] of the result type, or no data.
cudaError_t sample_statistics(const Matrix& logits, const Target& target, const Vector& input_norm,
                              const LogNorm& log_norm, const StatisticsResult& result,
                              void* workspace, cudaStream_t stream);

// values [N, 6] of the result type: the two largest logits, the logit of the label, and the three
// sums of ExponentialSums, which are 0 without `with_sums`. classes [N, 2]: the classes of the two
// largest logits. C may be 1. For a target outside [0, C) the logit of the label is 0.
cudaError_t row_sums(const Matrix& logits, const IndexVector& target, bool with_sums, void* values,
                     int64_t* classes, void* workspace, cudaStream_t stream);

// The results that the gradient needs, and the gradients of the results. Each is [N], and all but
// rival have the result type.
struct StatisticsGradient {
  IndexVector rival;
  Vector confidence, entropy, maximum, log_sum;
  Vector grad_margin, grad_loss, grad_confidence, grad_entropy;  // no data means 0
  const void *grad_mean_loss, *num_counted;  // one value each; null means 0 and 1
};

// grad_logits [N, C] of the dtype of logits. The logits may be a piece: C may be 1, and a target or
// rival outside [0, C) belongs to another piece.
cudaError_t sample_statistics_gradient(const Matrix& logits, const Target& target,
                                       const LogNorm& log_norm, const StatisticsGradient& gradient,
                                       void* grad_logits, cudaStream_t stream);

}  // namespace marginops::cuda
