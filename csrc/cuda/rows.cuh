// Reading rows of logits: a kernel reads each row once into the accumulator of its output, and
// hands it over. Merges have a fixed order or one that does not matter, so results are
// deterministic.
#pragma once

#include "device.cuh"

namespace marginops::cuda {

constexpr int kRowsBlock = 256;
// Blocks a multiprocessor must hold: ptxas left alone aims for more, and spills.
template <class Scalar>
constexpr int kRowsBlocks = sizeof(Scalar) == 8 ? 2 : 3;
constexpr int kTileRows = 128;
constexpr int kTileRowBytes = 128;

// One row as its threads see it; `active` is false for threads beyond the last row, which go along
// because warps and blocks work together.
template <class Scalar>
struct Row {
  const Scalar* data;
  int64_t stride;
  int32_t classes;
  int64_t source;    // its row in logits
  int64_t position;  // its place in the result
  bool active;

  __device__ __forceinline__ Value<Scalar> operator[](int32_t index) const {
    return to_value(data[index * stride]);
  }
  __device__ __forceinline__ bool has(int64_t label) const { return label >= 0 && label < classes; }
};

template <class Scalar>
struct Logits {
  const Scalar* data;
  int64_t row_stride;
  int64_t col_stride;
  int32_t classes;
  IndexVector rows;  // not checked: they come from our own selections

  __device__ __forceinline__ Row<Scalar> row(int64_t position) const {
    const bool active = position < rows.size;
    int64_t source = active ? position : 0;
    if (rows.data != nullptr && active) source = rows.data[position * rows.stride];
    return {data + source * row_stride, col_stride, classes, source, position, active};
  }
};

// Adds a pack of which `index` is the first class.
template <class Accumulator, class Scalar>
__device__ __forceinline__ void add_pack(Accumulator& found, const Pack<Scalar>& pack,
                                         int32_t index) {
  Value<Scalar> value[Pack<Scalar>::kSize];
#pragma unroll
  for (int i = 0; i < Pack<Scalar>::kSize; ++i) value[i] = to_value(pack.scalar[i]);
  found.add_pack(value, index);
}

// Thread `lane` of `threads` reads its share of the classes [begin, end). Columns that lie side by
// side are read in 16-byte packs, four in flight, with single scalars before the first 16-byte
// boundary and after the last; neighbouring lanes read neighbouring packs.
template <class Accumulator, class Scalar>
__device__ __forceinline__ Accumulator read_row(const Row<Scalar>& row, unsigned begin,
                                                unsigned end, unsigned lane, unsigned threads) {
  constexpr unsigned kSize = Pack<Scalar>::kSize;
  Accumulator found;
  unsigned scalars = end;  // up to here one by one
  if (row.stride == 1) {
    const auto address = reinterpret_cast<uintptr_t>(row.data + begin);
    const unsigned head = static_cast<unsigned>(-address % 16 / sizeof(Scalar));
    scalars = head < end - begin ? begin + head : end;
  }
#pragma unroll 4
  for (unsigned c = begin + lane; c < scalars; c += threads)
    found.add(to_value(__ldg(row.data + c * row.stride)), c);
  if (scalars == end) return found;

  const unsigned packs = (end - scalars) / kSize;
  const Scalar* aligned = row.data + scalars;
  unsigned p = lane;
  for (; p + 3 * threads < packs; p += 4 * threads) {
    Pack<Scalar> pack[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) pack[i] = load_pack(aligned + (p + i * threads) * kSize);
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) add_pack(found, pack[i], scalars + (p + i * threads) * kSize);
  }
  for (; p < packs; p += threads)
    add_pack(found, load_pack(aligned + p * kSize), scalars + p * kSize);
  for (unsigned c = scalars + packs * kSize + lane; c < end; c += threads)
    found.add(to_value(__ldg(row.data + c)), c);
  return found;
}

// The accumulators of each group of `width` neighbouring lanes merged, on all of them. The whole
// warp takes part.
template <class Accumulator>
__device__ __forceinline__ Accumulator merge_lanes(Accumulator found, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) found.merge(found.exchange(distance));
  const unsigned votes = __ballot_sync(kAllLanes, found.nan);
  const unsigned group = kAllLanes >> (kWarp - width) << (threadIdx.x % kWarp & -width);
  found.nan = (votes & group) != 0;
  return found;
}

// What comes out of a row is an output: it has the type of the Accumulator; label() is called
// before the row is read, so that the load is under way meanwhile; write() is called by all threads
// of the block, with the same settled accumulator on the `threads` threads of a row, of which this
// one is `lane`; with kWholeWarps these are at least a warp.

// How rows_kernel works on a row: all in one go; or many blocks a row, each leaving its part in
// `partial` [N, splits], and then a launch that merges them.
enum class Phase { kWhole, kPart, kMerge };

// 256 / threads rows a block, `threads` a power of two. A row is read as read_row() says, merged
// by shuffles, and across warps through shared memory.
template <class Scalar, class Output>
__global__ void __launch_bounds__(kRowsBlock, kRowsBlocks<Scalar>)
    rows_kernel(Logits<Scalar> logits, int threads, int splits, Phase phase,
                typename Output::Accumulator* partial, Output output) {
  using Accumulator = typename Output::Accumulator;
  __shared__ Accumulator by_warp[kRowsBlock / kWarp];
  const int lane = static_cast<int>(threadIdx.x) & (threads - 1);
  const int rows_per_block = kRowsBlock / threads;
  for (int64_t first = int64_t{blockIdx.x} * rows_per_block; first < logits.rows.size;
       first += int64_t{gridDim.x} * rows_per_block) {
    const Row<Scalar> row = logits.row(first + static_cast<int>(threadIdx.x) / threads);
    const int64_t label = output.label(row);
    Accumulator found;
    if (phase == Phase::kMerge) {
      for (int i = lane; i < splits && row.active; i += threads)
        found.merge(partial[row.position * splits + i]);
    } else if (row.active) {
      const auto classes = static_cast<unsigned>(logits.classes);
      const unsigned share = ((classes - 1) / splits / 64 + 1) * 64;
      const unsigned begin = min(blockIdx.y * share, classes);
      found = read_row<Accumulator>(row, begin, min(begin + share, classes), lane, threads);
    }
    found = merge_lanes(found, min(threads, kWarp));
    if (threads > kWarp) {
      __syncthreads();  // the row before is read
      if (lane % kWarp == 0) by_warp[threadIdx.x / kWarp] = found;
      __syncthreads();
      const int warps = threads / kWarp;
      found = merge_lanes(by_warp[(threadIdx.x - lane) / kWarp + lane % warps], warps);
    }
    if (phase == Phase::kPart) {
      if (row.active && lane == 0) partial[row.position * splits + blockIdx.y] = found;
      continue;
    }
    found.settle();
    output.write(row, label, found, lane, threads);
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
    typename Output::Accumulator found;
    if (staged.active) found.add_row(staged);
    found.settle();
    output.write(staged, label, found, 0, 1);
    __syncthreads();
  }
}

}  // namespace marginops::cuda
