// Distances between the rows of a weight matrix. A bias that counts is one more column.
#pragma once

#include <cmath>
#include <memory>

#include "../common/margin_math.h"
#include "tensor.h"

namespace marginops::cpu {

template <class A, class B>
ValueOf<A> squared_distance(const A* a, const B* b, int64_t columns) {
  using Value = ValueOf<A>;
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
  // ||w_i - point||^2
  virtual Value squared_distance_to(int64_t i, const Value* point) const = 0;
  // total += scale * w_i
  virtual void add_row(int64_t i, Value scale, Value* total) const = 0;

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

  Value squared_distance_to(int64_t i, const Value* point) const override {
    Value square = 0;
    int64_t d = 0;
    if (weight_.column_stride == 1) {
      square = squared_distance(weight_.row(i), point, weight_.columns);
      d = weight_.columns;
    }
    for (; d < this->columns; ++d) square += (entry(i, d) - point[d]) * (entry(i, d) - point[d]);
    return square;
  }

  void add_row(int64_t i, Value scale, Value* total) const override {
    constexpr int kLanes = Simd<Value>::kLanes;
    int64_t d = 0;
    if (weight_.column_stride == 1) {
      const T* row = weight_.row(i);
      for (; d + kLanes <= weight_.columns; d += kLanes) {
        store(load(total + d) + scale * load(row + d), total + d);
      }
    }
    for (; d < this->columns; ++d) total[d] += scale * entry(i, d);
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
  Value squared_distance_to(int64_t i, const Value* point) const override {
    return distances_->squared_distance_to(i, point);
  }
  void add_row(int64_t i, Value scale, Value* total) const override {
    distances_->add_row(i, scale, total);
  }

 private:
  std::unique_ptr<Distances<Value>> distances_;
  Array<Value> table_;
};

// The distances between the rows of the weight, each computed when it is asked for.
template <class Value>
std::unique_ptr<Distances<Value>> weight_distances(const Tensor& weight,
                                                   const std::optional<Tensor>& bias) {
  std::unique_ptr<Distances<Value>> distances;
  for_dtype(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<ValueOf<T>, Value>) {
      distances = std::make_unique<WeightDistances<T>>(weight, bias);
    }
  });
  MARGINOPS_CHECK(distances,
                  "weight: expected float64 with float64 logits and only with them, got ",
                  name_of(weight.scalar_type()));
  return distances;
}

// Whether a table of all distances costs less than the distances that `count` rows of logits need.
inline bool table_pays_off(int64_t classes, int64_t count) { return classes <= count / classes; }

// The distances that `count` rows of logits need.
template <class Value>
std::unique_ptr<Distances<Value>> make_distances(const Tensor& weight,
                                                 const std::optional<Tensor>& bias, int64_t count) {
  auto distances = weight_distances<Value>(weight, bias);
  if (!table_pays_off(distances->classes, count)) return distances;
  return std::make_unique<DistanceTable<Value>>(std::move(distances));
}

// ||w_j - centre|| of every class. Two radii bound a distance: ||w_i - w_j|| is at most their sum.
// Any centre is correct. The mean of some rows lies among the rows and so gives small radii. A
// radius is infinite where its square overflows. A sum of squares may be wrong by half a rounding
// step for each column, so the slack makes up for all steps of two sums.
template <class Value>
Array<Value> radii(const Distances<Value>& distances) {
  const int64_t classes = distances.classes, columns = distances.columns;
  const int64_t step = classes / 32 + 1, count = (classes - 1) / step + 1;
  const Value slack = 1 + static_cast<Value>(columns) * std::numeric_limits<Value>::epsilon();
  Array<Value> centre(columns), radius(classes);
  for (int64_t i = 0; i < count; ++i) {
    distances.add_row(i * step, Value{1} / static_cast<Value>(count), centre.data());
  }
  parallel(classes, kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Value square = distances.squared_distance_to(i, centre.data());
      radius[i] = square < std::numeric_limits<Value>::min() * Value(1e8)
                      ? std::numeric_limits<Value>::infinity()  // may have underflowed: no bound
                      : slack * std::sqrt(square);
    }
  });
  return radius;
}

}  // namespace marginops::cpu
