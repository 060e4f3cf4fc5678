// Launchers of the selection kernels, torch-free: the k smallest of n scores in the order of
// common/order.h. Every pointer is a device pointer; outputs are contiguous. A launcher runs in the
// given stream, never synchronises and allocates nothing. 0 <= k <= n; k = 0, no launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace marginops::cuda {

// Whether one block does it all. If so use select_sorted(), else select_unsorted().
bool fits_one_block(int64_t n, int64_t k);

// values [k] of the dtype of scores and index [k], in order. One launch.
cudaError_t select_sorted(const Vector& scores, int64_t k, void* values, int64_t* index,
                          cudaStream_t stream);

// The k smallest in the order of their index. key [k] is int32, int64 for float64 scores, and a
// stable sort by key, ascending and signed, gives the order of the scores. `workspace` has at least
// select_workspace_bytes(), any content and 256-byte alignment.
size_t select_workspace_bytes(const Vector& scores);
cudaError_t select_unsorted(const Vector& scores, int64_t k, void* key, int64_t* index,
                            void* workspace, cudaStream_t stream);

}  // namespace marginops::cuda
