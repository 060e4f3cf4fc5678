// What the shared headers need to compile as host C++, as CUDA, and under the CPU emulation of
// CUDA.
#pragma once

#if defined(__CUDACC__)
#define MARGINOPS_FUNCTION __host__ __device__ __forceinline__
#else
#define MARGINOPS_FUNCTION inline
#endif
