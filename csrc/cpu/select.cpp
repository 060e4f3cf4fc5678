// Selects the k smallest scores on the CPU.
//
// A sample of the scores gives an upper bound for the k-th score. One pass over all scores, on all
// threads, collects in index order the scores that are not above the bound. If these are far too
// many, either ties at the bound are cut by index, or a radix select narrows them down. A stable
// sort by the keys of common/order.h then keeps ties in index order. The sample decides how long
// this takes, never what is chosen.
#include <array>
#include <tuple>

#include "../common/order.h"
#include "fused_scores.h"

namespace marginops::cpu {
namespace {

constexpr int64_t kComparisonSort = 256;  // up to here a comparison sort is faster
constexpr int64_t kWideDigits = 8192;     // from here 11-bit digits are faster

template <class Key, class Index>
struct Entry {
  Index index;
  Key key;

  bool operator<(const Entry& other) const {
    if constexpr (sizeof(Key) == 4 && sizeof(Index) == 4) {  // one comparison, no branch
      return (uint64_t{key} << 32 | index) < (uint64_t{other.key} << 32 | other.index);
    }
    return key < other.key || (key == other.key && index < other.index);
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
    entries_ = uninitialized<Entries>(size_);
    Score limit = bound();
    collect(limit);
    if (count_ < k_) collect(limit = std::numeric_limits<Score>::infinity());
    if (count_ > std::max(2 * k_, kComparisonSort) && !cut_ties(sort_key(limit))) narrow();
    if (count_ <= kComparisonSort) {
      std::nth_element(entries_.get(), entries_.get() + k_ - 1, entries_.get() + count_);
      std::sort(entries_.get(), entries_.get() + k_);
    } else if (count_ < kWideDigits) {
      sort<8>();
    } else {
      sort<11>();
    }
    for (int64_t i = 0; i < k_; ++i) indices[i] = static_cast<int64_t>(entries_[i].index);
  }

 private:
  // A bound. Probably at least k scores, and few more, do not exceed it.
  Score bound() const {
    const int64_t samples = std::clamp<int64_t>(std::max(size_ / 16, k_ / 4), 64, 4096);
    const double share = static_cast<double>(k_) / static_cast<double>(size_);
    const double deviation = std::sqrt(share * (1 - share) * static_cast<double>(samples));
    const auto rank =
        static_cast<int64_t>(share * static_cast<double>(samples) + 2.5 * deviation + 1);
    if (size_ <= 2 * samples || rank >= samples) return std::numeric_limits<Score>::infinity();
    Score sample[4096];
    for (int64_t i = 0; i < samples; ++i) {
      const Score score = scores_[i * size_ / samples];
      sample[i] = score == score ? score : std::numeric_limits<Score>::infinity();
    }
    std::nth_element(sample, sample + rank, sample + samples);
    return sample[rank];
  }

  // Collects the scores that are not above the bound. NaN is never above it.
  void collect(Score bound) {
    const int64_t parts = std::clamp<int64_t>(size_ / kGrain, 1, torch::stable::get_num_threads());
    const auto begin_of = [&](int64_t part) { return size_ * part / parts; };
    if (parts == 1) {
      count_ = collect(0, size_, bound, entries_.get());
      return;
    }
    Array<int64_t> counts(static_cast<size_t>(parts));
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        counts[part] =
            collect(begin_of(part), begin_of(part + 1), bound, entries_.get() + begin_of(part));
      }
    });
    count_ = counts[0];
    for (int64_t part = 1; part < parts; ++part) {
      std::copy_n(entries_.get() + begin_of(part), counts[part], entries_.get() + count_);
      count_ += counts[part];
    }
  }

  int64_t collect(int64_t begin, int64_t end, Score bound, Entries* entries) const {
    constexpr int kLanes = Simd<Score>::kLanes;
    constexpr unsigned kAll = (1u << kLanes) - 1;
    int64_t count = 0, i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      unsigned hits = kAll & ~lane_bits<Score>(load(scores_ + i) > bound);
      for (; hits != 0; hits &= hits - 1) entries[count++] = entry(i + __builtin_ctz(hits));
    }
    for (; i < end; ++i) {
      if (!(scores_[i] > bound)) entries[count++] = entry(i);
    }
    return count;
  }

  Entries entry(int64_t i) const { return {static_cast<Index>(i), sort_key(scores_[i])}; }

  // If the k-th smallest score is equal to the bound, keeps the scores below the bound and the
  // first of those at it, k in all, and returns true.
  bool cut_ties(Key bound) {
    int64_t smaller = 0, equal = 0;
    for (int64_t i = 0; i < count_; ++i) {
      smaller += entries_[i].key < bound;
      equal += entries_[i].key == bound;
    }
    if (smaller > k_ || smaller + equal < k_) return false;
    int64_t kept = 0, missing = k_ - smaller;
    for (int64_t i = 0; i < count_ && kept < k_; ++i) {
      const Entries entry = entries_[i];
      if (entry.key < bound || (entry.key == bound && missing-- > 0)) entries_[kept++] = entry;
    }
    count_ = k_;
    return true;
  }

  // Radix select: keeps the k smallest entries. Entries of equal keys stay in index order.
  void narrow() {
    constexpr int kBits = 8;
    int64_t chosen = 0, open = count_;  // `chosen` entries are in entries_, `open` in undecided
    auto undecided = uninitialized<Entries>(count_);
    std::copy_n(entries_.get(), count_, undecided.get());
    for (int shift = kKeyBits - kBits; shift >= 0 && open > k_ - chosen; shift -= kBits) {
      std::array<int64_t, 1 << kBits> counts{};
      for (int64_t i = 0; i < open; ++i) ++counts[digit<kBits>(undecided[i].key, shift)];
      int pivot = 0;
      for (int64_t smaller = 0; smaller + counts[pivot] < k_ - chosen; ++pivot)
        smaller += counts[pivot];
      int64_t kept = 0;
      for (int64_t i = 0; i < open; ++i) {
        const Entries entry = undecided[i];
        const int current = digit<kBits>(entry.key, shift);
        if (current < pivot) entries_[chosen++] = entry;
        if (current == pivot) undecided[kept++] = entry;
      }
      open = kept;
    }
    std::copy_n(undecided.get(), k_ - chosen, entries_.get() + chosen);
    count_ = k_;
  }

  template <int kBits>
  static int digit(Key key, int shift) {
    return static_cast<int>(key >> shift) & ((1 << kBits) - 1);
  }

  // Radix sort. It is stable, and entries of equal keys are in index order already, so sorting by
  // key is enough.
  template <int kBits>
  void sort() {
    constexpr int kPasses = (kKeyBits + kBits - 1) / kBits;
    std::array<std::array<Index, 1 << kBits>, kPasses> positions{};
    for (int64_t i = 0; i < count_; ++i) {
      for (int pass = 0; pass < kPasses; ++pass) {
        ++positions[pass][digit<kBits>(entries_[i].key, pass * kBits)];
      }
    }
    auto other = uninitialized<Entries>(count_);
    for (int pass = 0; pass < kPasses; ++pass) {
      auto& position = positions[pass];
      if (position[digit<kBits>(entries_[0].key, pass * kBits)] == static_cast<Index>(count_)) {
        continue;  // all entries have the same digit
      }
      Index sum = 0;
      for (Index& count : position) sum += std::exchange(count, sum);
      for (int64_t i = 0; i < count_; ++i) {
        const Entries entry = entries_[i];
        other[position[digit<kBits>(entry.key, pass * kBits)]++] = entry;
      }
      entries_.swap(other);
    }
  }

  const Score* const scores_;
  const int64_t size_, k_;
  std::unique_ptr<Entries[]> entries_;
  int64_t count_ = 0;
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

void check_k(int64_t k, const Tensor& rows) {
  const int64_t size = rows.dim() == 0 ? 0 : rows.size(0);
  MARGINOPS_CHECK(k >= 0 && k <= size, "k: expected 0 <= k <= ", size, ", got ", k);
}

std::tuple<Tensor, Tensor> select_smallest(const Tensor& scores, int64_t k) {
  check_dim("scores", scores, 1, "[N]");
  check_k(k, scores);
  const int64_t size = scores.size(0);
  Tensor chosen = new_tensor({k}, scores.scalar_type());
  Tensor indices = new_tensor({k}, ScalarType::Long);
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
  check_k(k, logits);
  return select_smallest(minimal_margin_score(logits, weight, bias, nearest), k);
}

std::tuple<Tensor, Tensor> select_classification_margin(const Tensor& logits, const Tensor& target,
                                                        const std::optional<Tensor>& log_norm,
                                                        int64_t k, int64_t ignore_index) {
  check_k(k, logits);
  return select_smallest(classification_margin(logits, target, log_norm, ignore_index), k);
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("select_smallest", MARGINOPS_BOX(&select_smallest));
  m.impl("select_minimal_margin", MARGINOPS_BOX(&select_minimal_margin));
  m.impl("select_classification_margin", MARGINOPS_BOX(&select_classification_margin));
}

}  // namespace
}  // namespace marginops::cpu
