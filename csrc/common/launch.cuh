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
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- memory ----

// Elements that one 16-byte memory access moves.
template <class T>
constexpr int kWidest = 16 / sizeof(T);

// Neighbouring elements that a thread owns. It moves them in one access where they are `aligned`, which is a matter of the
// tensors' addresses and strides, and else one by one. So where a row lies in memory doesn't change the order of its sums.
template <class T, int width>
struct alignas(width * sizeof(T)) Pack {
  T element[width];
};

// Loads a pack of which `count` elements are there; the others are zeros. Aligned ones are there as a whole.
template <bool aligned, int width, class T>
__device__ __forceinline__ Pack<T, width> load_pack(const T* pointer, int count = width) {
  if constexpr (aligned) return *reinterpret_cast<const Pack<T, width>*>(pointer);
  Pack<T, width> pack{};
  if constexpr (sizeof(T) == 2 && width % 2 == 0) {  // two to a register: nvcc would give each one of its own
    uint32_t word[width / 2];
#pragma unroll
    for (int e = 0; e < width; e += 2) {
      const uint32_t low = e < count ? pointer[e].bits : 0, high = e + 1 < count ? pointer[e + 1].bits : 0;
      word[e / 2] = __byte_perm(low, high, 0x5410);  // low | high << 16
    }
    memcpy(&pack, word, sizeof pack);
  } else {
#pragma unroll
    for (int e = 0; e < width; ++e) {
      if (e < count) pack.element[e] = pointer[e];
    }
  }
  return pack;
}

template <bool aligned, int width, class T>
__device__ __forceinline__ void store_pack(T* pointer, const Pack<T, width>& pack, int count = width) {
  if constexpr (!aligned) {
#pragma unroll
    for (int e = 0; e < width; ++e) {
      if (e < count) pointer[e] = pack.element[e];
    }
  } else if constexpr (sizeof pack == 16) {  // in one access by name: nvcc may take an assignment apart
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    __stwb(reinterpret_cast<uint4*>(pointer), bits);
  } else {
    *reinterpret_cast<Pack<T, width>*>(pointer) = pack;
  }
}

// Tells whether packs of `width` elements are aligned in `rows` rows that start at `pointer`, `stride` elements apart.
template <class T, int width = kWidest<T>>
bool rows_aligned(const void* pointer, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(pointer) % (width * sizeof(T)) == 0 && (rows == 1 || stride % width == 0);
}

// A part of a row that a block owns: where it begins in the row, and its elements.
struct Columns {
  int64_t begin;
  int count;
};
__device__ __forceinline__ Columns block_columns(int64_t columns, int64_t d) {
  const int64_t begin = blockIdx.x * columns, rest = d - begin;
  return {begin, static_cast<int>(rest < columns ? rest : columns)};
}

// Calls f with the elements of `arrays` rows at each of the block's columns that this thread owns, and stores those rows whose
// bit in `written` is set. The columns begin at a pack. A thread owns packs of kWidest<T> elements, kThreads packs apart, of
// which it loads `in_flight` of each array before it uses the first; and the first threads own what is left beyond the packs.
template <bool aligned, unsigned written, int in_flight, class T, int arrays, class F>
__device__ __forceinline__ void for_columns(T* const (&row)[arrays], const Columns& columns, F f) {
  constexpr int width = kWidest<T>, kStride = kThreads * width;
  const int whole = columns.count / width * width;
  T* part[arrays];
#pragma unroll
  for (int a = 0; a < arrays; ++a) part[a] = row[a] + columns.begin;
#pragma unroll 1
  for (int first = threadIdx.x * width; first < whole; first += in_flight * kStride) {
    Pack<T, width> pack[in_flight][arrays];
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      if (first + u * kStride >= whole) continue;
#pragma unroll
      for (int a = 0; a < arrays; ++a) pack[u][a] = load_pack<aligned, width>(part[a] + first + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      if (first + u * kStride >= whole) continue;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        T element[arrays];
#pragma unroll
        for (int a = 0; a < arrays; ++a) element[a] = pack[u][a].element[e];
        f(element);
#pragma unroll
        for (int a = 0; a < arrays; ++a) pack[u][a].element[e] = element[a];
      }
#pragma unroll
      for (int a = 0; a < arrays; ++a) {
        if (written >> a & 1) store_pack<aligned>(part[a] + first + u * kStride, pack[u][a]);
      }
    }
  }
  const int left = whole + threadIdx.x;
  if (left < columns.count) {
    T element[arrays];
#pragma unroll
    for (int a = 0; a < arrays; ++a) element[a] = part[a][left];
    f(element);
#pragma unroll
    for (int a = 0; a < arrays; ++a) {
      if (written >> a & 1) part[a][left] = element[a];
    }
  }
}

// ---- sums ----

// Replaces each of `count` values by its sum over a group of threads, in all of them: a warp, or the block. All threads of a
// block must call it. Always the same tree: lanes by halves, then warps from left to right.
template <int group, class W, int count>
__device__ __forceinline__ void group_sums(W (&value)[count]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) value[i] += __shfl_xor_sync(kAllLanes, value[i], offset);
  }
  if constexpr (group > kWarp) {
    TORCH_INFLUENCE_SHARED(W, warp_sums, [count][group / kWarp]);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < count; ++i) warp_sums[i][threadIdx.x / kWarp] = value[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      value[i] = warp_sums[i][0];
      for (int warp = 1; warp < group / kWarp; ++warp) value[i] += warp_sums[i][warp];
    }
    __syncthreads();  // warp_sums may be written again
  }
}

template <int group, class W>
__device__ __forceinline__ W group_sum(W value) {
  W values[] = {value};
  group_sums<group>(values);
  return values[0];
}

// ---- launches ----

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

// Divides two numbers that are not negative. Most fit into 32 bits, where a GPU is several times as fast.
struct Division {
  int64_t quotient, remainder;
};
__device__ __forceinline__ Division divided(int64_t number, int64_t by) {
  if (static_cast<uint64_t>(number | by) >> 32 == 0) {
    const auto a = static_cast<uint32_t>(number), b = static_cast<uint32_t>(by), quotient = a / b;
    return {quotient, a - quotient * b};
  }
  return {number / by, number % by};
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
