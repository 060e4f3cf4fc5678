// Distances between rows of the last layer's weight. One warp computes a distance. Neighbouring
// lanes read neighbouring features, in 16-byte packs where rows are aligned. The order of summation
// depends only on the shape and the alignment of the rows, so a distance is the same wherever it is
// computed.
#pragma once

#include "common/margin_math.h"
#include "device.cuh"

namespace marginops::cuda {

// The larger number, or NaN if either is NaN.
template <class Number>
__device__ __forceinline__ Number larger(Number a, Number b) {
  return b > a || b != b ? b : a;
}

// A row of the weight as a point. The bias is its last coordinate, which is 0 where the norm leaves
// the bias out.
template <class Scalar>
struct Point {
  const Scalar* data;
  int64_t stride;
  Value<Scalar> bias;
};

template <class Weight>
struct HeadView {
  const Weight* weight;
  int64_t row_stride;
  int64_t col_stride;
  int64_t features;
  const Weight* bias;
  int64_t bias_stride;
  bool aligned;  // every row starts at a 16-byte boundary and is dense

  __device__ __forceinline__ Value<Weight> at(int64_t index, int64_t feature) const {
    if (feature < features) return to_value(weight[index * row_stride + feature * col_stride]);
    return bias == nullptr ? 0 : to_value(bias[index * bias_stride]);
  }
  __device__ __forceinline__ Point<Weight> point(int64_t index) const {
    return {weight + index * row_stride, col_stride, at(index, features)};
  }
};

// The distance where the plain sum of squares over- or underflows: the differences are divided by
// the largest one. This is rare, so the code is short rather than fast.
template <class A, class B>
__device__ __forceinline__ Value<A> scaled_distance(Point<A> a, Point<B> b, int64_t features) {
  using Number = Value<A>;
  const int lane = threadIdx.x % kWarp;
  const auto difference = [&](int64_t d) {
    if (d == features) return a.bias - b.bias;
    return to_value(a.data[d * a.stride]) - to_value(b.data[d * b.stride]);
  };
  Number largest = 0;
  for (int64_t d = lane; d <= features; d += kWarp) {
    const Number step = difference(d);
    largest = larger(largest, step < 0 ? -step : step);
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  if (largest == 0 || !(largest <= std::numeric_limits<Number>::max())) return largest;
  Number sum = 0;
  for (int64_t d = lane; d <= features; d += kWarp) {
    const Number step = difference(d) / largest;
    sum += step * step;
  }
  return largest * sqrt(warp_sum(sum));
}

// ||a - b|| on all lanes of the warp.
template <class A, class B>
__device__ __forceinline__ Value<A> warp_distance(Point<A> a, Point<B> b, int64_t features,
                                                  bool aligned) {
  using Number = Value<A>;
  const int lane = threadIdx.x % kWarp;
  Number sum = 0;
  int64_t done = 0;
  if constexpr (std::is_same_v<A, B>) {
    constexpr int kSize = Pack<A>::kSize;
    if (aligned) {
      done = features / kSize * kSize;
#pragma unroll 2
      for (int64_t d = lane * kSize; d < done; d += kWarp * kSize) {
        const Pack<A> one = load_pack(a.data + d), other = load_pack(b.data + d);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const Number step = to_value(one.scalar[i]) - to_value(other.scalar[i]);
          sum += step * step;
        }
      }
    }
  }
#pragma unroll 2
  for (int64_t d = done + lane; d < features; d += kWarp) {
    const Number step = to_value(a.data[d * a.stride]) - to_value(b.data[d * b.stride]);
    sum += step * step;
  }
  if (lane == 0) sum += (a.bias - b.bias) * (a.bias - b.bias);
  sum = warp_sum(sum);
  return is_safe_square(sum) ? sqrt(sum) : scaled_distance(a, b, features);
}

// distance[k] = ||w_i - w_j|| of pair k. A warp has one pair.
template <class Weight>
__global__ void __launch_bounds__(256, 3)
    pair_distance_kernel(HeadView<Weight> head, int64_t classes, IndexMatrix pair,
                         Value<Weight>* distance) {
  const int warps = blockDim.x / kWarp;
  for (int64_t k = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp; k < pair.rows;
       k += int64_t{gridDim.x} * warps) {
    const int64_t i = __ldg(pair.data + k * pair.row_stride);
    const int64_t j = __ldg(pair.data + k * pair.row_stride + pair.col_stride);
    const bool valid = i >= 0 && i < classes && j >= 0 && j < classes;
    MARGINOPS_DEVICE_ASSERT(valid);
    Value<Weight> result = std::numeric_limits<Value<Weight>>::quiet_NaN();
    if (valid) result = warp_distance(head.point(i), head.point(j), head.features, head.aligned);
    if (threadIdx.x % kWarp == 0) distance[k] = result;
  }
}

// table[i * classes + j] = ||w_i - w_j|| for i != j. A warp has one pair.
template <class Weight>
__global__ void __launch_bounds__(256, 3)
    distance_table_kernel(HeadView<Weight> head, int32_t classes, Value<Weight>* table) {
  const int warps = blockDim.x / kWarp;
  for (int item = blockIdx.x * warps + threadIdx.x / kWarp; item < classes * classes;
       item += gridDim.x * warps) {
    const int i = item / classes, j = item % classes;
    if (i >= j) continue;
    const Value<Weight> distance =
        warp_distance(head.point(i), head.point(j), head.features, head.aligned);
    if (threadIdx.x % kWarp == 0) table[item] = table[j * classes + i] = distance;
  }
}

// A centre for the radii: the mean of up to 1024 evenly spaced rows. Any point would be correct,
// and a point among the rows gives small radii. A block has 32 features, and a feature has eight
// threads.
template <class Weight>
__global__ void __launch_bounds__(256)
    centre_kernel(HeadView<Weight> head, int32_t classes, Value<Weight>* centre) {
  constexpr int kParts = 256 / kWarp;
  __shared__ Value<Weight> partial[kParts][kWarp];
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int64_t feature = int64_t{blockIdx.x} * kWarp + lane;
  const int step = classes / 1024 + 1, count = (classes - 1) / step + 1;
  Value<Weight> sum = 0;
  if (feature <= head.features) {
#pragma unroll 4
    for (int i = part; i < count; i += kParts) sum += head.at(int64_t{i} * step, feature);
  }
  partial[part][lane] = sum;
  __syncthreads();
  if (part != 0 || feature > head.features) return;
  for (int i = 1; i < kParts; ++i) sum += partial[i][lane];
  centre[feature] = sum / count;
}

// radius[c] = ||w_c - centre||. A warp has one class.
template <class Weight>
__global__ void __launch_bounds__(256, 3)
    radius_kernel(HeadView<Weight> head, int32_t classes, const Value<Weight>* centre,
                  Value<Weight>* radius) {
  const int warps = blockDim.x / kWarp;
  for (int64_t c = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp; c < classes;
       c += int64_t{gridDim.x} * warps) {
    const Point<Value<Weight>> middle{centre, 1, centre[head.features]};
    const Value<Weight> distance = warp_distance(head.point(c), middle, head.features, false);
    if (threadIdx.x % kWarp == 0) radius[c] = distance;
  }
}

}  // namespace marginops::cuda
