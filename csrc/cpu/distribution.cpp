// Adds a batch of margins to their distribution on the CPU.
//
// Each margin is read once. Vectors compute sums, extremes and counts. Scalar code counts the upper
// halves of the floats, which are the bins. The counting takes a cycle a margin in any case, and
// the vector instructions run in between. Sums are those of fixed chunks, added in order, so the
// number of threads does not change them.
#include <cmath>
#include <limits>
#include <mutex>
#include <utility>

#include "tensor.h"

namespace marginops::cpu {
namespace {

constexpr int64_t kBins = 1 << 16;
constexpr int64_t kInfiniteBin = 0x7f80;
constexpr int64_t kChunk = 8192;
constexpr int64_t kTile = 1024;
constexpr int64_t kSlab = int64_t{1} << 31;  // margins whose counts fit into 32 bits
// Neighbouring margins are counted in different tables, so an increment need not wait for the one
// before it.
constexpr int kTables = 2;
constexpr int64_t kBlock = 32;            // bins that add_table() tests at once
constexpr int64_t kTableGrain = 1 << 17;  // so many margins are worth tables for a thread

// A vector in double precision, which takes two vectors for one of float.
template <class Value>
struct Widened {
  static constexpr int kCount = sizeof(double) / sizeof(Value);
  VectorOf<double> part[kCount];
};

inline Widened<double> widen(VectorOf<double> vector) { return {{vector}}; }
inline Widened<float> widen(VectorOf<float> vector) {
#if defined(__AVX512F__)
  // GCC 12 warns about its own header where the forms without a mask are used.
  return {{_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, vector, 0)),
           _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, vector, 1))}};
#elif defined(__AVX2__)
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(vector)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(vector, 1))}};
#else
  Widened<float> wide;
  for (int lane = 0; lane < Simd<float>::kLanes; ++lane) {
    wide.part[lane / Simd<double>::kLanes][lane % Simd<double>::kLanes] = vector[lane];
  }
  return wide;
#endif
}

// The summary of some margins. `ignored` is the number of those that are +inf. The other fields
// leave these out.
struct Summary {
  int64_t ignored = 0, positive = 0;
  double sum = 0, positive_sum = 0;
  double minimum = std::numeric_limits<double>::infinity();
  double maximum = -std::numeric_limits<double>::infinity();
  bool nan = false;

  void add(const Summary& other) {
    ignored += other.ignored;
    positive += other.positive;
    sum += other.sum;
    positive_sum += other.positive_sum;
    minimum = std::min(minimum, other.minimum);
    maximum = std::max(maximum, other.maximum);
    nan |= other.nan;
  }
};

// The summary of a chunk, lane by lane.
template <class Value>
struct Lanes {
  using Vector = VectorOf<Value>;
  static constexpr int kLanes = Simd<Value>::kLanes;
  static constexpr Value kInfinity = std::numeric_limits<Value>::infinity();

  typename Simd<Value>::Index ignored{}, positive{};
  Widened<Value> sum{}, positive_sum{};
  Vector minimum = Vector{} + kInfinity, maximum = Vector{} - kInfinity;

  void add(Vector value) {
    const auto is_ignored = value == kInfinity;
    const Vector kept = is_ignored ? Vector{} : value;
    ignored -= is_ignored;
    positive -= kept > Value{0};
    minimum = cpu::minimum(value, minimum);
    maximum = cpu::maximum(is_ignored ? Vector{} - kInfinity : value, maximum);
    const Widened<Value> wide = widen(kept);
    for (int p = 0; p < Widened<Value>::kCount; ++p) {
      sum.part[p] += wide.part[p];
      positive_sum.part[p] += cpu::maximum(wide.part[p], VectorOf<double>{});
    }
  }

  Summary summary() const {
    Summary all;
    for (int lane = 0; lane < kLanes; ++lane) {
      all.ignored += ignored[lane];
      all.positive += positive[lane];
      all.minimum = std::min<double>(all.minimum, minimum[lane]);
      all.maximum = std::max<double>(all.maximum, maximum[lane]);
      const int p = lane / Simd<double>::kLanes, wide_lane = lane % Simd<double>::kLanes;
      all.sum += sum.part[p][wide_lane];
      all.positive_sum += positive_sum.part[p][wide_lane];
    }
    return all;
  }
};

template <int kTableCount, class Count>
[[gnu::always_inline]] inline void count_bins(const float* values, int size, Count* counts) {
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    ++counts[static_cast<size_t>(bits >> 16) * kTableCount + i % kTableCount];
  }
}

template <class T>
class Reader {
  using Value = ValueOf<T>;
  static constexpr int kLanes = Simd<Value>::kLanes;

 public:
  explicit Reader(const Vector<T>& margins) : margins_(margins) {}

  template <int kTableCount, class Count>
  Summary read(int64_t begin, int64_t end, Count* counts) {
    Lanes<Value> lanes;
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t size = std::min(kTile, end - i);
      const Value* values = tile(i, size);
      lanes = add_tile<kTableCount>(lanes, values, narrow(values, size), size, counts);
    }
    Summary summary = lanes.summary();
    summary.ignored -= -(end - begin) & (kLanes - 1);  // the padding of the last vector
    for (int64_t i = begin; i < end && summary.sum != summary.sum && !summary.nan; ++i) {
      summary.nan = value_of(margins_[i]) != value_of(margins_[i]);
    }
    return summary;
  }

 private:
  // `lanes` is passed by value, which keeps it in registers.
  template <int kTableCount, class Count>
  static Lanes<Value> add_tile(Lanes<Value> lanes, const Value* values, const float* floats,
                               int64_t size, Count* counts) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      lanes.add(load(values + i));
      count_bins<kTableCount>(floats + i, kLanes, counts);
    }
    if (i < size) {
      lanes.add(load(values + i));
      count_bins<kTableCount>(floats + i, static_cast<int>(size - i), counts);
    }
    return lanes;
  }

  // The margins next to each other, padded with +inf to a multiple of kLanes.
  const Value* tile(int64_t begin, int64_t size) {
    const bool dense = margins_.stride == 1;
    if constexpr (std::is_same_v<T, Value>) {
      if (dense && size % kLanes == 0) return margins_.data + begin;
    }
    int64_t i = 0;
    for (; dense && i + kLanes <= size; i += kLanes) {
      store(load(margins_.data + begin + i), values_ + i);
    }
    for (; i < size; ++i) values_[i] = value_of(margins_[begin + i]);
    for (; i % kLanes != 0; ++i) values_[i] = std::numeric_limits<Value>::infinity();
    return values_;
  }

  const float* narrow(const float* values, int64_t) { return values; }
  const float* narrow(const double* values, int64_t size) {
    for (int64_t i = 0; i < size; ++i) floats_[i] = static_cast<float>(values[i]);
    return floats_;
  }

  const Vector<T> margins_;
  Value values_[kTile];
  float floats_[std::is_same_v<Value, double> ? kTile : 1];
};

// Most bins are empty, so several are tested at once before they are added.
void add_table(const uint32_t* counts, int64_t begin, int64_t end, int64_t* bin_counts) {
  for (int64_t bin = begin; bin < end; bin += kBlock) {
    const uint32_t* block = counts + bin * kTables;
    uint32_t any = 0;
    for (int i = 0; i < kBlock * kTables; ++i) any |= block[i];
    if (any == 0) continue;
    for (int i = 0; i < kBlock * kTables; ++i) bin_counts[bin + i / kTables] += block[i];
  }
}

template <class T>
Summary add_slab(const Vector<T>& margins, int64_t* bin_counts) {
  if (margins.size <= kTableGrain) {
    return Reader<T>(margins).template read<1>(0, margins.size, bin_counts);
  }
  const int64_t chunks = (margins.size + kChunk - 1) / kChunk;
  Array<Summary> summaries(static_cast<size_t>(chunks));
  Array<Array<uint32_t>> tables;
  std::mutex mutex;
  parallel(chunks, kTableGrain / kChunk, [&](int64_t begin, int64_t end) {
    Array<uint32_t> counts(kTables * kBins);
    Reader<T> reader(margins);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      summaries[chunk] = reader.template read<kTables>(
          chunk * kChunk, std::min(margins.size, (chunk + 1) * kChunk), counts.data());
    }
    const std::lock_guard<std::mutex> lock(mutex);
    tables.push_back(std::move(counts));
  });
  parallel(kBins / kBlock, kGrain / static_cast<int64_t>(kBlock * kTables * tables.size()),
           [&](int64_t begin, int64_t end) {
             for (const auto& counts : tables) {
               add_table(counts.data(), begin * kBlock, end * kBlock, bin_counts);
             }
           });
  Summary all;
  for (const Summary& summary : summaries) all.add(summary);
  return all;
}

void update_margin_distribution(const Tensor& bin_counts, const Tensor& counts, const Tensor& sums,
                                const Tensor& minimum, const Tensor& maximum,
                                const Tensor& margins) {
  check_dim("margins", margins, 1, "[N]");
  check_floating("margins", margins);
  auto* bin = state<int64_t>("bin_counts", bin_counts, {kBins}, ScalarType::Long, bin_counts);
  auto* count = state<int64_t>("counts", counts, {2}, ScalarType::Long, bin_counts);
  auto* sum = state<double>("sums", sums, {2}, ScalarType::Double, bin_counts);
  auto* least = state<double>("minimum", minimum, {}, ScalarType::Double, bin_counts);
  auto* largest = state<double>("maximum", maximum, {}, ScalarType::Double, bin_counts);
  for_dtype(margins, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Vector<T> all = vector<T>(margins);
    Summary summary;
    for (int64_t i = 0; i < all.size; i += kSlab) {
      summary.add(add_slab<T>({&all[i], std::min(kSlab, all.size - i), all.stride}, bin));
    }
    bin[kInfiniteBin] -= summary.ignored;
    count[0] += summary.ignored;
    count[1] += summary.positive;
    sum[0] += summary.sum;
    sum[1] += summary.positive_sum;
    if (summary.minimum < *least) *least = summary.minimum;  // a NaN stays
    if (summary.maximum > *largest) *largest = summary.maximum;
    if (summary.nan) *least = *largest = sum[1] = std::numeric_limits<double>::quiet_NaN();
  });
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("update_margin_distribution", MARGINOPS_BOX(&update_margin_distribution));
}

}  // namespace
}  // namespace marginops::cpu
