// The CUDA library as a whole on the CPU: its kernels by emulation, and its binding registered for
// CPU tensors, so that the tests of the ops run through both.
#define USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// There is one stream and one device. Linked with -Bsymbolic, these are the binding's.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(error) STD_TORCH_CHECK((error) == cudaSuccess, cudaGetErrorString(error))
#define CUDA CPU  // the dispatch key of the registration

#include "cuda/margin.cu"
#include "cuda/margin_ops.cpp"
#include "cuda/moments.cu"
#include "cuda/moments_ops.cpp"
#include "cuda/select.cu"
#include "cuda/select_ops.cpp"
#include "cuda/statistics.cu"
#include "cuda/statistics_ops.cpp"
