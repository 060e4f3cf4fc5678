// Checks of the arguments of the ops, for the kernels of every device. The public functions check
// before them, in Python. These are for direct calls of the ops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "tensor.h"

namespace marginops {

// The dtype of what is computed from numbers of the dtype of a tensor.
inline ScalarType result_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& first) {
  MARGINOPS_CHECK(tensor.device() == first.device(), name, ": expected device ", device_of(first),
                  ", that of the first argument, got ", device_of(tensor));
}

// `shape` is what to expect, such as "[N, C]".
inline void check_dim(const char* name, const Tensor& tensor, int64_t dim, const char* shape) {
  MARGINOPS_CHECK(tensor.dim() == dim, name, ": expected shape ", shape, ", got ",
                  shape_of(tensor));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType type) {
  MARGINOPS_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", name_of(type), ", got ",
                  name_of(tensor.scalar_type()));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  MARGINOPS_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  name, ": expected dtype float32, float64, bfloat16 or float16, got ",
                  name_of(type));
}

// A vector of `size` values for `meaning`.
inline void check_vector(const char* name, const Tensor& tensor, int64_t size, const char* meaning,
                         ScalarType type, const Tensor& first) {
  MARGINOPS_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected shape [", size,
                  "] for ", meaning, ", got ", shape_of(tensor));
  check_dtype(name, tensor, type);
  check_device(name, tensor, first);
}

// A vector of any size.
inline void check_vector(const char* name, const Tensor& tensor, const char* shape, ScalarType type,
                         const Tensor& first) {
  check_dim(name, tensor, 1, shape);
  check_dtype(name, tensor, type);
  check_device(name, tensor, first);
}

inline void check_matrix(const char* name, const Tensor& tensor, const char* shape,
                         const Tensor& first) {
  check_dim(name, tensor, 2, shape);
  check_floating(name, tensor);
  check_device(name, tensor, first);
}

inline void check_logits(const Tensor& logits, int64_t least_classes = 2) {
  check_matrix("logits", logits, "[N, C]", logits);
  MARGINOPS_CHECK(least_classes <= logits.size(1) && logits.size(1) < INT32_MAX,
                  "logits: expected ", least_classes, " <= C < 2**31 - 1 classes, got ",
                  logits.size(1));
}

inline void check_target(const Tensor& target, const Tensor& logits) {
  check_vector("target", target, logits.size(0), "the rows of logits", ScalarType::Long, logits);
}

// A number of the result dtype for each row of logits.
inline void check_values(const char* name, const Tensor& values, const Tensor& logits) {
  check_vector(name, values, logits.size(0), "the rows of logits", result_type(logits), logits);
}
inline void check_values(const char* name, const std::optional<Tensor>& values,
                         const Tensor& logits) {
  if (values) check_values(name, *values, logits);
}

// One number of the result dtype.
inline void check_number(const char* name, const std::optional<Tensor>& number,
                         const Tensor& logits) {
  if (!number) return;
  check_dim(name, *number, 0, "[]");
  check_dtype(name, *number, result_type(logits));
  check_device(name, *number, logits);
}

// The number may also lie on the CPU.
inline void check_log_norm(const std::optional<Tensor>& log_norm, const Tensor& logits) {
  if (!log_norm) return;
  MARGINOPS_CHECK(log_norm->numel() == 1, "log_norm: expected one value, got shape ",
                  shape_of(*log_norm));
  check_dtype("log_norm", *log_norm, result_type(logits));
  MARGINOPS_CHECK(log_norm->is_cpu() || log_norm->device() == logits.device(),
                  "log_norm: expected device cpu, or ", device_of(logits), " as logits, got ",
                  device_of(*log_norm));
}

// The rows of logits that get a result.
inline void check_rows(const std::optional<Tensor>& rows, const Tensor& logits) {
  if (rows) check_vector("rows", *rows, "[K]", ScalarType::Long, logits);
}

// The weight of a last layer, and the bias where it counts in the norm.
inline void check_layer(const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& first) {
  check_matrix("weight", weight, "[C, D]", first);
  if (!bias) return;
  check_vector("bias", *bias, weight.size(0), "the rows of weight", weight.scalar_type(), first);
}

// Logits, and the last layer that they come from, if it is given.
inline void check_head(const Tensor& logits, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias) {
  check_logits(logits);
  if (!weight) {
    if (bias) check_device("bias", *bias, logits);
    return;
  }
  check_layer(*weight, bias, logits);
  MARGINOPS_CHECK(weight->size(0) == logits.size(1), "weight: expected ", logits.size(1),
                  " rows for the classes of logits, got ", weight->size(0));
  const ScalarType type = weight->scalar_type(), logits_type = logits.scalar_type();
  MARGINOPS_CHECK(
      type == logits_type || (type == ScalarType::Float && logits_type != ScalarType::Double),
      "weight: expected the dtype of logits, or float32 for bfloat16 and float16 logits, got ",
      name_of(type), " for ", name_of(logits_type), " logits");
}

inline void check_k(int64_t k, int64_t count) {
  MARGINOPS_CHECK(0 <= k && k <= count, "k: expected 0 <= k <= ", count, ", got ", k);
}

// Entries of a sum over the rows of a matrix: a key and a coefficient each.
inline void check_entries(const Tensor& key, const Tensor& coefficient, const Tensor& rows) {
  check_vector("key", key, "[M]", ScalarType::Long, key);
  check_vector("coefficient", coefficient, key.size(0), "the values of key", result_type(rows),
               key);
}

// Sums over the classes of a layer. A key is a class times the number of classes, plus another
// class.
inline void check_pair_gradient(const Tensor& key, const Tensor& coefficient, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  check_layer(weight, bias, key);
  check_entries(key, coefficient, weight);
  MARGINOPS_CHECK(weight.size(0) <= INT32_MAX, "weight: expected fewer than 2**31 rows, got ",
                  weight.size(0));
}

// Sums over `classes` classes. A key is a class times the number of rows, plus a row.
inline void check_class_sum(const Tensor& key, const Tensor& coefficient, const Tensor& rows,
                            int64_t classes) {
  check_matrix("rows", rows, "[R, D]", key);
  check_entries(key, coefficient, rows);
  MARGINOPS_CHECK(classes >= 0 && classes <= INT64_MAX / std::max<int64_t>(rows.size(0), 1),
                  "classes: expected at least 0, and keys below 2**63, got ", classes);
  MARGINOPS_CHECK(key.size(0) == 0 || rows.size(0) > 0, "rows: expected at least one for ",
                  key.size(0), " keys, got none");
}

inline void check_pair(const Tensor& pair, const Tensor& weight) {
  MARGINOPS_CHECK(pair.dim() == 2 && pair.size(1) == 2, "pair: expected shape [K, 2], got ",
                  shape_of(pair));
  check_dtype("pair", pair, ScalarType::Long);
  check_device("pair", pair, weight);
}

// Samples of classes.
inline void check_classes(const Tensor& input, const Tensor& target, int64_t num_classes) {
  check_matrix("input", input, "[N, D]", input);
  check_vector("target", target, input.size(0), "the rows of input", ScalarType::Long, input);
  MARGINOPS_CHECK(num_classes >= 1, "num_classes: expected at least 1, got ", num_classes);
}

// The data of a tensor that an op changes.
template <class T>
T* state(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
         ScalarType type, const Tensor& first) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  for (int64_t i = 0; fits && i < tensor.dim(); ++i) fits = tensor.size(i) == shape.begin()[i];
  MARGINOPS_CHECK(fits, name, ": expected a contiguous tensor ", shape_of(shape), ", got ",
                  tensor.is_contiguous() ? "shape " : "strided shape ", shape_of(tensor));
  check_dtype(name, tensor, type);
  check_device(name, tensor, first);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace marginops
