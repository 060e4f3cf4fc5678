// What the class moment kernels share: rows in class order and their parts, reading and scaling of
// rows.
#pragma once

#include <limits>

#include "common/margin_math.h"
#include "device.cuh"
#include "moments_launch.h"

namespace marginops::cuda {

constexpr int kMomentRows = 256;  // of a part, at most
// Two on a multiprocessor where a thread holds many values: left alone ptxas aims for more, and
// spills.
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

// Mean and squares of rows, by Welford's recurrence on their differences from an origin close to
// them: however far from 0 they are, nothing cancels, and the squares of equal rows are 0.
template <class Number, int kWidth>
struct Welford {
  Number origin[kWidth] = {};
  Number mean[kWidth] = {};  // less the origin
  Number squares = 0;

  template <class Scalar>
  __device__ __forceinline__ void start(const Pack<Scalar>& from) {
    squares = 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      origin[c] = to_value(from.scalar[c]);
      mean[c] = 0;
    }
  }
  // step: 1 / the number of rows, with this one.
  __device__ __forceinline__ void add(const Number (&value)[kWidth], Number step) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const Number away = value[c] - origin[c], before = away - mean[c];
      mean[c] += before * step;
      squares += before * (away - mean[c]);
    }
  }
};

// The places of a class in the order.
struct ClassSpan {
  int64_t label;
  int64_t begin;
  int64_t end;
};

// A class within one part leaves its mean in `mean` and its squares in `class_squares`. What a part
// holds of a class that has rows in other parts, too, goes to the pieces: number 2 * part if the
// class began in an earlier part, else 2 * part + 1. "Squares" are sums of squared distances from
// the mean, one for each warp that read columns of the row.
template <class Number>
struct MomentParts {
  ClassKeys key;
  const int64_t* row;
  const int64_t* begin;  // [C + 1]
  int64_t classes;
  int rows;                // of a part
  int64_t warps;           // of a row
  int64_t groups;          // of 32 columns
  int* unsafe;             // whether any squares are
  Number* mean;            // [C, D]
  double* piece_mean;      // [pieces, D]
  double* class_squares;   // [C, warps]
  double* piece_squares;   // [pieces, warps]
  double* merged_squares;  // [parts, groups], of the class that begins in a part and goes on

  __device__ __forceinline__ int64_t part_of(int64_t entry) const { return entry / rows; }
  // Parts with rows that are not ignored, and how many such rows they have.
  __device__ __forceinline__ int64_t used() const {
    return part_of(__ldg(begin + classes) + rows - 1);
  }
  __device__ __forceinline__ int count(int64_t part) const {
    return static_cast<int>(min(__ldg(begin + classes) - part * rows, int64_t{rows}));
  }
  __device__ __forceinline__ ClassSpan span(int64_t label) const {
    return {label, __ldg(begin + label), __ldg(begin + label + 1)};
  }
  // Rows of the piece of a class in a part.
  __device__ __forceinline__ int64_t rows_of(const ClassSpan& own, int64_t part) const {
    return min(own.end, (part + 1) * rows) - max(own.begin, part * rows);
  }

  // Where moments are: a class, or a piece as a negative number.
  __device__ __forceinline__ int32_t piece(const ClassSpan& own, int64_t part) const {
    return ~static_cast<int32_t>(2 * part + (own.begin >= part * rows));
  }
  // Whether a class begins with this piece.
  __device__ __forceinline__ static bool begins(int32_t piece) { return ~piece & 1; }
  __device__ __forceinline__ int32_t place(const ClassSpan& own, int64_t part) const {
    const bool whole = own.begin >= part * rows && own.end <= (part + 1) * rows;
    return whole ? static_cast<int32_t>(own.label) : piece(own, part);
  }
  // The mean of a class in one part. The pieces of others leave their means less the origin, which
  // is that of the class and stands in for its mean until it is known.
  template <class Wide, int kWidth>
  __device__ __forceinline__ void write_mean(int32_t place, int64_t label,
                                             const Welford<Wide, kWidth>& piece, int64_t column,
                                             int64_t columns) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (column + c >= columns) break;
      Number* to = mean + label * columns + column + c;
      if (place >= 0) {
        *to = finite_or_nan(static_cast<Number>(piece.origin[c] + piece.mean[c]));
      } else {
        piece_mean[~place * columns + column + c] = piece.mean[c];
        if (begins(place)) *to = static_cast<Number>(piece.origin[c]);
      }
    }
  }
  __device__ __forceinline__ double* squares_at(int32_t place, int64_t warp) const {
    return (place >= 0 ? class_squares + place * warps : piece_squares + ~place * warps) + warp;
  }
  // Whether squares must be found in float64; those of a single row are 0 or NaN.
  __device__ __forceinline__ static bool is_unsafe(Number squares, bool single) {
    return sizeof(Number) == 4 && !is_safe_square(squares) && !(single && squares == 0);
  }
};

// The factors that bring a row to unit length: a power of two, so that squares neither over- nor
// underflow, and what is left.
template <class Number>
struct RowScale {
  Number first, second;

  __device__ __forceinline__ Number operator()(Number value) const {
    return value * first * second;
  }
  // Takes the sum of squares of first * row, where `first` starts as 1; false if it must be
  // summed again with another `first`. A row of zeros stays, NaN and infinities make it NaN.
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

// What unit length takes: nothing; the block that has a whole row finds its norm; or they were
// found before.
enum class RowNorm { kNone, kOwn, kGiven };

template <class Scalar>
struct MomentInput {
  const Scalar* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t col_stride;
  const RowScale<Value<Scalar>>* scale;  // [N] for kGiven

  // A thread reads a whole pack, of rows that are aligned to 16 bytes, or one column.
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

// Norms of rows of which each thread of the block has a pack.
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
  int turn_ = 0;  // of two buffers, so that one barrier is enough
};

// Scales of rows that are too long for one block: a block a row.
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
