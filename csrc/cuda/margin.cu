#include "classification_margin.cuh"

#include "class_sum.cuh"
#include "minimal_margin.cuh"
#include "pair_gradient.cuh"
#include "plan.cuh"
#include "top2_margin.cuh"

namespace marginops::cuda {
namespace {

// A table of all distances pays off for few classes and many rows.
constexpr int64_t kTableClasses = 256;
constexpr int64_t kTableRows = 16384;
template <class Weight>
HeadView<Weight> view(const Head& head) {
  const Matrix& weight = head.weight;
  const bool aligned = weight.col_stride == 1 && weight.row_stride * sizeof(Weight) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
  return {static_cast<const Weight*>(weight.data),
          weight.row_stride,
          weight.col_stride,
          weight.cols,
          static_cast<const Weight*>(head.bias.data),
          head.bias.stride,
          aligned};
}

Rows all_rows(const Matrix& logits) { return {nullptr, logits.rows, 0}; }

cudaError_t write_target(const Matrix& logits, const Rows& rows, const Target& target,
                         const LogNorm& log_norm, void* margin, int64_t* rival, void* workspace,
                         cudaStream_t stream) {
  const Plan plan = plan_rows(logits, rows.size, false, false);
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Number = Value<decltype(scalar)>;
    const TargetOutput<Number> output{target, Normalizer<Number>(log_norm),
                                      static_cast<Number*>(margin), rival};
    return write_rows(plan, view<decltype(scalar)>(logits, rows),
                      static_cast<TopAccumulator<Number>*>(workspace), output, stream);
  });
}

// Calls body with an empty accumulator for the margins of logits or of probabilities.
template <class Number, class Body>
auto with_top2_accumulator(bool softmax, Body body) {
  return softmax ? body(StatisticsAccumulator<Number>{}) : body(TopAccumulator<Number>{});
}

bool use_table(const Matrix& logits, int64_t rows) {
  return logits.cols <= kTableClasses && rows >= std::max(kTableRows, logits.cols * logits.cols);
}

// The parts of the workspace of minimal margins.
template <class Number>
struct BoundaryWorkspace {
  Plan plan;
  TopAccumulator<Number>* partial;
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
    partial = workspace.take<TopAccumulator<Number>>(plan.parts(rows.size));
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
  const int64_t parts = plan_rows(logits, rows.size, false, false).parts(rows.size);
  return parts * (logits.dtype == Dtype::kFloat64 ? sizeof(TopAccumulator<double>)
                                                  : sizeof(TopAccumulator<float>));
}

size_t top2_margin_workspace_bytes(const Matrix& logits, bool softmax) {
  const auto size = [](auto found) { return sizeof found; };
  const int64_t parts = plan_rows(logits, logits.rows, false, false).parts(logits.rows);
  return parts * (logits.dtype == Dtype::kFloat64 ? with_top2_accumulator<double>(softmax, size)
                                                  : with_top2_accumulator<float>(softmax, size));
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
                                        const LogNorm& log_norm, const Rows& rows, void* margin,
                                        int64_t* rival, void* workspace, cudaStream_t stream) {
  return write_target(logits, rows, target, log_norm, margin, rival, workspace, stream);
}

cudaError_t top2_margin(const Matrix& logits, bool softmax, void* margin, void* workspace,
                        cudaStream_t stream) {
  const Plan plan = plan_rows(logits, logits.rows, false, false);
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Number = Value<decltype(scalar)>;
    return with_top2_accumulator<Number>(softmax, [&](auto found) {
      using Found = decltype(found);
      return write_rows(plan, view<decltype(scalar)>(logits, all_rows(logits)),
                        static_cast<Found*>(workspace),
                        Top2MarginOutput<Number, Found>{static_cast<Number*>(margin)}, stream);
    });
  });
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

cudaError_t pair_distance(const Head& head, const IndexMatrix& pair, void* distance,
                          cudaStream_t stream) {
  if (pair.rows == 0) return cudaSuccess;
  return with_scalar(head.weight.dtype, [&](auto scalar) {
    using Weight = decltype(scalar);
    constexpr int kBlock = 256;
    return launch(pair_distance_kernel<Weight>, blocks_for(pair.rows, kBlock / kWarp), kBlock,
                  stream, view<Weight>(head), head.weight.rows, pair,
                  static_cast<Value<Weight>*>(distance));
  });
}

size_t class_sum_workspace_bytes(int64_t size, const Matrix& rows) {
  if (size <= kSumEntries) return 0;
  const size_t value = rows.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  return size_t{2} * blocks_for(size, kSumEntries) * rows.cols * value;
}

cudaError_t class_sum(const int64_t* key, const void* coefficient, int64_t size, const Matrix& rows,
                      int64_t classes, void* result, void* workspace, cudaStream_t stream) {
  if (classes == 0 || rows.cols == 0) return cudaSuccess;
  return with_scalar(rows.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Number = Value<Scalar>;
    const auto sums = static_cast<Number*>(result), pieces = static_cast<Number*>(workspace);
    cudaError_t error = cudaMemsetAsync(sums, 0, classes * rows.cols * sizeof(Number), stream);
    if (error != cudaSuccess || size == 0) return error;
    const ClassSumEntries<Number> entries{key, static_cast<const Number*>(coefficient), size,
                                          rows.rows, classes};
    const int block = static_cast<int>(std::min<int64_t>((rows.cols + 31) / 32 * 32, kSumBlock));
    const int64_t parts = blocks_for(size, kSumEntries), tiles = blocks_for(rows.cols, block);
    const unsigned blocks = blocks_for(parts * tiles, 1);
    error = launch(class_sum_kernel<Scalar>, blocks, block, stream, entries,
                   static_cast<const Scalar*>(rows.data), rows.row_stride, rows.col_stride,
                   rows.cols, sums, pieces);
    if (error != cudaSuccess || size <= kSumEntries) return error;
    return launch(class_join_kernel<Number>, blocks, block, stream, entries, rows.cols, pieces,
                  sums);
  });
}

}  // namespace marginops::cuda
