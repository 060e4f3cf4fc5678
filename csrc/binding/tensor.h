// New tensors, calls of torch's ops, and checks of tensors, for the kernels of every device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <string>

#include "error.h"

namespace marginops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The name of a dtype in Python.
inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "number " + std::to_string(static_cast<int>(type)) + " of torch";
  }
}

// Where a tensor lies.
struct Place {
  int32_t device_type, device_index;
  std::string (*no_memory)();  // how an error for a lack of memory begins
};

// Calls the C shim. The dispatcher would cost a microsecond for each tensor.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type,
                         const Place& place) {
  const int64_t rows = sizes.size() == 0 ? 1 : *sizes.begin();
  const int64_t columns = sizes.size() == 2 ? *(sizes.begin() + 1) : 1;
  const int64_t shape[2] = {rows, columns}, strides[2] = {columns, 1};
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle tensor;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), shape, strides, dtype,
                               place.device_type, place.device_index, &tensor);
  if (error != AOTI_TORCH_SUCCESS) {
    std::ostringstream text;
    text << place.no_memory() << " Tried to allocate " << rows << " x " << columns
         << " values of dtype " << name_of(type);
    fail_like_torch(text.str());
  }
  return Tensor(tensor);
}

// Calls an op of torch whose arguments are right. So it fails only for lack of memory, or because
// the device has failed before.
template <size_t kArguments>
void call_torch(const char* op, const char* overload, std::array<StableIValue, kArguments>& stack,
                const Place& place) {
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    fail_like_torch(place.no_memory() + " " + op + " of torch failed");
  }
}

inline Tensor contiguous(const Tensor& tensor, const Place& place) {
  if (tensor.is_contiguous()) return tensor;
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(tensor),
                                    from(torch::headeronly::MemoryFormat::Contiguous)};
  call_torch("aten::contiguous", "", stack, place);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return "device " + std::to_string(tensor.get_device_index());
}

// `shape` is what to expect, such as "[N, C]".
inline void check_dim(const char* name, const Tensor& tensor, int64_t dim, const char* shape) {
  MARGINOPS_CHECK(tensor.dim() == dim, name, ": expected shape ", shape, ", got ",
                  shape_of(tensor));
}

inline void check_size(const char* name, const Tensor& tensor, int64_t size, const char* meaning) {
  MARGINOPS_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected shape [", size,
                  "] for ", meaning, ", got ", shape_of(tensor));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType type) {
  MARGINOPS_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", name_of(type), ", got ",
                  name_of(tensor.scalar_type()));
}

[[noreturn]] inline void fail_dtype(const char* name, const Tensor& tensor) {
  fail(name, ": expected dtype float32, float64, bfloat16 or float16, got ",
       name_of(tensor.scalar_type()));
}

}  // namespace marginops
