// Margins of rows of logits: a kernel reads each row once into its Top2 and hands it to an output,
// which knows what is to be written. All sums and merges have a fixed order or none that matters,
// so results are deterministic.
#pragma once

#include "distance.cuh"
#include "margin.h"
#include "top2.cuh"

namespace marginops::cuda {

constexpr int kRowsBlock = 256;
// Blocks a multiprocessor must hold: ptxas left alone aims for more, and spills.
template <class Scalar>
constexpr int kRowsBlocks = sizeof(Scalar) == 8 ? 2 : 3;
constexpr int kTileRows = 128;
constexpr int kTileRowBytes = 128;

// An output's write() is called by all threads of the block, with the same settled Top2 on the
// `threads` threads of a row, of which this one is `lane`; with kWholeWarps these are at least a
// warp. label() is called before the row is read, so that the load is under way meanwhile.

// The classification margin or, if `rival` is given, the strongest wrong class.
template <class Number>
struct TargetOutput {
  static constexpr bool kWholeWarps = false;
  Target target;
  const Number* log_norm;  // or null
  Number half;             // half_scale() of the log norm, if log_norm is null
  Number* margin;
  int64_t* rival;

  template <class Scalar>
  __device__ __forceinline__ int64_t label(const Row<Scalar>& row) const {
    return row.active ? __ldg(target.index.data + row.source * target.index.stride) : 0;
  }

  template <class Scalar>
  __device__ __forceinline__ void write(const Row<Scalar>& row, int64_t label,
                                        const Top2<Number>& top, int lane, int) const {
    if (!row.active || lane != 0) return;
    const bool ignored = label == target.ignore_index;
    const bool valid = label >= 0 && label < row.classes;
    MARGINOPS_DEVICE_ASSERT(ignored || valid);
    if (rival != nullptr) {
      int64_t other = label == top.first ? top.second : top.first;
      if (top.nan) other = label == 0;
      rival[row.position] = ignored || !valid ? 0 : other;
      return;
    }
    Number result = std::numeric_limits<Number>::quiet_NaN();
    if (!top.nan && valid) {
      const Number own = row[static_cast<int32_t>(label)];
      result = own - (own == top.first_value ? top.second_value : top.first_value);
      result = normalize(result, log_norm == nullptr ? half : half_scale(*log_norm));
    }
    margin[row.position] = ignored ? std::numeric_limits<Number>::infinity() : result;
  }
};

// A class beside the top one, the boundary between them, and how far away it is.
template <class Number>
struct Boundary {
  Number score;  // difference of logits / distance
  Number distance;
  int32_t other;

  __device__ __forceinline__ bool before(const Boundary& than) const {
    return is_nearer(score, other, than.score, than.other);
  }
};

// Where minimal margins go: the score, or the pair of classes and their distance.
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

// Minimal margins by a table of all distances; the lanes of a row are at most a warp.
template <class Number>
struct TableOutput {
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
          if (boundary.before(best)) best = boundary;
        }
      }
      for (int distance = threads / 2; distance > 0; distance /= 2) {
        const Boundary<Number> other{__shfl_xor_sync(kAllLanes, best.score, distance),
                                     __shfl_xor_sync(kAllLanes, best.distance, distance),
                                     __shfl_xor_sync(kAllLanes, best.other, distance)};
        if (other.before(best)) best = other;
      }
    }
    if (row.active && lane == 0) result.write(row.position, top, best);
  }
};

// Minimal margins by distances computed here, each by a warp. For the nearest boundary the warps of
// a row share the classes: lanes test one class each against the bound of may_be_nearer(), and the
// warp computes the distance of those that pass.
template <class Number, class Weight>
struct DistanceOutput {
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
      __syncthreads();  // the row before is written
      if (lane % kWarp == 0) by_warp[threadIdx.x / kWarp] = best;
      __syncthreads();
      if (lane == 0) {
        for (int i = 1; i < threads / kWarp; ++i) {
          const Boundary<Number> other = by_warp[threadIdx.x / kWarp + i];
          if (other.before(best)) best = other;
        }
      }
    }
    if (row.active && lane == 0) result.write(row.position, top, best);
  }

  // The boundary to the second class and, for the nearest, to this warp's share of all others.
  template <class Scalar>
  __device__ __forceinline__ Boundary<Number> search(const Row<Scalar>& row,
                                                     const Top2<Number>& top, int lane,
                                                     int threads) const {
    const Point<Weight> first = head.point(top.first);
    const auto classes = static_cast<unsigned>(radius == nullptr ? 0 : row.classes);
    const Number first_radius = radius == nullptr ? 0 : radius[top.first];
    unsigned base = lane / kWarp * kWarp, mine = 0;  // next classes to test; the one of this lane
    bool open = false;                               // whether it may yet be nearer
    Number difference = 0, reach = 0;
    Boundary<Number> best{0, 0, 0}, found{0, 0, top.second};
    Number found_difference = top.first_value - top.second_value;
    while (true) {
      found.distance = warp_distance(first, head.point(found.other), head.features, head.aligned);
      found.score = boundary_distance(found_difference, found.distance);
      if (found.other == top.second || found.before(best)) best = found;
      unsigned left = 0;
      while (true) {
        open = open && may_be_nearer(difference, reach, best.score);
        left = __ballot_sync(kAllLanes, open);
        if (left != 0 || base >= classes) break;
        mine = base + lane % kWarp;
        base += threads;
        open = mine < classes && mine != static_cast<unsigned>(top.first) &&
               mine != static_cast<unsigned>(top.second);
        if (open) {
          difference = top.first_value - row[mine];
          reach = first_radius + radius[mine];
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

// How rows_kernel works on a row: all in one go; or many blocks a row, each leaving its part in
// `partial` [N, splits], and then a launch that merges them.
enum class Phase { kWhole, kPart, kMerge };

// 256 / threads rows a block, `threads` a power of two. A row is read as read_top2() says, merged
// by shuffles, and across warps through shared memory.
template <class Scalar, class Output>
__global__ void __launch_bounds__(kRowsBlock, kRowsBlocks<Scalar>)
    rows_kernel(Logits<Scalar> logits, int threads, int splits, Phase phase,
                Top2<Value<Scalar>>* partial, Output output) {
  using Number = Value<Scalar>;
  __shared__ Top2<Number> by_warp[kRowsBlock / kWarp];
  const int lane = static_cast<int>(threadIdx.x) & (threads - 1);
  const int rows_per_block = kRowsBlock / threads;
  for (int64_t first = int64_t{blockIdx.x} * rows_per_block; first < logits.rows.size;
       first += int64_t{gridDim.x} * rows_per_block) {
    const Row<Scalar> row = logits.row(first + static_cast<int>(threadIdx.x) / threads);
    const int64_t label = output.label(row);
    Top2<Number> top;
    if (phase == Phase::kMerge) {
      for (int i = lane; i < splits && row.active; i += threads)
        top.merge(partial[row.position * splits + i]);
    } else if (row.active) {
      const auto classes = static_cast<unsigned>(logits.classes);
      const unsigned share = ((classes - 1) / splits / 64 + 1) * 64;
      const unsigned begin = min(blockIdx.y * share, classes);
      top = read_top2(row, begin, min(begin + share, classes), lane, threads);
    }
    top = merge_lanes(top, min(threads, kWarp));
    if (threads > kWarp) {
      __syncthreads();  // the row before is read
      if (lane % kWarp == 0) by_warp[threadIdx.x / kWarp] = top;
      __syncthreads();
      const int warps = threads / kWarp;
      top = merge_lanes(by_warp[(threadIdx.x - lane) / kWarp + lane % warps], warps);
    }
    if (phase == Phase::kPart) {
      if (row.active && lane == 0) partial[row.position * splits + blockIdx.y] = top;
      continue;
    }
    settle(top);
    output.write(row, label, top, lane, threads);
  }
}

// Short rows: a block brings 128 of them into shared memory, neighbouring threads reading
// neighbouring scalars, and each thread then has a row. `pitch` keeps the rows in different banks.
template <class Scalar, class Output>
__global__ void __launch_bounds__(kTileRows)
    tile_kernel(Logits<Scalar> logits, int pitch, Output output) {
  __shared__ __align__(16) unsigned char storage[kTileRows * (kTileRowBytes + 8)];
  Scalar* tile = reinterpret_cast<Scalar*>(storage);
  const int thread = threadIdx.x, classes = logits.classes;
  const bool dense =
      logits.rows.data == nullptr && logits.col_stride == 1 && logits.row_stride == classes;
  for (int64_t first = int64_t{blockIdx.x} * kTileRows; first < logits.rows.size;
       first += int64_t{gridDim.x} * kTileRows) {
    const int rows = static_cast<int>(min(int64_t{kTileRows}, logits.rows.size - first));
    const Row<Scalar> own = logits.row(first + thread);
    const int64_t label = output.label(own);
    const int count = rows * classes;
    int row = thread / classes, column = thread % classes;
    const int row_step = kTileRows / classes, column_step = kTileRows % classes;
    const auto place = [&] {
      const int offset = row * pitch + column;
      row += row_step;
      column += column_step;
      if (column >= classes) column -= classes, ++row;
      return offset;
    };
    if (dense) {
      const Scalar* source = logits.data + first * classes;
      int i = thread;
      for (; i + 3 * kTileRows < count; i += 4 * kTileRows) {
        Scalar scalar[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) scalar[j] = __ldg(source + i + j * kTileRows);
#pragma unroll
        for (int j = 0; j < 4; ++j) tile[place()] = scalar[j];
      }
      for (; i < count; i += kTileRows) tile[place()] = __ldg(source + i);
    } else {
      for (int i = thread; i < count; i += kTileRows) {
        const Scalar* source = logits.row(first + row).data + column * logits.col_stride;
        tile[place()] = __ldg(source);
      }
    }
    __syncthreads();
    const Row<Scalar> staged{tile + thread * pitch, 1,         classes, own.source,
                             own.position,          own.active};
    Top2<Value<Scalar>> top;
    if (staged.active)
      for (int c = 0; c < classes; ++c) add_ascending(top, staged[c], c);
    settle(top);
    output.write(staged, label, top, 0, 1);
    __syncthreads();
  }
}

}  // namespace marginops::cuda
