// Launchers of the margin kernels, without torch. Every pointer is a device pointer, and outputs
// are contiguous. The result type is float64 for float64 logits and float32 for all others. A
// launcher runs in the given stream, never synchronises and allocates nothing. The caller provides
// `workspace`, with any content, 256-byte alignment, and at least as many bytes as the matching
// _workspace_bytes() function returns. C is logits.cols, and 2 <= C < 2^31. Without rows nothing is
// launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "views.h"

namespace marginops::cuda {

struct Target {
  IndexVector index;  // [N] classes
  int64_t ignore_index;
};

// The logarithm of the norm that divides the margins: one value of the result type at `device` or,
// if that is null, `host`. 0 leaves the margins as they are.
struct LogNorm {
  const void* device = nullptr;
  double host = 0;
};

// The last layer. Its dtype is that of the logits, or float32 with bfloat16 and float16 logits.
struct Head {
  Matrix weight;  // [C, D]
  Vector bias;    // [C] of the dtype of weight, one more coordinate of the norm; or no data
};

size_t classification_margin_workspace_bytes(const Matrix& logits, const Rows& rows);
size_t top2_margin_workspace_bytes(const Matrix& logits, bool softmax);
size_t minimal_margin_workspace_bytes(const Matrix& logits, const Head& head, const Rows& rows,
                                      bool nearest);

// margin [N] of the result type.
cudaError_t classification_margin(const Matrix& logits, const Target& target,
                                  const LogNorm& log_norm, void* margin, void* workspace,
                                  cudaStream_t stream);

// For each of the K rows: margin [K] of the result type, and rival [K], the strongest wrong class.
cudaError_t classification_margin_rival(const Matrix& logits, const Target& target,
                                        const LogNorm& log_norm, const Rows& rows, void* margin,
                                        int64_t* rival, void* workspace, cudaStream_t stream);

// margin [N] of the result type: the difference of the two largest logits of each row or, with
// `softmax`, of their probabilities.
cudaError_t top2_margin(const Matrix& logits, bool softmax, void* margin, void* workspace,
                        cudaStream_t stream);

// score [N] of the result type.
cudaError_t minimal_margin_score(const Matrix& logits, const Head& head, bool nearest, void* score,
                                 void* workspace, cudaStream_t stream);

// pair [K, 2] and distance [K] of the result type.
cudaError_t minimal_margin_pair(const Matrix& logits, const Head& head, const Rows& rows,
                                bool nearest, int64_t* pair, void* distance, void* workspace,
                                cudaStream_t stream);

// The sum of coefficient * (w_c - w_p) over the entries of each class c. key [M] is sorted, and a
// key is c * C + p. coefficient [M] has the result type of weight. grad_weight [C, D] and grad_bias
// [C] have the dtype of weight; grad_bias is 0 without a bias.
cudaError_t pair_gradient(const int64_t* key, const void* coefficient, int64_t size,
                          const Head& head, void* grad_weight, void* grad_bias,
                          cudaStream_t stream);

// distance [K] of the result type of weight: ||w_i - w_j|| of each pair [K, 2], with the same bits
// as in minimal_margin_pair().
cudaError_t pair_distance(const Head& head, const IndexMatrix& pair, void* distance,
                          cudaStream_t stream);

// The sum of coefficient * row over the entries of each class. The keys [M] are sorted. An entry of
// class c and row r has the key c * R + r. coefficient [M] and result [classes, D] have the result
// type of rows [R, D].
size_t class_sum_workspace_bytes(int64_t size, const Matrix& rows);
cudaError_t class_sum(const int64_t* key, const void* coefficient, int64_t size, const Matrix& rows,
                      int64_t classes, void* result, void* workspace, cudaStream_t stream);

}  // namespace marginops::cuda
