#include "statistics_launch.h"

#include "mean_loss.cuh"
#include "plan.cuh"
#include "statistics.cuh"
#include "statistics_gradient.cuh"

namespace marginops::cuda {
namespace {

template <class Scalar, class Output>
cudaError_t write_statistics(const Matrix& logits, const Output& output, void* workspace,
                             cudaStream_t stream) {
  return write_rows(plan_rows(logits, logits.rows, false, false),
                    view<Scalar>(logits, {nullptr, logits.rows, 0}),
                    static_cast<typename Output::Accumulator*>(workspace), output, stream);
}

template <class Scalar, bool kDense>
cudaError_t write_gradient(const Logits<Scalar>& logits, const GradientView<Value<Scalar>>& inputs,
                           Scalar* grad_logits, cudaStream_t stream) {
  const int64_t rows = logits.rows.size, classes = logits.classes;
  const int64_t packs = classes / Pack<Scalar>::kSize + 1;
  const int64_t enough_threads = int64_t{1024} * multiprocessors();
  int threads = 1;
  while (threads < kGradientBlock && (threads * 4 < packs || (threads < 8 && threads < classes)))
    threads *= 2;
  unsigned parts = 1;  // parts of a row, several where rows are few
  while (parts < 1024 && rows * threads * parts * 2 <= enough_threads &&
         int64_t{threads} * parts * 4 < packs)
    parts *= 2;
  const dim3 grid(blocks_for(rows, kGradientBlock / threads), parts);
  return launch(gradient_kernel<Scalar, kDense>, grid, kGradientBlock, stream, logits, inputs,
                threads, grad_logits);
}

}  // namespace

size_t statistics_workspace_bytes(const Matrix& logits, bool with_mean) {
  const int64_t parts = plan_rows(logits, logits.rows, false, false).parts(logits.rows);
  const size_t rows =
      parts * (logits.dtype == Dtype::kFloat64 ? sizeof(StatisticsAccumulator<double>)
                                               : sizeof(StatisticsAccumulator<float>));
  // The mean needs its workspace only when that of the rows is free again.
  return with_mean ? std::max(rows, mean_parts(logits.rows) * sizeof(LossSum)) : rows;
}

cudaError_t sample_statistics(const Matrix& logits, const Target& target, const Vector& input_norm,
                              const LogNorm& log_norm, const StatisticsResult& result,
                              void* workspace, cudaStream_t stream) {
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Number = Value<decltype(scalar)>;
    const auto values = [](void* data) { return static_cast<Number*>(data); };
    const TargetOutput<Number> margins{target, Normalizer<Number>(log_norm), values(result.margin),
                                       result.rival};
    const StatisticsOutput<Number> output{margins,
                                          column<Number>(input_norm),
                                          values(result.top2_margin),
                                          values(result.loss),
                                          values(result.confidence),
                                          values(result.entropy),
                                          result.correct,
                                          values(result.el2n),
                                          values(result.gradient_norm),
                                          result.counted,
                                          values(result.maximum),
                                          values(result.log_sum)};
    const cudaError_t error = write_statistics<decltype(scalar)>(logits, output, workspace, stream);
    if (error != cudaSuccess || result.mean_loss == nullptr) return error;
    return write_mean_loss(values(result.loss), result.counted, logits.rows,
                           static_cast<LossSum*>(workspace), values(result.mean_loss),
                           values(result.num_counted), stream);
  });
}

cudaError_t row_sums(const Matrix& logits, const IndexVector& target, bool with_sums, void* values,
                     int64_t* classes, void* workspace, cudaStream_t stream) {
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Number = Value<decltype(scalar)>;
    const auto write = [&](auto found) {
      const ShardOutput<Number, decltype(found)> output{target, static_cast<Number*>(values),
                                                        classes};
      return write_statistics<decltype(scalar)>(logits, output, workspace, stream);
    };
    return with_sums ? write(StatisticsAccumulator<Number>{}) : write(TopAccumulator<Number>{});
  });
}

cudaError_t sample_statistics_gradient(const Matrix& logits, const Target& target,
                                       const LogNorm& log_norm, const StatisticsGradient& gradient,
                                       void* grad_logits, cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  return with_scalar(logits.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Number = Value<Scalar>;
    const GradientView<Number> inputs{target,
                                      Normalizer<Number>(log_norm),
                                      {gradient.rival.data, gradient.rival.stride},
                                      column<Number>(gradient.confidence),
                                      column<Number>(gradient.entropy),
                                      column<Number>(gradient.maximum),
                                      column<Number>(gradient.log_sum),
                                      column<Number>(gradient.grad_margin),
                                      column<Number>(gradient.grad_loss),
                                      column<Number>(gradient.grad_confidence),
                                      column<Number>(gradient.grad_entropy),
                                      static_cast<const Number*>(gradient.grad_mean_loss),
                                      static_cast<const Number*>(gradient.num_counted)};
    const Logits<Scalar> rows = view<Scalar>(logits, {nullptr, logits.rows, 0});
    const auto out = static_cast<Scalar*>(grad_logits);
    const bool dense = gradient.grad_loss.data != nullptr ||
                       gradient.grad_confidence.data != nullptr ||
                       gradient.grad_entropy.data != nullptr || gradient.grad_mean_loss != nullptr;
    return dense ? write_gradient<Scalar, true>(rows, inputs, out, stream)
                 : write_gradient<Scalar, false>(rows, inputs, out, stream);
  });
}

}  // namespace marginops::cuda
