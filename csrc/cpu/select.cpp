// Selection of the k smallest scores on the CPU.
//
// Radix select on the order-preserving keys of common/order.h: the highest digit of all scores is
// counted on all threads, what lies below the digit of the k-th is kept in index order, and the
// scores of that one digit are narrowed down by their next digits. Then the chosen are sorted,
// stably, so that ties stay in index order.
#include <array>
#include <tuple>

#include "../common/order.h"
#include "margin.h"

namespace marginops::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kGrain = 1 << 16;      // scores that are worth a thread
constexpr int64_t kComparisonSort = 160;  // up to here comparing beats counting

template <class Key, class Index>
struct Entry {
  Key key;
  Index index;

  bool operator<(const Entry& other) const {
    return key < other.key || (key == other.key && index < other.index);
  }
};

// Memory that nothing has written yet.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);
}

// The digit that holds the k-th (from 1), and how many lie in the digits below.
struct Pivot {
  int digit = 0;
  int64_t below = 0;

  template <class Count>
  Pivot(const Count& count, int64_t k) {
    while (below + count[digit] < k) below += count[digit++];
  }
};

template <class Score, class Index>
class Selector {
  using Key = typename SortKey<Score>::type;
  using Entries = Entry<Key, Index>;
  static constexpr int kKeyBits = 8 * sizeof(Key);

 public:
  Selector(const Score* scores, int64_t size, int64_t k) : scores_(scores), size_(size), k_(k) {}

  // Writes the indices of the k smallest scores, in order.
  void run(int64_t* indices) {
    if (k_ == size_) {
      chosen_ = uninitialized<Entries>(k_);
      for (int64_t i = 0; i < size_; ++i) chosen_[i] = entry(i);
    } else {
      select();
    }
    sort();
    for (int64_t i = 0; i < k_; ++i) indices[i] = static_cast<int64_t>(chosen_[i].index);
  }

 private:
  static int top_digit(Key key) { return static_cast<int>(key >> (kKeyBits - kDigitBits)); }
  static int digit(Key key, int shift) { return static_cast<int>(key >> shift) & (kDigits - 1); }
  Entries entry(int64_t i) const { return {sort_key(scores_[i]), static_cast<Index>(i)}; }

  void select() {
    const int64_t parts =
        std::clamp<int64_t>(size_ / kGrain, 1, torch::stable::get_num_threads());
    const auto part_begin = [&](int64_t part) { return size_ * part / parts; };
    std::vector<std::array<int64_t, kDigits>> counts(parts);
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t i = part_begin(part); i < part_begin(part + 1); ++i) {
          ++counts[part][top_digit(sort_key(scores_[i]))];
        }
      }
    });
    std::array<int64_t, kDigits> total{};
    for (const auto& count : counts) {
      for (int d = 0; d < kDigits; ++d) total[d] += count[d];
    }
    const Pivot pivot(total, k_);
    const int64_t undecided = total[pivot.digit];
    chosen_ = uninitialized<Entries>(k_);
    auto candidates = uninitialized<Entries>(undecided);

    std::vector<Entries*> below(parts), equal(parts);
    Entries *next_below = chosen_.get(), *next_equal = candidates.get();
    for (int64_t part = 0; part < parts; ++part) {
      below[part] = next_below;
      equal[part] = next_equal;
      for (int d = 0; d < pivot.digit; ++d) next_below += counts[part][d];
      next_equal += counts[part][pivot.digit];
    }
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t i = part_begin(part); i < part_begin(part + 1); ++i) {
          const Entries candidate = entry(i);
          const int top = top_digit(candidate.key);
          if (top < pivot.digit) *below[part]++ = candidate;
          if (top == pivot.digit) *equal[part]++ = candidate;
        }
      }
    });
    narrow(candidates.get(), undecided, pivot.below);
  }

  // Adds the smallest of the candidates, which agree in their highest digit, to the chosen.
  void narrow(Entries* candidates, int64_t count, int64_t chosen) {
    for (int shift = kKeyBits - kDigitBits; shift > 0 && count > k_ - chosen;) {
      shift = std::max(shift - kDigitBits, 0);
      std::array<int64_t, kDigits> counts{};
      for (int64_t i = 0; i < count; ++i) ++counts[digit(candidates[i].key, shift)];
      const Pivot pivot(counts, k_ - chosen);
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Entries candidate = candidates[i];
        const int own = digit(candidate.key, shift);
        if (own < pivot.digit) chosen_[chosen++] = candidate;
        if (own == pivot.digit) candidates[kept++] = candidate;
      }
      count = kept;
    }
    std::copy_n(candidates, k_ - chosen, chosen_.get() + chosen);
  }

  // Entries of equal keys are in index order already, so a stable sort by key is enough.
  void sort() {
    if (k_ <= kComparisonSort) return std::sort(chosen_.get(), chosen_.get() + k_);
    auto other = uninitialized<Entries>(k_);
    for (int shift = 0; shift < kKeyBits; shift += kDigitBits) {
      std::array<int64_t, kDigits> position{};
      for (int64_t i = 0; i < k_; ++i) ++position[digit(chosen_[i].key, shift)];
      if (position[digit(chosen_[0].key, shift)] == k_) continue;
      int64_t sum = 0;
      for (int64_t& count : position) sum += std::exchange(count, sum);
      for (int64_t i = 0; i < k_; ++i) {
        other[position[digit(chosen_[i].key, shift)]++] = chosen_[i];
      }
      chosen_.swap(other);
    }
  }

  const Score* scores_;
  const int64_t size_, k_;
  std::unique_ptr<Entries[]> chosen_;
};

template <class Score>
void select_indices(const Score* scores, int64_t size, int64_t k, int64_t* indices) {
  if (k == 0) return;
  if (size <= int64_t{UINT32_MAX}) {
    Selector<Score, uint32_t>(scores, size, k).run(indices);
  } else {
    Selector<Score, uint64_t>(scores, size, k).run(indices);
  }
}

std::tuple<Tensor, Tensor> select_smallest(const Tensor& scores, int64_t k) {
  STD_TORCH_CHECK(scores.dim() == 1, "scores: expected shape [N]");
  const int64_t size = scores.size(0);
  STD_TORCH_CHECK(k >= 0 && k <= size, "k: expected 0 <= k <= ", size, ", got ", k);
  Tensor chosen = new_vector(scores, k, scores.scalar_type());
  Tensor indices = new_vector(scores, k, ScalarType::Long);
  auto* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  for_dtype("scores", scores, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = ValueOf<T>;
    const Vector<T> view = vector<T>(scores);
    if (std::is_same_v<T, Value> && (view.stride == 1 || size < 2)) {
      select_indices(reinterpret_cast<const Value*>(view.data), size, k, index);
    } else {
      const auto values = uninitialized<Value>(size);
      parallel(size, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) values[i] = value_of(view[i]);
      });
      select_indices<Value>(values.get(), size, k, index);
    }
    auto* score = static_cast<T*>(chosen.mutable_data_ptr());
    for (int64_t i = 0; i < k; ++i) score[i] = view[index[i]];
  });
  return {chosen, indices};
}

std::tuple<Tensor, Tensor> select_minimal_margin(const Tensor& logits, const Tensor& weight,
                                                 const std::optional<Tensor>& bias, int64_t k,
                                                 bool nearest) {
  return select_smallest(minimal_margin_score(logits, weight, bias, nearest), k);
}

std::tuple<Tensor, Tensor> select_smallest_margin(const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& log_norm, int64_t k,
                                                  int64_t ignore_index) {
  return select_smallest(classification_margin(logits, target, log_norm, ignore_index), k);
}

STABLE_TORCH_LIBRARY_IMPL(marginops, CPU, m) {
  m.impl("select_smallest", TORCH_BOX(&select_smallest));
  m.impl("select_minimal_margin", TORCH_BOX(&select_minimal_margin));
  m.impl("select_smallest_margin", TORCH_BOX(&select_smallest_margin));
}

}  // namespace
}  // namespace marginops::cpu
