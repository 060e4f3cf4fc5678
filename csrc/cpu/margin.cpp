// Classification margins and minimal margin scores on the CPU.
//
// Rows are independent and spread over threads; nothing is summed across rows, so results do not
// depend on the number of threads. Class sums of pair_gradient run in the order of their entries.
#include "margin.h"

#include <atomic>
#include <tuple>

#include "distance.h"
#include "top2.h"

namespace marginops::cpu {
namespace {

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected shape [N, C], got ", logits.dim(), "-d");
  STD_TORCH_CHECK(2 <= logits.size(1) && logits.size(1) < Top2<float>::kNone,
                  "logits: expected 2 <= C < 2**31 - 1 classes, got ", logits.size(1));
}

void check_target(const Tensor& target, const Tensor& logits) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target: expected dtype int64");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.size(0), "target: expected shape [",
                  logits.size(0), "] for the rows of logits, got ", target.numel(), " classes");
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& weight) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                  "bias: expected shape [", weight.size(0), "] for the rows of weight");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == weight.scalar_type(),
                  "bias: expected the dtype of weight");
}

void check_head(const Tensor& logits, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_logits(logits);
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected shape [C, D], got ", weight.dim(), "-d");
  STD_TORCH_CHECK(weight.size(0) == logits.size(1), "weight: expected ", logits.size(1),
                  " rows for the classes of logits, got ", weight.size(0));
  STD_TORCH_CHECK(
      weight.scalar_type() == logits.scalar_type() ||
          (weight.scalar_type() == ScalarType::Float && logits.scalar_type() != ScalarType::Double),
      "weight: expected the dtype of logits, or float32 beside bfloat16 and float16");
  check_bias(bias, weight);
}

// The rows of logits that results are wanted for: all of them, or those listed.
class Rows {
 public:
  Rows(const Tensor& logits, const std::optional<Tensor>& listed)
      : count(listed ? listed->size(0) : logits.size(0)) {
    if (!listed) return;
    STD_TORCH_CHECK(listed->dim() == 1 && listed->scalar_type() == ScalarType::Long,
                    "rows: expected int64 [K]");
    listed_ = vector<int64_t>(*listed);
    for (int64_t r = 0; r < count; ++r) {
      STD_TORCH_CHECK(listed_[r] >= 0 && listed_[r] < logits.size(0),
                      "rows: expected indices in [0, N), got ", listed_[r]);
    }
  }
  int64_t operator[](int64_t result) const { return listed_.data ? listed_[result] : result; }

  const int64_t count;

 private:
  Vector<int64_t> listed_{};
};

// Calls use(result, row, top) for each of the rows; kClasses says whether the classes are needed.
template <bool kClasses, class T, class Use>
void for_each_top2(const Matrix<T>& logits, const Rows& rows, const Use& use) {
  const int64_t classes = logits.columns;
  parallel(rows.count, kGrain / classes, [&](int64_t begin, int64_t end) {
    if (classes > kLongRow && logits.column_stride == 1) {
      for (int64_t r = begin; r < end; ++r) {
        use(r, rows[r], top2_row<T, kClasses>(logits.row(rows[r]), classes));
      }
      return;
    }
    constexpr int kLanes = Simd<ValueOf<T>>::kLanes;
    const T* starts[kLanes];
    Top2<ValueOf<T>> top[kLanes];
    for (int64_t r = begin; r < end; r += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, end - r));
      for (int lane = 0; lane < count; ++lane) starts[lane] = logits.row(rows[r + lane]);
      top2_across(starts, count, classes, logits.column_stride, top);
      for (int lane = 0; lane < count; ++lane) use(r + lane, rows[r + lane], top[lane]);
    }
  });
}

// Targets, each checked as it is read; a wrong one is reported once all threads are done.
class Targets {
 public:
  Targets(const Tensor& target, int64_t classes, int64_t ignore_index)
      : target_(vector<int64_t>(target)), classes_(classes), ignore_index_(ignore_index) {}

  bool ignored(int64_t row) const { return target_[row] == ignore_index_; }
  // A class that is safe to read, whatever the target.
  int64_t operator[](int64_t row) {
    const int64_t target = target_[row];
    if (target >= 0 && target < classes_) return target;
    if (target != ignore_index_) wrong_.store(true, std::memory_order_relaxed);
    return 0;
  }
  void check() const {
    for (int64_t row = 0; wrong_ && row < target_.size; ++row) {  // the first, whoever saw it
      const int64_t target = target_[row];
      STD_TORCH_CHECK((target >= 0 && target < classes_) || target == ignore_index_,
                      "target: expected classes in [0, ", classes_, ") or ignore_index ",
                      ignore_index_, ", got ", target);
    }
  }

 private:
  Vector<int64_t> target_;
  int64_t classes_, ignore_index_;
  std::atomic<bool> wrong_{false};
};

Tensor classification_margin_rival(const Tensor& logits, const Tensor& target,
                                   const std::optional<Tensor>& listed, int64_t ignore_index) {
  check_logits(logits);
  check_target(target, logits);
  const Rows rows(logits, listed);
  Tensor rival = new_tensor({rows.count}, ScalarType::Long);
  auto* result = static_cast<int64_t*>(rival.mutable_data_ptr());
  Targets targets(target, logits.size(1), ignore_index);
  for_dtype("logits", logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_top2<true>(matrix<T>(logits), rows, [&](int64_t r, int64_t row, const auto& top) {
      const int64_t label = targets[row];
      const int64_t other = top.nan ? label == 0 : top.first == label ? top.second : top.first;
      result[r] = targets.ignored(row) ? 0 : other;
    });
  });
  targets.check();
  return rival;
}

// The class whose boundary with class top.first is nearest, and the distance of the two weights.
// Without radii every class is looked at.
template <class T>
std::pair<int64_t, ValueOf<T>> nearest_boundary(const Matrix<T>& logits, int64_t row,
                                                const Top2<ValueOf<T>>& top,
                                                const Distances<ValueOf<T>>& distances,
                                                const std::vector<ValueOf<T>>& radius) {
  using Value = ValueOf<T>;
  const int64_t first = top.first;
  int64_t nearest = top.second;
  Value distance = distances(first, nearest);
  Value best = boundary_distance(top.first_value - top.second_value, distance);
  for (int64_t j = 0; j < logits.columns; ++j) {
    const Value difference = top.first_value - value_of(logits.at(row, j));
    if (j == first || j == nearest) continue;
    if (!radius.empty() && !may_be_nearer(difference, radius[first] + radius[j], best)) continue;
    const Value candidate = distances(first, j);
    const Value score = boundary_distance(difference, candidate);
    if (is_nearer(score, j, best, nearest)) {
      best = score;
      nearest = j;
      distance = candidate;
    }
  }
  return {nearest, distance};
}

// Calls use(result, pair of classes, their distance, difference of their logits); NaN rows get the
// pair (0, 1) and NaN.
template <class T, class Use>
void for_each_boundary(const Tensor& logits, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Rows& rows, bool nearest,
                       const Use& use) {
  using Value = ValueOf<T>;
  const auto distances = make_distances<Value>(weight, bias, rows.count);
  const auto radius = nearest && !distances->tabled ? radii(*distances) : std::vector<Value>{};
  const Matrix<T> view = matrix<T>(logits);
  for_each_top2<true>(view, rows, [&](int64_t r, int64_t row, const Top2<Value>& top) {
    if (top.nan) {
      constexpr Value kNan = std::numeric_limits<Value>::quiet_NaN();
      use(r, int64_t{0}, int64_t{1}, kNan, kNan);
    } else if (nearest) {
      const auto [other, distance] = nearest_boundary(view, row, top, *distances, radius);
      use(r, int64_t{top.first}, other, distance, top.first_value - value_of(view.at(row, other)));
    } else {
      use(r, int64_t{top.first}, int64_t{top.second}, (*distances)(top.first, top.second),
          top.first_value - top.second_value);
    }
  });
}

std::tuple<Tensor, Tensor> minimal_margin_pair(const Tensor& logits, const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& listed, bool nearest) {
  check_head(logits, weight, bias);
  const Rows rows(logits, listed);
  Tensor pair = new_tensor({rows.count, 2}, ScalarType::Long);
  Tensor distance = new_tensor({rows.count}, result_type(logits));
  auto* classes = static_cast<int64_t*>(pair.mutable_data_ptr());
  for_dtype("logits", logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* result = static_cast<ValueOf<T>*>(distance.mutable_data_ptr());
    for_each_boundary<T>(logits, weight, bias, rows, nearest,
                         [&](int64_t r, int64_t i, int64_t j, auto length, auto) {
                           classes[2 * r] = i;
                           classes[2 * r + 1] = j;
                           result[r] = length;
                         });
  });
  return {pair, distance};
}

// One class' gradient: the sum of coefficient * (w_class - w_partner) over its entries, which are
// sorted by partner; the coefficients of a run of equal partners are summed first.
template <class T>
void add_pairs(const int64_t* key, const int64_t* end, const ValueOf<T>* coefficient,
               int64_t classes, const WeightDistances<T>& weight, std::vector<ValueOf<T>>& own,
               std::vector<ValueOf<T>>& partner, std::vector<ValueOf<T>>& total) {
  std::fill(total.begin(), total.end(), ValueOf<T>{0});
  if (key == end) return;
  weight.copy_row(*key / classes, own.data());
  while (key < end) {
    const int64_t run = *key;
    ValueOf<T> sum = 0;
    for (; key < end && *key == run; ++key, ++coefficient) sum += *coefficient;
    weight.copy_row(run % classes, partner.data());
    for (size_t d = 0; d < total.size(); ++d) total[d] += sum * (own[d] - partner[d]);
  }
}

std::tuple<Tensor, Tensor> pair_gradient(const Tensor& key, const Tensor& coefficient,
                                         const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected shape [C, D]");
  STD_TORCH_CHECK(key.dim() == 1 && key.scalar_type() == ScalarType::Long && key.is_contiguous() &&
                      coefficient.dim() == 1 && coefficient.size(0) == key.size(0) &&
                      coefficient.is_contiguous() &&
                      coefficient.scalar_type() == result_type(weight),
                  "key, coefficient: expected contiguous int64 [M] and a value for each");
  const int64_t classes = weight.size(0), columns = weight.size(1);
  Tensor grad_weight = new_tensor({classes, columns}, weight.scalar_type());
  Tensor grad_bias = new_tensor({classes}, weight.scalar_type());
  check_bias(bias, weight);
  const auto* keys = static_cast<const int64_t*>(key.const_data_ptr());
  const int64_t* keys_end = keys + key.size(0);
  STD_TORCH_CHECK(std::is_sorted(keys, keys_end) &&
                      (keys == keys_end || (keys[0] >= 0 && keys_end[-1] < classes * classes)),
                  "key: expected sorted values in [0, C * C)");
  for_dtype("weight", weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const WeightDistances<T> rows(weight, bias);
    const auto* values = static_cast<const Value*>(coefficient.const_data_ptr());
    auto* to_weight = static_cast<T*>(grad_weight.mutable_data_ptr());
    auto* to_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
    parallel(classes, 1, [&](int64_t begin, int64_t end) {
      std::vector<Value> own(rows.columns), partner(rows.columns), total(rows.columns);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t* from = std::lower_bound(keys, keys_end, c * classes);
        const int64_t* to = std::lower_bound(from, keys_end, (c + 1) * classes);
        add_pairs<T>(from, to, values + (from - keys), classes, rows, own, partner, total);
        for (int64_t d = 0; d < columns; ++d) to_weight[c * columns + d] = static_cast<T>(total[d]);
        to_bias[c] = static_cast<T>(bias ? total[columns] : Value{0});
      }
    });
  });
  return {grad_weight, grad_bias};
}

}  // namespace

Tensor classification_margin(const Tensor& logits, const Tensor& target,
                             const std::optional<Tensor>& log_norm, int64_t ignore_index) {
  check_logits(logits);
  check_target(target, logits);
  STD_TORCH_CHECK(!log_norm || (log_norm->numel() == 1 && log_norm->is_cpu() &&
                                log_norm->scalar_type() == result_type(logits)),
                  "log_norm: expected one value of the result dtype");
  Tensor margin = new_tensor({logits.size(0)}, result_type(logits));
  Targets targets(target, logits.size(1), ignore_index);
  for_dtype("logits", logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    auto* result = static_cast<Value*>(margin.mutable_data_ptr());
    const Matrix<T> view = matrix<T>(logits);
    const Value half =
        log_norm ? half_scale(*static_cast<const Value*>(log_norm->const_data_ptr())) : Value{1};
    const auto use = [&](int64_t r, int64_t row, const Top2<Value>& top) {
      const Value own = value_of(view.at(row, targets[row]));
      const Value rival = top.nan                  ? std::numeric_limits<Value>::quiet_NaN()
                          : own == top.first_value ? top.second_value
                                                   : top.first_value;
      result[r] = targets.ignored(row) ? std::numeric_limits<Value>::infinity()
                                       : normalize(own - rival, half);
    };
    for_each_top2<false>(view, Rows(logits, std::nullopt), use);
  });
  targets.check();
  return margin;
}

Tensor minimal_margin_score(const Tensor& logits, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool nearest) {
  check_head(logits, weight, bias);
  Tensor score = new_tensor({logits.size(0)}, result_type(logits));
  for_dtype("logits", logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* result = static_cast<ValueOf<T>*>(score.mutable_data_ptr());
    for_each_boundary<T>(logits, weight, bias, Rows(logits, std::nullopt), nearest,
                         [&](int64_t r, int64_t, int64_t, auto distance, auto difference) {
                           result[r] = boundary_distance(difference, distance);
                         });
  });
  return score;
}

STABLE_TORCH_LIBRARY_IMPL(marginops, CPU, m) {
  m.impl("classification_margin_forward", TORCH_BOX(&classification_margin));
  m.impl("classification_margin_rival", TORCH_BOX(&classification_margin_rival));
  m.impl("minimal_margin_score_forward", TORCH_BOX(&minimal_margin_score));
  m.impl("minimal_margin_pair_forward", TORCH_BOX(&minimal_margin_pair));
  m.impl("pair_gradient_forward", TORCH_BOX(&pair_gradient));
}

}  // namespace marginops::cpu
