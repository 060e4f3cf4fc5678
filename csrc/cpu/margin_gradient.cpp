// Sums over the samples of each class, of which the gradients of margins and scores consist.
//
// One thread sums a class, in the order of its entries, so results do not depend on the number of
// threads.
#include <tuple>

#include "distance.h"

namespace marginops::cpu {
namespace {

void check_entries(const Tensor& key, const Tensor& coefficient, ScalarType value, int64_t end) {
  STD_TORCH_CHECK(key.dim() == 1 && key.scalar_type() == ScalarType::Long && key.is_contiguous() &&
                      coefficient.dim() == 1 && coefficient.size(0) == key.size(0) &&
                      coefficient.is_contiguous() && coefficient.scalar_type() == value,
                  "key, coefficient: expected contiguous int64 [M] and a value for each");
  const auto* keys = static_cast<const int64_t*>(key.const_data_ptr());
  const int64_t count = key.size(0);
  STD_TORCH_CHECK(
      std::is_sorted(keys, keys + count) && (count == 0 || (keys[0] >= 0 && keys[count - 1] < end)),
      "key: expected sorted values in [0, ", end, ")");
}

// The gradient of one class: the sum of coefficient * (w_class - w_partner) over its entries. The
// entries are sorted by partner. The coefficients of entries with the same partner are summed
// first.
template <class T>
void add_pairs(const int64_t* key, const int64_t* end, const ValueOf<T>* coefficient,
               const WeightDistances<T>& weight, std::vector<ValueOf<T>>& total) {
  std::fill(total.begin(), total.end(), ValueOf<T>{0});
  while (key < end) {
    const int64_t run = *key;
    ValueOf<T> sum = 0;
    for (; key < end && *key == run; ++key, ++coefficient) sum += *coefficient;
    weight.add_difference(run / weight.classes, run % weight.classes, sum, total.data());
  }
}

std::tuple<Tensor, Tensor> pair_gradient(const Tensor& key, const Tensor& coefficient,
                                         const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected shape [C, D]");
  const int64_t classes = weight.size(0), columns = weight.size(1);
  check_entries(key, coefficient, result_type(weight), classes * classes);
  check_bias(bias, weight);
  Tensor grad_weight = new_tensor({classes, columns}, weight.scalar_type());
  Tensor grad_bias = new_tensor({classes}, weight.scalar_type());
  const auto* keys = static_cast<const int64_t*>(key.const_data_ptr());
  const int64_t* keys_end = keys + key.size(0);
  for_dtype("weight", weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const WeightDistances<T> rows(weight, bias);
    const auto* values = static_cast<const Value*>(coefficient.const_data_ptr());
    auto* weight_gradient = static_cast<T*>(grad_weight.mutable_data_ptr());
    auto* bias_gradient = static_cast<T*>(grad_bias.mutable_data_ptr());
    parallel(classes, 1, [&](int64_t begin, int64_t end) {
      std::vector<Value> total(rows.columns);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t* first = std::lower_bound(keys, keys_end, c * classes);
        const int64_t* last = std::lower_bound(first, keys_end, (c + 1) * classes);
        add_pairs<T>(first, last, values + (first - keys), rows, total);
        for (int64_t d = 0; d < columns; ++d)
          weight_gradient[c * columns + d] = static_cast<T>(total[d]);
        bias_gradient[c] = static_cast<T>(bias ? total[columns] : Value{0});
      }
    });
  });
  return {grad_weight, grad_bias};
}

// total += sum of coefficient * row over the entries of one class, whose keys begin at `base`.
template <class T>
void add_rows(const int64_t* key, const int64_t* end, int64_t base, const ValueOf<T>* coefficient,
              const Matrix<T>& rows, ValueOf<T>* total) {
  constexpr int kLanes = Simd<ValueOf<T>>::kLanes;
  for (; key < end; ++key, ++coefficient) {
    const int64_t row = *key - base;
    int64_t d = 0;
    if (rows.column_stride == 1) {
      for (; d + kLanes <= rows.columns; d += kLanes) {
        const auto sum = load(total + d) + *coefficient * load(rows.row(row) + d);
        store(sum, total + d);
      }
    }
    for (; d < rows.columns; ++d) total[d] += *coefficient * value_of(rows.at(row, d));
  }
}

Tensor class_sum(const Tensor& key, const Tensor& coefficient, const Tensor& rows,
                 int64_t classes) {
  STD_TORCH_CHECK(rows.dim() == 2, "rows: expected shape [R, D]");
  const int64_t count = rows.size(0), columns = rows.size(1);
  STD_TORCH_CHECK(classes >= 0 && classes <= INT64_MAX / std::max<int64_t>(count, 1),
                  "classes: expected at least 0, and keys below 2**63, got ", classes);
  check_entries(key, coefficient, result_type(rows), classes * count);
  Tensor result = new_tensor({classes, columns}, result_type(rows));
  const auto* keys = static_cast<const int64_t*>(key.const_data_ptr());
  const int64_t* keys_end = keys + key.size(0);
  for_dtype("rows", rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const Matrix<T> view = matrix<T>(rows);
    const auto* values = static_cast<const Value*>(coefficient.const_data_ptr());
    auto* sums = static_cast<Value*>(result.mutable_data_ptr());
    parallel(classes, 1, [&](int64_t begin, int64_t end) {
      std::fill(sums + begin * columns, sums + end * columns, Value{0});
      for (int64_t c = begin; c < end; ++c) {
        const int64_t* first = std::lower_bound(keys, keys_end, c * count);
        const int64_t* last = std::lower_bound(first, keys_end, (c + 1) * count);
        add_rows(first, last, c * count, values + (first - keys), view, sums + c * columns);
      }
    });
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("pair_gradient", TORCH_BOX(&pair_gradient));
  m.impl("class_sum", TORCH_BOX(&class_sum));
}

}  // namespace
}  // namespace marginops::cpu
