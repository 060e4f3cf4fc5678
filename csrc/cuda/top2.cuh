// Reading a row of logits into its Top2, by any number of threads.
#pragma once

#include "common/margin.h"
#include "device.cuh"

namespace marginops::cuda {

// One row as its threads see it; `active` is false for threads beyond the last row, which go along
// because warps and blocks work together.
template <class Scalar>
struct Row {
  const Scalar* data;
  int64_t stride;
  int32_t classes;
  int64_t source;    // its row in logits
  int64_t position;  // its place in the result
  bool active;

  __device__ __forceinline__ Value<Scalar> operator[](int32_t index) const {
    return to_value(data[index * stride]);
  }
};

template <class Scalar>
struct Logits {
  const Scalar* data;
  int64_t row_stride;
  int64_t col_stride;
  int32_t classes;
  IndexVector rows;  // not checked: they come from our own selections

  __device__ __forceinline__ Row<Scalar> row(int64_t position) const {
    const bool active = position < rows.size;
    int64_t source = active ? position : 0;
    if (rows.data != nullptr && active) source = rows.data[position * rows.stride];
    return {data + source * row_stride, col_stride, classes, source, position, active};
  }
};

// Top2::add for classes that come in ascending order, where an equal value never goes before.
// Never adds -inf; see settle().
template <class Number>
__device__ __forceinline__ void add_ascending(Top2<Number>& top, Number value, int32_t index) {
  top.nan |= value != value;
  const bool is_first = value > top.first_value;
  const bool is_second = value > top.second_value;
  top.second_value = is_first ? top.first_value : is_second ? value : top.second_value;
  top.second = is_first ? top.first : is_second ? index : top.second;
  top.first_value = is_first ? value : top.first_value;
  top.first = is_first ? index : top.first;
}

template <class Scalar>
__device__ __forceinline__ void add_pack(Top2<Value<Scalar>>& top, const Pack<Scalar>& pack,
                                         int32_t index) {
  Value<Scalar> value[Pack<Scalar>::kSize];
  bool matters = false;  // most packs of a long row hold nothing new
#pragma unroll
  for (int i = 0; i < Pack<Scalar>::kSize; ++i) {
    value[i] = to_value(pack.scalar[i]);
    matters |= !(value[i] <= top.second_value);
  }
  if (!matters) return;
#pragma unroll
  for (int i = 0; i < Pack<Scalar>::kSize; ++i) add_ascending(top, value[i], index + i);
}

// Thread `lane` of `threads` reads its share of the classes [begin, end). Columns that lie side by
// side are read in 16-byte packs, four in flight, with single scalars before the first 16-byte
// boundary and after the last; neighbouring lanes read neighbouring packs.
template <class Scalar>
__device__ __forceinline__ Top2<Value<Scalar>> read_top2(const Row<Scalar>& row, unsigned begin,
                                                         unsigned end, unsigned lane,
                                                         unsigned threads) {
  constexpr unsigned kSize = Pack<Scalar>::kSize;
  Top2<Value<Scalar>> top;
  unsigned scalars = end;  // up to here one by one
  if (row.stride == 1) {
    const auto address = reinterpret_cast<uintptr_t>(row.data + begin);
    const unsigned head = static_cast<unsigned>(-address % 16 / sizeof(Scalar));
    scalars = head < end - begin ? begin + head : end;
  }
#pragma unroll 4
  for (unsigned c = begin + lane; c < scalars; c += threads)
    add_ascending(top, to_value(__ldg(row.data + c * row.stride)), c);
  if (scalars == end) return top;

  const unsigned packs = (end - scalars) / kSize;
  const Scalar* aligned = row.data + scalars;
  unsigned p = lane;
  for (; p + 3 * threads < packs; p += 4 * threads) {
    Pack<Scalar> pack[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) pack[i] = load_pack(aligned + (p + i * threads) * kSize);
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) add_pack(top, pack[i], scalars + (p + i * threads) * kSize);
  }
  for (; p < packs; p += threads)
    add_pack(top, load_pack(aligned + p * kSize), scalars + p * kSize);
  for (unsigned c = scalars + packs * kSize + lane; c < end; c += threads)
    add_ascending(top, to_value(__ldg(row.data + c)), c);
  return top;
}

// The Top2 of each group of `width` neighbouring lanes, on all of them. The whole warp takes part.
template <class Number>
__device__ __forceinline__ Top2<Number> merge_lanes(Top2<Number> top, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    Top2<Number> other;
    other.first_value = __shfl_xor_sync(kAllLanes, top.first_value, distance);
    other.second_value = __shfl_xor_sync(kAllLanes, top.second_value, distance);
    other.first = __shfl_xor_sync(kAllLanes, top.first, distance);
    other.second = __shfl_xor_sync(kAllLanes, top.second, distance);
    top.merge(other);
  }
  const unsigned votes = __ballot_sync(kAllLanes, top.nan);
  const unsigned group = kAllLanes >> (kWarp - width) << (threadIdx.x % kWarp & -width);
  top.nan = (votes & group) != 0;
  return top;
}

// Gives the classes that were never added their place: all of them are -inf (or NaN, and then the
// row's result is NaN anyway), so the lowest come next. Afterwards both classes are in range.
template <class Number>
__device__ __forceinline__ void settle(Top2<Number>& top) {
  if (top.first == Top2<Number>::kNone) top.first = 0;
  if (top.second == Top2<Number>::kNone) top.second = top.first == 0 ? 1 : 0;
}

}  // namespace marginops::cuda
