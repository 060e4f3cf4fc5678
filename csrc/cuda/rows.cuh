// Reading rows of logits: a kernel reads each row once into the accumulator of its output, and
// hands it over. Merges have a fixed order or one that does not matter, so results are
// deterministic.
#pragma once

#include <type_traits>

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

// What a lane reads from shared memory at once: a bank, or two for float64.
template <class Scalar>
using BankUnit = std::conditional_t<sizeof(Scalar) == 8, uint2, unsigned>;

// Where a tile keeps the scalars of its rows. Rows of a multiple of 16 bytes are a unit apart, as
// side by side they would share few banks. Others lie as in memory, so that their packs are just
// copied: a warp that reads a column asks a bank for two words at most.
template <class Scalar>
struct TileLayout {
  using Unit = BankUnit<Scalar>;
  static constexpr int kUnits = 16 / sizeof(Unit);

  unsigned padding;     // scalars after a row
  unsigned reciprocal;  // above 2^24 / classes by at most 1: exact for the scalars of a tile

  explicit TileLayout(unsigned classes)
      : padding(classes * sizeof(Scalar) % 16 == 0 ? sizeof(Unit) / sizeof(Scalar) : 0),
        reciprocal((1u << 24) / classes + 1) {}

  __device__ __forceinline__ int row(int i) const { return static_cast<int>(i * reciprocal >> 24); }
  __device__ __forceinline__ int place(int i) const { return i + row(i) * padding; }

  // `aligned` is where pack 0 goes: with padding, the first row.
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

// Short rows: a block brings 128 of them into shared memory, and each thread then has a row. Rows
// side by side are read in packs from the first 16-byte boundary on, others scalar by scalar. There
// is a block for every tile, however many: more than a grid may have would not fit in memory.
template <class Scalar, class Output>
__global__ void __launch_bounds__(kTileRows)
    tile_kernel(Logits<Scalar> logits, TileLayout<Scalar> layout, Output output) {
  constexpr int kSize = Pack<Scalar>::kSize;
  constexpr int kRowBytes = kTileRowBytes + sizeof(BankUnit<Scalar>);
  __shared__ __align__(16) unsigned char storage[kTileRows * kRowBytes];
  const int thread = threadIdx.x, classes = logits.classes;
  const int64_t first = int64_t{blockIdx.x} * kTileRows;
  const Row<Scalar> own = logits.row(first + thread);
  const int64_t label = output.label(own);

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
    const Row<Scalar> from = logits.row(first + row);
    tile[layout.place(i)] = __ldg(from.data + (i - row * classes) * from.stride);
  }
  __syncthreads();

  const Row<Scalar> staged{
      tile + layout.place(thread * classes), 1, classes, own.source, own.position, own.active};
  typename Output::Accumulator found;
  if (staged.active) found.add_row(staged);
  found.settle();
  output.write(staged, label, found, 0, 1);
}

}  // namespace marginops::cuda
