// Launchers of the statistics kernels, torch-free; the rules of margin_launch.h hold here too.
#pragma once

#include "margin_launch.h"

namespace marginops::cuda {

// [N] each, of the result type but for rival and correct.
struct StatisticsResult {
  void* margin;
  int64_t* rival;
  void* loss;
  void* confidence;
  void* entropy;
  bool* correct;
  void* el2n;
  void* gradient_norm;  // or null: then there is no input_norm
  void* maximum;
  void* log_sum;
};

// Of sample_statistics() and of row_sums().
size_t statistics_workspace_bytes(const Matrix& logits);

// input_norm [N] of the result type, or null.
cudaError_t sample_statistics(const Matrix& logits, const Target& target, const Vector* input_norm,
                              const LogNorm& log_norm, const StatisticsResult& result,
                              void* workspace, cudaStream_t stream);

// values [N, 6] of the result type: the two largest logits, the label's, and the sums of
// ExponentialSums, or 0; classes [N, 2]. Here C may be 1, and a target outside [0, C) is none.
cudaError_t row_sums(const Matrix& logits, const IndexVector& target, bool with_sums, void* values,
                     int64_t* classes, void* workspace, cudaStream_t stream);

// What the gradient needs of the results, and the gradients of the results; [N] of the result type.
struct StatisticsGradient {
  IndexVector rival;
  Vector confidence, entropy, maximum, log_sum;
  const Vector *grad_margin, *grad_loss, *grad_confidence, *grad_entropy;  // or null, for 0
};

// grad_logits [N, C] of the dtype of logits. As for a shard, C may be 1, and a target or rival
// outside [0, C) is none.
cudaError_t sample_statistics_gradient(const Matrix& logits, const Target& target,
                                       const LogNorm& log_norm, const StatisticsGradient& gradient,
                                       void* grad_logits, cudaStream_t stream);

}  // namespace marginops::cuda
