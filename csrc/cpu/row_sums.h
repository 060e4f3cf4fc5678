// A row's two largest logits together with its sums of exponentials, reading each logit from memory
// once: the exponentials are a second loop over classes that are still in cache.
#pragma once

#include "../common/statistics_math.h"
#include "exp.h"
#include "rows.h"

namespace marginops::cpu {

// Classes from which sums along a row beat sums across rows; in shorter rows its ends take longest.
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

// Adds the exponentials of all logits but the one at `left_out`, if it is not negative.
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
  const auto add_some = [&](int64_t begin, int64_t fresh) {  // those before `fresh` were added
    const auto lane = lane_numbers<Value>();
    const auto out = (lane < static_cast<int32_t>(fresh - begin)) |
                     (lane == static_cast<int32_t>(left_out - begin));
    lanes.add((out ? none : load(logits + begin)) - sums.maximum);
  };
  const int64_t full = size / kLanes * kLanes;
  int64_t from = 0;
  if (0 <= left_out && left_out < full) {
    const int64_t around = left_out / kLanes * kLanes;
    add_vectors(0, around);
    add_some(around, around);
    from = around + kLanes;
  }
  add_vectors(from, full);
  if (full < size) add_some(size - kLanes, full);
  lanes.add_to(sums);
}

// The logits in the dtype of arithmetic: where they are, or copied to `buffer`.
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

// A row with neighbouring columns.
template <class T>
RowSums<ValueOf<T>> sums_of_row(const T* row, int64_t classes) {
  using Value = ValueOf<T>;
  RowSums<Value> result;
  auto& [top, sums] = result;
  alignas(kVectorBytes) Value buffer[std::is_same_v<T, Value> ? 1 : kSegment];
  for (int64_t from = 0; from < classes && !top.nan; from += kSegment) {
    const int64_t size = std::min(classes - from, kSegment);
    const auto start = static_cast<int32_t>(from);
    const Value* segment = widened(row + from, size, buffer);
    Top2<Value> next = top2_values(segment, size);
    int64_t left_out = -1;
    if (!next.nan && top.before(next.first_value, start, top.second_value, top.second)) {
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

// Up to kLanes rows, given by where they start.
template <class T>
class SumsAcross {
  using Value = ValueOf<T>;
  using Vector = VectorOf<Value>;

 public:
  SumsAcross(const T* const* rows, int count, int64_t classes, int64_t column_stride) {
    Tile<Value> tile;
    for (int64_t from = 0; from < classes; from += kTransposedTile) {
      const int64_t columns = std::min(kTransposedTile, classes - from);
      const Vector before = top_.first;
      tile.read(rows, count, from, columns, column_stride);
      for (int64_t column = 0; column < columns; ++column) {
        top_.add(load(tile.values[column]), from + column);
      }
      if (from > 0) raise(before);
      add(tile, from, columns);
    }
  }

  RowSums<Value> operator[](int lane) const {
    return {top_[lane],
            {top_.first[lane], lanes_.plain[lane], lanes_.weighted[lane], lanes_.squares[lane]}};
  }

 private:
  // ExponentialSums::raise() in the lanes where the maximum was smaller before.
  void raise(Vector before) {
    const auto rises = top_.first > before;
    const Vector lowest = Vector{} + ExpConstants<Value>::kLowest;
    const Vector step = maximum(lowest, before - top_.first);
    const Vector scale = exp<Value>(before - top_.first);
    lanes_.squares = rises ? scale * (scale * (1 + lanes_.squares)) : lanes_.squares;
    lanes_.weighted =
        rises ? scale * (lanes_.weighted + step * (1 + lanes_.plain)) : lanes_.weighted;
    lanes_.plain = rises ? scale * (1 + lanes_.plain) : lanes_.plain;
  }

  void add(const Tile<Value>& tile, int64_t from, int64_t columns) {
    const Vector none = Vector{} - std::numeric_limits<Value>::infinity();
    const Vector base = top_.first == none ? Vector{} : top_.first;
    LaneSums<Value> lanes;  // summed apart, for the sake of rounding
    for (int64_t column = 0; column < columns; ++column) {
      const auto leads = top_.first_class == static_cast<int32_t>(from + column);
      lanes.add(leads ? none : load(tile.values[column]) - base);
    }
    lanes_.plain += lanes.plain;
    lanes_.weighted += lanes.weighted;
    lanes_.squares += lanes.squares;
  }

  RowPerLaneTop2<Value> top_;
  LaneSums<Value> lanes_;
};

// Calls use(row, RowSums) for each row.
template <class T, class Use>
void for_each_sums(const Tensor& logits, const Use& use) {
  const Matrix<T> view = matrix<T>(logits);
  const Rows rows(logits, std::nullopt);
  const int64_t classes = view.columns;
  parallel(rows.count, kGrain / (4 * classes), [&](int64_t begin, int64_t end) {
    if (is_along_classes(view, kLongSums<ValueOf<T>>)) {
      for (int64_t r = begin; r < end; ++r) use(r, sums_of_row(view.row(r), classes));
    } else {
      for_each_group(view, rows, begin, end, [&](int64_t r, int count, const T* const* starts) {
        const SumsAcross<T> sums(starts, count, classes, view.column_stride);
        for (int lane = 0; lane < count; ++lane) use(r + lane, sums[lane]);
      });
    }
  });
}

}  // namespace marginops::cpu
