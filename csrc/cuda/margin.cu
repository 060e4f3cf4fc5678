#include "margin.cuh"
#include "pair_gradient.cuh"

namespace marginops::cuda {
namespace {

// A table of all distances pays off for few classes and many rows.
constexpr int64_t kTableClasses = 256;
constexpr int64_t kTableRows = 16384;
// The parts of split rows take at most 1 MiB.
constexpr int64_t kMostParts = (1 << 20) / sizeof(Top2<double>);

struct Plan {
  bool tile;          // tile_kernel; the rest is for rows_kernel
  bool whole;         // one launch
  int read_threads;   // a row, or a part of it
  int splits;         // parts of a row
  int write_threads;  // a row, when its parts are merged
};

// whole_warps: the output needs at least a warp a row; it can use several if `nearest`.
Plan plan_rows(const Matrix& logits, int64_t rows, bool whole_warps, bool nearest) {
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
cudaError_t write_rows(const Plan& plan, const Logits<Scalar>& logits, Top2<Value<Scalar>>* partial,
                       const Output& output, cudaStream_t stream) {
  const int64_t rows = logits.rows.size;
  if (rows == 0) return cudaSuccess;
  if constexpr (!Output::kWholeWarps) {
    if (plan.tile) {
      // An odd number of banks from row to row, or of bank pairs for float64.
      constexpr int kUnit = sizeof(Scalar) < 4 ? 4 : sizeof(Scalar);
      const int units = (logits.classes * int{sizeof(Scalar)} + kUnit - 1) / kUnit | 1;
      return launch(tile_kernel<Scalar, Output>, blocks_for(rows, kTileRows), kTileRows, stream,
                    logits, units * kUnit / int{sizeof(Scalar)}, output);
    }
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

template <class Weight>
HeadView<Weight> view(const Head& head) {
  const Matrix& weight = head.weight;
  const bool aligned = weight.col_stride == 1 && weight.row_stride * sizeof(Weight) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
  const Vector* bias = head.bias;
  return {static_cast<const Weight*>(weight.data),
          weight.row_stride,
          weight.col_stride,
          weight.cols,
          bias == nullptr ? nullptr : static_cast<const Weight*>(bias->data),
          bias == nullptr ? 0 : bias->stride,
          aligned};
}

Rows all_rows(const Matrix& logits) { return {nullptr, logits.rows, 0}; }

cudaError_t write_target(const Matrix& logits, const Rows& rows, const Target& target,
                         const LogNorm& log_norm, void* margin, int64_t* rival, void* workspace,
                         cudaStream_t stream) {
  const Plan plan = plan_rows(logits, rows.size, false, false);
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Number = Value<decltype(scalar)>;
    const TargetOutput<Number> output{target, static_cast<const Number*>(log_norm.device),
                                      half_scale(static_cast<Number>(log_norm.host)),
                                      static_cast<Number*>(margin), rival};
    return write_rows(plan, view<decltype(scalar)>(logits, rows),
                      static_cast<Top2<Number>*>(workspace), output, stream);
  });
}

bool use_table(const Matrix& logits, int64_t rows) {
  return logits.cols <= kTableClasses && rows >= std::max(kTableRows, logits.cols * logits.cols);
}

// The pieces of the workspace of minimal margins.
template <class Number>
struct BoundaryWorkspace {
  Plan plan;
  Top2<Number>* partial;
  Number* table;
  Number* centre;
  Number* radius;
  size_t size;

  BoundaryWorkspace(const Matrix& logits, const Head& head, const Rows& rows, bool nearest,
                    void* memory)
      : plan(plan_rows(logits, rows.size, !use_table(logits, rows.size),
                       nearest && !use_table(logits, rows.size))) {
    const bool tabled = use_table(logits, rows.size), radii = nearest && !tabled;
    Workspace workspace(memory);
    partial = workspace.take<Top2<Number>>(plan.whole ? 0 : rows.size * plan.splits);
    table = workspace.take<Number>(tabled ? logits.cols * logits.cols : 0);
    centre = workspace.take<Number>(radii ? head.weight.cols + 1 : 0);
    radius = workspace.take<Number>(radii ? logits.cols : 0);
    size = workspace.size();
    if (!tabled) table = nullptr;
    if (!radii) radius = nullptr;
  }
};

template <class Scalar, class Weight>
cudaError_t write_boundary(const Matrix& matrix, const Head& layer, const Rows& rows, bool nearest,
                           const BoundaryResult<Value<Scalar>>& result, void* memory,
                           cudaStream_t stream) {
  using Number = Value<Scalar>;
  const BoundaryWorkspace<Number> workspace(matrix, layer, rows, nearest, memory);
  const Logits<Scalar> logits = view<Scalar>(matrix, rows);
  const HeadView<Weight> head = view<Weight>(layer);
  constexpr int kBlock = 256, kWarps = kBlock / kWarp;
  const int64_t classes = matrix.cols, most = int64_t{16} * multiprocessors();
  if (workspace.table != nullptr) {
    const cudaError_t error =
        launch(distance_table_kernel<Weight>, blocks_for(classes * classes, kWarps, most), kBlock,
               stream, head, logits.classes, workspace.table);
    if (error != cudaSuccess) return error;
    return write_rows(workspace.plan, logits, workspace.partial,
                      TableOutput<Number>{workspace.table, nearest, result}, stream);
  }
  if (nearest) {
    cudaError_t error = launch(centre_kernel<Weight>, blocks_for(head.features + 1, kWarp), kBlock,
                               stream, head, logits.classes, workspace.centre);
    if (error != cudaSuccess) return error;
    error = launch(radius_kernel<Weight>, blocks_for(classes, kWarps, most), kBlock, stream, head,
                   logits.classes, workspace.centre, workspace.radius);
    if (error != cudaSuccess) return error;
  }
  return write_rows(workspace.plan, logits, workspace.partial,
                    DistanceOutput<Number, Weight>{head, workspace.radius, result}, stream);
}

cudaError_t minimal_margin(const Matrix& logits, const Head& head, const Rows& rows, bool nearest,
                           void* score, int64_t* pair, void* distance, void* workspace,
                           cudaStream_t stream) {
  if (rows.size == 0) return cudaSuccess;
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Number = Value<Scalar>;
    const BoundaryResult<Number> result{static_cast<Number*>(score), pair,
                                        static_cast<Number*>(distance)};
    if (head.weight.dtype == logits.dtype)
      return write_boundary<Scalar, Scalar>(logits, head, rows, nearest, result, workspace, stream);
    if constexpr (sizeof(Scalar) == 2) {
      if (head.weight.dtype == Dtype::kFloat32)
        return write_boundary<Scalar, float>(logits, head, rows, nearest, result, workspace,
                                             stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

size_t classification_margin_workspace_bytes(const Matrix& logits, const Rows& rows) {
  const Plan plan = plan_rows(logits, rows.size, false, false);
  if (plan.whole) return 0;
  const size_t part = logits.dtype == Dtype::kFloat64 ? sizeof(Top2<double>) : sizeof(Top2<float>);
  return rows.size * plan.splits * part;
}

size_t minimal_margin_workspace_bytes(const Matrix& logits, const Head& head, const Rows& rows,
                                      bool nearest) {
  if (logits.dtype == Dtype::kFloat64)
    return BoundaryWorkspace<double>(logits, head, rows, nearest, nullptr).size;
  return BoundaryWorkspace<float>(logits, head, rows, nearest, nullptr).size;
}

cudaError_t classification_margin(const Matrix& logits, const Target& target,
                                  const LogNorm& log_norm, void* margin, void* workspace,
                                  cudaStream_t stream) {
  return write_target(logits, all_rows(logits), target, log_norm, margin, nullptr, workspace,
                      stream);
}

cudaError_t classification_margin_rival(const Matrix& logits, const Target& target,
                                        const Rows& rows, int64_t* rival, void* workspace,
                                        cudaStream_t stream) {
  return write_target(logits, rows, target, {}, nullptr, rival, workspace, stream);
}

cudaError_t minimal_margin_score(const Matrix& logits, const Head& head, bool nearest, void* score,
                                 void* workspace, cudaStream_t stream) {
  return minimal_margin(logits, head, all_rows(logits), nearest, score, nullptr, nullptr, workspace,
                        stream);
}

cudaError_t minimal_margin_pair(const Matrix& logits, const Head& head, const Rows& rows,
                                bool nearest, int64_t* pair, void* distance, void* workspace,
                                cudaStream_t stream) {
  return minimal_margin(logits, head, rows, nearest, nullptr, pair, distance, workspace, stream);
}

cudaError_t pair_gradient(const int64_t* key, const void* coefficient, int64_t size,
                          const Head& head, void* grad_weight, void* grad_bias,
                          cudaStream_t stream) {
  return with_scalar(head.weight.dtype, [&](auto scalar) {
    using Weight = decltype(scalar);
    const HeadView<Weight> weight = view<Weight>(head);
    const int64_t classes = head.weight.rows, tiles = weight.features / kPairBlock + 1;
    if (classes == 0) return cudaSuccess;
    return launch(pair_gradient_kernel<Weight>, blocks_for(classes * tiles, 1), kPairBlock, stream,
                  key, static_cast<const Value<Weight>*>(coefficient), size, weight, classes,
                  static_cast<Weight*>(grad_weight), static_cast<Weight*>(grad_bias));
  });
}

}  // namespace marginops::cuda
