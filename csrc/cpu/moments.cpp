// Count, mean and radius of each class of samples, on the CPU.
//
// The samples are ordered by class. Every class is cut into pieces of a fixed number of samples.
// Threads compute the pieces, which are then merged in order. So results do not depend on the
// number of threads.
#include "moment_rows.h"

#include <tuple>

#include "../binding/aten.h"
#include "rows.h"

namespace marginops::cpu {
namespace {

constexpr int64_t kMomentRows = 256;   // rows of a piece, at most
constexpr int kGroup = 4;              // rows that are read at once
constexpr int64_t kAheadBytes = 8192;  // how far ahead rows are fetched

// The samples that are not ignored, in the order of their classes. Samples of a class keep their
// order.
struct SamplesByClass {
  SamplesByClass(Targets& targets, int64_t samples, int64_t classes)
      : start(static_cast<size_t>(classes) + 1) {
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t label = targets[n];
      start[label + 1] += !targets.ignored(n);
    }
    targets.check();
    for (int64_t c = 0; c < classes; ++c) start[c + 1] += start[c];
    order.resize(static_cast<size_t>(start[classes]));
    Array<int64_t> next = start;
    for (int64_t n = 0; n < samples; ++n) {
      if (!targets.ignored(n)) order[next[targets[n]]++] = n;
    }
  }

  Array<int64_t> start;  // the place where each class starts, and the end
  Array<int64_t> order;  // the sample at each place
};

// Some samples of one class.
struct Piece {
  int64_t label, begin, end;  // places in SamplesByClass::order
  int64_t part;               // place of its moments; -1 if it is a whole class
};

Array<Piece> make_pieces(const Array<int64_t>& start) {
  Array<Piece> pieces;
  int64_t parts = 0;
  for (int64_t c = 0; c + 1 < static_cast<int64_t>(start.size()); ++c) {
    const bool whole = start[c + 1] - start[c] <= kMomentRows;
    for (int64_t begin = start[c]; begin < start[c + 1]; begin += kMomentRows) {
      pieces.push_back(
          {c, begin, std::min(begin + kMomentRows, start[c + 1]), whole ? -1 : parts++});
    }
  }
  return pieces;
}

// Computes the moments of pieces. Each thread has its own reader.
template <class T>
class PieceReader {
  using Value = ValueOf<T>;

 public:
  PieceReader(const Matrix<T>& rows, const Array<int64_t>& order, bool normalize)
      : rows_(rows),
        order_(order),
        last_(order.size() - 1),
        readable_(rows.row(rows.rows - 1) + rows.columns),
        normalize_(normalize),
        ahead_(kAheadBytes / (rows.columns * sizeof(T) + 1) + kGroup),
        moments_(rows.columns) {}

  // Writes the mean minus `base` and returns the sum of squared distances from the mean.
  double read(const Piece& piece, const double* base, double* mean) {
    const bool safe = normalize_ ? add_rows<true>(piece) : add_rows<false>(piece);
    const double squares = moments_.squares();
    const bool precise = std::is_same_v<Value, double> || piece.end - piece.begin == 1 ||
                         is_safe_square(static_cast<Value>(squares));
    if (!safe || !precise) return read_again(piece, base, mean);
    moments_.write_mean(base, mean);
    return squares;
  }

  // Copies the row at a place, scaled if rows are normalized.
  void copy(int64_t place, double* result) const {
    copy_row(row(place), rows_.columns, readable_, normalize_, result);
  }

 private:
  const T* row(int64_t place) const { return rows_.row(order_[std::min(place, last_)]); }

  // Returns whether the scale of every row could be computed.
  template <bool kScaled>
  bool add_rows(const Piece& piece) {
    const T* first = row(piece.begin);
    Value scale = 1;
    if (kScaled) unit_scales<1>(&first, rows_.columns, readable_, &scale);
    moments_.start(first, scale);
    bool safe = true;
    int64_t place = piece.begin;
    for (; place + kGroup <= piece.end; place += kGroup) safe &= add_group<kGroup, kScaled>(place);
    for (; place < piece.end; ++place) safe &= add_group<1, kScaled>(place);
    return safe;
  }

  template <int kRows, bool kScaled>
  bool add_group(int64_t place) {
    const T *rows[kRows], *later[kRows];
    for (int i = 0; i < kRows; ++i) {
      rows[i] = row(place + i);
      later[i] = row(place + i + ahead_);
    }
    Value scales[kRows] = {};
    const bool safe = !kScaled || unit_scales<kRows>(rows, rows_.columns, readable_, scales);
    moments_.template add<kRows, kScaled>(rows, readable_, scales, later);
    return safe;
  }

  // Reads the piece again, in double and row by row, where squares over- or underflow.
  double read_again(const Piece& piece, const double* base, double* mean) const {
    const int64_t columns = rows_.columns;
    PieceMoments<double> moments(columns);
    Buffer<double> buffer(1, columns);
    double* const copy = buffer.row(0);
    for (int64_t place = piece.begin; place < piece.end; ++place) {
      copy_row(row(place), columns, readable_, normalize_, copy);
      if (place == piece.begin) moments.start(copy, 1.0);
      moments.add<1, false>(&copy, buffer.row(1), nullptr, &copy);
    }
    moments.write_mean(base, mean);
    return moments.squares();
  }

  Matrix<T> rows_;
  const Array<int64_t>& order_;
  int64_t last_;
  const T* readable_;  // end of the tensor
  bool normalize_;
  int64_t ahead_;  // rows that are fetched ahead
  PieceMoments<Value> moments_;
};

// Merges the mean and the squares of `other_rows` rows into those of `rows` rows, by the formula of
// Chan, Golub and LeVeque.
void merge(double* mean, double& squares, int64_t rows, const double* other, double other_squares,
           int64_t other_rows, int64_t columns) {
  constexpr int kLanes = Simd<double>::kLanes;
  const double share = static_cast<double>(other_rows) / static_cast<double>(rows + other_rows);
  double step_squares = 0;
  VectorOf<double> sums = {};
  int64_t d = 0;
  for (; d + kLanes <= columns; d += kLanes) {
    const auto step = load(other + d) - load(mean + d);
    sums += step * step;
    store(load(mean + d) + step * share, mean + d);
  }
  for (; d < columns; ++d) {
    const double step = other[d] - mean[d];
    step_squares += step * step;
    mean[d] += step * share;
  }
  for (int lane = 0; lane < kLanes; ++lane) step_squares += sums[lane];
  squares += other_squares + step_squares * share * static_cast<double>(rows);
}

template <class Value>
struct Results {
  int64_t columns;
  Value *mean, *radius;

  void write(int64_t label, int64_t rows, const double* base, const double* difference,
             double squares) const {
    Value* class_mean = mean + label * columns;
    for (int64_t d = 0; d < columns; ++d) {
      const double value = base[d] + difference[d];
      const bool finite = value - value == 0;
      class_mean[d] = finite ? static_cast<Value>(value) : std::numeric_limits<Value>::quiet_NaN();
    }
    radius[label] = static_cast<Value>(std::sqrt(squares / static_cast<double>(rows)));
  }
  void write_empty(int64_t label) const {
    std::fill_n(mean + label * columns, columns, std::numeric_limits<Value>::quiet_NaN());
    radius[label] = std::numeric_limits<Value>::quiet_NaN();
  }
};

template <class T>
void write_moments(const Matrix<T>& rows, const SamplesByClass& samples, bool normalize,
                   const Results<ValueOf<T>>& results) {
  const int64_t columns = rows.columns, grain = kGrain / (columns + 1);
  const Array<Piece> pieces = make_pieces(samples.start);
  int64_t parts = 0;
  for (const Piece& piece : pieces) parts += piece.part >= 0;
  const auto means = uninitialized<double>(parts * columns);
  Array<double> squares(parts);
  // Threads share the rows, not the pieces: a thread takes the pieces that begin among its rows.
  parallel(samples.order.size(), grain, [&](int64_t begin, int64_t end) {
    PieceReader<T> reader(rows, samples.order, normalize);
    const Array<double> zeros(columns);
    Array<double> mean(columns), base(columns);
    auto piece =
        std::lower_bound(pieces.begin(), pieces.end(), begin,
                         [](const Piece& one, int64_t place) { return one.begin < place; });
    for (; piece != pieces.end() && piece->begin < end; ++piece) {
      if (piece->part >= 0) {
        // Means are relative to the first row of the class, which keeps small differences exact.
        reader.copy(samples.start[piece->label], base.data());
        squares[piece->part] = reader.read(*piece, base.data(), &means[piece->part * columns]);
      } else {
        const double whole = reader.read(*piece, zeros.data(), mean.data());
        const int64_t count = piece->end - piece->begin;
        results.write(piece->label, count, zeros.data(), mean.data(), whole);
      }
    }
  });
  parallel(samples.start.size() - 1, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (samples.start[c] == samples.start[c + 1]) results.write_empty(c);
    }
  });
  parallel(pieces.size(), grain, [&](int64_t begin, int64_t end) {
    PieceReader<T> reader(rows, samples.order, normalize);
    Array<double> base(columns);
    for (int64_t p = begin; p < end; ++p) {
      const Piece& first = pieces[p];
      const int64_t start = samples.start[first.label], stop = samples.start[first.label + 1];
      if (first.part < 0 || first.begin != start) continue;
      double* mean = &means[first.part * columns];
      for (int64_t next = p + 1; pieces[next - 1].end < stop; ++next) {
        const Piece& piece = pieces[next];
        merge(mean, squares[first.part], piece.begin - start, &means[piece.part * columns],
              squares[piece.part], piece.end - piece.begin, columns);
      }
      reader.copy(start, base.data());
      results.write(first.label, stop - start, base.data(), mean, squares[first.part]);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> class_moments(const Tensor& input, const Tensor& target,
                                                 int64_t num_classes, bool normalize,
                                                 int64_t ignore_index) {
  check_classes(input, target, num_classes);
  const int64_t columns = input.size(1);
  Tensor count = new_tensor({num_classes}, ScalarType::Long);
  Tensor mean = new_tensor({num_classes, columns}, result_type(input));
  Tensor radius = new_tensor({num_classes}, result_type(input));
  for_dtype(input, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using Value = ValueOf<T>;
    Targets targets(target, num_classes, ignore_index);
    const SamplesByClass samples(targets, input.size(0), num_classes);
    auto* counts = static_cast<int64_t*>(count.mutable_data_ptr());
    for (int64_t c = 0; c < num_classes; ++c) counts[c] = samples.start[c + 1] - samples.start[c];
    // Rows are read singly, so the columns of a row have to be neighbours.
    const bool dense = columns <= 1 || input.stride(1) == 1;
    const Tensor rows = dense ? input : contiguous(input, place());
    const Results<Value> results{columns, static_cast<Value*>(mean.mutable_data_ptr()),
                                 static_cast<Value*>(radius.mutable_data_ptr())};
    write_moments<T>(matrix<T>(rows), samples, normalize, results);
  });
  return {count, mean, radius};
}

STABLE_TORCH_LIBRARY_IMPL(marginops_kernels, CPU, m) {
  m.impl("class_moments", MARGINOPS_BOX(&class_moments));
}

}  // namespace
}  // namespace marginops::cpu
