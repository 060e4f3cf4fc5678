// Mean and gyration radius of the rows of each class. The rows in class order are cut into parts,
// and the rows of a class within a part are a piece of the class. Welford's recurrence computes a
// piece, and Chan's formula merges the pieces of a class in order.
#pragma once

#include "moment_rows.cuh"

namespace marginops::cuda {

constexpr int kMergeLanes = 4;  // threads that share the pieces of a class
constexpr int kMergeColumns = kMomentBlock / kMergeLanes;

__global__ void __launch_bounds__(kMomentBlock)
    moment_key_kernel(Target target, int64_t classes, MutableKeys keys) {
  for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < target.index.size;
       n += int64_t{gridDim.x} * blockDim.x) {
    const int64_t label = __ldg(target.index.data + n * target.index.stride);
    const bool valid = label >= 0 && label < classes, ignored = label == target.ignore_index;
    MARGINOPS_DEVICE_ASSERT(valid || ignored);
    keys.set(n, valid && !ignored ? label : classes);
  }
}

// begin[c] is the number of rows of classes below c. begin[C] is the number of rows that are not
// ignored.
__global__ void __launch_bounds__(kMomentBlock)
    moment_begin_kernel(ClassKeys key, int64_t size, int64_t classes, int64_t* __restrict__ begin,
                        int64_t* __restrict__ count) {
  for (int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; c <= classes;
       c += int64_t{gridDim.x} * blockDim.x) {
    const int64_t first = key.lower_bound(0, size, c);
    begin[c] = first;
    if (c < classes) count[c] = key.lower_bound(first, size, c + 1) - first;
  }
}

// Computes the pieces of a part. A block has up to 256 packs of columns. A thread has one of these
// and reads all rows of the part in turn. For a class within one part, only the radius is left to
// compute.
template <class Scalar, int kWidth, RowNorm kNorm>
__global__ void __launch_bounds__(kMomentBlock, 2)
    moment_piece_kernel(MomentInput<Scalar> input, MomentParts<Value<Scalar>> parts) {
  using Number = Value<Scalar>;
  constexpr int kBatch = kWidth > 4 ? 4 : 8;  // loads in flight
  __shared__ const Scalar* source[kMomentRows];
  __shared__ Number factor[kMomentRows + 1];  // 1 / k for the k-th row of a piece
  __shared__ int32_t place[kMomentRows];
  __shared__ const Scalar* origin;
  __shared__ RowScale<Number> given[kNorm == RowNorm::kGiven ? kMomentRows : 1];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t tiles = (input.columns - 1) / (blockDim.x * kWidth) + 1;
  for (int64_t item = blockIdx.x; item < parts.used() * tiles; item += gridDim.x) {
    const int64_t part = item / tiles;
    const int count = parts.count(part);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int64_t entry = part * parts.rows + i, row = __ldg(parts.row + entry);
      const ClassSpan span = parts.span(parts.key[entry]);
      source[i] = input.data + row * input.row_stride;
      factor[i] = Number{1} / static_cast<Number>(min(entry - span.begin, int64_t{i}) + 1);
      place[i] = parts.place(span, part);
      if constexpr (kNorm == RowNorm::kGiven) given[i] = input.scale[row];
      if (i == 0) origin = input.data + __ldg(parts.row + span.begin) * input.row_stride;
    }
    if (threadIdx.x == 0) factor[count] = 1;
    __syncthreads();
    const int64_t column = (item % tiles * blockDim.x + threadIdx.x) * kWidth;
    const int valid = input.template valid<kWidth>(column);
    if (column - lane * kWidth < input.columns) {  // the same for the whole warp
      BlockNorms<Scalar> norms;
      Welford<Number, kWidth> piece;
      if constexpr (kNorm == RowNorm::kNone)
        piece.start(input.template load<kWidth>(origin, column, valid));
      for (int base = 0; base < count; base += kBatch) {
        Pack<Scalar> pack[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          pack[i] = input.template load<kWidth>(source[min(base + i, count - 1)], column, valid);
        RowScale<Number> scale[kBatch];
        if constexpr (kNorm == RowNorm::kOwn) norms.template find<kWidth>(pack, scale);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int entry = base + i;
          if (entry >= count) break;
          if constexpr (kNorm == RowNorm::kGiven) scale[i] = given[entry];
          Number value[kWidth];
#pragma unroll
          for (int c = 0; c < kWidth; ++c) {
            value[c] = to_value(pack[i].scalar[c]);
            if constexpr (kNorm != RowNorm::kNone) value[c] = scale[i](value[c]);
          }
          if (factor[entry] == 1 && entry > 0) {
            if constexpr (kNorm == RowNorm::kNone)
              piece.start(pack[i]);
            else
              piece = {};
          }
          piece.add(value, factor[entry]);
          if (factor[entry + 1] == 1) {
            const int64_t label =
                place[entry] >= 0 ? place[entry] : parts.key[part * parts.rows + entry];
            parts.write_mean(place[entry], label, piece, column, input.columns);
            const Number squares = warp_sum(piece.squares);
            if (lane == 0) *parts.squares_at(place[entry], column / (kWarp * kWidth)) = squares;
            // The squares of unit vectors are safe, or too small to matter.
            if (kNorm == RowNorm::kNone && parts.is_unsafe(squares, factor[entry] == 1))
              if (lane == 0) atomicOr(parts.unsafe, 1);
          }
        }
      }
    }
    __syncthreads();
  }
}

// Computes once more, in float64, the pieces whose squares over- or underflowed. A warp has one
// part and the columns of a warp of the kernel above.
template <class Scalar, int kWidth>
__global__ void __launch_bounds__(kMomentBlock, 2)
    moment_wide_kernel(MomentInput<Scalar> input, MomentParts<float> parts) {
  if (*parts.unsafe == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kMomentBlock / kWarp);
  for (int64_t item = (int64_t{blockIdx.x} * kMomentBlock + threadIdx.x) / kWarp;
       item < parts.used() * parts.warps; item += warps) {
    const int64_t part = item / parts.warps, warp = item % parts.warps;
    const int64_t column = (warp * kWarp + lane) * kWidth;
    const int valid = input.template valid<kWidth>(column);
    const int64_t part_end = part * parts.rows + parts.count(part);
    int64_t end;
    for (int64_t begin = part * parts.rows; begin < part_end; begin = end) {
      const ClassSpan span = parts.span(parts.key[begin]);
      end = min(span.end, part_end);
      const int32_t place = parts.place(span, part);
      double* squares = parts.squares_at(place, warp);
      if (!parts.is_unsafe(static_cast<float>(*squares), end - begin == 1)) continue;
      const Scalar* origin = input.data + __ldg(parts.row + span.begin) * input.row_stride;
      Welford<double, kWidth> piece;
      piece.start(input.template load<kWidth>(origin, column, valid));
      for (int64_t entry = begin; entry < end; ++entry) {
        const Scalar* row = input.data + __ldg(parts.row + entry) * input.row_stride;
        const Pack<Scalar> pack = input.template load<kWidth>(row, column, valid);
        double value[kWidth];
#pragma unroll
        for (int c = 0; c < kWidth; ++c) value[c] = to_value(pack.scalar[c]);
        piece.add(value, 1.0 / static_cast<double>(entry - begin + 1));
      }
      parts.write_mean(place, span.label, piece, column, input.columns);
      const double total = warp_sum(piece.squares);
      __syncwarp();  // all lanes have read the old squares
      if (lane == 0) *squares = total;
    }
  }
}

// Moments of one column, merged by Chan's formula. They are in float64, because a class may have
// any number of pieces. They are a small part of what was read.
struct ColumnMoments {
  double count = 0;
  double mean = 0;
  double squares = 0;

  __device__ __forceinline__ void merge(const ColumnMoments& other) {
    if (other.count == 0) return;
    const double step = other.mean - mean, share = other.count / (count + other.count);
    mean += step * share;
    squares += other.squares + step * step * (count * share);
    count += other.count;
  }
};

// Merges the pieces of each class that has several. A block has one class and 64 columns, and
// several threads share the pieces of a column. Items are classes or, if there are fewer parts than
// classes, parts. For a part, the block merges the class of its last row, if that class begins in
// the part.
template <class Number>
__global__ void __launch_bounds__(kMomentBlock)
    moment_merge_kernel(int64_t columns, MomentParts<Number> parts, int64_t items, bool by_class) {
  __shared__ ColumnMoments shared[kMomentBlock];
  const int thread = threadIdx.x, lane = thread / kMergeColumns;
  const int64_t tiles = (columns - 1) / kMergeColumns + 1;
  for (int64_t item = blockIdx.x; item < items * tiles; item += gridDim.x) {
    int64_t label = item / tiles, part = -1;
    if (!by_class) {
      part = label;
      if (part >= parts.used()) continue;
      label = parts.key[part * parts.rows + parts.count(part) - 1];
    }
    const ClassSpan span = parts.span(label);
    const int64_t first = parts.part_of(span.begin), last = parts.part_of(span.end - 1);
    if (span.begin == span.end || first == last || (!by_class && first != part)) continue;
    const int64_t column = item % tiles * kMergeColumns + thread % kMergeColumns;
    const int64_t share = (last - first) / kMergeLanes + 1;
    const int64_t stop = min(first + (lane + 1) * share, last + 1);
    ColumnMoments found;
#pragma unroll 4
    for (int64_t i = first + lane * share; i < stop; ++i) {
      if (column >= columns) break;
      const double rows = static_cast<double>(parts.rows_of(span, i));
      found.merge({rows, __ldg(parts.piece_mean + ~parts.piece(span, i) * columns + column), 0});
    }
    shared[thread] = found;
    __syncthreads();
    if (lane == 0) {
      for (int i = 1; i < kMergeLanes; ++i) found.merge(shared[thread + i * kMergeColumns]);
      if (column < columns) {
        Number& mean = parts.mean[label * columns + column];  // the origin so far
        mean = finite_or_nan(static_cast<Number>(mean + found.mean));
      }
      // Each warp adds, for all pieces, the squares from one warp of the kernels above, if there is
      // one.
      const int64_t group = column / kWarp;
      if (group < parts.warps)
        for (int64_t i = first + thread % kWarp; i <= last; i += kWarp)
          found.squares += *parts.squares_at(parts.piece(span, i), group);
      const double total = warp_sum(found.squares);
      if (thread % kWarp == 0 && column < columns)
        parts.merged_squares[first * parts.groups + group] = total;
    }
    __syncthreads();
  }
}

// A warp has one class.
template <class Number>
__global__ void __launch_bounds__(kMomentBlock)
    moment_radius_kernel(MomentParts<Number> parts, Number* __restrict__ radius) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kMomentBlock / kWarp);
  for (int64_t c = (int64_t{blockIdx.x} * kMomentBlock + threadIdx.x) / kWarp; c < parts.classes;
       c += warps) {
    const ClassSpan span = parts.span(c);
    const int64_t first = parts.part_of(span.begin);
    const bool merged = span.begin < span.end && first != parts.part_of(span.end - 1);
    const double* squares = merged ? parts.merged_squares + first * parts.groups
                                   : parts.class_squares + c * parts.warps;
    const int64_t size = merged ? parts.groups : span.begin < span.end ? parts.warps : 0;
    double sum = 0;
    for (int64_t i = lane; i < size; i += kWarp) sum += squares[i];
    sum = warp_sum(sum);
    if (lane == 0)  // 0 / 0 is NaN
      radius[c] = static_cast<Number>(sqrt(sum / static_cast<double>(span.end - span.begin)));
  }
}

}  // namespace marginops::cuda
