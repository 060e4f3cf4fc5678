// Plain views of the tensors of torch's stable ABI, new tensors, and loops on torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "simd.h"

namespace marginops::cpu {

constexpr int64_t kGrain = 32768;  // reading so many numbers is worth a thread

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  const T* row(int64_t index) const { return data + index * row_stride; }
  const T& at(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

template <class T>
struct Vector {
  const T* data;
  int64_t size, stride;

  const T& operator[](int64_t index) const { return data[index * stride]; }
};

template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0), tensor.stride(1)};
}

template <class T>
Vector<T> vector(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0), tensor.stride(0)};
}

// Calls action with a null T* of the tensor's element type.
template <class Action>
void for_dtype(const char* name, const Tensor& tensor, const Action& action) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return action(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return action(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return action(static_cast<bfloat16*>(nullptr));
    case ScalarType::Half:
      return action(static_cast<float16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, float64, bfloat16 or float16");
  }
}

inline ScalarType result_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls the C shim. The dispatcher would cost a microsecond for each tensor.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  const int64_t rows = *sizes.begin(), columns = sizes.size() == 2 ? *(sizes.begin() + 1) : 1;
  const int64_t shape[2] = {rows, columns}, strides[2] = {columns, 1};
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), shape,
                                                  strides, dtype, aoti_torch_device_type_cpu(), 0,
                                                  &tensor));
  return Tensor(tensor);
}

// Splits [0, count) into ranges of at least `grain` and calls body(begin, end) on torch's threads.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

}  // namespace marginops::cpu
