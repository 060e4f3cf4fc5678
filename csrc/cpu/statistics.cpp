// Statistics of each sample's softmax, and their gradient, on the CPU.
//
// One thread computes a row, so results do not depend on the number of threads.
#include <tuple>

#include "../binding/statistics.h"
#include "row_sums.h"

namespace marginops::cpu {
namespace {

// The values of an optional argument. Without it the vector is empty.
template <class Value>
Vector<Value> optional_vector(const std::optional<Tensor>& tensor) {
  return tensor ? vector<Value>(*tensor) : Vector<Value>{};
}

// The mean loss of the rows that are not ignored, and their number. Sums of few rows are added up,
// which rounds less.
template <class Value>
std::pair<Value, Value> mean_loss(const Value* losses, const bool* counts, int64_t rows) {
  constexpr int64_t kFew = 512;
  double sum = 0;
  int64_t counted = 0;
  for (int64_t begin = 0; begin < rows; begin += kFew) {
    double part = 0;
    for (int64_t r = begin; r < std::min(begin + kFew, rows); ++r) {
      part += losses[r];
      counted += counts[r];
    }
    sum += part;
  }
  return {static_cast<Value>(sum / counted), static_cast<Value>(counted)};
}

using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                          Tensor, Tensor, Tensor, Tensor, Tensor>;

Fields sample_statistics(const Tensor& logits, const Tensor& target,
                         const std::optional<Tensor>& input_norm,
                         const std::optional<Tensor>& log_norm, int64_t ignore_index,
                         bool with_mean) {
  check_logits(logits);
  check_target(target, logits);
  check_values("input_norm", input_norm, logits);
  check_log_norm(log_norm, logits);
  const int64_t count = logits.size(0);
  const auto field = [&](ScalarType type) { return new_tensor({count}, type); };
  const ScalarType type = result_type(logits);
  Tensor margin = field(type), rival = field(ScalarType::Long), top2 = field(type),
         loss = field(type), confidence = field(type), entropy = field(type),
         correct = field(ScalarType::Bool), el2n = field(type),
         gradient_norm = new_tensor({input_norm ? count : 0}, type), maximum = field(type),
         log_sum = field(type), counted = field(ScalarType::Bool);
  const auto number = [&] { return with_mean ? new_tensor({}, type) : new_tensor({0}, type); };
  Tensor mean = number(), num_counted = number();
  Targets targets(target, logits.size(1), ignore_index);
  for_dtype(logits, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using Value = ValueOf<T>;
    const Matrix<T> view = matrix<T>(logits);
    const Vector<Value> norms = optional_vector<Value>(input_norm);
    const Value half = half_scale_of<Value>(log_norm);
    const auto values = [](Tensor& tensor) {
      return static_cast<Value*>(tensor.mutable_data_ptr());
    };
    Value *margins = values(margin), *top2_margins = values(top2), *losses = values(loss),
          *confidences = values(confidence), *entropies = values(entropy), *el2ns = values(el2n),
          *gradient_norms = values(gradient_norm), *maxima = values(maximum),
          *log_sums = values(log_sum);
    auto* rivals = static_cast<int64_t*>(rival.mutable_data_ptr());
    auto* corrects = static_cast<bool*>(correct.mutable_data_ptr());
    auto* counts = static_cast<bool*>(counted.mutable_data_ptr());
    for_each_sums<T>(logits, [&](int64_t r, const RowSums<Value>& row) {
      const int64_t label = targets[r];
      const bool ignored = targets.ignored(r);
      const Value label_logit = value_of(view.at(r, label));
      const auto softmax = ignored ? ignored_statistics<Value>()
                                   : softmax_statistics(row.sums, label_logit, row.top.nan);
      margins[r] =
          ignored ? std::numeric_limits<Value>::infinity() : margin_of(row.top, label_logit, half);
      rivals[r] = ignored ? 0 : rival_of(row.top, label);
      top2_margins[r] =
          ignored ? std::numeric_limits<Value>::infinity() : normalize(top2_margin(row.top), half);
      corrects[r] = ignored || (row.top.first == label && !row.top.nan);
      losses[r] = softmax.loss;
      confidences[r] = softmax.confidence;
      entropies[r] = softmax.entropy;
      el2ns[r] = softmax.el2n;
      if (norms.data) {
        gradient_norms[r] = ignored ? 0 : last_layer_gradient_norm(softmax.el2n, norms[r]);
      }
      counts[r] = !ignored;
      maxima[r] = softmax.maximum;
      log_sums[r] = softmax.log_sum;
    });
    if (with_mean) std::tie(*values(mean), *values(num_counted)) = mean_loss(losses, counts, count);
  });
  targets.check();
  return {margin, rival,         top2,    loss,    confidence, entropy, correct,
          el2n,   gradient_norm, counted, maximum, log_sum,    mean,    num_counted};
}

// Writes SoftmaxGradient::dense() for every class of a row. Whole vectors are read up to `readable`
// and written up to `writable`. Both may lie behind the row: later rows overwrite what is written
// there.
template <class T>
void write_dense(const SoftmaxGradient<ValueOf<T>>& gradient, const T* logits, int64_t classes,
                 int64_t stride, const T* readable, T* result, const T* writable) {
  using Value = ValueOf<T>;
  constexpr int kLanes = Simd<Value>::kLanes;
  const VectorOf<Value> lowest = VectorOf<Value>{} + ExpConstants<Value>::kLowest;
  const Value constant = gradient.grad_loss - gradient.grad_confidence * gradient.confidence -
                         gradient.grad_entropy * gradient.entropy;
  for (int64_t begin = 0; begin < classes; begin += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, classes - begin);
    VectorOf<Value> logit;
    if (stride == 1 && readable - (logits + begin) >= kLanes) {
      logit = load(logits + begin);
    } else {
      alignas(kVectorBytes) Value part[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) part[i] = value_of(logits[(begin + i) * stride]);
      logit = load(part);
    }
    const auto log_p = logit - gradient.maximum - gradient.log_sum;
    VectorOf<Value> slope = VectorOf<Value>{} + constant;
    if (gradient.grad_entropy != 0) slope -= gradient.grad_entropy * maximum(lowest, log_p);
    const auto dense = exp<Value>(log_p) * slope;
    if (writable - (result + begin) >= kLanes) {
      store(dense, result + begin);
    } else {
      T part[kLanes];
      store(dense, part);
      std::copy_n(part, count, result + begin);
    }
  }
}

// Labels and rivals that are not among these classes belong to another piece of the logits.
Tensor sample_statistics_gradient(
    const Tensor& logits, const Tensor& target, const Tensor& rival, const Tensor& confidence,
    const Tensor& entropy, const Tensor& maximum, const Tensor& log_sum,
    const std::optional<Tensor>& log_norm, const std::optional<Tensor>& grad_margin,
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_confidence,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_mean_loss,
    const std::optional<Tensor>& num_counted, int64_t ignore_index) {
  check_statistics_gradient(logits, target, rival, confidence, entropy, maximum, log_sum, log_norm,
                            grad_margin, grad_loss, grad_confidence, grad_entropy, grad_mean_loss,
                            num_counted);
  const int64_t count = logits.size(0), classes = logits.size(1);
  const auto targets = vector<int64_t>(target), rivals = vector<int64_t>(rival);
  const bool has_dense = grad_loss || grad_confidence || grad_entropy || grad_mean_loss;
  Tensor grad_logits = new_tensor({count, classes}, logits.scalar_type());
  for_dtype(logits, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using Value = ValueOf<T>;
    const Matrix<T> view = matrix<T>(logits);
    const auto confidences = vector<Value>(confidence), entropies = vector<Value>(entropy),
               maxima = vector<Value>(maximum), log_sums = vector<Value>(log_sum);
    const auto grad_margins = optional_vector<Value>(grad_margin),
               grad_losses = optional_vector<Value>(grad_loss),
               grad_confidences = optional_vector<Value>(grad_confidence),
               grad_entropies = optional_vector<Value>(grad_entropy);
    const auto given = [](const Vector<Value>& values, int64_t r) {
      return values.data ? values[r] : Value{0};
    };
    const auto number = [](const std::optional<Tensor>& tensor, Value otherwise) {
      return tensor ? *static_cast<const Value*>(tensor->const_data_ptr()) : otherwise;
    };
    const Value share =
        grad_mean_loss ? number(grad_mean_loss, 0) / number(num_counted, 1) : Value{0};
    const Value half = half_scale_of<Value>(log_norm);
    const T* readable = count > 0 ? view.row(count - 1) + classes : nullptr;
    auto* result = static_cast<T*>(grad_logits.mutable_data_ptr());
    parallel(count, kGrain / (4 * classes), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = result + r * classes;
        const int64_t label = targets[r], other = rivals[r];
        const bool has_label = 0 <= label && label < classes;
        const Value margin_gradient = normalize(given(grad_margins, r), half);
        const bool has_other =
            margin_gradient != 0 && 0 <= other && other < classes && other != label;
        Value label_gradient = 0, rival_gradient = 0;
        if (has_dense && label != ignore_index) {
          const SoftmaxGradient<Value> gradient{maxima[r],
                                                log_sums[r],
                                                confidences[r],
                                                entropies[r],
                                                given(grad_losses, r) + share,
                                                given(grad_confidences, r),
                                                given(grad_entropies, r)};
          write_dense(gradient, view.row(r), classes, view.column_stride, readable, row,
                      result + end * classes);
          if (has_label) label_gradient = gradient.label(value_of(view.at(r, label)));
          if (has_other) rival_gradient = gradient.dense(value_of(view.at(r, other)));
        } else {
          std::fill(row, row + classes, T(0));
          if (label == ignore_index) continue;
        }
        if (has_label) row[label] = static_cast<T>(label_gradient + margin_gradient);
        if (has_other) row[other] = static_cast<T>(rival_gradient - margin_gradient);
      }
    });
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor> row_sums(const Tensor& logits, const Tensor& target, bool with_sums) {
  check_logits(logits, 1);
  check_target(target, logits);
  const int64_t count = logits.size(0), classes = logits.size(1);
  Tensor values = new_tensor({count, 6}, result_type(logits));
  Tensor leaders = new_tensor({count, 2}, ScalarType::Long);
  const Vector<int64_t> labels = vector<int64_t>(target);
  for_dtype(logits, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using Value = ValueOf<T>;
    const Matrix<T> view = matrix<T>(logits);
    auto* all_values = static_cast<Value*>(values.mutable_data_ptr());
    auto* all_leaders = static_cast<int64_t*>(leaders.mutable_data_ptr());
    const auto write = [&](int64_t r, const Top2<Value>& top, const ExponentialSums<Value>& sums) {
      const int64_t label = labels[r];
      const bool has_label = 0 <= label && label < classes;
      Value* value = all_values + 6 * r;
      value[0] = top.nan ? std::numeric_limits<Value>::quiet_NaN() : top.first_value;
      value[1] = top.second_value;
      value[2] = has_label ? value_of(view.at(r, label)) : Value{0};
      value[3] = sums.plain;
      value[4] = sums.weighted;
      value[5] = sums.squares;
      all_leaders[2 * r] = top.nan ? 0 : top.first;
      all_leaders[2 * r + 1] = classes == 1 ? -1 : top.nan ? 1 : top.second;
    };
    if (with_sums) {
      for_each_sums<T>(logits,
                       [&](int64_t r, const RowSums<Value>& row) { write(r, row.top, row.sums); });
    } else {
      for_each_top2<true>(view, Rows(logits, std::nullopt),
                          [&](int64_t r, int64_t, const Top2<Value>& top) { write(r, top, {}); });
    }
  });
  return {values, leaders};
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("sample_statistics", MARGINOPS_BOX(&sample_statistics));
  m.impl("sample_statistics_gradient", MARGINOPS_BOX(&sample_statistics_gradient));
  m.impl("row_sums", MARGINOPS_BOX(&row_sums));
}

}  // namespace
}  // namespace marginops::cpu
