// Calls of torch's ops, for the kernels of every device.
#pragma once

#include <array>
#include <optional>
#include <utility>

#include "tensor.h"

namespace marginops {

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

inline Tensor index_select(const Tensor& tensor, const Tensor& index, const Place& place) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(tensor), from(int64_t{0}), from(index)};
  call_torch("aten::index_select", "", stack, place);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The sorted keys, and the index that each key had before.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& key, const Place& place) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(key), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  call_torch("aten::sort", "stable", stack, place);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace marginops
