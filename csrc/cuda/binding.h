// Helpers of the bindings of the CUDA kernels. A binding checks what its kernel relies on,
// allocates, and launches in the current stream. Bindings use torch's stable ABI and are compiled
// by the host compiler.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // the stable headers declare the CUDA stream and errors only with it
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>

#include "../binding/tensor.h"
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

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail_dtype(name, tensor);
  }
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

inline ScalarType result_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_place(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like) {
  MARGINOPS_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got shape ",
                  shape_of(tensor));
  MARGINOPS_CHECK(tensor.device() == like.device(), name, ": expected a tensor on ",
                  device_of(like), " like the first argument, got one on ", device_of(tensor));
}

inline Matrix matrix(const Tensor& tensor, const char* name, const Tensor& like) {
  check_place(tensor, name, 2, like);
  return {tensor.const_data_ptr(), dtype_of(tensor, name), tensor.size(0),
          tensor.size(1),          tensor.stride(0),       tensor.stride(1)};
}

inline Vector vector(const Tensor& tensor, const char* name, const Tensor& like) {
  check_place(tensor, name, 1, like);
  return {tensor.const_data_ptr(), dtype_of(tensor, name), tensor.size(0), tensor.stride(0)};
}

inline IndexVector index_vector(const Tensor& tensor, const char* name, const Tensor& like) {
  check_place(tensor, name, 1, like);
  check_dtype(name, tensor, ScalarType::Long);
  return {tensor.const_data_ptr<int64_t>(), tensor.size(0), tensor.stride(0)};
}

inline Matrix logits_of(const Tensor& tensor, int64_t least_classes = 2) {
  const Matrix logits = matrix(tensor, "logits", tensor);
  MARGINOPS_CHECK(least_classes <= logits.cols && logits.cols <= INT32_MAX, "logits: expected ",
                  least_classes, " <= C < 2**31 classes, got ", logits.cols);
  return logits;
}

inline Rows rows_of(const std::optional<Tensor>& rows, const Matrix& logits, const Tensor& like) {
  if (rows.has_value()) return index_vector(*rows, "rows", like);
  return {nullptr, logits.rows, 0};
}

inline Target target_of(const Tensor& target, const Matrix& logits, const Tensor& like,
                        int64_t ignore_index) {
  check_size("target", target, logits.rows, "the rows of logits");
  return {index_vector(target, "target", like), ignore_index};
}

inline LogNorm log_norm_of(const std::optional<Tensor>& log_norm, const Matrix& logits,
                           const Tensor& like) {
  LogNorm result;
  if (!log_norm.has_value()) return result;
  MARGINOPS_CHECK(log_norm->numel() == 1, "log_norm: expected one value, got shape ",
                  shape_of(*log_norm));
  check_dtype("log_norm", *log_norm, result_type(logits.dtype));
  if (!log_norm->is_cpu()) {
    MARGINOPS_CHECK(log_norm->device() == like.device(),
                    "log_norm: expected a value on the CPU or on ", device_of(like),
                    " like logits, got one on ", device_of(*log_norm));
    result.device = log_norm->const_data_ptr();
  } else if (logits.dtype == Dtype::kFloat64) {
    result.host = *log_norm->const_data_ptr<double>();
  } else {
    result.host = *log_norm->const_data_ptr<float>();
  }
  return result;
}

// A Head and the bias that it points to.
class HeadArguments {
 public:
  HeadArguments(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& like)
      : head_{matrix(weight, "weight", like), nullptr} {
    if (!bias.has_value()) return;
    bias_ = vector(*bias, "bias", like);
    check_size("bias", *bias, head_.weight.rows, "the rows of weight");
    check_dtype("bias", *bias, weight.scalar_type());
    head_.bias = &bias_;
  }
  HeadArguments(const HeadArguments&) = delete;
  const Head& get() const { return head_; }

  const Head& head_for(const Matrix& logits) const {
    const Dtype dtype = head_.weight.dtype;
    MARGINOPS_CHECK(head_.weight.rows == logits.cols, "weight: expected ", logits.cols,
                    " rows, got ", head_.weight.rows);
    MARGINOPS_CHECK(
        dtype == logits.dtype || (dtype == Dtype::kFloat32 && logits.dtype != Dtype::kFloat64),
        "weight: expected the dtype of logits, or float32 for bfloat16 and float16 logits, got ",
        name_of(dtype), " for ", name_of(logits.dtype), " logits");
    return head_;
  }

 private:
  Head head_;
  Vector bias_{};
};

inline Tensor new_workspace(const Tensor& like, size_t bytes) {
  return new_tensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

Tensor classification_margin_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index);
// Without a weight, `bias` and `nearest` do not count, and with it `softmax` does not.
Tensor minimal_margin_score_op(const Tensor& logits, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, bool nearest, bool softmax);

}  // namespace marginops::cuda
