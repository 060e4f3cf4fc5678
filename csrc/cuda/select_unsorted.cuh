// Selection by many blocks: one launch a digit for the histograms, one to count the chosen of every
// warp's range, one to write them in the order of their index. Neighbouring lanes read neighbouring
// scores, four loads in flight. What a launch finds is read by the next, so no block waits.
#pragma once

#include "select.cuh"

namespace marginops::cuda {

// What the launches hand on. search[l] is the state before level l; every block of a launch finds
// it from the level before, and the first one writes it down for the next launch.
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

// Writes the chosen in the order of their index: a warp's place follows from the counts of the
// warps before it, a lane's from the votes of its warp.
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
      if ((below_votes | at_votes) == 0) continue;
      const unsigned earlier = (1u << lane) - 1;
      const int64_t at_rank = at + __popc(at_votes & earlier);
      if (is_below || (is_at && at_rank < search.wanted)) {
        const int64_t place = below + __popc(below_votes & earlier) + min(at_rank, search.wanted);
        keys[place] = static_cast<std::make_signed_t<Number>>(key[j] ^ kSign);
        indices[place] = i;
      }
      below += __popc(below_votes);
      at += __popc(at_votes);
    }
  }
}

}  // namespace marginops::cuda
