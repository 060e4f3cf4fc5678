// The attributes of functions in the shared headers, which compile as host C++, as CUDA, and in the
// CPU emulation of CUDA.
#pragma once

#if defined(__CUDACC__)
#define MARGINOPS_FUNCTION __host__ __device__ __forceinline__
#else
#define MARGINOPS_FUNCTION inline
#endif
