// Bindings of the CUDA kernels for the ops in marginops/ops/moments.py.
#include "moments_launch.h"

#include <array>

#include "binding.h"

namespace marginops::cuda {
namespace {

// The sorted keys, and the index that each key had before.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& key) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(key), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

ScalarType key_type(int64_t classes) {
  const int bytes = moment_key_bytes(classes);
  return bytes == 1 ? ScalarType::Byte : bytes == 2 ? ScalarType::Short : ScalarType::Int;
}

std::tuple<Tensor, Tensor, Tensor> class_moments_op(const Tensor& input, const Tensor& target,
                                                    int64_t num_classes, bool normalize,
                                                    int64_t ignore_index) {
  STD_TORCH_CHECK(input.dim() == 2, "input: expected shape [N, D], got ", input.dim(), "-d");
  const Matrix rows = matrix(input, "input", input);
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == rows.rows, "target: expected shape [",
                  rows.rows, "] for the rows of input, got ", target.numel(), " classes");
  const Target labels{index_vector(target, "target", input), ignore_index};
  STD_TORCH_CHECK(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
  STD_TORCH_CHECK(num_classes <= INT32_MAX, "num_classes: expected less than 2**31, got ",
                  num_classes);
  // torch's sort takes no more keys. Moments of several parts of the rows can be merged.
  STD_TORCH_CHECK(rows.rows <= INT32_MAX, "input: expected fewer than 2**31 rows at once, got ",
                  rows.rows);
  const Launch launch(input);
  Tensor key = torch::stable::new_empty(input, {rows.rows}, key_type(num_classes));
  STD_CUDA_CHECK(moment_keys(labels, num_classes, key.mutable_data_ptr(), launch.stream()));
  const auto [sorted, order] = stable_sort(key);
  const ScalarType dtype = result_type(rows.dtype);
  Tensor count = torch::stable::new_empty(input, {num_classes}, ScalarType::Long);
  Tensor mean = torch::stable::new_empty(input, {num_classes, rows.cols}, dtype);
  Tensor radius = torch::stable::new_empty(input, {num_classes}, dtype);
  Tensor workspace =
      new_workspace(input, class_moments_workspace_bytes(rows, num_classes, normalize));
  const MomentsResult result{count.mutable_data_ptr<int64_t>(), mean.mutable_data_ptr(),
                             radius.mutable_data_ptr()};
  STD_CUDA_CHECK(class_moments(rows, {sorted.const_data_ptr(), order.const_data_ptr<int64_t>()},
                               num_classes, normalize, result, workspace.mutable_data_ptr(),
                               launch.stream()));
  return {count, mean, radius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("class_moments", TORCH_BOX(&class_moments_op));
}

}  // namespace marginops::cuda
