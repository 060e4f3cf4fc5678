// What errors say of a tensor, and new tensors, for the kernels of every device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

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

template <class SizeOf>
std::string shape_text(int64_t dim, const SizeOf& size_of) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < dim; ++i) text << (i > 0 ? ", " : "") << size_of(i);
  text << "]";
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  return shape_text(tensor.dim(), [&](int64_t i) { return tensor.size(i); });
}

inline std::string shape_of(std::initializer_list<int64_t> sizes) {
  return shape_text(static_cast<int64_t>(sizes.size()),
                    [&](int64_t i) { return sizes.begin()[i]; });
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
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

}  // namespace marginops
