// The two largest logits of rows, reading each logit from memory once.
//
// Long rows with neighbouring columns are vectorised along the classes: a first pass keeps the two
// largest values per lane, a second one, over a segment that is still in cache, finds their
// classes. Short rows, and any other layout, are vectorised across rows, a row per lane.
#pragma once

#include <algorithm>

#include "../common/margin_math.h"
#include "simd.h"

namespace marginops::cpu {

constexpr int64_t kSegment = 2048;       // logits that are surely in cache for a second look
constexpr int64_t kLongRow = 48;         // classes from which a row fills vectors of its own
constexpr int64_t kTransposedTile = 64;  // classes copied at once for vectors across rows

// The two largest values of all lanes, the second counted with multiplicity.
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

// Sets the classes of the two largest values: the lowest that have them.
template <class T>
void find_classes(const T* row, int64_t classes, Top2<ValueOf<T>>& top) {
  using Value = ValueOf<T>;
  using Index = typename Simd<Value>::Index;
  constexpr int kLanes = Simd<Value>::kLanes;
  if (classes < kLanes) {
    top = Top2<Value>{};
    for (int64_t column = 0; column < classes; ++column) {
      top.add(value_of(row[column]), static_cast<int32_t>(column));
    }
    return;
  }
  const Index none = Index{} + Top2<Value>::kNone;
  Index first = none, second = none, index = lane_numbers<Value>();
  const auto look = [&](const VectorOf<Value>& value) {
    first = minimum(value == top.first_value ? index : none, first);
    second = minimum(value == top.second_value ? index : none, second);
  };
  int64_t column = 0;
  for (; column + kLanes <= classes; column += kLanes, index += kLanes) look(load(row + column));
  if (column < classes) {  // an entry that is seen again changes nothing
    index -= static_cast<int>(column + kLanes - classes);
    look(load(row + classes - kLanes));
  }
  for_each_fold<Value>([&](auto fold) {
    first = minimum(first, fold(first));
    second = minimum(second, fold(second));
  });
  top.first = static_cast<int32_t>(first[0]);
  top.second = static_cast<int32_t>(second[0]);
  if (top.first == top.second) {  // both values are equal, so the second is the next that has it
    do ++top.second;
    while (top.second < classes - 1 && value_of(row[top.second]) != top.second_value);
  }
}

// The two largest values only, without their classes.
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
  if (column < classes) {  // the last vector, without the lanes that have been seen
    const int fresh = static_cast<int>(classes - column);
    const auto seen = lane_numbers<Value>() < kLanes - fresh;
    const auto none = VectorOf<Value>{} - std::numeric_limits<Value>::infinity();
    odd.add(seen ? none : load(row + classes - kLanes));
  }
  even.merge(odd);
  return even.reduced();
}

// With kClasses, the second look is only at segments that have one of the two largest so far; the
// others keep no class, and merge() lets none of them win a tie.
template <class T, bool kClasses>
Top2<ValueOf<T>> top2_row(const T* row, int64_t classes) {
  Top2<ValueOf<T>> top;
  for (int64_t from = 0; from < classes; from += kSegment) {
    const int64_t size = std::min(classes - from, kSegment);
    const auto start = static_cast<int32_t>(from);
    Top2<ValueOf<T>> next = top2_values(row + from, size);
    if (kClasses && !next.nan &&
        top.before(next.first_value, start, top.second_value, top.second)) {
      find_classes(row + from, size, next);
      next.first += start;
      next.second += next.second == top.kNone ? 0 : start;
    }
    top.merge(next);
  }
  return top;
}

// Some classes of up to kLanes rows, a row per lane.
template <class Value>
struct Tile {
  alignas(kVectorBytes) Value values[kTransposedTile][Simd<Value>::kLanes] = {};

  // Copies the classes [from, from + columns) of rows that are given by where they start.
  template <class T>
  void read(const T* const* rows, int count, int64_t from, int64_t columns, int64_t column_stride) {
    for (int lane = 0; lane < count; ++lane) {
      const T* row = rows[lane] + from * column_stride;
      for (int64_t column = 0; column < columns; ++column) {
        values[column][lane] = value_of(row[column * column_stride]);
      }
    }
  }
};

// The two largest logits, and their classes, of the row in each lane.
template <class Value>
struct RowPerLaneTop2 {
  using Vector = VectorOf<Value>;
  using Index = typename Simd<Value>::Index;
  Vector first = Vector{} - std::numeric_limits<Value>::infinity();
  Vector second = first;
  Index first_class = Index{} + Top2<Value>::kNone, second_class = first_class;
  typename Simd<Value>::Bits magnitude{};

  // Classes come in ascending order, so only a larger value, or the first, takes a place.
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

// Up to kLanes rows at once, given by where they start.
template <class T>
RowPerLaneTop2<ValueOf<T>> top2_across(const T* const* rows, int count, int64_t classes,
                                       int64_t column_stride) {
  RowPerLaneTop2<ValueOf<T>> top;
  Tile<ValueOf<T>> tile;
  for (int64_t from = 0; from < classes; from += kTransposedTile) {
    const int64_t columns = std::min(kTransposedTile, classes - from);
    tile.read(rows, count, from, columns, column_stride);
    for (int64_t column = 0; column < columns; ++column) {
      top.add(load(tile.values[column]), from + column);
    }
  }
  return top;
}

}  // namespace marginops::cpu
