// The outputs of minimal margins. They compute the score, or the pair of classes and their
// distance, from the two largest logits of a row and the last layer.
#pragma once

#include "distance.cuh"
#include "rows.cuh"
#include "top2.cuh"

namespace marginops::cuda {

// A class other than the top one, the boundary between the two, and how far away it is.
template <class Number>
struct Boundary {
  Number score;  // difference of logits / distance
  Number distance;
  int32_t other;

  __device__ __forceinline__ bool is_nearer_than(const Boundary& boundary) const {
    return is_nearer(score, other, boundary.score, boundary.other);
  }
};

// The results to write: the score, or the pair of classes and their distance.
template <class Number>
struct BoundaryResult {
  Number* score;
  int64_t* pair;
  Number* distance;

  __device__ __forceinline__ void write(int64_t position, const Top2<Number>& top,
                                        const Boundary<Number>& boundary) const {
    const Number nan = std::numeric_limits<Number>::quiet_NaN();
    if (score != nullptr) {
      score[position] = top.nan ? nan : boundary.score;
      return;
    }
    pair[2 * position] = top.nan ? 0 : top.first;
    pair[2 * position + 1] = top.nan ? 1 : boundary.other;
    distance[position] = top.nan ? nan : boundary.distance;
  }
};

// Minimal margins from a table of all distances. A row has at most a warp of lanes.
template <class Number>
struct TableOutput {
  using Accumulator = TopAccumulator<Number>;
  static constexpr bool kWholeWarps = false;
  const Number* table;  // [C, C]
  bool nearest;
  BoundaryResult<Number> result;

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>&) const {
    return 0;
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t, const Top2<Number>& top,
                                        int lane, int threads) const {
    const Number* distances = table + int64_t{top.first} * row.classes;
    Boundary<Number> best{0, distances[top.second], top.second};
    best.score = boundary_distance(top.first_value - top.second_value, best.distance);
    if (nearest) {
      if (row.active) {
        for (int32_t c = lane; c < row.classes; c += threads) {
          if (c == top.first) continue;
          Boundary<Number> boundary{0, distances[c], c};
          boundary.score = boundary_distance(top.first_value - row[c], boundary.distance);
          if (boundary.is_nearer_than(best)) best = boundary;
        }
      }
      for (int distance = threads / 2; distance > 0; distance /= 2) {
        const Boundary<Number> other{__shfl_xor_sync(kAllLanes, best.score, distance),
                                     __shfl_xor_sync(kAllLanes, best.distance, distance),
                                     __shfl_xor_sync(kAllLanes, best.other, distance)};
        if (other.is_nearer_than(best)) best = other;
      }
    }
    if (row.active && lane == 0) result.write(row.position, top, best);
  }
};

// Minimal margins from distances that are computed here, each by one warp. For the nearest boundary
// the warps of a row share the classes: each lane tests a class with may_be_nearer(), and the warp
// computes the distances of those that pass.
template <class Number, class Weight>
struct DistanceOutput {
  using Accumulator = TopAccumulator<Number>;
  static constexpr bool kWholeWarps = true;
  HeadView<Weight> head;
  const Number* radius;  // [C] for the nearest boundary, else null
  BoundaryResult<Number> result;

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>&) const {
    return 0;
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t, const Top2<Number>& top,
                                        int lane, int threads) const {
    if (radius == nullptr && lane >= kWarp) return;
    Boundary<Number> best{0, 0, 0};
    if (row.active && !top.nan) best = search(row, top, lane, threads);
    if (radius != nullptr && threads > kWarp) {
      __shared__ Boundary<Number> by_warp[kRowsBlock / kWarp];
      __syncthreads();  // the previous row has been written
      if (lane % kWarp == 0) by_warp[threadIdx.x / kWarp] = best;
      __syncthreads();
      if (lane == 0) {
        for (int i = 1; i < threads / kWarp; ++i) {
          const Boundary<Number> other = by_warp[threadIdx.x / kWarp + i];
          if (other.is_nearer_than(best)) best = other;
        }
      }
    }
    if (row.active && lane == 0) result.write(row.position, top, best);
  }

  // Returns the boundary to the second class. For the nearest boundary, tries this warp's share of
  // the other classes too and returns the nearest.
  template <class Scalar>
  __device__ __forceinline__ Boundary<Number> search(const Row<Scalar>& row,
                                                     const Top2<Number>& top, int lane,
                                                     int threads) const {
    const Point<Weight> first = head.point(top.first);
    const auto classes = static_cast<unsigned>(radius == nullptr ? 0 : row.classes);
    const Number first_radius = radius == nullptr ? 0 : radius[top.first];
    unsigned base = lane / kWarp * kWarp, mine = 0;  // next classes to test; the class of this lane
    bool open = false;                               // whether that class may still be nearer
    Number difference = 0, radius_sum = 0;
    Boundary<Number> best{0, 0, 0}, found{0, 0, top.second};
    Number found_difference = top.first_value - top.second_value;
    while (true) {
      found.distance = warp_distance(first, head.point(found.other), head.features, head.aligned);
      found.score = boundary_distance(found_difference, found.distance);
      if (found.other == top.second || found.is_nearer_than(best)) best = found;
      unsigned left = 0;
      while (true) {
        open = open && may_be_nearer(difference, radius_sum, best.score);
        left = __ballot_sync(kAllLanes, open);
        if (left != 0 || base >= classes) break;
        mine = base + lane % kWarp;
        base += threads;
        open = mine < classes && mine != static_cast<unsigned>(top.first) &&
               mine != static_cast<unsigned>(top.second);
        if (open) {
          difference = top.first_value - row[mine];
          radius_sum = first_radius + radius[mine];
        }
      }
      if (left == 0) return best;
      const int next = __ffs(left) - 1;
      found.other = __shfl_sync(kAllLanes, static_cast<int32_t>(mine), next);
      found_difference = __shfl_sync(kAllLanes, difference, next);
      open = open && lane % kWarp != next;
    }
  }
};

}  // namespace marginops::cuda
