// Distances between the rows of a weight matrix. A bias that counts is one more column.
#pragma once

#include <cmath>
#include <memory>

#include "../common/margin_math.h"
#include "tensor.h"

namespace marginops::cpu {

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& weight) {
  if (!bias) return;
  check_size("bias", *bias, weight.size(0), "the rows of weight");
  check_dtype("bias", *bias, weight.scalar_type());
}

template <class T>
ValueOf<T> squared_distance(const T* a, const T* b, int64_t columns) {
  using Value = ValueOf<T>;
  constexpr int kLanes = Simd<Value>::kLanes;
  constexpr int kUnroll = 4;
  VectorOf<Value> sums[kUnroll] = {};
  int64_t column = 0;
  for (; column + kUnroll * kLanes <= columns; column += kUnroll * kLanes) {
    for (int part = 0; part < kUnroll; ++part) {
      const auto step = load(a + column + part * kLanes) - load(b + column + part * kLanes);
      sums[part] += step * step;
    }
  }
  for (; column + kLanes <= columns; column += kLanes) {
    const auto step = load(a + column) - load(b + column);
    sums[0] += step * step;
  }
  const VectorOf<Value> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  Value sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  for (; column < columns; ++column) {
    const Value step = value_of(a[column]) - value_of(b[column]);
    sum += step * step;
  }
  return sum;
}

template <class Value>
class Distances {
 public:
  virtual ~Distances() = default;
  // ||w_i - w_j||
  virtual Value operator()(int64_t i, int64_t j) const = 0;
  // Copies row i of the weight and then its bias.
  virtual void copy_row(int64_t i, Value* row) const = 0;

  int64_t classes = 0;
  int64_t columns = 0;
  bool tabled = false;  // whether a distance is read, not computed
};

template <class T>
class WeightDistances final : public Distances<ValueOf<T>> {
  using Value = ValueOf<T>;

 public:
  WeightDistances(const Tensor& weight, const std::optional<Tensor>& bias)
      : weight_(matrix<T>(weight)), bias_(bias ? vector<T>(*bias) : Vector<T>{}) {
    this->classes = weight_.rows;
    this->columns = weight_.columns + (bias ? 1 : 0);
  }

  Value operator()(int64_t i, int64_t j) const override {
    Value square = 0;
    int64_t d = 0;
    if (weight_.column_stride == 1) {
      square = squared_distance(weight_.row(i), weight_.row(j), weight_.columns);
      d = weight_.columns;
    }
    for (; d < this->columns; ++d) square += difference(i, j, d) * difference(i, j, d);
    return is_safe_square(square) ? std::sqrt(square) : scaled_distance(i, j);
  }

  void copy_row(int64_t i, Value* row) const override {
    for (int64_t d = 0; d < this->columns; ++d) row[d] = entry(i, d);
  }

  // total += scale * (w_i - w_j)
  void add_difference(int64_t i, int64_t j, Value scale, Value* total) const {
    constexpr int kLanes = Simd<Value>::kLanes;
    int64_t d = 0;
    if (weight_.column_stride == 1) {
      const T *a = weight_.row(i), *b = weight_.row(j);
      for (; d + kLanes <= weight_.columns; d += kLanes) {
        store(load(total + d) + scale * (load(a + d) - load(b + d)), total + d);
      }
    }
    for (; d < this->columns; ++d) total[d] += scale * difference(i, j, d);
  }

 private:
  Value entry(int64_t i, int64_t d) const {
    return value_of(d < weight_.columns ? weight_.at(i, d) : bias_[i]);
  }
  Value difference(int64_t i, int64_t j, int64_t d) const { return entry(i, d) - entry(j, d); }

  Value scaled_distance(int64_t i, int64_t j) const {
    Value largest = 0;
    for (int64_t d = 0; d < this->columns; ++d) {
      const Value size = std::abs(difference(i, j, d));
      if (size > largest || size != size) largest = size;
    }
    if (largest == 0 || !std::isfinite(largest)) return largest;
    Value square = 0;
    for (int64_t d = 0; d < this->columns; ++d) {
      const Value step = difference(i, j, d) / largest;
      square += step * step;
    }
    return largest * std::sqrt(square);
  }

  Matrix<T> weight_;
  Vector<T> bias_;
};

// A table of all distances, each computed once.
template <class Value>
class DistanceTable final : public Distances<Value> {
 public:
  explicit DistanceTable(std::unique_ptr<Distances<Value>> distances)
      : distances_(std::move(distances)),
        table_(static_cast<size_t>(distances_->classes * distances_->classes)) {
    const int64_t classes = this->classes = distances_->classes;
    this->columns = distances_->columns;
    this->tabled = true;
    parallel(classes, kGrain / (classes * this->columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < i; ++j) {
          table_[i * classes + j] = table_[j * classes + i] = (*distances_)(i, j);
        }
      }
    });
  }

  Value operator()(int64_t i, int64_t j) const override { return table_[i * this->classes + j]; }
  void copy_row(int64_t i, Value* row) const override { distances_->copy_row(i, row); }

 private:
  std::unique_ptr<Distances<Value>> distances_;
  Array<Value> table_;
};

// The distances that `count` rows of logits need. A table pays off if the pairs of classes are no
// more than the rows.
template <class Value>
std::unique_ptr<Distances<Value>> make_distances(const Tensor& weight,
                                                 const std::optional<Tensor>& bias, int64_t count) {
  std::unique_ptr<Distances<Value>> distances;
  for_dtype("weight", weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<ValueOf<T>, Value>) {
      distances = std::make_unique<WeightDistances<T>>(weight, bias);
    }
  });
  MARGINOPS_CHECK(distances,
                  "weight: expected float64 with float64 logits and only with them, got ",
                  name_of(weight.scalar_type()));
  const int64_t classes = distances->classes;
  if (classes <= count / classes) {
    return std::make_unique<DistanceTable<Value>>(std::move(distances));
  }
  return distances;
}

// ||w_j - centre|| of every class: bounds for the distances. Any centre is correct. The mean of
// some rows lies among the rows and so gives small radii. A radius is infinite where its square
// overflows.
template <class Value>
Array<Value> radii(const Distances<Value>& distances) {
  const int64_t classes = distances.classes, columns = distances.columns;
  const int64_t step = classes / 1024 + 1, count = (classes - 1) / step + 1;
  Array<Value> centre(columns), sample(columns), radius(classes);
  for (int64_t i = 0; i < count; ++i) {
    distances.copy_row(i * step, sample.data());
    for (int64_t d = 0; d < columns; ++d) centre[d] += sample[d] / static_cast<Value>(count);
  }
  parallel(classes, kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
    Array<Value> row(columns);
    for (int64_t i = begin; i < end; ++i) {
      distances.copy_row(i, row.data());
      const Value square = squared_distance(row.data(), centre.data(), columns);
      radius[i] = square < std::numeric_limits<Value>::min() * Value(1e8)
                      ? std::numeric_limits<Value>::infinity()  // may have underflowed: no bound
                      : std::sqrt(square);
    }
  });
  return radius;
}

}  // namespace marginops::cpu
