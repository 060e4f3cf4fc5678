// Comes before each file of csrc/cuda that binds ops, and makes of it one for CPU tensors: the
// kernels are registered for the CPU, and there is one device and one stream.
#pragma once

#define USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

extern "C" {
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
inline AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
inline AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                            \
  do {                                                                  \
    const cudaError_t status = (call);                                  \
    STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status)); \
  } while (false)
#define CUDA CPU  // the dispatch key of the registration
