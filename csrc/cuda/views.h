// Tensors as the CUDA launchers see them: device pointers, sizes, and strides in elements.
#pragma once

#include <cstdint>

namespace marginops::cuda {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
};

struct Vector {
  const void* data;
  Dtype dtype;
  int64_t size;
  int64_t stride;
};

struct IndexVector {
  const int64_t* data;
  int64_t size;
  int64_t stride;
};

struct IndexMatrix {
  const int64_t* data;
  int64_t rows;
  int64_t row_stride;
  int64_t col_stride;
};

// The rows of a matrix to work on. Without data they are the first `size` rows.
using Rows = IndexVector;

}  // namespace marginops::cuda
