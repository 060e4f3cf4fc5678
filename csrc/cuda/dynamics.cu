// Adds a batch to the training dynamics of samples. The first launch writes the largest key of each
// sample, which belongs to its first counted row. The second lets this row update its sample. Only
// integers are added up atomically, so every run gives the same bits.
#include "common/dynamics_math.h"
#include "device.cuh"
#include "dynamics_launch.h"

namespace marginops::cuda {
namespace {

constexpr int kDynamicsBlock = 256;

__device__ __forceinline__ bool value_of(const BoolVector& vector, int64_t row) {
  return vector.data[row * vector.stride];
}

// Writes the keys of the batch, and a copy of the step for the second launch.
__global__ void __launch_bounds__(kDynamicsBlock)
    claim_samples(DynamicsState state, IndexVector indices, BoolVector counted, int64_t* step) {
  const int64_t row = int64_t{blockIdx.x} * kDynamicsBlock + threadIdx.x;
  const int64_t now = state.totals[0];
  if (row == 0) *step = now;
  if (row >= indices.size) return;
  const int64_t id = __ldg(indices.data + row * indices.stride);
  const bool is_inside = 0 <= id && id < state.samples;
  MARGINOPS_DEVICE_ASSERT(is_inside);
  if (is_inside && value_of(counted, row)) {
    atomicMax(reinterpret_cast<long long*>(state.last_seen + id),
              static_cast<long long>(visit_key(now, row)));
  }
}

template <class Number>
struct Numbers {
  Column<Number> margin, score, loss, confidence, el2n;
};

template <class Number>
__global__ void __launch_bounds__(kDynamicsBlock)
    update_samples(DynamicsState state, IndexVector indices, Numbers<Number> numbers,
                   BoolVector correct, BoolVector counted, Decay decay, const int64_t* step) {
  const int64_t row = int64_t{blockIdx.x} * kDynamicsBlock + threadIdx.x;
  const int64_t now = *step;
  if (row == 0) state.totals[0] = now + 1;  // in this launch nobody reads it
  if (row >= indices.size) return;
  const int64_t id = __ldg(indices.data + row * indices.stride);
  const bool is_inside = 0 <= id && id < state.samples;
  if (!is_inside || !value_of(counted, row) || state.last_seen[id] != visit_key(now, row)) return;
  const Visit visit{
      static_cast<float>(numbers.margin[row]), static_cast<float>(numbers.score[row]),
      static_cast<float>(numbers.loss[row]),   static_cast<float>(numbers.confidence[row]),
      static_cast<float>(numbers.el2n[row]),   value_of(correct, row)};
  float* values = state.values + kDynamicsValues * id;
  if (!add_visit(visit, decay, values, state.counts + kDynamicsCounts * id))
    atomicAdd(reinterpret_cast<unsigned long long*>(state.totals + 1), 1ull);
}

}  // namespace

cudaError_t update_dynamics(const DynamicsState& state, const DynamicsBatch& batch, double decay,
                            int64_t* step, cudaStream_t stream) {
  const unsigned blocks = std::max(blocks_for(batch.indices.size, kDynamicsBlock), 1u);
  const cudaError_t error = launch(claim_samples, blocks, kDynamicsBlock, stream, state,
                                   batch.indices, batch.counted, step);
  if (error != cudaSuccess) return error;
  const auto update = [&](auto number) {
    using Number = decltype(number);
    const Numbers<Number> numbers{column<Number>(batch.margin), column<Number>(batch.score),
                                  column<Number>(batch.loss), column<Number>(batch.confidence),
                                  column<Number>(batch.el2n)};
    return launch(update_samples<Number>, blocks, kDynamicsBlock, stream, state, batch.indices,
                  numbers, batch.correct, batch.counted, Decay(decay), step);
  };
  return batch.margin.dtype == Dtype::kFloat64 ? update(double{}) : update(float{});
}

}  // namespace marginops::cuda
