// Element types as kernels see them, on the CPU and in CUDA alike, without any header of torch.
//
// Arithmetic is done in Wide<T>: float for the two 16-bit types, T itself otherwise. Everything here is static and inlined:
// see simd.h for the reason.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define TORCH_INFLUENCE_INLINE static __host__ __device__ __forceinline__
#else
#define TORCH_INFLUENCE_INLINE static inline __attribute__((always_inline))
#endif

namespace torch_influence {

enum class DType { float32, float64, float16, bfloat16 };

// Returns the dtype that arithmetic with elements of `dtype` is done in, as Wide<T> says for types.
TORCH_INFLUENCE_INLINE DType wide_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// Returns the bytes of an element.
TORCH_INFLUENCE_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Returns the address of the element `index` places after the one that `elements` points to.
TORCH_INFLUENCE_INLINE const void* element_at(const void* elements, int64_t index, DType dtype) {
  return static_cast<const char*>(elements) + index * element_size(dtype);
}
TORCH_INFLUENCE_INLINE void* element_at(void* elements, int64_t index, DType dtype) {
  return static_cast<char*>(elements) + index * element_size(dtype);
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct WideOf {
  using type = T;
};
template <>
struct WideOf<Half> {
  using type = float;
};
template <>
struct WideOf<BFloat16> {
  using type = float;
};
template <class T>
using Wide = typename WideOf<T>::type;

TORCH_INFLUENCE_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

TORCH_INFLUENCE_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- widen: T -> Wide<T>, exact ----

TORCH_INFLUENCE_INLINE float widen(float x) { return x; }
TORCH_INFLUENCE_INLINE double widen(double x) { return x; }
TORCH_INFLUENCE_INLINE float widen(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

TORCH_INFLUENCE_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Without branches, so that loops over it vectorise. Normal numbers, infinities and NaNs: exponent and mantissa moved
  // into place, the exponent raised to the top of float's range and scaled back by 2^-112. Subnormals: mantissa under the
  // exponent of 0.5, then 0.5 subtracted.
  const uint32_t shifted = uint32_t(x.bits) << 17;  // the sign bit is gone
  const uint32_t normal = float_bits(bits_float((shifted >> 4) + (0xE0u << 23)) * 0x1p-112f);
  const uint32_t subnormal = float_bits(bits_float((shifted >> 17) | (126u << 23)) - 0.5f);
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  return bits_float(sign | (shifted < (1u << 27) ? subnormal : normal));
#endif
}

// ---- narrow: Wide<T> -> T, T being the type of the second argument; to nearest even, beyond the range is infinite ----

TORCH_INFLUENCE_INLINE float narrow(float x, float) { return x; }
TORCH_INFLUENCE_INLINE double narrow(double x, double) { return x; }

TORCH_INFLUENCE_INLINE BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

TORCH_INFLUENCE_INLINE Half narrow(float x, Half) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  // Adding a power of two whose last mantissa bit has the weight of the result's last bit lets the float adder round. The
  // two scalings first turn what is beyond the range into an infinity.
  const uint32_t bits = float_bits(x), doubled = bits << 1;
  const float magnitude = (bits_float(bits & 0x7FFFFFFFu) * 0x1p112f) * 0x1p-110f;
  uint32_t exponent = doubled & 0xFF000000u;
  exponent = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = float_bits(bits_float((exponent >> 1) + 0x07800000u) + magnitude);
  const uint32_t rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | (doubled > 0xFF000000u ? 0x7E00u : rounded))};
#endif
}

// Calls f with a value of the element type that dtype names.
template <class F>
static inline auto with_element_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float64: return f(double());
    case DType::float16: return f(Half());
    case DType::bfloat16: return f(BFloat16());
    default: return f(float());
  }
}

}  // namespace torch_influence
