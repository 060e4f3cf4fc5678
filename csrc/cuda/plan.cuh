// How threads share the rows of logits, and the launches that follow from it.
#pragma once

#include "rows.cuh"

namespace marginops::cuda {

// With at most so many parts, the accumulators of split rows take 1 or 2 MiB.
constexpr int64_t kMostParts = 1 << 15;

struct Plan {
  bool tile;          // tile_kernel runs; the other fields are for rows_kernel
  bool whole;         // one launch reads and writes
  int read_threads;   // threads that read a row or a part of it
  int splits;         // parts of a row
  int write_threads;  // threads that merge the parts of a row

  // The number of accumulators that one launch leaves for the next.
  int64_t parts(int64_t rows) const { return whole ? 0 : rows * splits; }
};

// whole_warps: the output needs at least one warp for each row. nearest: it can use several.
inline Plan plan_rows(const Matrix& logits, int64_t rows, bool whole_warps, bool nearest) {
  const int64_t scalar = logits.dtype == Dtype::kFloat64   ? 8
                         : logits.dtype == Dtype::kFloat32 ? 4
                                                           : 2;
  const int64_t packs = (logits.cols * scalar + 15) / 16;
  // Enough to hide the latency of memory, each with up to four packs in flight.
  const int64_t enough_threads = int64_t{512} * multiprocessors();
  const bool by_columns =
      logits.col_stride != 1 && std::abs(logits.row_stride) < std::abs(logits.col_stride);

  Plan plan{false, true, 1, 1, 0};
  plan.tile = !whole_warps && !by_columns && logits.cols * scalar <= kTileRowBytes;
  if (plan.tile) return plan;
  if (!by_columns) {
    while (plan.read_threads < kWarp && plan.read_threads * 8 < packs) plan.read_threads *= 2;
    if (whole_warps) plan.read_threads = kWarp;
    while (plan.read_threads < kRowsBlock && packs >= plan.read_threads * 8 &&
           (rows * plan.read_threads < enough_threads || packs > plan.read_threads * 32))
      plan.read_threads *= 2;
  }
  const int64_t loads = by_columns ? logits.cols / 4 : packs / plan.read_threads;
  while (plan.splits < 1024 && rows * plan.read_threads * plan.splits * 2 <= enough_threads &&
         rows * plan.splits * 2 <= kMostParts && loads >= plan.splits * 8)
    plan.splits *= 2;

  plan.write_threads = kWarp;
  while (nearest && plan.write_threads < kRowsBlock && logits.cols >= plan.write_threads * 8 &&
         rows * plan.write_threads < enough_threads)
    plan.write_threads *= 2;
  plan.whole = plan.splits == 1 && !(whole_warps && plan.read_threads < kWarp);
  if (plan.whole && nearest) plan.read_threads = std::max(plan.read_threads, plan.write_threads);
  return plan;
}

template <class Scalar, class Output>
cudaError_t write_rows(const Plan& plan, const Logits<Scalar>& logits,
                       typename Output::Accumulator* partial, const Output& output,
                       cudaStream_t stream) {
  const int64_t rows = logits.rows.size;
  if (rows == 0) return cudaSuccess;
  if constexpr (!Output::kWholeWarps) {
    if (plan.tile)
      return launch(tile_kernel<Scalar, Output>, blocks_for(rows, kTileRows), kTileRows, stream,
                    logits, TileLayout<Scalar>(logits.classes), output);
  }
  const auto run = [&](int threads, unsigned parts, Phase phase) {
    const dim3 grid(blocks_for(rows, kRowsBlock / threads), parts);
    return launch(rows_kernel<Scalar, Output>, grid, kRowsBlock, stream, logits, threads,
                  plan.splits, phase, partial, output);
  };
  if (plan.whole) return run(plan.read_threads, 1, Phase::kWhole);
  const cudaError_t error = run(plan.read_threads, plan.splits, Phase::kPart);
  return error != cudaSuccess ? error : run(plan.write_threads, 1, Phase::kMerge);
}

template <class Scalar>
Logits<Scalar> view(const Matrix& logits, const Rows& rows) {
  return {static_cast<const Scalar*>(logits.data), logits.row_stride, logits.col_stride,
          static_cast<int32_t>(logits.cols), rows};
}

}  // namespace marginops::cuda
