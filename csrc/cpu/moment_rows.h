// Mean and sum of squares of rows, which may be scaled to unit length first.
#pragma once

#include <cmath>

#include "../common/margin_math.h"
#include "tensor.h"

namespace marginops::cpu {

// Rows of zeros. Each row is aligned and padded to whole vectors.
template <class Value>
class Buffer {
  struct alignas(kVectorBytes) Aligned {
    Value values[Simd<Value>::kLanes] = {};
  };

 public:
  Buffer(int64_t rows, int64_t columns)
      : vectors_((columns + Simd<Value>::kLanes - 1) / Simd<Value>::kLanes),
        data_(rows * vectors_) {}

  Value* row(int64_t index) { return reinterpret_cast<Value*>(data_.data() + index * vectors_); }

 private:
  int64_t vectors_;
  Array<Aligned> data_;
};

// Loads a row's last `count` values and fills the vector with zeros. Memory may be read up to
// `readable`, which may lie behind the row.
template <class T>
VectorOf<ValueOf<T>> load_part(const T* source, int64_t count, const T* readable) {
  using Value = ValueOf<T>;
  constexpr int64_t kLanes = Simd<Value>::kLanes;
  if (readable - source >= kLanes) {
    using Index = typename Simd<Value>::Index;
    const auto in_row = lane_numbers<Value>() < Index{} + static_cast<int>(count);
    return in_row ? load(source) : VectorOf<Value>{};
  }
  alignas(kVectorBytes) Value part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = value_of(source[i]);
  return load(part);
}

// Calls use(column, load) for each vector of columns, where load(row) loads that vector of a row,
// and fetch(column) once for each cache line. Everything has to be inlined: otherwise sums are kept
// in memory, and GCC treats a function that only prefetches as one without effect.
template <class T, class Fetch, class Use>
[[gnu::always_inline]] inline void for_each_vector(int64_t columns, const T* readable,
                                                   const Fetch& fetch, const Use& use) {
  constexpr int64_t kLanes = Simd<ValueOf<T>>::kLanes;
  constexpr int64_t kLine = std::max<int64_t>(64 / sizeof(T), kLanes);
  const auto loader = [](int64_t d) { return [d](const T* row) { return load(row + d); }; };
  int64_t d = 0;
  for (; d + kLine <= columns; d += kLine) {
    fetch(d);
#pragma GCC unroll 8
    for (int64_t part = 0; part < kLine; part += kLanes) use(d + part, loader(d + part));
  }
  if (d < columns) fetch(d);
  for (; d + kLanes <= columns; d += kLanes) use(d, loader(d));
  if (d < columns) use(d, [&](const T* row) { return load_part(row + d, columns - d, readable); });
}

// The rounded product. The asm statement keeps the compiler from fusing it with a subtraction.
template <class Vector>
inline Vector rounded(Vector product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// The sum of squares of each row.
template <int kRows, class T>
void sum_squares(const T* const* rows, int64_t columns, const T* readable, ValueOf<T>* sums) {
  VectorOf<ValueOf<T>> squares[kRows] = {};
  const auto add = [&](int64_t, const auto& load_row) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto value = load_row(rows[i]);
      squares[i] += value * value;
    }
  };
  for_each_vector(columns, readable, [](int64_t) {}, add);
  for (int i = 0; i < kRows; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < Simd<ValueOf<T>>::kLanes; ++lane) sums[i] += squares[i][lane];
  }
}

// Scales a row to unit length where the sum of its squares is not safe: it is divided by its
// largest entry first. A row of zeros stays, and a row with a NaN or an infinity becomes NaN.
template <class Value>
void scale_to_unit(Value* row, int64_t columns) {
  Value largest = 0, square = 0;
  for (int64_t d = 0; d < columns; ++d) {
    const Value size = std::abs(row[d]);
    if (size > largest || size != size) largest = size;
  }
  if (largest == 0) return;
  if (!std::isfinite(largest)) {
    std::fill(row, row + columns, std::numeric_limits<Value>::quiet_NaN());
    return;
  }
  for (int64_t d = 0; d < columns; ++d) {
    row[d] /= largest;
    square += row[d] * row[d];
  }
  const Value scale = 1 / std::sqrt(square);
  for (int64_t d = 0; d < columns; ++d) row[d] *= scale;
}

// Computes the factors that scale rows to unit length, 1 for a row of zeros. Returns false if the
// squares of a row over- or underflow; scale_to_unit() then has to scale that row.
template <int kRows, class T>
bool unit_scales(const T* const* rows, int64_t columns, const T* readable, ValueOf<T>* scales) {
  bool safe = true;
  sum_squares<kRows>(rows, columns, readable, scales);
  for (int i = 0; i < kRows; ++i) {
    const auto is_zero = [](T value) { return value_of(value) == 0; };
    if (is_safe_square(scales[i])) {
      scales[i] = 1 / std::sqrt(scales[i]);
    } else if (scales[i] == 0 && std::all_of(rows[i], rows[i] + columns, is_zero)) {
      scales[i] = 1;
    } else {
      safe = false;
    }
  }
  return safe;
}

// Copies a row, scaled to unit length if `normalize` is true. All copies of a row have the same
// values.
template <class T>
void copy_row(const T* row, int64_t columns, const T* readable, bool normalize, double* copy) {
  ValueOf<T> scale = 1;
  const bool safe = !normalize || unit_scales<1>(&row, columns, readable, &scale);
  if (!safe) scale = 1;
  for (int64_t d = 0; d < columns; ++d) copy[d] = value_of(row[d]) * scale;
  if (!safe) scale_to_unit(copy, columns);
}

// Mean and sum of squares of rows, by Welford's updates of their differences from the first row.
// The differences are small where the rows are close to each other, however far from 0 they are.
// For equal rows they are 0.
template <class Value>
class PieceMoments {
  static constexpr int kLanes = Simd<Value>::kLanes;

 public:
  explicit PieceMoments(int64_t columns)
      : columns_(columns), state_(2, columns), origin_(state_.row(0)), mean_(state_.row(1)) {}

  template <class T>
  void start(const T* row, Value scale) {
    for (int64_t d = 0; d < columns_; ++d) origin_[d] = value_of(row[d]) * scale;
    std::fill(mean_, state_.row(2), Value{0});  // with the padding, which may hold NaN
    std::fill(squares_, squares_ + kLanes, 0.0);
    count_ = 0;
  }

  // Adds rows, each times its scale, and fetches the rows `later` into the cache meanwhile.
  template <int kRows, bool kScaled, class T, class Later>
  void add(const T* const* rows, const T* readable, const Value* scales,
           const Later* const* later) {
    const Value* const origins = origin_;
    Value* const means = mean_;
    VectorOf<Value> squares[kRows] = {};
    Value share[kRows];
    for (Value& one : share) one = 1 / static_cast<Value>(++count_);
    const auto fetch = [&](int64_t d) __attribute__((always_inline)) {
      // Fetches into the second level of the cache, which waits for more lines at once than the
      // first.
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(later[i] + d, 0, 2);
    };
    const auto update = [&](int64_t d, const auto& load_row) __attribute__((always_inline)) {
      const auto origin = load(origins + d);
      auto mean = load(means + d);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        auto value = load_row(rows[i]);
        if constexpr (kScaled) value = rounded(value * scales[i]);
        value -= origin;
        const auto difference = value - mean;
        mean += difference * share[i];
        squares[i] += difference * (value - mean);
      }
      store(mean, means + d);
    };
    for_each_vector(columns_, readable, fetch, update);
    for (int i = 1; i < kRows; ++i) squares[0] += squares[i];
    for (int lane = 0; lane < kLanes; ++lane) squares_[lane] += squares[0][lane];
  }

  // Writes the mean minus `base`. The differences are exact where they are small.
  void write_mean(const double* base, double* mean) const {
    for (int64_t d = 0; d < columns_; ++d) {
      mean[d] = (static_cast<double>(origin_[d]) - base[d]) + static_cast<double>(mean_[d]);
    }
  }
  double squares() const {
    double sum = 0;
    for (const double square : squares_) sum += square;
    return sum;
  }

 private:
  int64_t columns_, count_ = 0;
  Buffer<Value> state_;
  Value *origin_, *mean_;  // the first row, and the mean minus the first row
  double squares_[kLanes] = {};
};

}  // namespace marginops::cpu
