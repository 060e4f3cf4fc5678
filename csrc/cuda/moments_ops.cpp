// Bindings of the CUDA kernels for the ops in marginops/ops/moments.py.
#include "tensor.h"

#include "../binding/aten.h"
#include "moments_launch.h"

namespace marginops::cuda {
namespace {

ScalarType key_type(int64_t classes) {
  const int bytes = moment_key_bytes(classes);
  return bytes == 1 ? ScalarType::Byte : bytes == 2 ? ScalarType::Short : ScalarType::Int;
}

std::tuple<Tensor, Tensor, Tensor> class_moments_op(const Tensor& input, const Tensor& target,
                                                    int64_t num_classes, bool normalize,
                                                    int64_t ignore_index) {
  check_classes(input, target, num_classes);
  const Matrix rows = matrix(input);
  MARGINOPS_CHECK(num_classes <= INT32_MAX, "num_classes: expected less than 2**31, got ",
                  num_classes);
  // torch's sort takes no more keys. Moments of several parts of the rows can be merged.
  MARGINOPS_CHECK(rows.rows <= INT32_MAX, "input: expected fewer than 2**31 rows at once, got ",
                  rows.rows);
  const Launch launch(input);
  Tensor key = new_tensor(input, {rows.rows}, key_type(num_classes));
  check_launch(moment_keys({index_vector(target), ignore_index}, num_classes,
                           key.mutable_data_ptr(), launch.stream()));
  const auto [sorted, order] = stable_sort(key, place_of(key));
  const ScalarType dtype = result_type(input);
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
