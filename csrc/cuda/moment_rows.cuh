// What the class moment kernels share: rows in class order, their parts and pieces, and the reading
// and scaling of rows.
#pragma once

#include <limits>

#include "common/margin_math.h"
#include "device.cuh"
#include "moments_launch.h"

namespace marginops::cuda {

constexpr int kMomentRows = 256;  // rows of a part, at most
// A multiprocessor must hold two blocks where a thread holds many values. Without this bound ptxas
// aims for more, and registers spill.
constexpr int kMomentBlock = 256;

struct ClassKeys {
  const void* data;
  int bytes;

  __device__ __forceinline__ int64_t operator[](int64_t index) const {
    if (bytes == 1) return __ldg(static_cast<const uint8_t*>(data) + index);
    if (bytes == 2) return __ldg(static_cast<const int16_t*>(data) + index);
    return __ldg(static_cast<const int32_t*>(data) + index);
  }
  // First place in [begin, end) whose key is not less than bound, or the end.
  __device__ __forceinline__ int64_t lower_bound(int64_t begin, int64_t end, int64_t bound) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if ((*this)[middle] < bound)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};

struct MutableKeys {
  void* data;
  int bytes;

  __device__ __forceinline__ void set(int64_t index, int64_t key) const {
    if (bytes == 1)
      static_cast<uint8_t*>(data)[index] = static_cast<uint8_t>(key);
    else if (bytes == 2)
      static_cast<int16_t*>(data)[index] = static_cast<int16_t>(key);
    else
      static_cast<int32_t*>(data)[index] = static_cast<int32_t>(key);
  }
};

template <class Number>
__device__ __forceinline__ Number finite_or_nan(Number value) {
  return value - value == 0 ? value : std::numeric_limits<Number>::quiet_NaN();
}

// Mean and squares of rows, by Welford's recurrence on their differences from an origin that is
// close to them. So nothing cancels, however far the rows are from 0, and the squares of equal rows
// are 0.
template <class Number, int kWidth>
struct Welford {
  Number origin[kWidth] = {};
  Number mean[kWidth] = {};  // minus the origin
  Number squares = 0;

  template <class Scalar>
  __device__ __forceinline__ void start(const Pack<Scalar>& row) {
    squares = 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      origin[c] = to_value(row.scalar[c]);
      mean[c] = 0;
    }
  }
  // `step` is 1 / the number of rows, with this one.
  __device__ __forceinline__ void add(const Number (&value)[kWidth], Number step) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const Number offset = value[c] - origin[c], difference = offset - mean[c];
      mean[c] += difference * step;
      squares += difference * (offset - mean[c]);
    }
  }
};

// The places [begin, end) of a class in class order.
struct ClassSpan {
  int64_t label;
  int64_t begin;
  int64_t end;
};

// The parts, and where their moments are. A class within one part has its mean in `mean` and its
// squares in `class_squares`. If a class has rows in several parts, each piece has its place in
// `piece_mean` and `piece_squares`: 2 * part, or 2 * part + 1 if the class begins in the part.
// Squares are sums of squared distances from the mean, one for each warp that reads columns of the
// rows.
template <class Number>
struct MomentParts {
  ClassKeys key;
  const int64_t* row;
  const int64_t* begin;  // [C + 1]
  int64_t classes;
  int rows;                // rows of a part
  int64_t warps;           // warps that read a row
  int64_t groups;          // groups of 32 columns
  int* unsafe;             // whether any squares are unsafe
  Number* mean;            // [C, D]
  double* piece_mean;      // [pieces, D]
  double* class_squares;   // [C, warps]
  double* piece_squares;   // [pieces, warps]
  double* merged_squares;  // [parts, groups], of a class that begins in a part and continues

  __device__ __forceinline__ int64_t part_of(int64_t entry) const { return entry / rows; }
  // The number of parts that have rows that are not ignored.
  __device__ __forceinline__ int64_t used() const {
    return part_of(__ldg(begin + classes) + rows - 1);
  }
  // The number of rows of a part that are not ignored.
  __device__ __forceinline__ int count(int64_t part) const {
    return static_cast<int>(min(__ldg(begin + classes) - part * rows, int64_t{rows}));
  }
  __device__ __forceinline__ ClassSpan span(int64_t label) const {
    return {label, __ldg(begin + label), __ldg(begin + label + 1)};
  }
  // The number of rows in the piece of a class in a part.
  __device__ __forceinline__ int64_t rows_of(const ClassSpan& span, int64_t part) const {
    return min(span.end, (part + 1) * rows) - max(span.begin, part * rows);
  }

  // The place of a piece, as a negative number.
  __device__ __forceinline__ int32_t piece(const ClassSpan& span, int64_t part) const {
    return ~static_cast<int32_t>(2 * part + (span.begin >= part * rows));
  }
  // Whether a class begins with this piece.
  __device__ __forceinline__ static bool begins(int32_t piece) { return ~piece & 1; }
  // Where the moments of a class in a part are: the class, or the place of its piece.
  __device__ __forceinline__ int32_t place(const ClassSpan& span, int64_t part) const {
    const bool whole = span.begin >= part * rows && span.end <= (part + 1) * rows;
    return whole ? static_cast<int32_t>(span.label) : piece(span, part);
  }
  // Writes the mean of a class within one part. The pieces of another class write their means minus
  // the origin of that class. The first piece also writes the origin to `mean`, where it stands
  // until the mean is known.
  template <class Wide, int kWidth>
  __device__ __forceinline__ void write_mean(int32_t place, int64_t label,
                                             const Welford<Wide, kWidth>& piece, int64_t column,
                                             int64_t columns) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (column + c >= columns) break;
      Number* result = mean + label * columns + column + c;
      if (place >= 0) {
        *result = finite_or_nan(static_cast<Number>(piece.origin[c] + piece.mean[c]));
      } else {
        piece_mean[~place * columns + column + c] = piece.mean[c];
        if (begins(place)) *result = static_cast<Number>(piece.origin[c]);
      }
    }
  }
  __device__ __forceinline__ double* squares_at(int32_t place, int64_t warp) const {
    return (place >= 0 ? class_squares + place * warps : piece_squares + ~place * warps) + warp;
  }
  // Whether squares must be computed again in float64. The squares of a single row are 0 or NaN.
  __device__ __forceinline__ static bool is_unsafe(Number squares, bool single) {
    return sizeof(Number) == 4 && !is_safe_square(squares) && !(single && squares == 0);
  }
};

// The factors that scale a row to unit length. The first is a power of two, with which squares
// neither over- nor underflow, and the second is the rest.
template <class Number>
struct RowScale {
  Number first, second;

  __device__ __forceinline__ Number operator()(Number value) const {
    return value * first * second;
  }
  // Takes the sum of squares of first * row, where `first` is 1 at the start. Returns false if the
  // squares must be summed again with the new `first`. A row of zeros stays, and a row with a NaN
  // or an infinity becomes NaN.
  __device__ __forceinline__ bool settle(Number sum) {
    constexpr bool kDouble = sizeof(Number) == 8;
    constexpr Number kUp = kDouble ? Number(0x1p600) : Number(0x1p100f);
    constexpr Number kDown = kDouble ? Number(0x1p-600) : Number(0x1p-80f);
    const bool finite = sum < std::numeric_limits<Number>::infinity();
    if (first == 1 && sum == sum && !is_safe_square(sum)) {
      first = sum < 1 ? kUp : kDown;
      return false;
    }
    second = sum == 0 ? Number{0} : Number{1} / sqrt(sum);
    if (!finite) second = std::numeric_limits<Number>::quiet_NaN();
    return true;
  }
};

// How the norms that scale rows to unit length are computed. kNone: rows are not scaled. kOwn: by
// each block, which has whole rows. kGiven: by an earlier launch.
enum class RowNorm { kNone, kOwn, kGiven };

template <class Scalar>
struct MomentInput {
  const Scalar* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t col_stride;
  const RowScale<Value<Scalar>>* scale;  // [N] for kGiven

  // The number of columns that a thread reads from `column` on. Its width is a whole pack if rows
  // are aligned to 16 bytes, otherwise one column.
  template <int kWidth>
  __device__ __forceinline__ int valid(int64_t column) const {
    return static_cast<int>(max(min(columns - column, int64_t{kWidth}), int64_t{0}));
  }
  template <int kWidth>
  __device__ __forceinline__ Pack<Scalar> load(const Scalar* row, int64_t column, int valid) const {
    if (kWidth == Pack<Scalar>::kSize && valid == kWidth) return load_pack(row + column);
    Pack<Scalar> pack{};
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      pack.scalar[c] = c < valid ? __ldg(row + (column + c) * col_stride) : Scalar{};
    return pack;
  }
};

template <int kWidth, class Scalar>
__device__ __forceinline__ Value<Scalar> sum_of_squares(const Pack<Scalar>& pack,
                                                        Value<Scalar> factor) {
  Value<Scalar> sum = 0;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const Value<Scalar> value = to_value(pack.scalar[c]) * factor;
    sum += value * value;
  }
  return sum;
}

// Norms of rows. Each thread of the block has a pack of every row.
template <class Scalar>
class BlockNorms {
  using Number = Value<Scalar>;

 public:
  template <int kWidth, int kBatch>
  __device__ __forceinline__ void find(const Pack<Scalar> (&pack)[kBatch],
                                       RowScale<Number> (&scale)[kBatch]) {
    __shared__ Number by_warp[2][kBatch][kMomentBlock / kWarp];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) scale[i].first = 1;
    for (bool settled = false; !settled; turn_ ^= 1) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Number sum = warp_sum(sum_of_squares<kWidth>(pack[i], scale[i].first));
        if (threadIdx.x % kWarp == 0) by_warp[turn_][i][warp] = sum;
      }
      __syncthreads();
      settled = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        Number sum = 0;
        for (int w = 0; w < warps; ++w) sum += by_warp[turn_][i][w];
        settled &= scale[i].settle(sum);
      }
    }
  }

 private:
  int turn_ = 0;  // which of two buffers is used; with two, one barrier is enough
};

// The scales of rows that are too long for one block of moment_piece_kernel. A block has one row.
template <class Scalar, int kWidth>
__global__ void __launch_bounds__(kMomentBlock, 2)
    moment_norm_kernel(MomentInput<Scalar> input, RowScale<Value<Scalar>>* __restrict__ result) {
  using Number = Value<Scalar>;
  __shared__ Number by_warp[2][kMomentBlock / kWarp];
  int turn = 0;
  for (int64_t n = blockIdx.x; n < input.rows; n += gridDim.x) {
    const Scalar* row = input.data + n * input.row_stride;
    RowScale<Number> scale{1, 0};
    for (bool settled = false; !settled; turn ^= 1) {
      Number sum = 0;
#pragma unroll 2
      for (int64_t column = int64_t{threadIdx.x} * kWidth; column < input.columns;
           column += kMomentBlock * kWidth) {
        const int valid = input.template valid<kWidth>(column);
        sum += sum_of_squares<kWidth>(input.template load<kWidth>(row, column, valid), scale.first);
      }
      sum = warp_sum(sum);
      if (threadIdx.x % kWarp == 0) by_warp[turn][threadIdx.x / kWarp] = sum;
      __syncthreads();
      sum = 0;
      for (int w = 0; w < kMomentBlock / kWarp; ++w) sum += by_warp[turn][w];
      settled = scale.settle(sum);
    }
    if (threadIdx.x == 0) result[n] = scale;
  }
}

}  // namespace marginops::cuda
