// What all kernels and launchers share: dtypes, 16-byte packs, launches and workspaces.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "views.h"

// A device-side assertion, with NDEBUG too. Where it compiles to nothing, the code after it must
// still be safe.
#if defined(__CUDA_ARCH__) || defined(CUDACPU)
#define MARGINOPS_DEVICE_ASSERT(condition) \
  ((condition) ? void() : __assert_fail(#condition, __FILE__, __LINE__, __func__))
#else
#define MARGINOPS_DEVICE_ASSERT(condition) void(sizeof(condition))
#endif

namespace marginops::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ float to_value(float scalar) { return scalar; }
__device__ __forceinline__ double to_value(double scalar) { return scalar; }
__device__ __forceinline__ float to_value(__half scalar) { return __half2float(scalar); }
__device__ __forceinline__ float to_value(__nv_bfloat16 scalar) { return __bfloat162float(scalar); }

__device__ __forceinline__ void from_value(float value, float* scalar) { *scalar = value; }
__device__ __forceinline__ void from_value(double value, double* scalar) { *scalar = value; }
__device__ __forceinline__ void from_value(float value, __half* scalar) {
  *scalar = __float2half_rn(value);
}
__device__ __forceinline__ void from_value(float value, __nv_bfloat16* scalar) {
  *scalar = __float2bfloat16_rn(value);
}

// The type of arithmetic and results.
template <class Scalar>
struct ValueOf {
  using type = float;
};
template <>
struct ValueOf<double> {
  using type = double;
};
template <class Scalar>
using Value = typename ValueOf<Scalar>::type;

template <class Scalar>
struct Pack {
  static constexpr int kSize = 16 / sizeof(Scalar);
  Scalar scalar[kSize];
};

template <class Scalar>
__device__ __forceinline__ Pack<Scalar> load_pack(const Scalar* aligned) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(aligned));
  Pack<Scalar> pack;
  memcpy(static_cast<void*>(&pack), &raw, sizeof pack);
  return pack;
}

template <class Scalar>
__device__ __forceinline__ void store_pack(Scalar* aligned, const Pack<Scalar>& pack) {
  uint4 raw;
  memcpy(&raw, static_cast<const void*>(&pack), sizeof raw);
  *reinterpret_cast<uint4*>(aligned) = raw;
}

// A value for each row.
template <class T>
struct Column {
  const T* data;  // or null: there is no column
  int64_t stride;

  __device__ __forceinline__ T operator[](int64_t index) const {
    return __ldg(data + index * stride);
  }
};

template <class T>
Column<T> column(const Vector& vector) {
  return {static_cast<const T*>(vector.data), vector.stride};
}

// The sum over the warp, on all lanes. The whole warp takes part.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number sum) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// First position in the sorted key whose entry is not less than bound.
__device__ __forceinline__ int64_t lower_bound(const int64_t* key, int64_t size, int64_t bound) {
  int64_t begin = 0;
  while (begin < size) {
    const int64_t middle = begin + (size - begin) / 2;
    if (__ldg(key + middle) < bound)
      begin = middle + 1;
    else
      size = middle;
  }
  return begin;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int block, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// The number of blocks that the work needs, at most `most`. Kernels loop over what is left.
inline unsigned blocks_for(int64_t items, int64_t items_per_block, int64_t most = 0x7fffffff) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::min(blocks, most));
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

// Calls body with a value of the C++ type of dtype.
template <class Body>
cudaError_t with_scalar(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kBFloat16:
      return body(__nv_bfloat16{});
    case Dtype::kFloat16:
      return body(__half{});
  }
  return cudaErrorInvalidValue;
}

// Cuts a workspace into 256-byte aligned pieces. Without memory it only adds up their sizes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + size_) : nullptr;
    size_ += (count * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  size_t size() const { return size_; }

 private:
  char* memory_;
  size_t size_ = 0;
};

}  // namespace marginops::cuda
