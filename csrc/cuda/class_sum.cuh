// Sums of rows by class, from sorted entries (class, row, coefficient).
#pragma once

#include "device.cuh"

namespace marginops::cuda {

constexpr int kSumEntries = 256;  // entries of a part, which is the work of a block
// Features of a block, at most. A multiprocessor must hold three blocks. Without this bound ptxas
// aims for more, and registers spill.
constexpr int kSumBlock = 256;

// The sorted entries. They are cut into parts, and the entries of a class within a part are a piece
// of the class. If the class has entries in other parts too, the sum of a piece goes to `pieces`
// [parts, 2, D]: to place 0 if the class began in an earlier part, otherwise to place 1.
template <class Number>
struct ClassSumEntries {
  const int64_t* key;
  const Number* coefficient;
  int64_t size;
  int64_t rows;
  int64_t classes;

  __device__ __forceinline__ int64_t class_at(int64_t entry) const {
    return entry < 0 || entry >= size ? -1 : __ldg(key + entry) / rows;
  }
  // Whether the class of the last entry of a part continues in the next part.
  __device__ __forceinline__ bool crosses(int64_t last) const {
    return last + 1 < size && class_at(last) == class_at(last + 1);
  }
};

// result[c] = sum of coefficient * row over the entries of class c, for classes within one part.
// Other classes leave their pieces, and classes without entries are not written. A block has one
// part and up to 256 features, and each thread has one of these. There are no atomics, so the order
// of summation is fixed.
template <class Scalar>
__global__ void __launch_bounds__(kSumBlock, 3)
    class_sum_kernel(ClassSumEntries<Value<Scalar>> entries, const Scalar* __restrict__ rows,
                     int64_t row_stride, int64_t col_stride, int64_t features,
                     Value<Scalar>* __restrict__ result, Value<Scalar>* __restrict__ pieces) {
  using Number = Value<Scalar>;
  constexpr int kBatch = 8;  // loads in flight
  __shared__ Number coefficient[kSumEntries];
  __shared__ int64_t label[kSumEntries];
  __shared__ const Scalar* source[kSumEntries];
  const int64_t tiles = (features - 1) / blockDim.x + 1;
  const int64_t parts = (entries.size - 1) / kSumEntries + 1;
  for (int64_t item = blockIdx.x; item < parts * tiles; item += gridDim.x) {
    const int64_t part = item / tiles, begin = part * kSumEntries;
    const int64_t feature = item % tiles * blockDim.x + threadIdx.x;
    const int count = static_cast<int>(min(entries.size - begin, int64_t{kSumEntries}));
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int64_t key = __ldg(entries.key + begin + i);
      const bool valid = key >= 0 && key / entries.rows < entries.classes;
      MARGINOPS_DEVICE_ASSERT(valid);
      label[i] = valid ? key / entries.rows : -1;
      source[i] = rows + (valid ? key % entries.rows * row_stride : 0);
      coefficient[i] = __ldg(entries.coefficient + begin + i);
    }
    const bool crosses_begin = entries.crosses(begin - 1);
    const bool crosses_end = entries.crosses(begin + count - 1);
    __syncthreads();
    if (feature < features) {
      const int64_t column = feature * col_stride;
      int piece = 0;  // first entry of the current piece
      Number sum = 0;
      const auto finish = [&](int end) {
        Number* destination = result + label[piece] * features;
        if (piece == 0 && crosses_begin)
          destination = pieces + 2 * part * features;
        else if (end == count && crosses_end)
          destination = pieces + (2 * part + 1) * features;
        if (label[piece] >= 0) destination[feature] = sum;
        piece = end;
        sum = 0;
      };
      for (int base = 0; base < count; base += kBatch) {
        Number value[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          value[i] = base + i < count ? to_value(__ldg(source[base + i] + column)) : Number{0};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (base + i >= count) break;
          if (label[base + i] != label[piece]) finish(base + i);
          sum += coefficient[base + i] * value[i];
        }
      }
      finish(count);
    }
    __syncthreads();
  }
}

// Adds the pieces of each class that begins in a part and continues in the next, in order.
template <class Number>
__global__ void __launch_bounds__(kSumBlock)
    class_join_kernel(ClassSumEntries<Number> entries, int64_t features,
                      const Number* __restrict__ pieces, Number* __restrict__ result) {
  const int64_t tiles = (features - 1) / blockDim.x + 1;
  const int64_t parts = (entries.size - 1) / kSumEntries + 1;
  for (int64_t item = blockIdx.x; item < parts * tiles; item += gridDim.x) {
    const int64_t begin = item / tiles * kSumEntries, last = begin + kSumEntries - 1;
    const int64_t feature = item % tiles * blockDim.x + threadIdx.x;
    if (feature >= features || !entries.crosses(last)) continue;
    const int64_t label = entries.class_at(last);
    if (label < 0 || label >= entries.classes) continue;
    if (entries.class_at(begin) == label && entries.crosses(begin - 1)) continue;
    const Number* piece = pieces + 2 * (item / tiles) * features + feature;
    Number sum = piece[features];
    const int64_t end = lower_bound(entries.key, entries.size, (label + 1) * entries.rows);
    const int64_t later = (end - 1) / kSumEntries - item / tiles;  // parts after this one
#pragma unroll 8
    for (int64_t i = 1; i <= later; ++i) sum += __ldg(piece + 2 * i * features);
    result[label * features + feature] = sum;
  }
}

}  // namespace marginops::cuda
