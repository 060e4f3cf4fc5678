// The gradients of margins and scores are sums over the samples of each class. This file computes
// these sums.
//
// One thread sums a class, in the order of its entries, so results do not depend on the number of
// threads.
#include <tuple>

#include "../binding/aten.h"
#include "distance.h"

namespace marginops::cpu {
namespace {

void check_keys(const int64_t* keys, int64_t count, int64_t end) {
  if (count == 0) return;
  MARGINOPS_CHECK(std::is_sorted(keys, keys + count), "key: expected sorted values, got others");
  MARGINOPS_CHECK(keys[0] >= 0 && keys[count - 1] < end, "key: expected values in [0, ", end,
                  "), got ", keys[0], " to ", keys[count - 1]);
}

// The gradient of one class: the sum of coefficient * (w_class - w_partner) over its entries. The
// entries are sorted by partner. The coefficients of entries with the same partner are summed
// first.
template <class T>
void add_pairs(const int64_t* key, const int64_t* end, const ValueOf<T>* coefficient,
               const WeightDistances<T>& weight, Array<ValueOf<T>>& total) {
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
  check_pair_gradient(key, coefficient, weight, bias);
  const int64_t classes = weight.size(0), columns = weight.size(1);
  const Tensor dense_key = contiguous(key, place());
  const Tensor dense_coefficient = contiguous(coefficient, place());
  const auto* keys = static_cast<const int64_t*>(dense_key.const_data_ptr());
  const int64_t* keys_end = keys + key.size(0);
  check_keys(keys, key.size(0), classes * classes);
  Tensor grad_weight = new_tensor({classes, columns}, weight.scalar_type());
  Tensor grad_bias = new_tensor({classes}, weight.scalar_type());
  for_dtype(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const WeightDistances<T> rows(weight, bias);
    const auto* values = static_cast<const Value*>(dense_coefficient.const_data_ptr());
    auto* weight_gradient = static_cast<T*>(grad_weight.mutable_data_ptr());
    auto* bias_gradient = static_cast<T*>(grad_bias.mutable_data_ptr());
    parallel(classes, 1, [&](int64_t begin, int64_t end) {
      Array<Value> total(rows.columns);
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
  check_class_sum(key, coefficient, rows, classes);
  const int64_t count = rows.size(0), columns = rows.size(1);
  const Tensor dense_key = contiguous(key, place());
  const Tensor dense_coefficient = contiguous(coefficient, place());
  const auto* keys = static_cast<const int64_t*>(dense_key.const_data_ptr());
  const int64_t* keys_end = keys + key.size(0);
  check_keys(keys, key.size(0), classes * count);
  Tensor result = new_tensor({classes, columns}, result_type(rows));
  for_dtype(rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const Matrix<T> view = matrix<T>(rows);
    const auto* values = static_cast<const Value*>(dense_coefficient.const_data_ptr());
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
  m.impl("pair_gradient", MARGINOPS_BOX(&pair_gradient));
  m.impl("class_sum", MARGINOPS_BOX(&class_sum));
}

}  // namespace
}  // namespace marginops::cpu
