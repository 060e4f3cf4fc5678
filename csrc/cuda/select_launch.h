// Launchers of the selection kernels, without torch. They select the k smallest of n scores in the
// order of common/order.h, where 0 <= k <= n. Every pointer is a device pointer, and outputs are
// contiguous. A launcher runs in the given stream, never synchronises and allocates nothing. If k
// is 0, nothing is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "views.h"

namespace marginops::cuda {

// Whether one block can select. If so, use select_sorted(), otherwise select_unsorted().
bool fits_one_block(int64_t n, int64_t k);

// values [k] of the dtype of scores and index [k], in the order of scores. Takes one launch.
cudaError_t select_sorted(const Vector& scores, int64_t k, void* values, int64_t* index,
                          cudaStream_t stream);

// Selects the k smallest scores in the order of their indices. key [k] is int32, or int64 for
// float64 scores. A stable ascending sort by key as a signed integer gives the order of scores.
// `workspace` has at least select_workspace_bytes() bytes, with any content and 256-byte alignment.
size_t select_workspace_bytes(const Vector& scores);
cudaError_t select_unsorted(const Vector& scores, int64_t k, void* key, int64_t* index,
                            void* workspace, cudaStream_t stream);

}  // namespace marginops::cuda
