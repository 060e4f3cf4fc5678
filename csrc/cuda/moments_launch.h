// Launchers of the class moment kernels, without torch. The rules of margin_launch.h hold here too.
// Between the two launchers, torch's stable sort puts the rows in the order of their classes.
#pragma once

#include "margin_launch.h"

namespace marginops::cuda {

// The rows in the order of their classes.
struct ClassOrder {
  const void* key;     // [N] classes, sorted
  const int64_t* row;  // [N] indices of rows
};

// The bytes of a key, which is an unsigned integer of 1 byte or a signed one of 2 or 4. They are as
// few as possible, because a radix sort takes a pass for each byte. C < 2^31.
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
