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
  call_torch("aten::sort", "stable", stack, place_of(key));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

ScalarType key_type(int64_t classes) {
  const int bytes = moment_key_bytes(classes);
  return bytes == 1 ? ScalarType::Byte : bytes == 2 ? ScalarType::Short : ScalarType::Int;
}

std::tuple<Tensor, Tensor, Tensor> class_moments_op(const Tensor& input, const Tensor& target,
                                                    int64_t num_classes, bool normalize,
                                                    int64_t ignore_index) {
  check_dim("input", input, 2, "[N, D]");
  const Matrix rows = matrix(input, "input", input);
  check_size("target", target, rows.rows, "the rows of input");
  const Target labels{index_vector(target, "target", input), ignore_index};
  MARGINOPS_CHECK(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
  MARGINOPS_CHECK(num_classes <= INT32_MAX, "num_classes: expected less than 2**31, got ",
                  num_classes);
  // torch's sort takes no more keys. Moments of several parts of the rows can be merged.
  MARGINOPS_CHECK(rows.rows <= INT32_MAX, "input: expected fewer than 2**31 rows at once, got ",
                  rows.rows);
  const Launch launch(input);
  Tensor key = new_tensor(input, {rows.rows}, key_type(num_classes));
  check_launch(moment_keys(labels, num_classes, key.mutable_data_ptr(), launch.stream()));
  const auto [sorted, order] = stable_sort(key);
  const ScalarType dtype = result_type(rows.dtype);
  Tensor count = new_tensor(input, {num_classes}, ScalarType::Long);
  Tensor mean = new_tensor(input, {num_classes, rows.cols}, dtype);
  Tensor radius = new_tensor(input, {num_classes}, dtype);
  Tensor workspace =
      new_workspace(input, class_moments_workspace_bytes(rows, num_classes, normalize));
  const MomentsResult result{count.mutable_data_ptr<int64_t>(), mean.mutable_data_ptr(),
                             radius.mutable_data_ptr()};
  check_launch(class_moments(rows, {sorted.const_data_ptr(), order.const_data_ptr<int64_t>()},
                             num_classes, normalize, result, workspace.mutable_data_ptr(),
                             launch.stream()));
  return {count, mean, radius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CUDA, m) {
  m.impl("class_moments", MARGINOPS_BOX(&class_moments_op));
}

}  // namespace marginops::cuda
