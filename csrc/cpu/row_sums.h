// Finds the two largest logits of each row and its sums of exponentials, and reads each logit from
// memory once. A second loop adds the exponentials of classes that are still in cache.
#pragma once

#include "../common/statistics_math.h"
#include "exp.h"
#include "rows.h"

namespace marginops::cpu {

// Rows with more classes are summed along the row. In shorter rows the ends, which fill no vector,
// take longest.
template <class Value>
constexpr int64_t kLongSums = 8 * Simd<Value>::kLanes;

template <class Value>
struct RowSums {
  Top2<Value> top;
  ExponentialSums<Value> sums;
};

template <class Value>
struct LaneSums {
  using Vector = VectorOf<Value>;
  Vector plain{}, weighted{}, squares{};

  // `step` is logit - maximum.
  void add(Vector step) {
    const Vector e = exp<Value>(step);
    plain += e;
    weighted += e * (step < ExpConstants<Value>::kLowest ? Vector{} : step);  // 0 * -inf is NaN
    squares += e * e;
  }
  void add_to(ExponentialSums<Value>& sums) const {
    LaneSums all = *this;
    for_each_fold<Value>([&](auto fold) {
      all.plain += fold(all.plain);
      all.weighted += fold(all.weighted);
      all.squares += fold(all.squares);
    });
    sums.plain += all.plain[0];
    sums.weighted += all.weighted[0];
    sums.squares += all.squares[0];
  }
};

// Adds the exponentials of all logits except the one at `left_out`. A negative `left_out` leaves
// out none.
template <class Value>
void add_exponentials(const Value* logits, int64_t size, int64_t left_out,
                      ExponentialSums<Value>& sums) {
  using Vector = VectorOf<Value>;
  constexpr int kLanes = Simd<Value>::kLanes;
  const Vector none = Vector{} - std::numeric_limits<Value>::infinity();
  alignas(kVectorBytes) Value padded[kLanes];
  if (size < kLanes) {
    std::fill(std::copy_n(logits, size, padded), padded + kLanes, none[0]);
    logits = padded;
    size = kLanes;
  }
  LaneSums<Value> lanes;
  const auto add_vectors = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) lanes.add(load(logits + i) - sums.maximum);
  };
  const auto add_part = [&](int64_t begin, int64_t fresh) {  // lanes before `fresh` are in the sums
    const auto lane = lane_numbers<Value>();
    const auto out = (lane < static_cast<int32_t>(fresh - begin)) |
                     (lane == static_cast<int32_t>(left_out - begin));
    lanes.add((out ? none : load(logits + begin)) - sums.maximum);
  };
  const int64_t full = size / kLanes * kLanes;
  int64_t next = 0;
  if (0 <= left_out && left_out < full) {
    const int64_t vector_begin = left_out / kLanes * kLanes;
    add_vectors(0, vector_begin);
    add_part(vector_begin, vector_begin);
    next = vector_begin + kLanes;
  }
  add_vectors(next, full);
  if (full < size) add_part(size - kLanes, full);
  lanes.add_to(sums);
}

// The logits in the dtype of arithmetic: where they are, or widened into `buffer`.
inline const float* widened(const float* logits, int64_t, float*) { return logits; }
inline const double* widened(const double* logits, int64_t, double*) { return logits; }
template <class Half>
const float* widened(const Half* logits, int64_t size, float* buffer) {
  constexpr int kLanes = Simd<float>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(load(logits + i), buffer + i);
  for (; i < size; ++i) buffer[i] = value_of(logits[i]);
  return buffer;
}

// The sums of a row whose columns are neighbours in memory.
template <class T>
RowSums<ValueOf<T>> sums_of_row(const T* row, int64_t classes) {
  using Value = ValueOf<T>;
  RowSums<Value> result;
  auto& [top, sums] = result;
  alignas(kVectorBytes) Value buffer[std::is_same_v<T, Value> ? 1 : kSegment];
  for (int64_t begin = 0; begin < classes && !top.nan; begin += kSegment) {
    const int64_t size = std::min(classes - begin, kSegment);
    const auto start = static_cast<int32_t>(begin);
    const Value* segment = widened(row + begin, size, buffer);
    Top2<Value> next = top2_values(segment, size);
    int64_t left_out = -1;
    if (!next.nan && top.precedes(next.first_value, start, top.second_value, top.second)) {
      find_classes(segment, size, next);
      if (next.first_value > sums.maximum) {
        sums.raise(next.first_value);
        left_out = next.first;
      }
      next.first += start;
      next.second += next.second == top.kNone ? 0 : start;
    }
    if (next.first_value > -std::numeric_limits<Value>::infinity()) {
      add_exponentials(segment, size, left_out, sums);
    }
    top.merge(next);
  }
  return result;
}

// The sums of up to kLanes rows. `rows` holds the addresses of the rows, and each lane has a row.
template <class T>
class RowPerLaneSums {
  using Value = ValueOf<T>;
  using Vector = VectorOf<Value>;

 public:
  RowPerLaneSums(const T* const* rows, int count, int64_t classes, int64_t column_stride) {
    Tile<Value> tile;
    for (int64_t begin = 0; begin < classes; begin += kTransposedTile) {
      const int64_t columns = std::min(kTransposedTile, classes - begin);
      const Vector previous = top_.first;
      tile.read(rows, count, begin, columns, column_stride);
      for (int64_t column = 0; column < columns; ++column) {
        top_.add(load(tile.values[column]), begin + column);
      }
      if (begin > 0) raise(previous);
      add(tile, begin, columns);
    }
  }

  RowSums<Value> operator[](int lane) const {
    return {top_[lane],
            {top_.first[lane], lanes_.plain[lane], lanes_.weighted[lane], lanes_.squares[lane]}};
  }

 private:
  // ExponentialSums::raise() in the lanes whose maximum has grown.
  void raise(Vector previous) {
    const auto rises = top_.first > previous;
    const Vector lowest = Vector{} + ExpConstants<Value>::kLowest;
    const Vector step = maximum(lowest, previous - top_.first);
    const Vector scale = exp<Value>(previous - top_.first);
    lanes_.squares = rises ? scale * (scale * (1 + lanes_.squares)) : lanes_.squares;
    lanes_.weighted =
        rises ? scale * (lanes_.weighted + step * (1 + lanes_.plain)) : lanes_.weighted;
    lanes_.plain = rises ? scale * (1 + lanes_.plain) : lanes_.plain;
  }

  void add(const Tile<Value>& tile, int64_t begin, int64_t columns) {
    const Vector none = Vector{} - std::numeric_limits<Value>::infinity();
    const Vector base = top_.first == none ? Vector{} : top_.first;
    LaneSums<Value> lanes;  // summed separately, which rounds less
    for (int64_t column = 0; column < columns; ++column) {
      const auto leads = top_.first_class == static_cast<int32_t>(begin + column);
      lanes.add(leads ? none : load(tile.values[column]) - base);
    }
    lanes_.plain += lanes.plain;
    lanes_.weighted += lanes.weighted;
    lanes_.squares += lanes.squares;
  }

  RowPerLaneTop2<Value> top_;
  LaneSums<Value> lanes_;
};

template <class T, class Use>
void for_each_sums(const Tensor& logits, const Use& use) {
  const Matrix<T> view = matrix<T>(logits);
  const Rows rows(logits, std::nullopt);
  const int64_t classes = view.columns;
  parallel(rows.count, kGrain / (4 * classes), [&](int64_t begin, int64_t end) {
    if (is_vectorised_along_classes(view, kLongSums<ValueOf<T>>)) {
      for (int64_t r = begin; r < end; ++r) use(r, sums_of_row(view.row(r), classes));
    } else {
      for_each_group(view, rows, begin, end, [&](int64_t r, int count, const T* const* starts) {
        const RowPerLaneSums<T> sums(starts, count, classes, view.column_stride);
        for (int lane = 0; lane < count; ++lane) use(r + lane, sums[lane]);
      });
    }
  });
}

}  // namespace marginops::cpu
