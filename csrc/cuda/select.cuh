// The k smallest scores by radix select on the keys of common/order.h: from the top digit down, a
// histogram says which digit holds the k-th smallest key, until the scores up to some prefix of a
// key are exactly the k smallest, or only equal keys are left and the lowest indices decide. Counts
// are integers and the order of the result is settled in the end, so atomics do not show.
#pragma once

#include "common/order.h"
#include "device.cuh"

namespace marginops::cuda {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSelectBlock = 1024;
constexpr int kSortedMost = 2048;           // k of one block
constexpr int64_t kOneBlockMost = 1 << 17;  // n of one block
constexpr int kStreamBlock = 256;           // of the kernels of many blocks

template <class Scalar>
using Key = typename SortKey<Value<Scalar>>::type;

// How many digits the keys have.
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

  // Calls visit(index, key) for begin, begin + step, ..., below end, four loads in flight.
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

// Where the search stands: `wanted` more are to come from among the numbers that start with `prefix`
// above bit `shift`; all numbers below the prefix are chosen. Once `closed`, all that start with it
// are chosen too.
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
  // Of the open numbers, `before` have a smaller digit and `same` this one.
  __device__ __forceinline__ Search descend(unsigned digit, int64_t before, int64_t same) const {
    const int next = next_shift();
    return {(prefix << (shift - next)) | digit, next, wanted - before, same == wanted - before};
  }
};

// Exclusive sum over the block of one count a thread. All threads take part.
template <class Count, int kBlock>
__device__ __forceinline__ Count block_offset(Count count) {
  __shared__ Count warp_total[kBlock / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Count sum = count;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Count below = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == kWarp - 1) warp_total[warp] = sum;
  __syncthreads();
  Count offset = sum - count;
  for (int i = 0; i < warp; ++i) offset += warp_total[i];
  __syncthreads();
  return offset;
}

// Finds the digit in which the search goes on. The whole block takes part; `next` is shared.
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
  int64_t before = block_offset<int64_t, kBlock>(total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t same = count[i];
    if (before < search.wanted && search.wanted <= before + same)
      *next = search.descend(threadIdx.x * kEach + i, before, same);
    before += same;
  }
  __syncthreads();
}

// One step of the search by the whole block: number_at(index, key) is the number searched, with
// is_open() false where the key alone has decided.
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

// Sorts `size` (a power of two) entries by key and index. Up to distance 32 the two halves of all
// exchanges of a warp stay within it.
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

// Everything in one block: histograms in shared memory, the chosen are collected there in any order,
// sorted, and written. Scores are read once a digit, from the caches after the first time.
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
  // What is wanted of the scores with an equal key: those of the lowest indices.
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
    const bool chosen =
        head < search.prefix ||
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

// What the launches hand on. search[l] is the state before level l; every block of a launch finds it
// from the level before, and the first one writes it down for the next launch.
template <class Number>
struct SelectState {
  unsigned long long histogram[kKeyLevels<Number>][kDigits];
  Search<Number> search[kKeyLevels<Number> + 1];
};

template <class Number>
__global__ void __launch_bounds__(kStreamBlock)
    select_clear_kernel(SelectState<Number>* state, int64_t k) {
  unsigned long long* histogram = state->histogram[0];
  for (int i = blockIdx.x * kStreamBlock + threadIdx.x; i < kKeyLevels<Number> * kDigits;
       i += gridDim.x * kStreamBlock)
    histogram[i] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    state->search[0] = Search<Number>::start(8 * sizeof(Number), k);
}

template <class Number>
__device__ __forceinline__ Search<Number> reach_level(SelectState<Number>* state, int level) {
  __shared__ Search<Number> next;
  if (level == 0) return state->search[0];
  const Search<Number> search = state->search[level - 1];
  if (search.ended()) {
    if (threadIdx.x == 0) next = search;
    __syncthreads();
  } else {
    find_digit<kStreamBlock>(state->histogram[level - 1], search, &next);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) state->search[level] = next;
  return next;
}

template <class Scalar>
__global__ void __launch_bounds__(kStreamBlock)
    select_histogram_kernel(ScoresView<Scalar> scores, int level,
                            SelectState<Key<Scalar>>* state) {
  __shared__ unsigned histogram[kDigits];
  const Search<Key<Scalar>> search = reach_level(state, level);
  if (search.ended()) return;
  for (int i = threadIdx.x; i < kDigits; i += kStreamBlock) histogram[i] = 0;
  __syncthreads();
  scores.for_each(int64_t{blockIdx.x} * kStreamBlock + threadIdx.x, scores.size,
                  int64_t{gridDim.x} * kStreamBlock, [&](int64_t, Key<Scalar> key) {
                    if (search.head(key) == search.prefix)
                      atomicAdd(histogram + search.digit(key), 1u);
                  });
  __syncthreads();
  for (int i = threadIdx.x; i < kDigits; i += kStreamBlock)
    if (histogram[i] != 0)
      atomicAdd(state->histogram[level] + i, static_cast<unsigned long long>(histogram[i]));
}

// Each warp has a range of the scores, the same in both kernels below.
struct WarpRange {
  int64_t warp, begin, end;

  __device__ __forceinline__ explicit WarpRange(int64_t size) {
    constexpr int kWarps = kStreamBlock / kWarp;
    const int64_t share = ((size - 1) / (int64_t{gridDim.x} * kWarps * kWarp) + 1) * kWarp;
    warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    begin = min(warp * share, size);
    end = min(begin + share, size);
  }
};

// counts[warp]: how many scores of its range are below the threshold, and how many at it.
struct WarpCount {
  int64_t below, at;
};

template <class Scalar>
__global__ void __launch_bounds__(kStreamBlock)
    select_count_kernel(ScoresView<Scalar> scores, SelectState<Key<Scalar>>* state,
                        WarpCount* counts) {
  const Search<Key<Scalar>> search = reach_level(state, kKeyLevels<Key<Scalar>>);
  const WarpRange range(scores.size);
  int64_t below = 0, at = 0;
  scores.for_each(range.begin + threadIdx.x % kWarp, range.end, kWarp,
                  [&](int64_t, Key<Scalar> key) {
                    const Key<Scalar> head = search.head(key);
                    below += head < search.prefix;
                    at += head == search.prefix;
                  });
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    below += __shfl_xor_sync(kAllLanes, below, distance);
    at += __shfl_xor_sync(kAllLanes, at, distance);
  }
  if (threadIdx.x % kWarp == 0) counts[range.warp] = {below, at};
}

// Writes the chosen in the order of their index: a warp's place follows from the counts of the warps
// before it, a lane's from the votes of its warp.
template <class Scalar>
__global__ void __launch_bounds__(kStreamBlock)
    select_write_kernel(ScoresView<Scalar> scores, const SelectState<Key<Scalar>>* state,
                        const WarpCount* counts, std::make_signed_t<Key<Scalar>>* keys,
                        int64_t* indices) {
  using Number = Key<Scalar>;
  constexpr int kWarps = kStreamBlock / kWarp;
  constexpr Number kSign = Number{1} << (8 * sizeof(Number) - 1);
  __shared__ int64_t below_before[kWarps], at_before[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t below = 0, at = 0;
  for (int64_t i = threadIdx.x; i < int64_t{blockIdx.x} * kWarps; i += kStreamBlock) {
    below += counts[i].below;
    at += counts[i].at;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    below += __shfl_xor_sync(kAllLanes, below, distance);
    at += __shfl_xor_sync(kAllLanes, at, distance);
  }
  if (lane == 0) {
    below_before[warp] = below;
    at_before[warp] = at;
  }
  __syncthreads();
  const WarpRange range(scores.size);
  below = at = 0;
  for (int i = 0; i < kWarps; ++i) {
    below += below_before[i];
    at += at_before[i];
  }
  for (int i = 1; i <= warp; ++i) {
    below += counts[range.warp - i].below;
    at += counts[range.warp - i].at;
  }

  const Search<Number> search = state->search[kKeyLevels<Number>];
  const WarpCount own = counts[range.warp];
  if (own.below == 0 && (own.at == 0 || at >= search.wanted)) return;
  constexpr int kBatch = 4;  // loads in flight
  for (int64_t base = range.begin; base < range.end; base += kBatch * kWarp) {
    Number key[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = base + j * kWarp + lane;
      key[j] = i < range.end ? scores.key(i) : 0;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = base + j * kWarp + lane;
      const Number head = search.head(key[j]);
      const bool is_below = i < range.end && head < search.prefix;
      const bool is_at = i < range.end && head == search.prefix;
      const unsigned below_votes = __ballot_sync(kAllLanes, is_below);
      const unsigned at_votes = __ballot_sync(kAllLanes, is_at);
      const unsigned earlier = (1u << lane) - 1;
      const int64_t at_rank = at + __popc(at_votes & earlier);
      if (is_below || (is_at && at_rank < search.wanted)) {
        const int64_t place =
            below + __popc(below_votes & earlier) + min(at_rank, search.wanted);
        keys[place] = static_cast<std::make_signed_t<Number>>(key[j] ^ kSign);
        indices[place] = i;
      }
      below += __popc(below_votes);
      at += __popc(at_votes);
    }
  }
}

}  // namespace marginops::cuda
