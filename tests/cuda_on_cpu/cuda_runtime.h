// Stands in for the CUDA runtime's header, so that a C++ compiler takes CUDA kernels: each thread of a block is a fiber, which
// emulator.cpp runs. Here is what our kernels use of CUDA, and no more; docs/emulator.md says how to add to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

// Of the thread that runs now.
uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();
int lane();

void barrier(const char* file, int line);
uint64_t shuffle(unsigned mask, uint64_t bits, int source_lane, const char* file, int line);
// Where this block has the shared variable that `key` names, which every block has one of.
void* shared(const void* key, size_t bytes, size_t alignment);
// Runs call(context) once in each thread of the grid. `kernel` is the kernel's address, for its name.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*call)(const void*), const void* context);
// A variable whose members are asked for when they are read: threadIdx and its like.
template <uint3 (*ask)(), unsigned uint3::* member>
struct Asked {
  constexpr Asked() {}
  operator unsigned() const { return ask().*member; }
};
template <uint3 (*ask)()>
struct Index {
  constexpr Index() {}
  Asked<ask, &uint3::x> x;
  Asked<ask, &uint3::y> y;
  Asked<ask, &uint3::z> z;
};

template <class T>
uint64_t bits_of(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T of_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

// The most blocks that a grid shall have where its kernel goes on by gridDim: a GPU's limits, or less by EMULATOR_GRID.
namespace grid_limits {
int64_t most_blocks_x();
int64_t most_blocks_y();
}  // namespace grid_limits

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto call = [kernel, values = std::tuple<Parameters...>(arguments...)] { std::apply(kernel, values); };
  return emulator::launch(
      reinterpret_cast<const void*>(kernel), *config, [](const void* f) { (*static_cast<const decltype(call)*>(f))(); },
      &call);
}

constexpr emulator::Index<emulator::thread_index> threadIdx;
constexpr emulator::Index<emulator::block_index> blockIdx;
constexpr emulator::Index<emulator::block_size> blockDim;
constexpr emulator::Index<emulator::grid_size> gridDim;

// A shared variable: a reference to where the block that runs now has it.
#define TORCH_INFLUENCE_SHARED(type, name, ...) \
  static char name##_key;                       \
  using name##_type = type __VA_ARGS__;         \
  name##_type& name = *static_cast<name##_type*>(emulator::shared(&name##_key, sizeof(name##_type), alignof(name##_type)))

#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_HERE) { emulator::barrier(file, line); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATOR_HERE) {
  return emulator::of_bits<T>(emulator::shuffle(mask, emulator::bits_of(value), emulator::lane() ^ lanes, file, line));
}
inline void __stwb(uint4* to, uint4 value) { *to = value; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
