// Kernels that read rows of logits. They read each row once into the accumulator of an output, and
// the output turns it into results. Accumulators are merged in a fixed order, or in one that does
// not matter, so results are deterministic.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace marginops::cuda {

constexpr int kRowsBlock = 256;
// Blocks that a multiprocessor must hold. Without this bound ptxas aims for more, and registers
// spill.
template <class Scalar>
constexpr int kRowsBlocks = sizeof(Scalar) == 8 ? 2 : 3;
constexpr int kTileRows = 128;
constexpr int kTileRowBytes = 128;

// One row as its threads see it. `active` is false for threads beyond the last row, which take part
// because warps and blocks work together.
template <class Scalar>
struct Row {
  const Scalar* data;
  int64_t stride;
  int32_t classes;
  int64_t source;    // index of the row in logits
  int64_t position;  // index of the row in the result
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
  IndexVector rows;  // not checked: they come from selections of this library

  __device__ __forceinline__ Row<Scalar> row(int64_t position) const {
    const bool active = position < rows.size;
    int64_t source = active ? position : 0;
    if (rows.data != nullptr && active) source = rows.data[position * rows.stride];
    return {data + source * row_stride, col_stride, classes, source, position, active};
  }
};

// Adds a pack, whose first class is `index`.
template <class Accumulator, class Scalar>
__device__ __forceinline__ void add_pack(Accumulator& found, const Pack<Scalar>& pack,
                                         int32_t index) {
  Value<Scalar> value[Pack<Scalar>::kSize];
#pragma unroll
  for (int i = 0; i < Pack<Scalar>::kSize; ++i) value[i] = to_value(pack.scalar[i]);
  found.add_pack(value, index);
}

// Thread `lane` of `threads` reads its share of the classes [begin, end). Neighbouring columns are
// read in 16-byte packs, four in flight, and one by one before the first 16-byte boundary and after
// the last. Neighbouring lanes read neighbouring packs.
template <class Accumulator, class Scalar>
__device__ __forceinline__ Accumulator read_row(const Row<Scalar>& row, unsigned begin,
                                                unsigned end, unsigned lane, unsigned threads) {
  constexpr unsigned kSize = Pack<Scalar>::kSize;
  Accumulator found;
  unsigned scalars = end;  // classes below this one are read one by one
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

// Merges the accumulators of each group of `width` neighbouring lanes. All lanes of a group get the
// result. The whole warp takes part.
template <class Accumulator>
__device__ __forceinline__ Accumulator merge_lanes(Accumulator found, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) found.merge(found.exchange(distance));
  const unsigned votes = __ballot_sync(kAllLanes, found.nan);
  const unsigned group = kAllLanes >> (kWarp - width) << (threadIdx.x % kWarp & -width);
  found.nan = (votes & group) != 0;
  return found;
}

// An output turns the accumulator of a row into results. It names the type of the Accumulator.
// label() is called before the row is read, so that the label is loaded meanwhile. write() is
// called by all threads of the block. The `threads` threads of a row, of which this one is `lane`,
// pass the same settled accumulator. With kWholeWarps a row has at least a warp of threads.

// What a launch of rows_kernel does. kWhole reads rows and writes results. kPart reads parts of
// rows, with many blocks for each row, and writes the accumulators of the parts to `partial` [N,
// splits]. kMerge merges these and writes results.
enum class Phase { kWhole, kPart, kMerge };

// A block has 256 / threads rows, and `threads` is a power of two. Each thread reads its share of a
// row by read_row(). Shuffles merge the accumulators of a warp, and shared memory those of several
// warps.
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
      __syncthreads();  // the previous row has been merged
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

// What a lane reads from shared memory at once: one bank, or two for float64.
template <class Scalar>
using BankUnit = std::conditional_t<sizeof(Scalar) == 8, uint2, unsigned>;

// Where a tile keeps the scalars of its rows. Rows whose size is a multiple of 16 bytes are padded
// by a unit, because without it they would share few banks. Other rows lie as in memory, so that
// their packs are copied as they are; a warp that reads a column then asks a bank for two words at
// most.
template <class Scalar>
struct TileLayout {
  using Unit = BankUnit<Scalar>;
  static constexpr int kUnits = 16 / sizeof(Unit);

  unsigned padding;     // scalars after a row
  unsigned reciprocal;  // floor(2^24 / classes) + 1: row() is exact in a tile

  explicit TileLayout(unsigned classes)
      : padding(classes * sizeof(Scalar) % 16 == 0 ? sizeof(Unit) / sizeof(Scalar) : 0),
        reciprocal((1u << 24) / classes + 1) {}

  __device__ __forceinline__ int row(int i) const { return static_cast<int>(i * reciprocal >> 24); }
  __device__ __forceinline__ int place(int i) const { return i + row(i) * padding; }

  // `aligned` is the place of pack 0. With padding it is the start of the first row.
  __device__ __forceinline__ void store(Scalar* aligned, int p, const uint4& pack) const {
    if (padding == 0) {
      reinterpret_cast<uint4*>(aligned)[p] = pack;
      return;
    }
    Unit unit[kUnits];
    memcpy(unit, &pack, sizeof unit);
    Unit* first = reinterpret_cast<Unit*>(aligned + place(p * Pack<Scalar>::kSize));
#pragma unroll
    for (int j = 0; j < kUnits; ++j) first[j] = unit[j];
  }
};

// For short rows: a block copies 128 of them into shared memory, and then each thread has a row.
// Contiguous rows are read in packs from the first 16-byte boundary on, other rows scalar by
// scalar. Every tile has its own block: more tiles than a grid may have blocks would not fit in
// memory.
template <class Scalar, class Output>
__global__ void __launch_bounds__(kTileRows)
    tile_kernel(Logits<Scalar> logits, TileLayout<Scalar> layout, Output output) {
  constexpr int kSize = Pack<Scalar>::kSize;
  constexpr int kRowBytes = kTileRowBytes + sizeof(BankUnit<Scalar>);
  __shared__ __align__(16) unsigned char storage[kTileRows * kRowBytes];
  const int thread = threadIdx.x, classes = logits.classes;
  const int64_t first = int64_t{blockIdx.x} * kTileRows;
  const Row<Scalar> origin = logits.row(first + thread);
  const int64_t label = output.label(origin);

  const int offset = reinterpret_cast<uintptr_t>(logits.data) % 16 / sizeof(Scalar);
  const bool packed = logits.rows.data == nullptr && logits.col_stride == 1 &&
                      logits.row_stride == classes && (layout.padding == 0 || offset == 0);
  Scalar* tile = reinterpret_cast<Scalar*>(storage) + (packed ? offset : 0);
  const int count = static_cast<int>(min(int64_t{kTileRows}, logits.rows.size - first)) * classes;
  const int head = min((kSize - offset) % kSize, count);
  const int packs = packed ? (count - head) / kSize : 0;
  const auto* source = reinterpret_cast<const uint4*>(logits.data + first * classes + head);
  for (int p = thread; p < packs; p += 4 * kTileRows) {
    uint4 pack[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (p + j * kTileRows < packs) pack[j] = __ldg(source + p + j * kTileRows);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (p + j * kTileRows < packs) layout.store(tile + head, p + j * kTileRows, pack[j]);
  }
  for (int j = thread; j < count - packs * kSize; j += kTileRows) {
    const int i = j < head ? j : j + packs * kSize, row = layout.row(i);
    const Row<Scalar> source_row = logits.row(first + row);
    tile[layout.place(i)] = __ldg(source_row.data + (i - row * classes) * source_row.stride);
  }
  __syncthreads();

  const Row<Scalar> staged{tile + layout.place(thread * classes),
                           1,
                           classes,
                           origin.source,
                           origin.position,
                           origin.active};
  typename Output::Accumulator found;
  if (staged.active) found.add_row(staged);
  found.settle();
  output.write(staged, label, found, 0, 1);
}

}  // namespace marginops::cuda
