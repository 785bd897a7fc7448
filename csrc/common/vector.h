// Vectors as wide as the SIMD level that is being compiled, for hot loops that the compiler can't vectorise well by itself:
// short rows, several sums at once, 16-bit elements. For .inc files only (simd.h), after SIMD_LEVEL is defined.
#pragma once

#include "common/element.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace torch_influence::SIMD_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class W, int bytes = kVectorBytes>
struct VectorOf {
  typedef W type __attribute__((vector_size(bytes)));
};
template <class W, int bytes = kVectorBytes>
using Vector = typename VectorOf<W, bytes>::type;

using FloatVector = Vector<float>;
using BitsVector = Vector<uint32_t>;
using ShortVector = Vector<uint16_t, kVectorBytes / 2>;

// Elements that one vector holds once they are widened.
template <class T>
constexpr int64_t kVectorLanes = kVectorBytes / sizeof(Wide<T>);

template <class V>
TORCH_INFLUENCE_INLINE V load_as(const void* pointer) {
  V vector;
  __builtin_memcpy(&vector, pointer, sizeof vector);
  return vector;
}

// ---- load: kVectorLanes<T> adjacent elements, widened as widen() in element.h does ----

TORCH_INFLUENCE_INLINE FloatVector load_vector(const float* pointer) { return load_as<FloatVector>(pointer); }
TORCH_INFLUENCE_INLINE Vector<double> load_vector(const double* pointer) { return load_as<Vector<double>>(pointer); }

TORCH_INFLUENCE_INLINE FloatVector load_vector(const BFloat16* pointer) {
  return (FloatVector)(__builtin_convertvector(load_as<ShortVector>(pointer), BitsVector) << 16);
}

TORCH_INFLUENCE_INLINE FloatVector load_vector(const Half* pointer) {
  FloatVector vector;
#if defined(__F16C__)
  for (int64_t i = 0; i < kVectorLanes<Half>; i += 8) {
    const __m256 eight = _mm256_cvtph_ps(load_as<__m128i>(pointer + i));
    __builtin_memcpy(reinterpret_cast<float*>(&vector) + i, &eight, sizeof eight);
  }
#else
  for (int64_t i = 0; i < kVectorLanes<Half>; ++i) vector[i] = widen(pointer[i]);
#endif
  return vector;
}

// ---- store: rounded as narrow() in element.h does ----

TORCH_INFLUENCE_INLINE void store_vector(float* pointer, FloatVector vector) {
  __builtin_memcpy(pointer, &vector, sizeof vector);
}
TORCH_INFLUENCE_INLINE void store_vector(double* pointer, Vector<double> vector) {
  __builtin_memcpy(pointer, &vector, sizeof vector);
}

TORCH_INFLUENCE_INLINE void store_vector(BFloat16* pointer, FloatVector vector) {
  const BitsVector bits = (BitsVector)vector;
  const BitsVector rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const ShortVector shorts = __builtin_convertvector(vector == vector ? rounded : BitsVector{} + 0x7FC0u, ShortVector);
  __builtin_memcpy(pointer, &shorts, sizeof shorts);
}

TORCH_INFLUENCE_INLINE void store_vector(Half* pointer, FloatVector vector) {
#if defined(__F16C__)
  for (int64_t i = 0; i < kVectorLanes<Half>; i += 8) {
    const __m256 eight = load_as<__m256>(reinterpret_cast<const float*>(&vector) + i);
    const __m128i shorts = _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(pointer + i, &shorts, sizeof shorts);
  }
#else
  for (int64_t i = 0; i < kVectorLanes<Half>; ++i) pointer[i] = narrow(vector[i], Half());
#endif
}

// The sum of all lanes: halves are added to each other until one lane is left.
template <class W, int bytes = kVectorBytes>
TORCH_INFLUENCE_INLINE W sum_lanes(Vector<W, bytes> vector) {
  if constexpr (bytes == sizeof(W)) {
    return vector[0];
  } else {
    const auto* halves = reinterpret_cast<const char*>(&vector);
    using HalfVector = Vector<W, bytes / 2>;
    return sum_lanes<W, bytes / 2>(load_as<HalfVector>(halves) + load_as<HalfVector>(halves + bytes / 2));
  }
}

}  // namespace
}  // namespace torch_influence::SIMD_LEVEL
