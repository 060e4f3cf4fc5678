// Selection in one block. Its histograms lie in shared memory. The chosen scores are collected
// there in any order, sorted by key and index, and written. Each digit needs a reading of all
// scores, which come from the caches after the first time. Neighbouring threads read neighbouring
// scores.
#pragma once

#include "select.cuh"

namespace marginops::cuda {

// One step of the search, by the whole block. number_at(index, key) is the number whose digits are
// counted. is_open(key) is false where the key alone has decided.
template <class Scalar, class Number, class IsOpen, class NumberAt>
__device__ __forceinline__ Search<Number> narrow(const ScoresView<Scalar>& scores,
                                                 const Search<Number>& search, unsigned* histogram,
                                                 IsOpen is_open, NumberAt number_at) {
  __shared__ Search<Number> next;
  for (int i = threadIdx.x; i < kDigits; i += kSelectBlock) histogram[i] = 0;
  __syncthreads();
  scores.for_each(threadIdx.x, scores.size, kSelectBlock, [&](int64_t i, Key<Scalar> key) {
    const Number number = number_at(i, key);
    if (is_open(key) && search.head(number) == search.prefix)
      atomicAdd(histogram + search.digit(number), 1u);
  });
  __syncthreads();
  find_digit<kSelectBlock>(histogram, search, &next);
  const Search<Number> result = next;
  __syncthreads();
  return result;
}

// Sorts `size` entries by key and index; `size` is a power of two. Up to distance 32, each warp
// exchanges entries that no other warp touches, and a barrier of the warp is enough.
template <class Number>
__device__ __forceinline__ void bitonic_sort(Number* key, int* index, int size) {
  for (int length = 2; length <= size; length *= 2) {
    for (int distance = length / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kSelectBlock) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const bool ascending = (low & length) == 0;
        const Number low_key = key[low], high_key = key[high];
        const int low_index = index[low], high_index = index[high];
        const bool after = low_key > high_key || (low_key == high_key && low_index > high_index);
        if (after == ascending) {
          key[low] = high_key;
          key[high] = low_key;
          index[low] = high_index;
          index[high] = low_index;
        }
      }
      if (distance > kWarp || (distance == 1 && length > kWarp))
        __syncthreads();
      else
        __syncwarp();
    }
  }
  __syncthreads();
}

template <class Scalar>
__global__ void __launch_bounds__(kSelectBlock)
    select_sorted_kernel(ScoresView<Scalar> scores, int k, Scalar* values, int64_t* indices) {
  using Number = Key<Scalar>;
  __shared__ Number key[kSortedMost];
  __shared__ int index[kSortedMost];
  __shared__ unsigned histogram[kDigits];
  __shared__ int count;

  auto search = Search<Number>::start(8 * sizeof(Number), k);
  while (!search.ended())
    search = narrow(
        scores, search, histogram, [](Number) { return true; },
        [](int64_t, Number key) { return key; });
  // Of the scores with an equal key, those with the lowest indices are chosen.
  auto ties = Search<unsigned>::start(32 - __clz(static_cast<int>(scores.size)), search.wanted);
  while (!search.closed && !ties.ended())
    ties = narrow(
        scores, ties, histogram, [&](Number key) { return key == search.prefix; },
        [](int64_t i, Number) { return static_cast<unsigned>(i); });

  int sorted = 2;
  while (sorted < k) sorted *= 2;
  if (threadIdx.x == 0) count = 0;
  for (int i = threadIdx.x; i < sorted; i += kSelectBlock) {
    key[i] = ~Number{0};
    index[i] = 0x7fffffff;
  }
  __syncthreads();
  scores.for_each(threadIdx.x, scores.size, kSelectBlock, [&](int64_t i, Number number) {
    const Number head = search.head(number);
    const bool chosen = head < search.prefix ||
                        (head == search.prefix &&
                         (search.closed || ties.head(static_cast<unsigned>(i)) <= ties.prefix));
    if (chosen) {
      const int place = atomicAdd(&count, 1);
      key[place] = number;
      index[place] = static_cast<int>(i);
    }
  });
  __syncthreads();
  bitonic_sort(key, index, sorted);
  for (int i = threadIdx.x; i < k; i += kSelectBlock) {
    values[i] = scores.data[index[i] * scores.stride];
    indices[i] = index[i];
  }
}

}  // namespace marginops::cuda
