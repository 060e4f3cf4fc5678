// Helpers of the bindings of the CUDA kernels. A binding checks what its kernel relies on,
// allocates, and launches in the current stream. Bindings use torch's stable ABI and are compiled
// by the host compiler.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // the stable headers declare the CUDA stream and errors only with it
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "margin_launch.h"

namespace marginops::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device the current one and holds its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
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
      STD_TORCH_CHECK(false, name, ": expected dtype float32, float64, bfloat16 or float16");
  }
}

inline ScalarType result_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_place(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of the first ",
                  "argument");
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
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, name, ": expected dtype int64");
  return {tensor.const_data_ptr<int64_t>(), tensor.size(0), tensor.stride(0)};
}

inline Matrix logits_of(const Tensor& tensor, int64_t least_classes = 2) {
  const Matrix logits = matrix(tensor, "logits", tensor);
  STD_TORCH_CHECK(least_classes <= logits.cols && logits.cols <= INT32_MAX, "logits: expected ",
                  least_classes, " <= C < 2**31 classes, got ", logits.cols);
  return logits;
}

inline Rows rows_of(const std::optional<Tensor>& rows, const Matrix& logits, const Tensor& like) {
  if (rows.has_value()) return index_vector(*rows, "rows", like);
  return {nullptr, logits.rows, 0};
}

inline Target target_of(const Tensor& target, const Matrix& logits, const Tensor& like,
                        int64_t ignore_index) {
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.rows, "target: expected shape [",
                  logits.rows, "] for the rows of logits");
  return {index_vector(target, "target", like), ignore_index};
}

inline LogNorm log_norm_of(const std::optional<Tensor>& log_norm, const Matrix& logits,
                           const Tensor& like) {
  LogNorm result;
  if (!log_norm.has_value()) return result;
  STD_TORCH_CHECK(log_norm->numel() == 1, "log_norm: expected one value, got ", log_norm->numel());
  STD_TORCH_CHECK(log_norm->scalar_type() == result_type(logits.dtype),
                  "log_norm: expected the dtype of the result");
  if (!log_norm->is_cpu()) {
    STD_TORCH_CHECK(log_norm->device() == like.device(),
                    "log_norm: expected the CPU or the device of logits");
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
    STD_TORCH_CHECK(bias_.size == head_.weight.rows, "bias: expected ", head_.weight.rows,
                    " values, got ", bias_.size);
    STD_TORCH_CHECK(bias_.dtype == head_.weight.dtype, "bias: expected the dtype of weight");
    head_.bias = &bias_;
  }
  HeadArguments(const HeadArguments&) = delete;
  const Head& get() const { return head_; }

  const Head& head_for(const Matrix& logits) const {
    const Dtype dtype = head_.weight.dtype;
    STD_TORCH_CHECK(head_.weight.rows == logits.cols, "weight: expected ", logits.cols,
                    " rows, got ", head_.weight.rows);
    STD_TORCH_CHECK(
        dtype == logits.dtype || (dtype == Dtype::kFloat32 && logits.dtype != Dtype::kFloat64),
        "weight: expected the dtype of logits, or float32 for bfloat16 and float16 logits");
    return head_;
  }

 private:
  Head head_;
  Vector bias_{};
};

inline Tensor new_workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

Tensor classification_margin_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index);
// Without a weight, `bias` and `nearest` do not count, and with it `softmax` does not.
Tensor minimal_margin_score_op(const Tensor& logits, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, bool nearest, bool softmax);

}  // namespace marginops::cuda
