// Classification margins and minimal margin scores on the CPU.
//
// One thread computes a row, and nothing is summed across rows, so results do not depend on the
// number of threads.
#include "margin.h"

#include <tuple>

#include "distance.h"
#include "row_sums.h"

namespace marginops::cpu {
namespace {

// The margins of the rows. With kRival the rivals are written too.
template <bool kRival>
Tensor margins(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& log_norm,
               const Rows& rows, int64_t ignore_index, int64_t* rival) {
  check_target(target, logits);
  check_log_norm(log_norm, logits);
  Tensor margin = new_tensor({rows.count}, result_type(logits));
  Targets targets(target, logits.size(1), ignore_index);
  for_dtype(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    auto* result = static_cast<Value*>(margin.mutable_data_ptr());
    const Matrix<T> view = matrix<T>(logits);
    const Value half = half_scale_of<Value>(log_norm);
    for_each_top2<kRival>(view, rows, [&](int64_t r, int64_t row, const Top2<Value>& top) {
      const int64_t label = targets[row];
      const bool ignored = targets.ignored(row);
      result[r] = ignored ? std::numeric_limits<Value>::infinity()
                          : margin_of(top, value_of(view.at(row, label)), half);
      if (kRival) rival[r] = ignored ? 0 : rival_of(top, label);
    });
  });
  targets.check();
  return margin;
}

std::tuple<Tensor, Tensor> classification_margin_rival(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& log_norm,
                                                       const std::optional<Tensor>& listed,
                                                       int64_t ignore_index) {
  check_logits(logits);
  check_rows(listed, logits);
  const Rows rows(logits, listed);
  Tensor rival = new_tensor({rows.count}, ScalarType::Long);
  auto* classes = static_cast<int64_t*>(rival.mutable_data_ptr());
  return {margins<true>(logits, target, log_norm, rows, ignore_index, classes), rival};
}

// The difference of the two largest logits of each row or, with `softmax`, of their probabilities.
Tensor top2_margins(const Tensor& logits, bool softmax) {
  check_logits(logits);
  Tensor margin = new_tensor({logits.size(0)}, result_type(logits));
  for_dtype(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    auto* result = static_cast<Value*>(margin.mutable_data_ptr());
    if (softmax) {
      for_each_sums<T>(logits, [&](int64_t r, const RowSums<Value>& row) {
        result[r] = top2_margin(row.top, row.sums);
      });
    } else {
      for_each_top2<false>(
          matrix<T>(logits), Rows(logits, std::nullopt),
          [&](int64_t r, int64_t, const Top2<Value>& top) { result[r] = top2_margin(top); });
    }
  });
  return margin;
}

// The class whose boundary with class top.first is nearest, and the distance between the weights of
// the two. Without radii every class is tried.
template <class T>
std::pair<int64_t, ValueOf<T>> nearest_boundary(const Matrix<T>& logits, int64_t row,
                                                const Top2<ValueOf<T>>& top,
                                                const Distances<ValueOf<T>>& distances,
                                                const Array<ValueOf<T>>& radius) {
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

// Calls use(result, class, other class, distance of their weights, difference of their logits) for
// each row. A row with a NaN gets the classes 0 and 1, and NaN for both numbers.
template <class T, class Use>
void for_each_boundary(const Tensor& logits, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Rows& rows, bool nearest,
                       const Use& use) {
  using Value = ValueOf<T>;
  const auto distances = make_distances<Value>(weight, bias, rows.count);
  const auto radius = nearest && !distances->tabled ? radii(*distances) : Array<Value>{};
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
  check_rows(listed, logits);
  const Rows rows(logits, listed);
  Tensor pair = new_tensor({rows.count, 2}, ScalarType::Long);
  Tensor distance = new_tensor({rows.count}, result_type(logits));
  auto* classes = static_cast<int64_t*>(pair.mutable_data_ptr());
  for_dtype(logits, [&](auto* type) {
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

// The distance of each pair, as minimal_margin_pair() computes it.
Tensor pair_distance(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& pair) {
  check_layer(weight, bias, weight);
  check_pair(pair, weight);
  const Matrix<int64_t> pairs = matrix<int64_t>(pair);
  for (int64_t k = 0; k < pairs.rows; ++k) {
    check_class("pair", pairs.at(k, 0), weight.size(0));
    check_class("pair", pairs.at(k, 1), weight.size(0));
  }
  Tensor distance = new_tensor({pairs.rows}, result_type(weight));
  for_dtype(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const WeightDistances<T> distances(weight, bias);
    auto* result = static_cast<ValueOf<T>*>(distance.mutable_data_ptr());
    parallel(pairs.rows, kGrain / (2 * distances.columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) result[k] = distances(pairs.at(k, 0), pairs.at(k, 1));
    });
  });
  return distance;
}

}  // namespace

Tensor classification_margin(const Tensor& logits, const Tensor& target,
                             const std::optional<Tensor>& log_norm, int64_t ignore_index) {
  check_logits(logits);
  return margins<false>(logits, target, log_norm, Rows(logits, std::nullopt), ignore_index,
                        nullptr);
}

Tensor minimal_margin_score(const Tensor& logits, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, bool nearest, bool softmax) {
  if (!weight) return top2_margins(logits, softmax);
  check_head(logits, *weight, bias);
  Tensor score = new_tensor({logits.size(0)}, result_type(logits));
  for_dtype(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* result = static_cast<ValueOf<T>*>(score.mutable_data_ptr());
    for_each_boundary<T>(logits, *weight, bias, Rows(logits, std::nullopt), nearest,
                         [&](int64_t r, int64_t, int64_t, auto distance, auto difference) {
                           result[r] = boundary_distance(difference, distance);
                         });
  });
  return score;
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("classification_margin", MARGINOPS_BOX(&classification_margin));
  m.impl("classification_margin_rival", MARGINOPS_BOX(&classification_margin_rival));
  m.impl("minimal_margin_score", MARGINOPS_BOX(&minimal_margin_score));
  m.impl("minimal_margin_pair", MARGINOPS_BOX(&minimal_margin_pair));
  m.impl("pair_distance", MARGINOPS_BOX(&pair_distance));
}

}  // namespace marginops::cpu
