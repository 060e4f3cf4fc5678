// Rows of logits, for the kernels of several families: loops that find the two largest logits of
// each row, and the margin that these give with the target.
#pragma once

#include <atomic>

#include "tensor.h"
#include "top2.h"

namespace marginops::cpu {

inline void check_class(const char* name, int64_t value, int64_t classes) {
  MARGINOPS_CHECK(value >= 0 && value < classes, name, ": expected classes in [0, ", classes,
                  "), got ", value);
}

template <class Value>
Value half_scale_of(const std::optional<Tensor>& log_norm) {
  return log_norm ? half_scale(*static_cast<const Value*>(log_norm->const_data_ptr())) : Value{1};
}

template <class Value>
Value margin_of(const Top2<Value>& top, Value label_logit, Value half) {
  if (top.nan) return std::numeric_limits<Value>::quiet_NaN();
  return normalize(
      label_logit - (label_logit == top.first_value ? top.second_value : top.first_value), half);
}

template <class Value>
int64_t rival_of(const Top2<Value>& top, int64_t label) {
  if (top.nan) return label == 0 ? 1 : 0;
  return top.first == label ? top.second : top.first;
}

// The rows of logits that get a result: all rows, or the listed ones.
class Rows {
 public:
  explicit Rows(int64_t count) : count(count) {}
  Rows(const Tensor& logits, const std::optional<Tensor>& listed)
      : count(listed ? listed->size(0) : logits.size(0)) {
    if (!listed) return;
    listed_ = vector<int64_t>(*listed);
    for (int64_t r = 0; r < count; ++r) {
      MARGINOPS_CHECK(listed_[r] >= 0 && listed_[r] < logits.size(0),
                      "rows: expected indices in [0, ", logits.size(0), "), got ", listed_[r]);
    }
  }
  int64_t operator[](int64_t result) const { return listed_.data ? listed_[result] : result; }

  const int64_t count;

 private:
  Vector<int64_t> listed_{};
};

// Whether rows are vectorised along the classes: they are long, and their columns are neighbours.
template <class T>
bool is_vectorised_along_classes(const Matrix<T>& logits, int64_t long_row) {
  return logits.columns > long_row && logits.column_stride == 1;
}

// Calls read(result, count, starts) for groups of up to kLanes neighbouring results. `starts` holds
// the addresses of their rows.
template <class T, class Read>
void for_each_group(const Matrix<T>& logits, const Rows& rows, int64_t begin, int64_t end,
                    const Read& read) {
  constexpr int kLanes = Simd<ValueOf<T>>::kLanes;
  const T* starts[kLanes];
  for (int64_t r = begin; r < end; r += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - r));
    for (int lane = 0; lane < count; ++lane) starts[lane] = logits.row(rows[r + lane]);
    read(r, count, starts);
  }
}

// Calls use(result, row, top) for each row. kClasses says whether `use` needs the classes.
template <bool kClasses, class T, class Use>
void for_each_top2(const Matrix<T>& logits, const Rows& rows, const Use& use) {
  const int64_t classes = logits.columns;
  parallel(rows.count, kGrain / classes, [&](int64_t begin, int64_t end) {
    if (is_vectorised_along_classes(logits, kLongRow)) {
      for (int64_t r = begin; r < end; ++r) {
        use(r, rows[r], top2_row<T, kClasses>(logits.row(rows[r]), classes));
      }
    } else {
      for_each_group(logits, rows, begin, end, [&](int64_t r, int count, const T* const* starts) {
        const auto top = top2_row_per_lane(starts, count, classes, logits.column_stride);
        for (int lane = 0; lane < count; ++lane) use(r + lane, rows[r + lane], top[lane]);
      });
    }
  });
}

// The targets. operator[] checks each target that it reads, and check() reports a wrong one after
// all threads are done.
class Targets {
 public:
  Targets(const Tensor& target, int64_t classes, int64_t ignore_index)
      : target_(vector<int64_t>(target)), classes_(classes), ignore_index_(ignore_index) {}

  bool ignored(int64_t row) const { return target_[row] == ignore_index_; }
  // The target, or class 0 if the target is no class, so that a logit can be read for it.
  int64_t operator[](int64_t row) {
    const int64_t target = target_[row];
    if (target >= 0 && target < classes_) return target;
    if (target != ignore_index_) wrong_.store(true, std::memory_order_relaxed);
    return 0;
  }
  void check() const {
    for (int64_t row = 0; wrong_ && row < target_.size;
         ++row) {  // the first, whichever thread saw it
      const int64_t target = target_[row];
      MARGINOPS_CHECK((target >= 0 && target < classes_) || target == ignore_index_,
                      "target: expected classes in [0, ", classes_, ") or ignore_index ",
                      ignore_index_, ", got ", target);
    }
  }

 private:
  Vector<int64_t> target_;
  int64_t classes_, ignore_index_;
  std::atomic<bool> wrong_{false};
};

}  // namespace marginops::cpu
