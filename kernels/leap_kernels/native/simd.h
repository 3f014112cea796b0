// Vector types shared by the native kernels, and conversions between storage types and float.
//
// The vectors are GCC / Clang vector extensions, as wide as the widest register the compiler was allowed to use, so the
// same source serves AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace leap {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));

// While one lives, this thread reads and writes subnormal numbers as 0: with them, arithmetic is up to a hundred times
// slower on x86. Elsewhere it does nothing.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

template <typename V, typename T>
inline V load(const T* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <typename T, typename V>
inline void store(T* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

// Storage types; the numbers are part of the C interface (native.py).
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

// Round to nearest even; NaN stays a (quiet) NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Half to float: move exponent and mantissa in place, then correct the exponent bias with one exact multiplication,
// which also normalises subnormal halves.
inline float fp16_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  bits = (h & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : bits;
  return bits_to_float(bits | (uint32_t(h & 0x8000u) << 16));
}

// Float to half, round to nearest even. Normal results are rounded on the bits; for subnormal ones the addition of 0.5
// shifts the mantissa to the position where the float unit's own rounding is the wanted one.
inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return uint16_t(result | ((bits >> 16) & 0x8000u));
}

inline void load_as_float(const void* source, int dtype, int64_t first, int count, float* target) {
  if (dtype == kFloat32) {
    std::memcpy(target, static_cast<const float*>(source) + first, size_t(count) * 4);
  } else if (dtype == kBFloat16) {
    const uint16_t* s = static_cast<const uint16_t*>(source) + first;
    for (int i = 0; i < count; ++i) target[i] = bf16_to_float(s[i]);
  } else {
    const uint16_t* s = static_cast<const uint16_t*>(source) + first;
    for (int i = 0; i < count; ++i) target[i] = fp16_to_float(s[i]);
  }
}

inline void store_from_float(const float* source, int dtype, int64_t first, int count, void* target) {
  if (dtype == kFloat32) {
    std::memcpy(static_cast<float*>(target) + first, source, size_t(count) * 4);
  } else if (dtype == kBFloat16) {
    uint16_t* t = static_cast<uint16_t*>(target) + first;
    for (int i = 0; i < count; ++i) t[i] = float_to_bf16(source[i]);
  } else {
    uint16_t* t = static_cast<uint16_t*>(target) + first;
    for (int i = 0; i < count; ++i) t[i] = float_to_fp16(source[i]);
  }
}

}  // namespace leap
