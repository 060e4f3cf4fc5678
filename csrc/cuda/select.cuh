// Selects the k smallest scores by radix select on the keys of common/order.h. From the top digit
// down, a histogram tells which digit the k-th smallest key has. The search ends when exactly k
// scores have keys up to some prefix, or when only equal keys are left, of which the lowest indices
// are chosen. The atomics count integers, and the result is ordered at the end, so results are
// deterministic.
#pragma once

#include "common/order.h"
#include "device.cuh"

namespace marginops::cuda {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSelectBlock = 1024;
constexpr int kSortedMost = 2048;           // largest k of one block
constexpr int64_t kOneBlockMost = 1 << 17;  // largest n of one block
constexpr int kStreamBlock = 256;           // for the kernels of many blocks

template <class Scalar>
using Key = typename SortKey<Value<Scalar>>::type;

// The number of digits of a key.
template <class Number>
constexpr int kKeyLevels = (8 * sizeof(Number) + kDigitBits - 1) / kDigitBits;

template <class Scalar>
struct ScoresView {
  const Scalar* data;
  int64_t stride;
  int64_t size;

  __device__ __forceinline__ Key<Scalar> key(int64_t index) const {
    return sort_key(to_value(__ldg(data + index * stride)));
  }

  // Calls visit(index, key) for the indices begin, begin + step, ... below end, with four loads in
  // flight.
  template <class Visit>
  __device__ __forceinline__ void for_each(int64_t begin, int64_t end, int64_t step,
                                           Visit visit) const {
    int64_t i = begin;
    for (; i + 3 * step < end; i += 4 * step) {
      Scalar scalar[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) scalar[j] = __ldg(data + (i + j * step) * stride);
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(i + j * step, sort_key(to_value(scalar[j])));
    }
    for (; i < end; i += step) visit(i, key(i));
  }
};

// The state of the search. It compares the bits from `shift` upwards of a number with `prefix`. All
// numbers below the prefix are chosen, and `wanted` more are chosen among those that are equal to
// it. Once `closed`, all of these are chosen.
template <class Number>
struct Search {
  Number prefix;
  int shift;
  int64_t wanted;
  bool closed;

  __device__ __forceinline__ static Search start(int bits, int64_t wanted) {
    return {0, bits, wanted, false};
  }
  __device__ __forceinline__ Number head(Number number) const {
    return shift == int{8 * sizeof(Number)} ? 0 : number >> shift;
  }
  __device__ __forceinline__ int next_shift() const {
    return shift > kDigitBits ? shift - kDigitBits : 0;
  }
  __device__ __forceinline__ unsigned digit(Number number) const {
    return static_cast<unsigned>(number >> next_shift()) & ((1u << (shift - next_shift())) - 1);
  }
  __device__ __forceinline__ bool ended() const { return closed || shift == 0; }
  // Appends a digit to the prefix. Of the numbers with the old prefix, `smaller` have a smaller
  // digit and `same` have this one.
  __device__ __forceinline__ Search descend(unsigned digit, int64_t smaller, int64_t same) const {
    const int next = next_shift();
    return {(prefix << (shift - next)) | digit, next, wanted - smaller, same == wanted - smaller};
  }
};

// The exclusive sum over the block of one count from each thread. All threads take part.
template <int kBlock>
__device__ __forceinline__ int64_t block_offset(int64_t count) {
  __shared__ int64_t warp_total[kBlock / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = count;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t lower = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += lower;
  }
  if (lane == kWarp - 1) warp_total[warp] = sum;
  __syncthreads();
  int64_t offset = sum - count;
  for (int i = 0; i < warp; ++i) offset += warp_total[i];
  __syncthreads();
  return offset;
}

// Finds the digit with which the search continues. The whole block takes part, and `next` lies in
// shared memory.
template <int kBlock, class Count, class Number>
__device__ __forceinline__ void find_digit(const Count* histogram, const Search<Number>& search,
                                           Search<Number>* next) {
  constexpr int kEach = kDigits / kBlock;
  Count count[kEach];
  int64_t total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    count[i] = histogram[threadIdx.x * kEach + i];
    total += count[i];
  }
  int64_t smaller = block_offset<kBlock>(total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t same = count[i];
    if (smaller < search.wanted && search.wanted <= smaller + same)
      *next = search.descend(threadIdx.x * kEach + i, smaller, same);
    smaller += same;
  }
  __syncthreads();
}

}  // namespace marginops::cuda
