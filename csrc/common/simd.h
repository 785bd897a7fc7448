// Which of the compiled instruction sets this machine runs.
//
// A file <op>_simd.inc holds an op's hot loops. CMake compiles it once per level, each time with that level's flags and with
// SIMD_LEVEL set to its name, which the file uses as its namespace:
//
//     namespace torch_influence::SIMD_LEVEL { double row_sum(...) { ... } }
//
// The op declares and calls them by TORCH_INFLUENCE_SIMD_DECLARE and TORCH_INFLUENCE_SIMD_PICK below. A .inc file must not
// emit any inline function that another object file emits too (no STL, no torch header; helpers are static and always
// inlined): of several copies the linker keeps one, and if that is the AVX-512 one, everyone gets it.
#pragma once

#include <cstdlib>
#include <cstring>

namespace torch_influence {

enum class SimdLevel { base, avx2, avx512 };

inline const char* simd_name(SimdLevel level) {
  return level == SimdLevel::avx512 ? "avx512" : level == SimdLevel::avx2 ? "avx2" : "base";
}

// The best level of this machine, or a lower one that TORCH_INFLUENCE_SIMD=base|avx2 asks for (to test the other paths).
inline SimdLevel simd_level() {
  static const SimdLevel level = [] {
    const char* asked = std::getenv("TORCH_INFLUENCE_SIMD");
    [[maybe_unused]] auto allowed = [asked](const char* name) {
      return !asked || std::strcmp(asked, "avx512") == 0 || std::strcmp(asked, name) == 0;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return SimdLevel::avx512;
    }
    // Every processor with AVX2 can convert float16 too, but a virtual machine may hide it.
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return SimdLevel::avx2;
    }
#endif
    return SimdLevel::base;
  }();
  return level;
}

}  // namespace torch_influence

// clang-format off
#if defined(__x86_64__) && !defined(TORCH_INFLUENCE_EMULATE)
#define TORCH_INFLUENCE_SIMD_DECLARE(signature)  \
  namespace base { signature; }                  \
  namespace avx2 { signature; }                  \
  namespace avx512 { signature; }
#define TORCH_INFLUENCE_SIMD_PICK(function)                                  \
  (simd_level() == SimdLevel::avx512 ? avx512::function                      \
   : simd_level() == SimdLevel::avx2 ? avx2::function : base::function)
#else
#define TORCH_INFLUENCE_SIMD_DECLARE(signature) namespace base { signature; }
#define TORCH_INFLUENCE_SIMD_PICK(function) (base::function)
#endif
// clang-format on
