// Launchers of the margin kernels, torch-free. Every pointer is a device pointer; outputs are
// contiguous. "Result type" is float64 for float64 logits and float32 for all others. A launcher
// runs in the given stream, never synchronises and allocates nothing: the caller provides
// `workspace`, of at least the bytes its companion names, with any content and 256-byte alignment.
// C is logits.cols: 2 <= C < 2^31. No rows, no launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace marginops::cuda {

struct Target {
  IndexVector index;  // [N] classes
  int64_t ignore_index;
};

// Logarithm of the norm that divides the margins: one value of the result type on the device, or
// without it one on the host, where 0 leaves the margins as they are.
struct LogNorm {
  const void* device = nullptr;
  double host = 0;
};

// The last layer. Its dtype is that of the logits, or float32 beside bfloat16 and float16 logits.
struct Head {
  Matrix weight;       // [C, D]
  const Vector* bias;  // [C] of the dtype of weight, or null: one more coordinate of the norm
};

size_t classification_margin_workspace_bytes(const Matrix& logits, const Rows& rows);
size_t minimal_margin_workspace_bytes(const Matrix& logits, const Head& head, const Rows& rows,
                                      bool nearest);

// margin [N] of the result type.
cudaError_t classification_margin(const Matrix& logits, const Target& target,
                                  const LogNorm& log_norm, void* margin, void* workspace,
                                  cudaStream_t stream);

// margin [K] of the result type and rival [K], the strongest wrong class, of each of the K rows.
cudaError_t classification_margin_rival(const Matrix& logits, const Target& target,
                                        const LogNorm& log_norm, const Rows& rows, void* margin,
                                        int64_t* rival, void* workspace, cudaStream_t stream);

// score [N] of the result type.
cudaError_t minimal_margin_score(const Matrix& logits, const Head& head, bool nearest, void* score,
                                 void* workspace, cudaStream_t stream);

// pair [K, 2] and distance [K] of the result type.
cudaError_t minimal_margin_pair(const Matrix& logits, const Head& head, const Rows& rows,
                                bool nearest, int64_t* pair, void* distance, void* workspace,
                                cudaStream_t stream);

// key [M] sorted, key = c * C + p; coefficient [M] of the result type of weight; grad_weight [C, D]
// and grad_bias [C], zeros without bias, of the dtype of weight.
cudaError_t pair_gradient(const int64_t* key, const void* coefficient, int64_t size,
                          const Head& head, void* grad_weight, void* grad_bias,
                          cudaStream_t stream);

// distance [K], of the result type of weight: ||w_i - w_j|| of each pair [K, 2], the same bits as
// minimal_margin_pair().
cudaError_t pair_distance(const Head& head, const IndexMatrix& pair, void* distance,
                          cudaStream_t stream);

// key [M] sorted, key = c * R + r; coefficient [M] and result [classes, D] of the result type of
// rows [R, D]: the sum of coefficient * row over the entries of each class.
size_t class_sum_workspace_bytes(int64_t size, const Matrix& rows);
cudaError_t class_sum(const int64_t* key, const void* coefficient, int64_t size, const Matrix& rows,
                      int64_t classes, void* result, void* workspace, cudaStream_t stream);

}  // namespace marginops::cuda
