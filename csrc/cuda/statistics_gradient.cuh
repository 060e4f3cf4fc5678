// The gradient of the statistics for the logits: one reading and one writing of each row.
#pragma once

#include "statistics.cuh"

namespace marginops::cuda {

constexpr int kGradientBlock = 256;

// What the gradient needs, [N] each; grad_* without data are 0.
template <class Number>
struct GradientView {
  Target target;
  Normalizer<Number> normalized;
  Column<int64_t> rival;
  Column<Number> confidence, entropy, maximum, log_sum;
  Column<Number> grad_margin, grad_loss, grad_confidence, grad_entropy;

  __device__ __forceinline__ Number optional(const Column<Number>& column, int64_t n) const {
    return column.data == nullptr ? 0 : column[n];
  }
};

// One row of the gradient. The thread that writes the classes around the label or the rival also
// writes these, afterwards. Those outside [0, C) belong to another shard of the logits.
template <class Scalar, bool kDense>
struct RowGradient {
  using Number = Value<Scalar>;
  Row<Scalar> row;
  bool ignored;
  int32_t label, rival;
  Number margin;  // what the label gets from the margin, and the rival loses
  SoftmaxGradient<Number> softmax;

  __device__ __forceinline__ RowGradient(const GradientView<Number>& from, const Row<Scalar>& row)
      : row(row) {
    const int64_t n = row.position;
    const int64_t wanted = __ldg(from.target.index.data + n * from.target.index.stride);
    ignored = wanted == from.target.ignore_index;
    label = ignored || !row.has(wanted) ? -1 : static_cast<int32_t>(wanted);
    const int64_t other = from.rival[n];
    rival = ignored || !row.has(other) ? -1 : static_cast<int32_t>(other);
    margin = from.normalized(from.optional(from.grad_margin, n));
    if constexpr (kDense)
      softmax = {from.maximum[n],
                 from.log_sum[n],
                 from.confidence[n],
                 from.entropy[n],
                 from.optional(from.grad_loss, n),
                 from.optional(from.grad_confidence, n),
                 from.optional(from.grad_entropy, n)};
  }

  // The gradient of `count` classes from `index` on is written; these have a margin among them.
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

// `threads` threads a row, a power of two, times gridDim.y. Packs of 16 bytes where the rows read
// and written have the same place between 16-byte boundaries.
template <class Scalar, bool kDense>
__global__ void __launch_bounds__(kGradientBlock, kRowsBlocks<Scalar>)
    gradient_kernel(Logits<Scalar> logits, GradientView<Value<Scalar>> from, int threads,
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
    const RowGradient<Scalar, kDense> gradient(from, row);
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
