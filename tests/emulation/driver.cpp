// Runs the launchers of csrc/cuda on the CPU: `driver CASES DATA RESULTS`. Cases and expected
// results live in the Python files beside it; here is only the way from one to the other.
#include "cuda/margin.cu"
#include "cuda/moments.cu"
#include "cuda/select.cu"
#include "cuda/statistics.cu"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <numeric>

#include "case.h"

namespace {

using namespace marginops::cuda;

Dtype dtype_of(const Array& array) {
  static const std::map<std::string, Dtype> dtypes{{"float32", Dtype::kFloat32},
                                                   {"float64", Dtype::kFloat64},
                                                   {"bfloat16", Dtype::kBFloat16},
                                                   {"float16", Dtype::kFloat16}};
  return dtypes.at(array.dtype);
}

Matrix matrix(const Array& array) {
  return {array.data(),      dtype_of(array),    array.shape.at(0),
          array.shape.at(1), array.stride.at(0), array.stride.at(1)};
}

Vector vector(const Array& array) {
  return {array.data(), dtype_of(array), array.shape.at(0), array.stride.at(0)};
}

IndexVector index_vector(const Array& array) {
  return {static_cast<const int64_t*>(array.data()), array.shape.at(0), array.stride.at(0)};
}

// The arguments that several launchers share, from the arrays of a case.
struct Arguments {
  explicit Arguments(const Case& from) : case_(from) {
    if (const Array* array = from.find("logits")) logits = matrix(*array);
    if (const Array* array = from.find("weight")) head.weight = matrix(*array);
    if (const Array* array = from.find("bias")) {
      bias = vector(*array);
      head.bias = &bias;
    }
    if (const Array* array = from.find("target")) target.index = index_vector(*array);
    if (from.ints.count("ignore_index")) target.ignore_index = from.ints.at("ignore_index");
    if (const Array* array = from.find("log_norm")) log_norm.device = array->data();
    if (from.reals.count("log_norm")) log_norm.host = from.reals.at("log_norm");
    rows = {nullptr, logits.rows, 1};
    if (const Array* array = from.find("rows")) rows = index_vector(*array);
    nearest = from.ints.count("nearest") && from.ints.at("nearest");
  }

  template <class T>
  T* output(const char* name) const {
    return case_.output<T>(name);
  }

  Matrix logits{};
  Vector bias{};
  Head head{};
  Target target{};
  LogNorm log_norm{};
  Rows rows{};
  bool nearest = false;

 private:
  const Case& case_;
};

cudaError_t run_margin(const Case& from) {
  const Arguments a(from);
  const Buffer workspace(classification_margin_workspace_bytes(a.logits, a.rows));
  return classification_margin(a.logits, a.target, a.log_norm, a.output<void>("margin"),
                               workspace.data(), nullptr);
}

cudaError_t run_margin_rival(const Case& from) {
  const Arguments a(from);
  const Buffer workspace(classification_margin_workspace_bytes(a.logits, a.rows));
  return classification_margin_rival(a.logits, a.target, a.log_norm, a.rows,
                                     a.output<void>("margin"), a.output<int64_t>("rival"),
                                     workspace.data(), nullptr);
}

cudaError_t run_score(const Case& from) {
  const Arguments a(from);
  const Buffer workspace(minimal_margin_workspace_bytes(a.logits, a.head, a.rows, a.nearest));
  return minimal_margin_score(a.logits, a.head, a.nearest, a.output<void>("score"),
                              workspace.data(), nullptr);
}

cudaError_t run_pair(const Case& from) {
  const Arguments a(from);
  const Buffer workspace(minimal_margin_workspace_bytes(a.logits, a.head, a.rows, a.nearest));
  return minimal_margin_pair(a.logits, a.head, a.rows, a.nearest, a.output<int64_t>("pair"),
                             a.output<void>("distance"), workspace.data(), nullptr);
}

cudaError_t run_pair_gradient(const Case& from) {
  const Arguments a(from);
  const IndexVector key = index_vector(from.array("key"));
  return pair_gradient(key.data, from.array("coefficient").data(), key.size, a.head,
                       a.output<void>("grad_weight"), a.output<void>("grad_bias"), nullptr);
}

cudaError_t run_pair_distance(const Case& from) {
  const Arguments a(from);
  const Array& pair = from.array("pair");
  return pair_distance(a.head,
                       {static_cast<const int64_t*>(pair.data()), pair.shape.at(0),
                        pair.stride.at(0), pair.stride.at(1)},
                       a.output<void>("distance"), nullptr);
}

cudaError_t run_class_sum(const Case& from) {
  const IndexVector key = index_vector(from.array("key"));
  const Matrix rows = matrix(from.array("rows"));
  const Buffer workspace(class_sum_workspace_bytes(key.size, rows));
  return class_sum(key.data, from.array("coefficient").data(), key.size, rows,
                   from.ints.at("classes"), from.output<void>("result"), workspace.data(), nullptr);
}

// A vector of a case, for as long as a launcher needs it.
struct OptionalVector {
  OptionalVector(const Case& from, const char* name) : given(from.find(name) != nullptr) {
    if (given) value = vector(from.array(name));
  }
  const Vector* get() const { return given ? &value : nullptr; }

  bool given;
  Vector value{};
};

cudaError_t run_statistics(const Case& from) {
  const Arguments a(from);
  const OptionalVector input_norm(from, "input_norm");
  const Buffer workspace(statistics_workspace_bytes(a.logits));
  const StatisticsResult result{a.output<void>("margin"),  a.output<int64_t>("rival"),
                                a.output<void>("loss"),    a.output<void>("confidence"),
                                a.output<void>("entropy"), a.output<bool>("correct"),
                                a.output<void>("el2n"),    a.output<void>("gradient_norm"),
                                a.output<void>("maximum"), a.output<void>("log_sum")};
  return sample_statistics(a.logits, a.target, input_norm.get(), a.log_norm, result,
                           workspace.data(), nullptr);
}

cudaError_t run_row_sums(const Case& from) {
  const Arguments a(from);
  const Buffer workspace(statistics_workspace_bytes(a.logits));
  return row_sums(a.logits, a.target.index, from.ints.at("with_sums") != 0,
                          a.output<void>("values"), a.output<int64_t>("classes"), workspace.data(),
                          nullptr);
}

cudaError_t run_statistics_gradient(const Case& from) {
  const Arguments a(from);
  const OptionalVector margin(from, "grad_margin"), loss(from, "grad_loss");
  const OptionalVector confidence(from, "grad_confidence"), entropy(from, "grad_entropy");
  const StatisticsGradient gradient{index_vector(from.array("rival")),
                                    vector(from.array("confidence")),
                                    vector(from.array("entropy")),
                                    vector(from.array("maximum")),
                                    vector(from.array("log_sum")),
                                    margin.get(),
                                    loss.get(),
                                    confidence.get(),
                                    entropy.get()};
  return sample_statistics_gradient(a.logits, a.target, a.log_norm, gradient,
                                    a.output<void>("grad_logits"), nullptr);
}

// Stands in for the library's sort.
template <class Key>
void sort_rows(Key* key, std::vector<int64_t>& row) {
  std::iota(row.begin(), row.end(), 0);
  std::stable_sort(row.begin(), row.end(), [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  std::stable_sort(key, key + row.size());
}

cudaError_t run_class_moments(const Case& from) {
  const Matrix input = matrix(from.array("input"));
  const Target target{index_vector(from.array("target")), from.ints.at("ignore_index")};
  const int64_t classes = from.ints.at("classes");
  const bool normalize = from.ints.at("normalize") != 0;
  const int bytes = moment_key_bytes(classes);
  const Buffer key(input.rows * bytes);
  const cudaError_t error = moment_keys(target, classes, key.data(), nullptr);
  if (error != cudaSuccess) return error;
  std::vector<int64_t> row(input.rows);
  if (bytes == 1)
    sort_rows(reinterpret_cast<uint8_t*>(key.data()), row);
  else if (bytes == 2)
    sort_rows(reinterpret_cast<int16_t*>(key.data()), row);
  else
    sort_rows(reinterpret_cast<int32_t*>(key.data()), row);
  const Buffer workspace(class_moments_workspace_bytes(input, classes, normalize));
  return class_moments(
      input, {key.data(), row.data()}, classes, normalize,
      {from.output<int64_t>("count"), from.output<void>("mean"), from.output<void>("radius")},
      workspace.data(), nullptr);
}

cudaError_t run_select_sorted(const Case& from) {
  return select_sorted(vector(from.array("scores")), from.ints.at("k"), from.output<void>("values"),
                       from.output<int64_t>("index"), nullptr);
}

cudaError_t run_select_unsorted(const Case& from) {
  const Vector scores = vector(from.array("scores"));
  const Buffer workspace(select_workspace_bytes(scores));
  return select_unsorted(scores, from.ints.at("k"), from.output<void>("key"),
                         from.output<int64_t>("index"), workspace.data(), nullptr);
}

cudaError_t run_fits_one_block(const Case& from) {
  *from.output<int64_t>("fits") = fits_one_block(from.ints.at("n"), from.ints.at("k"));
  return cudaSuccess;
}

const std::map<std::string, std::function<cudaError_t(const Case&)>> kLaunchers{
    {"classification_margin", run_margin},
    {"classification_margin_rival", run_margin_rival},
    {"minimal_margin_score", run_score},
    {"minimal_margin_pair", run_pair},
    {"pair_gradient", run_pair_gradient},
    {"pair_distance", run_pair_distance},
    {"class_sum", run_class_sum},
    {"sample_statistics", run_statistics},
    {"row_sums", run_row_sums},
    {"sample_statistics_gradient", run_statistics_gradient},
    {"class_moments", run_class_moments},
    {"select_sorted", run_select_sorted},
    {"select_unsorted", run_select_unsorted},
    {"fits_one_block", run_fits_one_block},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    fprintf(stderr, "usage: driver CASES DATA RESULTS\n");
    return 2;
  }
  CaseReader reader(arguments[1], arguments[2]);
  std::ofstream results(arguments[3], std::ios::binary);
  Case next;
  for (int number = 0; reader.next(next); ++number) {
    fprintf(stderr, "case %d: %s\n", number, next.op.c_str());  // a sanitizer's report comes below
    const cudaError_t error = kLaunchers.at(next.op)(next);
    if (error != cudaSuccess) {
      fprintf(stderr, "the launch failed: %s\n", cudaGetErrorString(error));
      return 3;  // 1 is a sanitizer's
    }
    for (const std::string& name : next.outputs) {
      const Buffer& buffer = next.array(name).buffer;
      results.write(buffer.data(), std::streamsize(buffer.bytes()));
    }
  }
  return 0;
}
