// The gradient of the statistics for the logits. Each row is read once and written once.
#pragma once

#include "statistics.cuh"

namespace marginops::cuda {

constexpr int kGradientBlock = 256;

// The inputs of the gradient, each [N], but the last two are one value. A grad_* without data is 0.
template <class Number>
struct GradientView {
  Target target;
  Normalizer<Number> normalized;
  Column<int64_t> rival;
  Column<Number> confidence, entropy, maximum, log_sum;
  Column<Number> grad_margin, grad_loss, grad_confidence, grad_entropy;
  const Number *grad_mean_loss, *num_counted;

  __device__ __forceinline__ Number optional(const Column<Number>& column, int64_t n) const {
    return column.data == nullptr ? 0 : column[n];
  }
  // What each loss gets of the gradient of their mean.
  __device__ __forceinline__ Number share() const {
    if (grad_mean_loss == nullptr) return 0;
    return num_counted == nullptr ? __ldg(grad_mean_loss)
                                  : __ldg(grad_mean_loss) / __ldg(num_counted);
  }
};

// One row of the gradient. The thread that writes the classes around the label or the rival writes
// the entry of that class again, afterwards. A label or rival outside [0, C) belongs to another
// piece of the logits.
template <class Scalar, bool kDense>
struct RowGradient {
  using Number = Value<Scalar>;
  Row<Scalar> row;
  bool ignored;
  int32_t label, rival;
  Number margin;  // gradient of the margin, added for the label and subtracted for the rival
  SoftmaxGradient<Number> softmax;

  __device__ __forceinline__ RowGradient(const GradientView<Number>& inputs, const Row<Scalar>& row)
      : row(row) {
    const int64_t n = row.position;
    const int64_t wanted = __ldg(inputs.target.index.data + n * inputs.target.index.stride);
    ignored = wanted == inputs.target.ignore_index;
    label = ignored || !row.has(wanted) ? -1 : static_cast<int32_t>(wanted);
    const int64_t other = inputs.rival[n];
    rival = ignored || !row.has(other) ? -1 : static_cast<int32_t>(other);
    margin = inputs.normalized(inputs.optional(inputs.grad_margin, n));
    if constexpr (kDense)
      softmax = {inputs.maximum[n],
                 inputs.log_sum[n],
                 inputs.confidence[n],
                 inputs.entropy[n],
                 inputs.optional(inputs.grad_loss, n) + inputs.share(),
                 inputs.optional(inputs.grad_confidence, n),
                 inputs.optional(inputs.grad_entropy, n)};
  }

  // Writes the entries of the label and the rival if they are among the `count` classes from
  // `index` on, whose dense part has been written.
  __device__ __forceinline__ void write_sparse(Scalar* out, unsigned index, unsigned count) const {
    if (static_cast<unsigned>(label) - index < count) {
      Number value = margin;
      if constexpr (kDense) value += softmax.label(row[label]);
      from_value(value, out + label);
    }
    if (static_cast<unsigned>(rival) - index < count) {
      Number value = -margin;
      if constexpr (kDense) value += softmax.dense(row[rival]);
      from_value(value, out + rival);
    }
  }

  __device__ __forceinline__ Scalar dense(Scalar logit) const {
    Scalar result;
    Number value = 0;
    if constexpr (kDense)
      if (!ignored) value = softmax.dense(to_value(logit));
    from_value(value, &result);
    return result;
  }

  __device__ __forceinline__ void write_one(Scalar* out, unsigned index) const {
    out[index] = dense(kDense ? __ldg(row.data + index * row.stride) : Scalar{});
    write_sparse(out, index, 1);
  }

  __device__ __forceinline__ void write_pack(Scalar* out, unsigned index) const {
    Pack<Scalar> pack{};
    if constexpr (kDense)
      if (!ignored) pack = load_pack(row.data + index);
#pragma unroll
    for (int i = 0; i < Pack<Scalar>::kSize; ++i) pack.scalar[i] = dense(pack.scalar[i]);
    store_pack(out + index, pack);
    write_sparse(out, index, Pack<Scalar>::kSize);
  }
};

// A row has `threads` threads, a power of two, in each of gridDim.y blocks. It is read and written
// in 16-byte packs if the rows read and written lie equally between 16-byte boundaries.
template <class Scalar, bool kDense>
__global__ void __launch_bounds__(kGradientBlock, kRowsBlocks<Scalar>)
    gradient_kernel(Logits<Scalar> logits, GradientView<Value<Scalar>> inputs, int threads,
                    Scalar* grad_logits) {
  constexpr unsigned kSize = Pack<Scalar>::kSize;
  const int rows_per_block = kGradientBlock / threads;
  const auto classes = static_cast<unsigned>(logits.classes);
  const unsigned lane = blockIdx.y * threads + (threadIdx.x & (threads - 1));
  const unsigned step = gridDim.y * threads;
  for (int64_t first = int64_t{blockIdx.x} * rows_per_block; first < logits.rows.size;
       first += int64_t{gridDim.x} * rows_per_block) {
    const Row<Scalar> row = logits.row(first + static_cast<int>(threadIdx.x) / threads);
    if (!row.active) return;
    const RowGradient<Scalar, kDense> gradient(inputs, row);
    Scalar* out = grad_logits + row.position * logits.classes;
    const auto address = reinterpret_cast<uintptr_t>(out);
    const bool packed =
        !kDense || (row.stride == 1 && (reinterpret_cast<uintptr_t>(row.data) - address) % 16 == 0);
    const unsigned head = static_cast<unsigned>(-address % 16 / sizeof(Scalar));
    const unsigned scalars = packed && head < classes ? head : classes;
    for (unsigned c = lane; c < scalars; c += step) gradient.write_one(out, c);
    const unsigned packs = (classes - scalars) / kSize;
#pragma unroll 2
    for (unsigned p = lane; p < packs; p += step) gradient.write_pack(out, scalars + p * kSize);
    for (unsigned c = scalars + packs * kSize + lane; c < classes; c += step)
      gradient.write_one(out, c);
  }
}

}  // namespace marginops::cuda
