// The gradient of the distances between rows of weight, from sorted entries (class, partner,
// coefficient).
#pragma once

#include "distance.cuh"

namespace marginops::cuda {

// A multiprocessor must hold three blocks. Without this bound ptxas aims for more, and registers
// spill.
constexpr int kPairBlock = 256;

// grad[c] = sum over the entries of class c of coefficient * (w_c - w_partner), with the bias as
// the last coordinate. A block has one class and 256 coordinates, and each thread has one of these.
// The block takes the entries of its class in chunks of 256. Each warp sums its entries of equal
// partner by a segmented scan, and then every thread adds up these pieces. There are no atomics, so
// the order of summation is fixed.
template <class Weight>
__global__ void __launch_bounds__(kPairBlock, 3)
    pair_gradient_kernel(const int64_t* __restrict__ key,
                         const Value<Weight>* __restrict__ coefficient, int64_t size,
                         HeadView<Weight> head, int64_t classes, Weight* grad_weight,
                         Weight* grad_bias) {
  using Number = Value<Weight>;
  constexpr int kWarps = kPairBlock / kWarp;
  __shared__ Number piece_sum[kPairBlock];
  __shared__ int64_t piece_partner[kPairBlock];
  __shared__ int pieces_of[kWarps];
  __shared__ int64_t segment[2];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t tiles = head.features / kPairBlock + 1;  // of D + 1 coordinates
  for (int64_t item = blockIdx.x; item < classes * tiles; item += gridDim.x) {
    const int64_t index = item / tiles, feature = item % tiles * kPairBlock + thread;
    const bool active = feature <= head.features;
    if (thread < 2) segment[thread] = lower_bound(key, size, (index + thread) * classes);
    __syncthreads();
    const int64_t begin = segment[0], end = segment[1];
    const Number own_coordinate = active ? head.at(index, feature) : 0;
    Number sum = 0;
    int64_t entry = begin + thread, next_key = 0;
    Number next_coefficient = 0;
    const auto load_next = [&] {
      next_key = entry < end ? __ldg(key + entry) : 0;
      next_coefficient = entry < end ? __ldg(coefficient + entry) : 0;
    };
    load_next();
    for (int64_t base = begin; base < end; base += kPairBlock) {
      const bool valid = entry < end;
      const int64_t partner = valid ? next_key - index * classes : -1;
      MARGINOPS_DEVICE_ASSERT(partner >= -1 && partner < classes);  // keys are sorted
      Number run = next_coefficient;
      const int64_t previous = __shfl_up_sync(kAllLanes, partner, 1);
      const unsigned heads = __ballot_sync(kAllLanes, lane == 0 || previous != partner);
      const int head_lane = 31 - __clz(static_cast<int>(heads & (kAllLanes >> (31 - lane))));
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const Number earlier = __shfl_up_sync(kAllLanes, run, distance);
        if (lane - distance >= head_lane) run += earlier;
      }
      const bool is_last = lane == kWarp - 1 || (heads >> (lane + 1) & 1) != 0;
      const unsigned lasts = __ballot_sync(kAllLanes, valid && is_last);
      if (lane == 0) pieces_of[warp] = __popc(lasts);
      __syncthreads();
      int pieces = 0, offset = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        if (i == warp) offset = pieces;
        pieces += pieces_of[i];
      }
      if (valid && is_last) {
        offset += __popc(lasts & ((1u << lane) - 1));
        piece_sum[offset] = run;
        piece_partner[offset] = partner;
      }
      entry += kPairBlock;
      load_next();  // under way while the pieces are added
      __syncthreads();
      if (active) {
#pragma unroll 4
        for (int i = 0; i < pieces; ++i)
          sum += piece_sum[i] * (own_coordinate - head.at(piece_partner[i], feature));
      }
      __syncthreads();
    }
    if (feature < head.features)
      from_value(sum, grad_weight + index * head.features + feature);
    else if (active)
      from_value(sum, grad_bias + index);
    __syncthreads();
  }
}

}  // namespace marginops::cuda
