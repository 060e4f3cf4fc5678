// The CUDA kernels of the ops declared in marginops/ops: checks what kernels rely on, allocates,
// and launches in the current stream.
#ifndef USE_CUDA
#define USE_CUDA  // the stable headers declare the CUDA stream and errors only then
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "margin.h"
#include "select.h"

namespace marginops::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device the current one and knows its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, float64, bfloat16 or float16");
  }
}

ScalarType result_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void check_place(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of the first ",
                  "argument");
}

Matrix matrix(const Tensor& tensor, const char* name, const Tensor& like) {
  check_place(tensor, name, 2, like);
  return {tensor.const_data_ptr(), dtype_of(tensor, name), tensor.size(0),
          tensor.size(1),          tensor.stride(0),       tensor.stride(1)};
}

Vector vector(const Tensor& tensor, const char* name, const Tensor& like) {
  check_place(tensor, name, 1, like);
  return {tensor.const_data_ptr(), dtype_of(tensor, name), tensor.size(0), tensor.stride(0)};
}

IndexVector index_vector(const Tensor& tensor, const char* name, const Tensor& like) {
  check_place(tensor, name, 1, like);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, name, ": expected dtype int64");
  return {tensor.const_data_ptr<int64_t>(), tensor.size(0), tensor.stride(0)};
}

Matrix logits_of(const Tensor& tensor) {
  const Matrix logits = matrix(tensor, "logits", tensor);
  STD_TORCH_CHECK(2 <= logits.cols && logits.cols <= INT32_MAX,
                  "logits: expected 2 <= C < 2**31 classes, got ", logits.cols);
  return logits;
}

Rows rows_of(const std::optional<Tensor>& rows, const Matrix& logits, const Tensor& like) {
  if (rows.has_value()) return index_vector(*rows, "rows", like);
  return {nullptr, logits.rows, 0};
}

Target target_of(const Tensor& target, const Matrix& logits, const Tensor& like,
                 int64_t ignore_index) {
  const IndexVector index = index_vector(target, "target", like);
  STD_TORCH_CHECK(index.size == logits.rows, "target: expected ", logits.rows, " classes, got ",
                  index.size);
  return {index, ignore_index};
}

LogNorm log_norm_of(const std::optional<Tensor>& log_norm, const Matrix& logits,
                    const Tensor& like) {
  LogNorm result;
  if (!log_norm.has_value()) return result;
  STD_TORCH_CHECK(log_norm->numel() == 1, "log_norm: expected one value, got ", log_norm->numel());
  STD_TORCH_CHECK(log_norm->scalar_type() == result_type(logits.dtype),
                  "log_norm: expected the dtype of the result");
  if (!log_norm->is_cpu()) {
    STD_TORCH_CHECK(log_norm->device() == like.device(),
                    "log_norm: expected the CPU or the device of logits");
    result.device = log_norm->const_data_ptr();
  } else if (logits.dtype == Dtype::kFloat64) {
    result.host = *log_norm->const_data_ptr<double>();
  } else {
    result.host = *log_norm->const_data_ptr<float>();
  }
  return result;
}

// Owns the vector that Head points at.
class HeadArguments {
 public:
  HeadArguments(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& like)
      : head_{matrix(weight, "weight", like), nullptr} {
    if (!bias.has_value()) return;
    bias_ = vector(*bias, "bias", like);
    STD_TORCH_CHECK(bias_.size == head_.weight.rows, "bias: expected ", head_.weight.rows,
                    " values, got ", bias_.size);
    STD_TORCH_CHECK(bias_.dtype == head_.weight.dtype, "bias: expected the dtype of weight");
    head_.bias = &bias_;
  }
  HeadArguments(const HeadArguments&) = delete;
  const Head& get() const { return head_; }

  const Head& beside(const Matrix& logits) const {
    const Dtype dtype = head_.weight.dtype;
    STD_TORCH_CHECK(head_.weight.rows == logits.cols, "weight: expected ", logits.cols,
                    " rows, got ", head_.weight.rows);
    STD_TORCH_CHECK(
        dtype == logits.dtype || (dtype == Dtype::kFloat32 && logits.dtype != Dtype::kFloat64),
        "weight: expected the dtype of logits, or float32 beside bfloat16 and float16");
    return head_;
  }

 private:
  Head head_;
  Vector bias_{};
};

Tensor new_workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

Tensor classification_margin_op(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& log_norm, int64_t ignore_index) {
  const Matrix matrix = logits_of(logits);
  const Target classes = target_of(target, matrix, logits, ignore_index);
  const LogNorm norm = log_norm_of(log_norm, matrix, logits);
  const Launch launch(logits);
  Tensor margin = torch::stable::new_empty(logits, {matrix.rows}, result_type(matrix.dtype));
  Tensor workspace = new_workspace(
      logits, classification_margin_workspace_bytes(matrix, {nullptr, matrix.rows, 0}));
  STD_CUDA_CHECK(classification_margin(matrix, classes, norm, margin.mutable_data_ptr(),
                                       workspace.mutable_data_ptr(), launch.stream()));
  return margin;
}

Tensor classification_margin_rival_op(const Tensor& logits, const Tensor& target,
                                      const std::optional<Tensor>& rows, int64_t ignore_index) {
  const Matrix matrix = logits_of(logits);
  const Target classes = target_of(target, matrix, logits, ignore_index);
  const Rows chosen = rows_of(rows, matrix, logits);
  const Launch launch(logits);
  Tensor rival = torch::stable::new_empty(logits, {chosen.size}, ScalarType::Long);
  Tensor workspace = new_workspace(logits, classification_margin_workspace_bytes(matrix, chosen));
  STD_CUDA_CHECK(classification_margin_rival(matrix, classes, chosen,
                                             rival.mutable_data_ptr<int64_t>(),
                                             workspace.mutable_data_ptr(), launch.stream()));
  return rival;
}

Tensor minimal_margin_score_op(const Tensor& logits, const Tensor& weight,
                               const std::optional<Tensor>& bias, bool nearest) {
  const Matrix matrix = logits_of(logits);
  const HeadArguments arguments(weight, bias, logits);
  const Head& head = arguments.beside(matrix);
  const Launch launch(logits);
  Tensor score = torch::stable::new_empty(logits, {matrix.rows}, result_type(matrix.dtype));
  Tensor workspace = new_workspace(
      logits, minimal_margin_workspace_bytes(matrix, head, {nullptr, matrix.rows, 0}, nearest));
  STD_CUDA_CHECK(minimal_margin_score(matrix, head, nearest, score.mutable_data_ptr(),
                                      workspace.mutable_data_ptr(), launch.stream()));
  return score;
}

std::tuple<Tensor, Tensor> minimal_margin_pair_op(const Tensor& logits, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& rows, bool nearest) {
  const Matrix matrix = logits_of(logits);
  const HeadArguments arguments(weight, bias, logits);
  const Head& head = arguments.beside(matrix);
  const Rows chosen = rows_of(rows, matrix, logits);
  const Launch launch(logits);
  Tensor pair = torch::stable::new_empty(logits, {chosen.size, 2}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(logits, {chosen.size}, result_type(matrix.dtype));
  Tensor workspace =
      new_workspace(logits, minimal_margin_workspace_bytes(matrix, head, chosen, nearest));
  STD_CUDA_CHECK(minimal_margin_pair(matrix, head, chosen, nearest,
                                     pair.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr(),
                                     workspace.mutable_data_ptr(), launch.stream()));
  return {pair, distance};
}

std::tuple<Tensor, Tensor> pair_gradient_op(const Tensor& key, const Tensor& coefficient,
                                            const Tensor& weight,
                                            const std::optional<Tensor>& bias) {
  const HeadArguments arguments(weight, bias, key);
  const Matrix& matrix = arguments.get().weight;
  const IndexVector entries = index_vector(key, "key", key);
  check_place(coefficient, "coefficient", 1, key);
  STD_TORCH_CHECK(coefficient.size(0) == entries.size, "coefficient: expected ", entries.size,
                  " values, got ", coefficient.size(0));
  STD_TORCH_CHECK(coefficient.scalar_type() == result_type(matrix.dtype),
                  "coefficient: expected the dtype of results");
  STD_TORCH_CHECK(matrix.rows <= INT32_MAX, "weight: expected fewer than 2**31 rows, got ",
                  matrix.rows);
  const Launch launch(key);
  const Tensor dense_key = torch::stable::contiguous(key);
  const Tensor dense_coefficient = torch::stable::contiguous(coefficient);
  Tensor grad_weight = torch::stable::new_empty(weight, {matrix.rows, matrix.cols});
  Tensor grad_bias = torch::stable::new_empty(weight, {matrix.rows});
  STD_CUDA_CHECK(pair_gradient(dense_key.const_data_ptr<int64_t>(),
                               dense_coefficient.const_data_ptr(), entries.size, arguments.get(),
                               grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                               launch.stream()));
  return {grad_weight, grad_bias};
}

void check_k(int64_t k, int64_t count) {
  STD_TORCH_CHECK(0 <= k && k <= count, "k: expected 0 <= k <= ", count, ", got ", k);
}

Tensor index_select(const Tensor& tensor, const Tensor& index) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(tensor), from(int64_t{0}), from(index)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor stable_argsort(const Tensor& key) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(key), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);  // takes it over, to free it
  return torch::stable::detail::to<Tensor>(stack[1]);
}

std::tuple<Tensor, Tensor> empty_selection(const Tensor& like, ScalarType dtype) {
  return {torch::stable::new_empty(like, {0}, dtype),
          torch::stable::new_empty(like, {0}, ScalarType::Long)};
}

// Few of few in one launch of our own; else our kernels choose and the library's sort orders.
std::tuple<Tensor, Tensor> select_smallest_op(const Tensor& scores, int64_t k) {
  const Vector all = vector(scores, "scores", scores);
  check_k(k, all.size);
  if (k == 0) return empty_selection(scores, scores.scalar_type());
  const Launch launch(scores);
  Tensor index = torch::stable::new_empty(scores, {k}, ScalarType::Long);
  if (fits_one_block(all.size, k)) {
    Tensor values = torch::stable::new_empty(scores, {k});
    STD_CUDA_CHECK(select_sorted(all, k, values.mutable_data_ptr(),
                                 index.mutable_data_ptr<int64_t>(), launch.stream()));
    return {values, index};
  }
  const ScalarType key_type = all.dtype == Dtype::kFloat64 ? ScalarType::Long : ScalarType::Int;
  Tensor key = torch::stable::new_empty(scores, {k}, key_type);
  Tensor workspace = new_workspace(scores, select_workspace_bytes(all));
  STD_CUDA_CHECK(select_unsorted(all, k, key.mutable_data_ptr(), index.mutable_data_ptr<int64_t>(),
                                 workspace.mutable_data_ptr(), launch.stream()));
  index = index_select(index, stable_argsort(key));
  return {index_select(scores, index), index};
}

std::tuple<Tensor, Tensor> select_minimal_margin_op(const Tensor& logits, const Tensor& weight,
                                                    const std::optional<Tensor>& bias, int64_t k,
                                                    bool nearest) {
  const Matrix matrix = logits_of(logits);
  check_k(k, matrix.rows);
  if (k == 0) return empty_selection(logits, result_type(matrix.dtype));
  return select_smallest_op(minimal_margin_score_op(logits, weight, bias, nearest), k);
}

std::tuple<Tensor, Tensor> select_smallest_margin_op(const Tensor& logits, const Tensor& target,
                                                     const std::optional<Tensor>& log_norm,
                                                     int64_t k, int64_t ignore_index) {
  const Matrix matrix = logits_of(logits);
  check_k(k, matrix.rows);
  if (k == 0) return empty_selection(logits, result_type(matrix.dtype));
  return select_smallest_op(classification_margin_op(logits, target, log_norm, ignore_index), k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(marginops, CUDA, m) {
  m.impl("classification_margin_forward", TORCH_BOX(&classification_margin_op));
  m.impl("classification_margin_rival", TORCH_BOX(&classification_margin_rival_op));
  m.impl("minimal_margin_score_forward", TORCH_BOX(&minimal_margin_score_op));
  m.impl("minimal_margin_pair_forward", TORCH_BOX(&minimal_margin_pair_op));
  m.impl("pair_gradient_forward", TORCH_BOX(&pair_gradient_op));
  m.impl("select_smallest_forward", TORCH_BOX(&select_smallest_op));
  m.impl("select_minimal_margin_forward", TORCH_BOX(&select_minimal_margin_op));
  m.impl("select_smallest_margin_forward", TORCH_BOX(&select_smallest_margin_op));
}

}  // namespace marginops::cuda
