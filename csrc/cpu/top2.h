// Finds the two largest logits of each row and reads each logit from memory once.
//
// Long rows whose columns are neighbours in memory are vectorised along the classes: a first pass
// keeps the two largest values of each lane, and a second pass over the segment, which is still in
// cache, finds their classes. Short rows and other layouts are vectorised across rows: each lane
// has a row.
#pragma once

#include <algorithm>

#include "../common/margin_math.h"
#include "simd.h"

namespace marginops::cpu {

constexpr int64_t kSegment = 2048;       // logits that stay in cache for a second pass
constexpr int64_t kLongRow = 48;         // rows with more classes are vectorised along them
constexpr int64_t kTransposedTile = 64;  // classes that a Tile holds

// The two largest values of each lane. A value that occurs twice counts twice.
template <class Value>
struct LaneTop2 {
  using Vector = VectorOf<Value>;
  Vector first = Vector{} - std::numeric_limits<Value>::infinity();
  Vector second = first;
  typename Simd<Value>::Bits magnitude{};

  void add(Vector value) {
    second = maximum(minimum(first, value), second);
    first = maximum(value, first);
    magnitude = maximum(magnitude_bits<Value>(value), magnitude);
  }
  void merge(const LaneTop2& other) {
    second = maximum(minimum(first, other.first), maximum(second, other.second));
    first = maximum(first, other.first);
    magnitude = maximum(magnitude, other.magnitude);
  }
  Top2<Value> reduced() const {
    LaneTop2 all = *this;
    for_each_fold<Value>([&](auto fold) {
      const Vector other_first = fold(all.first);
      const Vector other_second = fold(all.second);
      all.second = maximum(minimum(all.first, other_first), maximum(all.second, other_second));
      all.first = maximum(all.first, other_first);
      all.magnitude = maximum(all.magnitude, fold(all.magnitude));
    });
    Top2<Value> top;
    top.first_value = all.first[0];
    top.second_value = all.second[0];
    top.nan = all.magnitude[0] > Simd<Value>::kInfinity;
    return top;
  }
};

// Finds the classes of the two largest values, which `top` holds already. Among equal logits the
// lower class comes first.
template <class T>
void find_classes(const T* row, int64_t classes, Top2<ValueOf<T>>& top) {
  using Value = ValueOf<T>;
  using Index = typename Simd<Value>::Index;
  constexpr int kLanes = Simd<Value>::kLanes, kBlock = 4 * kLanes;
  if (classes < kLanes) {
    top = Top2<Value>{};
    for (int64_t column = 0; column < classes; ++column) {
      top.add(value_of(row[column]), static_cast<int32_t>(column));
    }
    return;
  }
  const Index none = Index{} + Top2<Value>::kNone;
  Index first = none, second = none;
  const auto match = [&](int64_t column) {
    const VectorOf<Value> value = load(row + column);
    const Index index = lane_numbers<Value>() + static_cast<int32_t>(column);
    first = minimum(value == top.first_value ? index : none, first);
    second = minimum(value == top.second_value ? index : none, second);
  };
  int64_t column = 0;
  for (; column + kBlock <= classes; column += kBlock) {  // few blocks hold one of the two values
    VectorOf<Value> largest = load(row + column);
    for (int i = kLanes; i < kBlock; i += kLanes) {
      largest = maximum(load(row + column + i), largest);
    }
    if (lane_bits<Value>(largest >= top.second_value) == 0) continue;
    for (int i = 0; i < kBlock; i += kLanes) match(column + i);
  }
  for (; column + kLanes <= classes; column += kLanes) match(column);
  // The last vector overlaps: a logit seen twice changes nothing.
  if (column < classes) match(classes - kLanes);
  for_each_fold<Value>([&](auto fold) {
    first = minimum(first, fold(first));
    second = minimum(second, fold(second));
  });
  top.first = static_cast<int32_t>(first[0]);
  top.second = static_cast<int32_t>(second[0]);
  if (top.first == top.second) {  // the values are equal: the second class is the next that has it
    do ++top.second;
    while (top.second < classes - 1 && value_of(row[top.second]) != top.second_value);
  }
}

// The two largest values, without their classes.
template <class T>
Top2<ValueOf<T>> top2_values(const T* row, int64_t classes) {
  using Value = ValueOf<T>;
  constexpr int kLanes = Simd<Value>::kLanes;
  if (classes < kLanes) {
    Top2<Value> top;
    for (int64_t column = 0; column < classes; ++column) top.add(value_of(row[column]), top.kNone);
    return top;
  }
  LaneTop2<Value> even, odd;
  int64_t column = 0;
  for (; column + 2 * kLanes <= classes; column += 2 * kLanes) {
    even.add(load(row + column));
    odd.add(load(row + column + kLanes));
  }
  if (column + kLanes <= classes) {
    even.add(load(row + column));
    column += kLanes;
  }
  if (column < classes) {  // the last vector overlaps: the lanes seen before count as -inf
    const int fresh = static_cast<int>(classes - column);
    const auto seen = lane_numbers<Value>() < kLanes - fresh;
    const auto none = VectorOf<Value>{} - std::numeric_limits<Value>::infinity();
    odd.add(seen ? none : load(row + classes - kLanes));
  }
  even.merge(odd);
  return even.reduced();
}

// The two largest logits of a row and, with kClasses, their classes. The classes are searched only
// in segments that may have one of the two largest so far. The logits of other segments keep kNone
// as their class, and merge() lets none of them win a tie.
template <class T, bool kClasses>
Top2<ValueOf<T>> top2_row(const T* row, int64_t classes) {
  Top2<ValueOf<T>> top;
  for (int64_t begin = 0; begin < classes; begin += kSegment) {
    const int64_t size = std::min(classes - begin, kSegment);
    const auto start = static_cast<int32_t>(begin);
    Top2<ValueOf<T>> next = top2_values(row + begin, size);
    if (kClasses && !next.nan &&
        top.precedes(next.first_value, start, top.second_value, top.second)) {
      find_classes(row + begin, size, next);
      next.first += start;
      next.second += next.second == top.kNone ? 0 : start;
    }
    top.merge(next);
  }
  return top;
}

// Up to kTransposedTile classes of up to kLanes rows. Each lane has a row.
template <class Value>
struct Tile {
  alignas(kVectorBytes) Value values[kTransposedTile][Simd<Value>::kLanes] = {};

  // Copies the classes [begin, begin + columns). `rows` holds the addresses of the rows.
  template <class T>
  void read(const T* const* rows, int count, int64_t begin, int64_t columns,
            int64_t column_stride) {
    for (int lane = 0; lane < count; ++lane) {
      const T* row = rows[lane] + begin * column_stride;
      for (int64_t column = 0; column < columns; ++column) {
        values[column][lane] = value_of(row[column * column_stride]);
      }
    }
  }
};

// The two largest logits of the row in each lane, and their classes.
template <class Value>
struct RowPerLaneTop2 {
  using Vector = VectorOf<Value>;
  using Index = typename Simd<Value>::Index;
  Vector first = Vector{} - std::numeric_limits<Value>::infinity();
  Vector second = first;
  Index first_class = Index{} + Top2<Value>::kNone, second_class = first_class;
  typename Simd<Value>::Bits magnitude{};

  // Classes come in ascending order, so a logit takes a place only if it is larger or if the place
  // is empty.
  void add(Vector value, int64_t column) {
    const Index index = Index{} + static_cast<int32_t>(column);
    magnitude = maximum(magnitude_bits<Value>(value), magnitude);
    const auto leads = (value > first) | (first_class == Top2<Value>::kNone);
    const auto follows = (value > second) | (second_class == Top2<Value>::kNone);
    second_class = leads ? first_class : follows ? index : second_class;
    second = leads ? first : follows ? value : second;
    first_class = leads ? index : first_class;
    first = leads ? value : first;
  }
  Top2<Value> operator[](int lane) const {
    Top2<Value> top;
    top.first_value = first[lane];
    top.second_value = second[lane];
    top.first = static_cast<int32_t>(first_class[lane]);
    top.second = static_cast<int32_t>(second_class[lane]);
    top.nan = magnitude[lane] > Simd<Value>::kInfinity;
    return top;
  }
};

// The two largest logits of up to kLanes rows. `rows` holds the addresses of the rows.
template <class T>
RowPerLaneTop2<ValueOf<T>> top2_row_per_lane(const T* const* rows, int count, int64_t classes,
                                             int64_t column_stride) {
  RowPerLaneTop2<ValueOf<T>> top;
  Tile<ValueOf<T>> tile;
  for (int64_t begin = 0; begin < classes; begin += kTransposedTile) {
    const int64_t columns = std::min(kTransposedTile, classes - begin);
    tile.read(rows, count, begin, columns, column_stride);
    for (int64_t column = 0; column < columns; ++column) {
      top.add(load(tile.values[column]), begin + column);
    }
  }
  return top;
}

}  // namespace marginops::cpu
