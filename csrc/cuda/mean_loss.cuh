// The mean loss of the samples that are not ignored. The number of blocks depends on the number of
// samples only, and every block adds in a fixed order, so every run gives the same bits.
#pragma once

#include "device.cuh"

namespace marginops::cuda {

constexpr int kMeanBlock = 256, kMeanItems = 4;
constexpr int64_t kMostMeanParts = 512;

struct LossSum {
  double loss;
  int64_t counted;

  __device__ __forceinline__ LossSum over_warp() const {
    return {warp_sum(loss), warp_sum(counted)};
  }
};

inline unsigned mean_parts(int64_t rows) {
  return blocks_for(rows, kMeanBlock * kMeanItems, kMostMeanParts);
}

// The loss of an ignored sample is 0.
template <class Number>
__global__ void __launch_bounds__(kMeanBlock)
    loss_sum_kernel(const Number* loss, const bool* counted, int64_t rows, LossSum* parts) {
  __shared__ LossSum warps[kMeanBlock / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  LossSum sum{0, 0};
  for (int64_t row = int64_t{blockIdx.x} * kMeanBlock + threadIdx.x; row < rows;
       row += int64_t{gridDim.x} * kMeanBlock) {
    sum.loss += loss[row];
    sum.counted += counted[row];
  }
  sum = sum.over_warp();
  if (lane == 0) warps[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  sum = lane < kMeanBlock / kWarp ? warps[lane] : LossSum{0, 0};
  sum = sum.over_warp();
  if (lane == 0) parts[blockIdx.x] = sum;
}

// One warp. Without counted samples the mean is NaN.
template <class Number>
__global__ void __launch_bounds__(kWarp)
    mean_loss_kernel(const LossSum* parts, int count, Number* mean_loss, Number* num_counted) {
  LossSum sum{0, 0};
  for (int part = threadIdx.x; part < count; part += kWarp) {
    sum.loss += parts[part].loss;
    sum.counted += parts[part].counted;
  }
  sum = sum.over_warp();
  if (threadIdx.x > 0) return;
  *mean_loss = static_cast<Number>(sum.loss / static_cast<double>(sum.counted));
  *num_counted = static_cast<Number>(sum.counted);
}

template <class Number>
cudaError_t write_mean_loss(const Number* loss, const bool* counted, int64_t rows, LossSum* parts,
                            Number* mean_loss, Number* num_counted, cudaStream_t stream) {
  const unsigned blocks = mean_parts(rows);
  if (blocks > 0) {
    const cudaError_t error =
        launch(loss_sum_kernel<Number>, blocks, kMeanBlock, stream, loss, counted, rows, parts);
    if (error != cudaSuccess) return error;
  }
  return launch(mean_loss_kernel<Number>, 1, kWarp, stream, parts, static_cast<int>(blocks),
                mean_loss, num_counted);
}

}  // namespace marginops::cuda
