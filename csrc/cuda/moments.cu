#include "moments_launch.h"

#include "moments.cuh"

namespace marginops::cuda {
namespace {

// Few rows are cut into short parts, so that all multiprocessors have work. The size depends on the
// number of rows alone, so results are the same on every device.
int rows_of_part(int64_t rows) {
  int size = kWarp;
  while (size < kMomentRows && rows > int64_t{512} * size) size *= 2;
  return size;
}

int scalar_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// The number of columns that a thread reads at once: a pack, or one.
int width_of(const Matrix& input) {
  const int bytes = scalar_bytes(input.dtype);
  const bool aligned = input.col_stride == 1 && input.row_stride * bytes % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(input.data) % 16 == 0;
  return aligned ? 16 / bytes : 1;
}

int64_t ceil_div(int64_t count, int64_t by) { return (count + by - 1) / by; }

// How blocks share the work, and the memory for what one launch leaves for the next.
template <class Number>
struct MomentPlan {
  MomentPlan(const Matrix& input, int64_t classes, bool normalize, void* memory)
      : width(width_of(input)), rows(rows_of_part(input.rows)), parts(ceil_div(input.rows, rows)) {
    block = static_cast<int>(
        std::min<int64_t>(ceil_div(ceil_div(input.cols, width), kWarp) * kWarp, kMomentBlock));
    tiles = block == 0 ? 0 : ceil_div(input.cols, block * width);
    warps = ceil_div(input.cols, kWarp * width);
    groups = ceil_div(input.cols, kWarp);
    norm = !normalize ? RowNorm::kNone : tiles <= 1 ? RowNorm::kOwn : RowNorm::kGiven;
    Workspace workspace(memory);
    const int64_t pieces = parts > 1 ? 2 * parts : 0;
    begin = workspace.take<int64_t>(classes + 1);
    class_squares = workspace.take<double>(classes * warps);
    piece_squares = workspace.take<double>(pieces * warps);
    merged_squares = workspace.take<double>(pieces * groups / 2);
    unsafe = workspace.take<int>(1);
    piece_mean = workspace.take<double>(pieces * input.cols);
    scale = workspace.take<RowScale<Number>>(norm == RowNorm::kGiven ? input.rows : 0);
    bytes = workspace.size();
  }

  int width, block, rows;
  int64_t parts, tiles, warps, groups;
  RowNorm norm;
  int64_t* begin;
  int* unsafe;
  double *class_squares, *piece_squares, *merged_squares, *piece_mean;
  RowScale<Number>* scale;
  size_t bytes;
};

template <class Scalar, int kWidth>
cudaError_t write_pieces(const Matrix& input, const MomentPlan<Value<Scalar>>& plan,
                         const MomentParts<Value<Scalar>>& parts, cudaStream_t stream) {
  const MomentInput<Scalar> rows{static_cast<const Scalar*>(input.data),
                                 input.rows,
                                 input.cols,
                                 input.row_stride,
                                 input.col_stride,
                                 plan.scale};
  const auto run = [&](auto kernel) {
    return launch(kernel, blocks_for(plan.parts * plan.tiles, 1), plan.block, stream, rows, parts);
  };
  if (plan.norm == RowNorm::kOwn) return run(moment_piece_kernel<Scalar, kWidth, RowNorm::kOwn>);
  if (plan.norm == RowNorm::kGiven) {
    const cudaError_t error = launch(moment_norm_kernel<Scalar, kWidth>, blocks_for(input.rows, 1),
                                     kMomentBlock, stream, rows, plan.scale);
    if (error != cudaSuccess) return error;
    return run(moment_piece_kernel<Scalar, kWidth, RowNorm::kGiven>);
  }
  cudaError_t error = cudaMemsetAsync(plan.unsafe, 0, sizeof *plan.unsafe, stream);
  if (error != cudaSuccess) return error;
  error = run(moment_piece_kernel<Scalar, kWidth, RowNorm::kNone>);
  if constexpr (sizeof(Value<Scalar>) == 4) {
    if (error != cudaSuccess) return error;
    const int64_t most = int64_t{8} * multiprocessors();  // mostly there is nothing to do
    error = launch(moment_wide_kernel<Scalar, kWidth>,
                   blocks_for(plan.parts * plan.warps, kMomentBlock / kWarp, most), kMomentBlock,
                   stream, rows, parts);
  }
  return error;
}

template <class Scalar>
cudaError_t write_means(const Matrix& input, const MomentPlan<Value<Scalar>>& plan,
                        const MomentParts<Value<Scalar>>& parts, cudaStream_t stream) {
  using Number = Value<Scalar>;
  cudaError_t error = plan.width == 1
                          ? write_pieces<Scalar, 1>(input, plan, parts, stream)
                          : write_pieces<Scalar, Pack<Scalar>::kSize>(input, plan, parts, stream);
  if (error != cudaSuccess || plan.parts == 1) return error;
  const bool by_class = parts.classes <= plan.parts;
  const int64_t items = by_class ? parts.classes : plan.parts;
  return launch(moment_merge_kernel<Number>,
                blocks_for(items * ceil_div(input.cols, kMergeColumns), 1), kMomentBlock, stream,
                input.cols, parts, items, by_class);
}

}  // namespace

int moment_key_bytes(int64_t classes) {
  return classes <= UINT8_MAX ? 1 : classes <= INT16_MAX ? 2 : 4;
}

cudaError_t moment_keys(const Target& target, int64_t classes, void* key, cudaStream_t stream) {
  if (target.index.size == 0) return cudaSuccess;
  return launch(moment_key_kernel, blocks_for(target.index.size, kMomentBlock), kMomentBlock,
                stream, target, classes, MutableKeys{key, moment_key_bytes(classes)});
}

size_t class_moments_workspace_bytes(const Matrix& input, int64_t classes, bool normalize) {
  if (input.dtype == Dtype::kFloat64)
    return MomentPlan<double>(input, classes, normalize, nullptr).bytes;
  return MomentPlan<float>(input, classes, normalize, nullptr).bytes;
}

cudaError_t class_moments(const Matrix& input, const ClassOrder& order, int64_t classes,
                          bool normalize, const MomentsResult& result, void* workspace,
                          cudaStream_t stream) {
  return with_scalar(input.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Number = Value<Scalar>;
    const MomentPlan<Number> plan(input, classes, normalize, workspace);
    const ClassKeys key{order.key, moment_key_bytes(classes)};
    const auto mean = static_cast<Number*>(result.mean);
    // The mean of a class without rows stays NaN.
    cudaError_t error = cudaMemsetAsync(mean, 0xff, classes * input.cols * sizeof(Number), stream);
    if (error != cudaSuccess) return error;
    error = launch(moment_begin_kernel, blocks_for(classes + 1, kMomentBlock), kMomentBlock, stream,
                   key, input.rows, classes, plan.begin, result.count);
    if (error != cudaSuccess) return error;
    const MomentParts<Number> parts{key,
                                    order.row,
                                    plan.begin,
                                    classes,
                                    plan.rows,
                                    plan.warps,
                                    plan.groups,
                                    plan.unsafe,
                                    mean,
                                    plan.piece_mean,
                                    plan.class_squares,
                                    plan.piece_squares,
                                    plan.merged_squares};
    if (input.rows > 0 && input.cols > 0) {
      error = write_means<Scalar>(input, plan, parts, stream);
      if (error != cudaSuccess) return error;
    }
    return launch(moment_radius_kernel<Number>, blocks_for(classes, kMomentBlock / kWarp),
                  kMomentBlock, stream, parts, static_cast<Number*>(result.radius));
  });
}

}  // namespace marginops::cuda
