// Launchers of the class moment kernels, torch-free; the rules of margin_launch.h hold here too. The rows
// are put in the order of their classes by the library's stable sort, between the two launchers.
#pragma once

#include "margin_launch.h"

namespace marginops::cuda {

// Rows in the order of their classes: their keys, and which rows they are.
struct ClassOrder {
  const void* key;     // [N] sorted
  const int64_t* row;  // [N]
};

// Bytes of a key, an unsigned integer of 1 byte or a signed one of 2 or 4: as few as can be, for a
// radix sort takes a pass for each of them. C < 2^31.
int moment_key_bytes(int64_t classes);

// key [N]: the class of each row, and C for ignored rows.
cudaError_t moment_keys(const Target& target, int64_t classes, void* key, cudaStream_t stream);

struct MomentsResult {
  int64_t* count;  // [C]
  void* mean;      // [C, D] of the result type
  void* radius;    // [C] of the result type
};

size_t class_moments_workspace_bytes(const Matrix& input, int64_t classes, bool normalize);

// N < 2^31, 1 <= C < 2^31; N and D may be 0.
cudaError_t class_moments(const Matrix& input, const ClassOrder& order, int64_t classes,
                          bool normalize, const MomentsResult& result, void* workspace,
                          cudaStream_t stream);

}  // namespace marginops::cuda
