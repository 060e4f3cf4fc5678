// What device code may call. Semantics are CUDA's for sm_70 and later; where CUDA leaves a result
// undefined, it is here a value that should not go unnoticed.
#pragma once

#include <cassert>
#include <cmath>
#include <type_traits>

#include "block.h"

namespace cudacpu {

constexpr uint64_t kPoison = ~uint64_t{0};  // what a shuffle from a lane outside the mask reads

template <class T>
struct Identity {
  using type = T;
};
// The type of a parameter that takes no part in template argument deduction.
template <class T>
using Exactly = typename Identity<T>::type;

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(From) <= 8 && sizeof(To) <= 8, "at most 8 bytes");
  To to{};
  memcpy(static_cast<void*>(&to), &from, std::min(sizeof to, sizeof from));
  return to;
}

// from(lane, last lane of its group of `width`) is the lane to read from.
template <class T, class From>
CUDACPU_SCHEDULER T shuffle(uint32_t mask, const char* operation, T value, int width, From from) {
  if (width < 1 || width > int(kLanes) || (width & (width - 1))) {
    current_block->fail("%s: the width is %d", operation, width);
  }
  const Exchange& all = current_block->collective(mask, operation, bits<uint64_t>(value));
  const int lane = int(current_block->lane());
  const int source = from(lane, lane | (width - 1));
  return bits<T>(all.mask >> source & 1 ? all.value[source] : kPoison);
}

CUDACPU_SCHEDULER inline unsigned ballot(uint32_t mask, const char* operation, bool vote) {
  const Exchange& all = current_block->collective(mask, operation, vote);
  unsigned votes = 0;
  for (unsigned lane : Lanes(all.mask)) votes |= unsigned(all.value[lane]) << lane;
  return votes;
}

template <class T, class Combine>
CUDACPU_SCHEDULER T reduce(uint32_t mask, const char* operation, T value, Combine combine) {
  const Exchange& all = current_block->collective(mask, operation, bits<uint64_t>(value));
  T result = value;
  for (unsigned lane : Lanes(all.mask & ~(1u << current_block->lane()))) {
    result = combine(result, bits<T>(all.value[lane]));
  }
  return result;
}

template <size_t>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// CUDA's atomics order nothing else. This processor's do, but ThreadSanitizer takes them at their
// word and so sees a missing __threadfence.
template <class T, class Change>
T update(T* address, Change change) {
  using W = typename Word<sizeof(T)>::type;
  W* word = reinterpret_cast<W*>(address);
  W old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bits<W>(T(change(bits<T>(old)))), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return bits<T>(old);
}

inline char fence_tag;

}  // namespace cudacpu

#undef __shared__
#define __shared__ thread_local  // in a function that is static, too
#define __launch_bounds__(...)

// Barriers and fences
inline void __syncthreads() { cudacpu::current_block->barrier(0, &cudacpu::Votes::count); }
inline int __syncthreads_count(int vote) {
  return cudacpu::current_block->barrier(vote, &cudacpu::Votes::count);
}
inline int __syncthreads_and(int vote) {
  return cudacpu::current_block->barrier(vote, &cudacpu::Votes::all);
}
inline int __syncthreads_or(int vote) {
  return cudacpu::current_block->barrier(vote, &cudacpu::Votes::any);
}
inline void __syncwarp(unsigned mask = ~0u) {
  cudacpu::current_block->collective(mask, "__syncwarp", 0, true);
}
inline void __threadfence() {
#if defined(__SANITIZE_THREAD__)  // it knows no fences
  cudacpu::release(&cudacpu::fence_tag);
  cudacpu::acquire(&cudacpu::fence_tag);
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
inline void __threadfence_block() { __threadfence(); }
[[noreturn]] inline void __trap() { cudacpu::current_block->fail("__trap"); }

// assert() in device code: the launch fails, the process goes on.
extern "C" inline void __assert_fail(const char* expression, const char* file, unsigned line,
                                     const char*) noexcept {
  cudacpu::current_block->fail("%s:%u: assertion failed: %s", file, line, expression);
}

// Warp collectives
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cudacpu::shuffle(mask, "__shfl_sync", value, width, [&](int, int last) {
    return (last & ~(width - 1)) | (source & (width - 1));
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return cudacpu::shuffle(mask, "__shfl_up_sync", value, width, [&](int lane, int last) {
    return lane - int(by) < last - width + 1 ? lane : lane - int(by);
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return cudacpu::shuffle(mask, "__shfl_down_sync", value, width, [&](int lane, int last) {
    return lane + int(by) > last ? lane : lane + int(by);
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  return cudacpu::shuffle(mask, "__shfl_xor_sync", value, width, [&](int lane, int last) {
    return (lane ^ with) > last ? lane : lane ^ with;
  });
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return cudacpu::ballot(mask, "__ballot_sync", vote != 0);
}
inline int __any_sync(unsigned mask, int vote) {
  return cudacpu::ballot(mask, "__any_sync", vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote) {
  return cudacpu::ballot(mask, "__all_sync", vote == 0) == 0;
}
inline unsigned __activemask() {  // CUDA promises no more
  return 1u << cudacpu::current_block->lane();
}
template <class T>
CUDACPU_SCHEDULER unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t own = cudacpu::bits<uint64_t>(value);
  const cudacpu::Exchange& all = cudacpu::current_block->collective(mask, "__match_any_sync", own);
  unsigned same = 0;
  for (unsigned lane : cudacpu::Lanes(all.mask)) same |= unsigned(all.value[lane] == own) << lane;
  return same;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return cudacpu::reduce(mask, "__reduce_add_sync", value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cudacpu::reduce(mask, "__reduce_min_sync", value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cudacpu::reduce(mask, "__reduce_max_sync", value, [](T a, T b) { return a < b ? b : a; });
}

// Atomics
template <class T>
T atomicAdd(T* address, cudacpu::Exactly<T> value) {
  return cudacpu::update(address, [&](T old) { return old + value; });
}
template <class T>
T atomicMin(T* address, cudacpu::Exactly<T> value) {
  return cudacpu::update(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, cudacpu::Exactly<T> value) {
  return cudacpu::update(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* address, cudacpu::Exactly<T> value) {
  return cudacpu::update(address, [&](T) { return value; });
}
template <class T>
T atomicOr(T* address, cudacpu::Exactly<T> value) {
  return cudacpu::update(address, [&](T old) { return old | value; });
}
template <class T>
T atomicCAS(T* address, cudacpu::Exactly<T> expected, cudacpu::Exactly<T> value) {
  return cudacpu::update(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return cudacpu::update(address, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

// Loads and stores with a cache hint
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, cudacpu::Exactly<T> value) {
  *address = value;
}

// Intrinsics
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(uint64_t(value)) : 64; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __float_as_uint(float value) { return cudacpu::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return cudacpu::bits<float>(value); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
