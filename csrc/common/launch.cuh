// Shared by the CUDA kernels. No header of torch is seen by nvcc: it would compile four times as long.
#pragma once

#include <cuda_runtime.h>

#include "common/element.h"

// What differs where each thread is a fiber on the CPU (tests/cuda_on_cpu), whose cuda_runtime.h has these too.
#if !defined(TORCH_INFLUENCE_EMULATE)
// Declares what the threads of a block share: TORCH_INFLUENCE_SHARED(double, sums, [8]) is double sums[8].
#define TORCH_INFLUENCE_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
namespace grid_limits {
inline int64_t most_blocks_x() { return 0x7fffffff; }
inline int64_t most_blocks_y() { return 65535; }
}  // namespace grid_limits
#endif

namespace torch_influence {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Elements that one 16-byte memory access moves.
template <class T>
constexpr int kWidest = 16 / sizeof(T);

template <class T, int width>
struct alignas(width * sizeof(T)) Pack {
  T element[width];
};

template <int width, class T>
__device__ __forceinline__ Pack<T, width> load_pack(const T* pointer) {
  return *reinterpret_cast<const Pack<T, width>*>(pointer);
}

template <int width, class T>
__device__ __forceinline__ void store_pack(T* pointer, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(pointer) = pack;
}

// `rows` rows that start at `pointer`, `stride` elements apart, can be moved in packs of the widest kind.
template <class T>
bool packs_fit(const void* pointer, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && (rows == 1 || stride % kWidest<T> == 0);
}

// The sum over a block of kThreads threads, in thread 0. Always the same tree: lanes by halves, then warps by halves.
// Call it once per kernel and pass over `shared`, or synchronise in between.
__device__ inline double block_sum(double value) {
  TORCH_INFLUENCE_SHARED(double, warp_sums, [kThreads / kWarp]);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    value = threadIdx.x < kThreads / kWarp ? warp_sums[threadIdx.x] : 0.0;
    for (int offset = kThreads / kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  __syncthreads();  // warp_sums may be written again
  return value;
}

// Cuts the number of blocks that would do all at once down to the most that a grid may have, along x and along y. Where it
// cuts, a block goes on by gridDim to what is left.
inline unsigned grid_x(int64_t blocks) {
  const int64_t most = grid_limits::most_blocks_x();
  return static_cast<unsigned>(blocks < most ? blocks : most);
}
inline unsigned grid_y(int64_t blocks) {
  const int64_t most = grid_limits::most_blocks_y();
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// Enqueues kernel(arguments...) on `stream`, a cudaStream_t, and returns null, or what is wrong with this launch.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // or whoever asks for it next takes this error for one of theirs
  return cudaGetErrorString(error);
}

}  // namespace torch_influence
