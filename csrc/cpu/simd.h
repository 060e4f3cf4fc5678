// Vectors of float or double, as wide as the machine's registers. They use the compilers' vector
// extension, so one source serves every instruction set. Half-precision input is widened as it is
// loaded.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace marginops::cpu {

using bfloat16 = torch::headeronly::BFloat16;
using float16 = torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Value>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int kLanes = kVectorBytes / sizeof(float);
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
  static constexpr uint32_t kInfinity = 0xff000000u;  // magnitude_bits() of infinity
};
template <>
struct Simd<double> {
  static constexpr int kLanes = kVectorBytes / sizeof(double);
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
  static constexpr uint64_t kInfinity = 0xffe0000000000000u;
};

// The dtype of arithmetic on T.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using ValueOf = typename Arithmetic<T>::type;

inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline float value_of(bfloat16 x) { return x; }
inline float value_of(float16 x) { return x; }

template <class Value>
using VectorOf = typename Simd<Value>::Vector;

inline VectorOf<float> load(const float* source) {
  VectorOf<float> vector;
  memcpy(&vector, source, sizeof vector);
  return vector;
}
inline VectorOf<double> load(const double* source) {
  VectorOf<double> vector;
  memcpy(&vector, source, sizeof vector);
  return vector;
}
inline void store(VectorOf<float> vector, float* destination) {
  memcpy(destination, &vector, sizeof vector);
}
inline void store(VectorOf<double> vector, double* destination) {
  memcpy(destination, &vector, sizeof vector);
}
template <class Half>
inline Simd<float>::Bits load_bits(const Half* source) {
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  Packed packed;
  memcpy(&packed, source, sizeof packed);
  return __builtin_convertvector(packed, Simd<float>::Bits);
}
inline VectorOf<float> as_floats(Simd<float>::Bits bits) {
  VectorOf<float> vector;
  memcpy(&vector, &bits, sizeof vector);
  return vector;
}
inline VectorOf<float> load(const bfloat16* source) { return as_floats(load_bits(source) << 16); }
inline VectorOf<float> load(const float16* source) {
  using Bits = Simd<float>::Bits;
  const Bits half = load_bits(source);
  const Bits magnitude = half & 0x7fff, exponent = half & 0x7c00;
  const Bits rebias = exponent == 0x7c00 ? Bits{} + (224u << 23) : Bits{} + (112u << 23);
  // Subnormals are computed as 0.5 + m - 0.5, which is right even where the machine flushes its own
  // subnormals to 0.
  const VectorOf<float> small = as_floats(magnitude | 0x3f000000) - 0.5f;
  Bits bits;
  memcpy(&bits, &small, sizeof bits);
  bits = exponent == 0 ? bits : (magnitude << 13) + rebias;
  return as_floats(bits | (half & 0x8000) << 16);
}

// Rounds to the nearest number, and ties to even.
inline void store(VectorOf<float> vector, bfloat16* destination) {
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  Simd<float>::Bits bits;
  memcpy(&bits, &vector, sizeof bits);
  bits = vector != vector ? Simd<float>::Bits{} + 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const auto packed = __builtin_convertvector(bits, Packed);
  memcpy(static_cast<void*>(destination), &packed, sizeof packed);
}
inline void store(VectorOf<float> vector, float16* destination) {
#if defined(__AVX512F__)
  // GCC 12 warns about its own header where the form without a mask is used.
  const auto packed = _mm512_maskz_cvtps_ph(0xffff, vector, _MM_FROUND_TO_NEAREST_INT);
  memcpy(static_cast<void*>(destination), &packed, sizeof packed);
#elif defined(__AVX2__) && defined(__F16C__)
  const auto packed = _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT);
  memcpy(static_cast<void*>(destination), &packed, sizeof packed);
#else
  for (int lane = 0; lane < Simd<float>::kLanes; ++lane) {
    destination[lane] = static_cast<float16>(vector[lane]);
  }
#endif
}

// If either operand is NaN, the result is the second operand, as it is with the machine's
// instruction.
template <class Vector>
inline Vector maximum(Vector a, Vector b) {
  return a > b ? a : b;
}
template <class Vector>
inline Vector minimum(Vector a, Vector b) {
  return a < b ? a : b;
}

template <class Value>
inline typename Simd<Value>::Index lane_numbers() {
  typename Simd<Value>::Index lanes;
  for (int lane = 0; lane < Simd<Value>::kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// One bit for each lane, the lowest for the first lane: whether a comparison of Values holds there.
template <class Value, class Mask>
inline unsigned lane_bits(const Mask& holds) {
#if defined(__AVX512F__)
  const auto mask = reinterpret_cast<__m512i>(holds);
  return sizeof(Value) == 4 ? _mm512_movepi32_mask(mask) : _mm512_movepi64_mask(mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(sizeof(Value) == 4
                                   ? _mm256_movemask_ps(reinterpret_cast<__m256>(holds))
                                   : _mm256_movemask_pd(reinterpret_cast<__m256d>(holds)));
#else
  unsigned bits = 0;
  for (int lane = 0; lane < Simd<Value>::kLanes; ++lane) bits |= (holds[lane] & 1u) << lane;
  return bits;
#endif
}

// Reduces over the lanes: calls step(fold) log2(lanes) times. fold(vector) rotates the vector, so
// that after all steps every lane has been combined with every other lane.
template <class Value, class Step>
inline void for_each_fold(const Step& step) {
  using Index = typename Simd<Value>::Index;
  constexpr int kLanes = Simd<Value>::kLanes;
#pragma GCC unroll 8
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Index turned = (lane_numbers<Value>() + distance) & (kLanes - 1);
#if defined(__clang__)
    step([turned](auto vector) { return __builtin_shufflevector(vector, turned); });
#else
    step([turned](auto vector) { return __builtin_shuffle(vector, turned); });
#endif
  }
}

// Twice the bits of x, without the sign. They grow with |x|, and for NaN they are above those of
// infinity.
template <class Value>
inline typename Simd<Value>::Bits magnitude_bits(VectorOf<Value> vector) {
  typename Simd<Value>::Bits bits;
  memcpy(&bits, &vector, sizeof bits);
  return bits + bits;
}
}  // namespace marginops::cpu
