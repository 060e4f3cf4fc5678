// Selects the k samples with the smallest minimal margin scores, with few distances.
//
// Most of the time of the scores goes into the distances ||w_i - w_j||. A distance is at most the
// sum of the two radii, and so a score is at least difference / (radius_i + radius_j). The k rows
// with the smallest bounds get their scores first. The largest of these is a limit: at least k
// scores do not exceed it. Rows whose bound is above the limit need no distance.
#pragma once

#include "distance.h"
#include "rows.h"
#include "selector.h"

namespace marginops::cpu {

// Whether the distances that are saved cost more than the radii and the bounds.
inline bool bounds_pay_off(const Tensor& logits, const Tensor& weight, int64_t k) {
  const int64_t rows = logits.size(0), classes = weight.size(0), columns = weight.size(1);
  return columns >= 64 && k > 0 && classes + 4 * k <= rows && !table_pays_off(classes, rows);
}

// A row of logits: its two largest classes, the difference of their logits, and its score.
template <class Value>
struct BoundaryRow {
  int32_t first, second;
  Value difference, score;
};

template <class T>
void select_nearest_to_boundary(const Matrix<T>& logits, const Distances<ValueOf<T>>& distances,
                                int64_t k, ValueOf<T>* scores, int64_t* indices) {
  using Value = ValueOf<T>;
  constexpr Value kInfinity = std::numeric_limits<Value>::infinity();
  constexpr Value kKnown = -kInfinity;  // replaces the bound of a row whose score is known
  const Array<Value> radius = radii(distances);
  const auto rows = uninitialized<BoundaryRow<Value>>(logits.rows);
  const auto bounds = uninitialized<Value>(logits.rows);
  for_each_top2<true>(logits, Rows(logits.rows), [&](int64_t, int64_t row, const auto& top) {
    if (top.nan) {
      constexpr Value kNan = std::numeric_limits<Value>::quiet_NaN();
      rows[row] = {0, 1, kNan, kNan};
      bounds[row] = kInfinity;  // NaN comes last
      return;
    }
    const Value difference = top.first_value - top.second_value;
    rows[row] = {top.first, top.second, difference, difference};
    // The factor exceeds the rounding errors of this line by far.
    bounds[row] = difference / ((radius[top.first] + radius[top.second]) * Value(1.001));
  });

  const auto compute_scores = [&](const int64_t* list, int64_t count) {
    parallel(count, kGrain / (2 * distances.columns), [&](int64_t begin, int64_t end) {
      for (const int64_t* index = list + begin; index < list + end; ++index) {
        BoundaryRow<Value>& row = rows[*index];
        if (bounds[*index] == kKnown) continue;
        bounds[*index] = kKnown;
        if (row.difference != row.difference) continue;
        row.score = boundary_distance(row.difference, distances(row.first, row.second));
      }
    });
  };
  select_indices<Value>(bounds.get(), logits.rows, k, indices);
  compute_scores(indices, k);
  Value limit = 0;
  for (int64_t r = 0; r < k; ++r) {
    const Value score = rows[indices[r]].score;
    limit = score <= limit ? limit : score == score ? score : kInfinity;  // NaN sets no limit
  }

  Array<int64_t> candidates;  // in index order, so that ties stay in it
  for (int64_t row = 0; row < logits.rows; ++row) {
    if (!(bounds[row] > limit)) candidates.push_back(row);
  }
  const auto count = static_cast<int64_t>(candidates.size());
  compute_scores(candidates.data(), count);
  for (int64_t r = 0; r < count; ++r) bounds[r] = rows[candidates[r]].score;
  select_indices<Value>(bounds.get(), count, k, indices);
  for (int64_t r = 0; r < k; ++r) {
    scores[r] = bounds[indices[r]];
    indices[r] = candidates[indices[r]];
  }
}

}  // namespace marginops::cpu
