// Helpers of the bindings of the CUDA kernels. A binding checks what its kernel relies on,
// allocates, and launches in the current stream. Bindings use torch's stable ABI and are compiled
// by the host compiler.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // the stable headers declare the CUDA stream and errors only with it, so this
                  // file comes first in those that include it
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>

#include "../binding/checks.h"
#include "margin_launch.h"

namespace marginops::cuda {

// How an error for a lack of memory begins. Training libraries rely on these words. If the device
// has failed before, the error is that one.
inline std::string no_memory() {
  const cudaError_t earlier = cudaPeekAtLastError();
  if (earlier == cudaSuccess || earlier == cudaErrorMemoryAllocation) return "CUDA out of memory.";
  return std::string("CUDA error: ") + cudaGetErrorString(earlier) + ".";
}

inline Place place_of(const Tensor& tensor) {
  int32_t device_type = 0;
  if (aoti_torch_get_device_type(tensor.get(), &device_type) != AOTI_TORCH_SUCCESS) {
    fail_like_torch("torch does not know the device of a tensor");
  }
  return {device_type, tensor.get_device_index(), no_memory};
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType type) {
  return marginops::new_tensor(sizes, type, place_of(like));
}

inline void check_launch(cudaError_t launched) {
  if (launched == cudaErrorMemoryAllocation) {
    fail("CUDA out of memory. A kernel could not be launched");
  }
  STD_CUDA_CHECK(launched);
}

// Makes the tensor's device the current one and holds its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) !=
        AOTI_TORCH_SUCCESS) {
      fail_like_torch("torch has no current stream for the device of the first argument");
    }
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// A tensor that check_floating() has seen.
inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat16;
  }
}

inline Matrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(0),
          tensor.size(1),          tensor.stride(0), tensor.stride(1)};
}

// Without a tensor the vector has no data.
inline Vector vector(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), dtype_of(*tensor), tensor->size(0), tensor->stride(0)};
}

inline IndexVector index_vector(const Tensor& tensor) {
  return {tensor.const_data_ptr<int64_t>(), tensor.size(0), tensor.stride(0)};
}

inline Rows rows_of(const std::optional<Tensor>& rows, const Tensor& logits) {
  return rows ? index_vector(*rows) : Rows{nullptr, logits.size(0), 0};
}

inline LogNorm log_norm_of(const std::optional<Tensor>& log_norm) {
  if (!log_norm) return {};
  if (!log_norm->is_cpu()) return {log_norm->const_data_ptr(), 0};
  const bool is_double = log_norm->scalar_type() == ScalarType::Double;
  return {nullptr,
          is_double ? *log_norm->const_data_ptr<double>() : *log_norm->const_data_ptr<float>()};
}

inline Tensor new_workspace(const Tensor& like, size_t bytes) {
  return new_tensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

Tensor classification_margin_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index);
// Without a weight, `bias` and `nearest` do not count, and with it `softmax` does not.
Tensor minimal_margin_score_op(const Tensor& logits, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, bool nearest, bool softmax);

}  // namespace marginops::cuda
