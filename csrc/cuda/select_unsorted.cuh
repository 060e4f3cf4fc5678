// Selection by many blocks. One launch for each digit computes a histogram, one launch counts the
// chosen scores in the range of every warp, and one writes them in the order of their indices.
// Neighbouring lanes read neighbouring scores, with four loads in flight. A launch reads what the
// previous one found, so no block waits.
#pragma once

#include "select.cuh"

namespace marginops::cuda {

// What the launches pass on. search[l] is the state before level l. Every block of a launch
// computes it from the previous level, and the first block writes it for the next launch.
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
    select_histogram_kernel(ScoresView<Scalar> scores, int level, SelectState<Key<Scalar>>* state) {
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

// The range of scores that a warp has, the same in both kernels below.
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

// How many scores in the range of a warp are below the threshold, and how many are equal to it.
struct WarpCount {
  int64_t smaller, equal;
};

template <class Scalar>
__global__ void __launch_bounds__(kStreamBlock)
    select_count_kernel(ScoresView<Scalar> scores, SelectState<Key<Scalar>>* state,
                        WarpCount* counts) {
  const Search<Key<Scalar>> search = reach_level(state, kKeyLevels<Key<Scalar>>);
  const WarpRange range(scores.size);
  int64_t smaller = 0, equal = 0;
  scores.for_each(range.begin + threadIdx.x % kWarp, range.end, kWarp,
                  [&](int64_t, Key<Scalar> key) {
                    const Key<Scalar> head = search.head(key);
                    smaller += head < search.prefix;
                    equal += head == search.prefix;
                  });
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    smaller += __shfl_xor_sync(kAllLanes, smaller, distance);
    equal += __shfl_xor_sync(kAllLanes, equal, distance);
  }
  if (threadIdx.x % kWarp == 0) counts[range.warp] = {smaller, equal};
}

// Writes the chosen scores in the order of their indices. A warp finds its place from the counts of
// the warps before it, and a lane from the votes of its warp.
template <class Scalar>
__global__ void __launch_bounds__(kStreamBlock)
    select_write_kernel(ScoresView<Scalar> scores, const SelectState<Key<Scalar>>* state,
                        const WarpCount* counts, std::make_signed_t<Key<Scalar>>* keys,
                        int64_t* indices) {
  using Number = Key<Scalar>;
  constexpr int kWarps = kStreamBlock / kWarp;
  constexpr Number kSign = Number{1} << (8 * sizeof(Number) - 1);
  __shared__ int64_t smaller_before[kWarps], equal_before[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t smaller = 0, equal = 0;
  for (int64_t i = threadIdx.x; i < int64_t{blockIdx.x} * kWarps; i += kStreamBlock) {
    smaller += counts[i].smaller;
    equal += counts[i].equal;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    smaller += __shfl_xor_sync(kAllLanes, smaller, distance);
    equal += __shfl_xor_sync(kAllLanes, equal, distance);
  }
  if (lane == 0) {
    smaller_before[warp] = smaller;
    equal_before[warp] = equal;
  }
  __syncthreads();
  const WarpRange range(scores.size);
  smaller = equal = 0;
  for (int i = 0; i < kWarps; ++i) {
    smaller += smaller_before[i];
    equal += equal_before[i];
  }
  for (int i = 1; i <= warp; ++i) {
    smaller += counts[range.warp - i].smaller;
    equal += counts[range.warp - i].equal;
  }

  const Search<Number> search = state->search[kKeyLevels<Number>];
  const WarpCount warp_count = counts[range.warp];
  if (warp_count.smaller == 0 && (warp_count.equal == 0 || equal >= search.wanted)) return;
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
      const bool is_smaller = i < range.end && head < search.prefix;
      const bool is_equal = i < range.end && head == search.prefix;
      const unsigned smaller_votes = __ballot_sync(kAllLanes, is_smaller);
      const unsigned equal_votes = __ballot_sync(kAllLanes, is_equal);
      if ((smaller_votes | equal_votes) == 0) continue;
      const unsigned earlier = (1u << lane) - 1;
      const int64_t equal_rank = equal + __popc(equal_votes & earlier);
      if (is_smaller || (is_equal && equal_rank < search.wanted)) {
        const int64_t place =
            smaller + __popc(smaller_votes & earlier) + min(equal_rank, search.wanted);
        keys[place] = static_cast<std::make_signed_t<Number>>(key[j] ^ kSign);
        indices[place] = i;
      }
      smaller += __popc(smaller_votes);
      equal += __popc(equal_votes);
    }
  }
}

}  // namespace marginops::cuda
