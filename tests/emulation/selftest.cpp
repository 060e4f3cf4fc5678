// Kernels with one bug each, and their twins without it: selftest() launches those that its
// arguments name and prints what they wrote. test_selftest.py says which tool must see which bug.
#include <cuda_runtime.h>

#include <functional>
#include <map>
#include <vector>

namespace {

__global__ void reverse_in_shared(float* out, bool synchronized) {
  __shared__ float value[64];
  value[threadIdx.x] = float(threadIdx.x);
  if (synchronized) __syncthreads();
  out[threadIdx.x] = value[63 - threadIdx.x];
}

__global__ void reverse_in_warp(float* out, bool synchronized) {
  __shared__ float value[32];
  value[threadIdx.x] = float(threadIdx.x);
  __shfl_xor_sync(~0u, 1, 1);  // converges the warp, but orders no memory
  if (synchronized) __syncwarp();
  out[threadIdx.x] = value[31 - threadIdx.x];
}

__global__ void last_block_sums(float* part, unsigned* done, float* out, bool fenced) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    part[blockIdx.x] = float(blockIdx.x);
    if (fenced) __threadfence();
    last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    if (fenced) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += part[i];
  *out = sum;
}

__global__ void blocks_write_one_place(float* out) { out[0] = float(blockIdx.x); }

__global__ void copy(const float* from, float* to, int n) {
  if (int(threadIdx.x) < n) to[threadIdx.x] = from[threadIdx.x];
}

__global__ void fill_shared(float* out, int shift) {
  __shared__ float value[64];
  value[threadIdx.x + shift] = 1;
  __syncthreads();
  out[threadIdx.x] = value[threadIdx.x];
}

__global__ void load_vectors(const float* from, float* out) {
  out[threadIdx.x] = reinterpret_cast<const float4*>(from)[threadIdx.x].x;
}

__global__ void half_a_warp_shuffles(float* out) {
  float value = 1;
  if (threadIdx.x < 16) value += __shfl_xor_sync(~0u, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

__global__ void barrier_in_one_branch(float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1;
}

__global__ void two_masks_in_one_shuffle(float* out) {
  const unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_sync(mask, 1.0f, 16);
}

__global__ void lane_outside_its_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0);
}

__global__ void shuffle_from_outside_the_mask(float* out) {
  if (threadIdx.x < 20) out[threadIdx.x] = __shfl_down_sync(0xfffffu, 1.0f, 16);
}

__global__ void failing_assertion(float* out) {
  assert(threadIdx.x < 5);
  out[threadIdx.x] = 1;
}

__attribute__((noinline)) int deep(int n) {
  volatile char frame[1024];
  frame[n & 1023] = char(n);
  return n ? deep(n - 1) + frame[n & 1023] : 0;
}
__global__ void stack_overflow(float* out) { out[threadIdx.x] = float(deep(500)); }

// One value a thread from everything a warp can do together, with lanes that have left.
__global__ void collectives(float* out, unsigned threads) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned here = __ballot_sync(~0u, threadIdx.x < threads);
  if (threadIdx.x >= threads) return;
  const unsigned last = unsigned(__popc(here)) - 1;
  bool right = __shfl_sync(here, lane, 3) == 3;
  right &= __shfl_sync(here, lane, 1, 4) == lane / 4 * 4 + 1;
  right &= __shfl_up_sync(here, lane, 2) == (lane < 2 ? lane : lane - 2);
  const unsigned below = __shfl_down_sync(here, lane, 1);
  right &= lane == last || below == lane + 1;
  right &= __shfl_xor_sync(here, lane, 1) == (lane ^ 1);
  right &= __reduce_add_sync(here, lane) == last * (last + 1) / 2;
  right &= __reduce_max_sync(here, lane) == last && __reduce_min_sync(here, lane) == 0;
  right &= __any_sync(here, lane == 7) && !__all_sync(here, lane == 7);
  right &= __ballot_sync(here, lane & 1) == (here & 0xaaaaaaaau);
  right &= __match_any_sync(here, lane % 8) == (here & (0x01010101u << lane % 8));
  right &= __syncthreads_count(lane == 0) == int((threads + 31) / 32);
  right &= __syncthreads_or(threadIdx.x == 5) && !__syncthreads_and(threadIdx.x == 5);
  out[threadIdx.x] = right;
}

__global__ void atomics(unsigned* out) {
  atomicAdd(&out[0], 2);
  atomicMin(&out[1], threadIdx.x);
  atomicMax(&out[2], threadIdx.x + blockIdx.x);
  atomicOr(&out[3], 1u << threadIdx.x % 8);
  unsigned seen;
  do {
    seen = atomicAdd(&out[4], 0);
  } while (atomicCAS(&out[4], seen, seen + 3) != seen);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace

extern "C" int selftest(int count, char** arguments) {
  std::vector<float> in(64, 2), out(128, -1);
  std::vector<float> part(64);
  std::vector<unsigned> counters{0, ~0u, 0, 0, 0};
  float* to = out.data();
  unsigned done = 0;
  const std::map<std::string, std::function<cudaError_t()>> cases{
      {"barrier", [&] { return launch(reverse_in_shared, 1, 64, to, true); }},
      {"no_barrier", [&] { return launch(reverse_in_shared, 1, 64, to, false); }},
      {"syncwarp", [&] { return launch(reverse_in_warp, 1, 32, to, true); }},
      {"no_syncwarp", [&] { return launch(reverse_in_warp, 1, 32, to, false); }},
      {"fence", [&] { return launch(last_block_sums, 64, 32, part.data(), &done, to, true); }},
      {"no_fence", [&] { return launch(last_block_sums, 64, 32, part.data(), &done, to, false); }},
      {"blocks_race", [&] { return launch(blocks_write_one_place, 64, 32, to); }},
      {"copy", [&] { return launch(copy, 1, 96, in.data(), to, 64); }},
      {"global_overrun", [&] { return launch(copy, 1, 96, in.data(), to, 65); }},
      {"shared", [&] { return launch(fill_shared, 1, 64, to, 0); }},
      {"shared_overrun", [&] { return launch(fill_shared, 1, 64, to, 1); }},
      {"aligned", [&] { return launch(load_vectors, 1, 8, in.data() + 4, to); }},
      {"misaligned", [&] { return launch(load_vectors, 1, 8, in.data() + 1, to); }},
      {"divergent_shuffle", [&] { return launch(half_a_warp_shuffles, 1, 64, to); }},
      {"divergent_barrier", [&] { return launch(barrier_in_one_branch, 1, 32, to); }},
      {"two_masks", [&] { return launch(two_masks_in_one_shuffle, 1, 32, to); }},
      {"not_in_mask", [&] { return launch(lane_outside_its_mask, 1, 32, to); }},
      {"outside_mask", [&] { return launch(shuffle_from_outside_the_mask, 1, 32, to); }},
      {"assertion", [&] { return launch(failing_assertion, 1, 32, to); }},
      {"stack_overflow", [&] { return launch(stack_overflow, 1, 64, to); }},
      {"too_many_threads", [&] { return launch(blocks_write_one_place, 1, 1056, to); }},
      {"collectives", [&] { return launch(collectives, 1, 96, to, 82); }},
      {"atomics", [&] { return launch(atomics, 7, 64, counters.data()); }},
  };
  for (int i = 1; i < count; ++i) {
    std::fill(out.begin(), out.end(), -1);
    const cudaError_t status = cases.at(arguments[i])();
    if (status != cudaSuccess) {
      fprintf(stderr, "%s: %s\n", arguments[i], cudaGetErrorString(status));
      return 1;
    }
    for (float value : out) printf(" %g", value);
    for (unsigned value : counters) printf(" %u", value);
    printf("\n");
  }
  return 0;
}
