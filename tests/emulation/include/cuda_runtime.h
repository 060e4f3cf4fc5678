// Takes the place of the toolkit's <cuda_runtime.h> when kernels are built for the host. Host
// memory is device memory, and a launch returns when its blocks are done.
#pragma once

#ifdef __CUDACC__
#error "cudacpu's headers are not for nvcc"
#endif

#define CUDACPU 1

#include <vector_functions.h>

#include <tuple>
#include <utility>

#include "cudacpu/device.h"
#include "cudacpu/launch.h"

namespace cudacpu {

inline cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

inline bool is_valid(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  return threads && threads <= kMaxThreads && block.z <= 64 && grid.x && grid.y && grid.z &&
         grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
}

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  static void run(void* call) {
    auto* self = static_cast<Call*>(call);
    std::apply(self->kernel, self->arguments);
  }
};

}  // namespace cudacpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (!cudacpu::is_valid(config->gridDim, config->blockDim) || config->dynamicSmemBytes) {
    return cudacpu::remember(cudaErrorInvalidConfiguration);
  }
  cudacpu::Call<Parameters...> call{kernel, {std::forward<Arguments>(arguments)...}};
  cudacpu::Grid grid(config->gridDim, config->blockDim, &call.run, &call);
  return cudacpu::remember(grid.run());
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads,
                                                          size_t) {
  *blocks = std::min(2048 / threads, 32);
  return cudaSuccess;
}

extern "C" {
inline cudaError_t cudaGetLastError() { return std::exchange(cudacpu::last_error(), cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return cudacpu::last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return cudacpu::launch_error().c_str();
  if (error == cudaErrorInvalidConfiguration) return "invalid launch configuration";
  return error == cudaSuccess ? "no error" : "CUDA error";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Launchers share out work by it: with few, small inputs take the ways of large ones.
  const char* multiprocessors = getenv("CUDACPU_MULTIPROCESSORS");
  if (attribute != cudaDevAttrMultiProcessorCount) return cudacpu::remember(cudaErrorInvalidValue);
  *value = multiprocessors ? atoi(multiprocessors) : 132;
  return cudaSuccess;
}
}
