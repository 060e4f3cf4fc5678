// Plain views of the tensors of torch's stable ABI, new tensors, and loops on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>

#include "../binding/checks.h"
#include "memory.h"
#include "simd.h"

namespace marginops::cpu {

constexpr int64_t kGrain = 32768;  // reading so many numbers is worth a thread

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

// Calls action with a null T* of the tensor's element type, which check_floating() has seen.
template <class Action>
void for_dtype(const Tensor& tensor, const Action& action) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return action(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return action(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return action(static_cast<bfloat16*>(nullptr));
    default:
      return action(static_cast<float16*>(nullptr));
  }
}

inline Place place() {
  const auto no_memory = []() -> std::string {
    return "not enough memory: DefaultCPUAllocator: can't allocate memory.";
  };
  return {aoti_torch_device_type_cpu(), 0, no_memory};
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  return marginops::new_tensor(sizes, type, place());
}

// Splits [0, count) into ranges of at least `grain` and calls body(begin, end) on torch's threads.
// If calls fail, the error of the first is thrown here: it would lose its words in torch.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  struct Call {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } call{body, {}, nullptr};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    auto& [body, mutex, error] = *static_cast<Call*>(context);
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (error == nullptr) error = std::current_exception();
    }
  };
  const AOTITorchError status =
      torch_parallel_for(0, count, std::max<int64_t>(grain, 1), run, &call);
  if (call.error != nullptr) std::rethrow_exception(call.error);
  if (status != AOTI_TORCH_SUCCESS) fail_like_torch("torch cannot run its threads");
}

}  // namespace marginops::cpu
