#include "common/launch.cuh"
#include "ops/softmax_curvature/softmax_curvature.h"

namespace torch_influence {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class W>
__device__ W weight_of(const SoftmaxCurvature& s, int64_t example) {
  return s.weights ? static_cast<const W*>(s.weights)[example] : W(1);
}

// ---- short rows: as many as fill a block ----

constexpr int64_t kShort = 32;  // elements of a row, at most

// Elements of a tile: 16 KiB once they are widened.
template <class T>
constexpr int kTile = 16384 / sizeof(Wide<T>);

// A block owns as many whole examples as a tile holds (a multiple of `width` of them, so that every tile begins at a pack),
// for every gridDim.y-th tangent; a thread owns packs of the tile, kThreads packs apart, in registers. Reads t and writes
// out once, p once per block: (2 + gridDim.y / k) * sizeof(T) bytes per element. Means are summed from shared memory by
// groups of lanes, as many as the largest power of two within c. Order of summation: a lane from left to right, then lanes
// by halves.
template <class T, int width>
__global__ void __launch_bounds__(kThreads, 1) short_rows_kernel(const SoftmaxCurvature s, int rows_per_tile) {
  using W = Wide<T>;
  constexpr int kPacks = kTile<T> / width / kThreads;
  TORCH_INFLUENCE_SHARED(W, products, [kTile<T>]);  // and then every row's mean in the place of its first product

  const int c = static_cast<int>(s.c);
  const int64_t first_example = int64_t(blockIdx.x) * rows_per_tile;
  const int rows = static_cast<int>(s.n - first_example < rows_per_tile ? s.n - first_example : rows_per_tile);
  const int size = rows * c;
  const int group_bits = 31 - __clz(c), group = 1 << group_bits;

  const T* p = static_cast<const T*>(s.p) + first_example * c;
  Pack<T, width> p_pack[kPacks], t_pack[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int first = (i * kThreads + threadIdx.x) * width;
    if (first < size) p_pack[i] = load_pack<width>(p + first);
  }

  for (int64_t tangent = blockIdx.y; tangent < s.k; tangent += gridDim.y) {
    const T* t = static_cast<const T*>(s.t) + tangent * s.t_tangent_stride + first_example * c;
    T* out = static_cast<T*>(s.out) + tangent * s.out_tangent_stride + first_example * c;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int first = (i * kThreads + threadIdx.x) * width;
      if (first < size) t_pack[i] = load_pack<width>(t + first);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int first = (i * kThreads + threadIdx.x) * width;
      if (first >= size) continue;
#pragma unroll
      for (int e = 0; e < width; ++e) products[first + e] = widen(p_pack[i].element[e]) * widen(t_pack[i].element[e]);
    }
    __syncthreads();

    // All threads take every turn, as shuffles need whole warps.
    for (int turn = 0; turn < rows * group; turn += kThreads) {
      const int row = (turn + threadIdx.x) >> group_bits, lane = threadIdx.x & (group - 1);
      W sum = 0;
      if (row < rows) {
        for (int j = lane; j < c; j += group) sum += products[row * c + j];
      }
      for (int offset = group / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      if (row < rows && lane == 0) products[row * c] = sum;
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int first = (i * kThreads + threadIdx.x) * width;
      if (first >= size) continue;
      int row = first / c, end = (row + 1) * c;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        if (first + e == end) {
          ++row;
          end += c;
        }
        const W weighted = weight_of<W>(s, first_example + row) * widen(p_pack[i].element[e]);
        const W t_wide = widen(t_pack[i].element[e]);
        t_pack[i].element[e] = narrow(softmax_curvature_element<W>(weighted, t_wide, products[row * c]), T());
      }
      store_pack(out + first, t_pack[i]);
    }
    __syncthreads();
  }
}

template <class T, int width>
const char* launch_short_rows(const SoftmaxCurvature& s, void* stream) {
  constexpr int64_t kEnoughBlocks = 4096;  // beyond, a block does all tangents and reads p once
  const int rows_per_tile = static_cast<int>(kTile<T> / s.c / width * width);
  const int64_t tiles = (s.n + rows_per_tile - 1) / rows_per_tile;
  int64_t shares = (kEnoughBlocks + tiles - 1) / tiles;
  shares = shares < s.k ? shares : s.k;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(shares));
  return launch(short_rows_kernel<T, width>, grid, kThreads, stream, s, rows_per_tile);
}

// ---- longer rows: one per group of threads ----

// Packs that fit in so many registers of a thread; an element moved alone takes a whole one.
template <class T, int width>
constexpr int kPacksIn(int registers) {
  return registers * 4 / (width > 1 ? 16 : sizeof(T) < 4 ? 4 : int(sizeof(T)));
}

// The sum over a group, in all of its threads. Always the same tree: lanes by halves, then warps from left to right.
template <int group, class W>
__device__ W group_sum(W sum) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if constexpr (group > kWarp) {
    TORCH_INFLUENCE_SHARED(W, warp_sums, [group / kWarp]);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < group / kWarp; ++warp) sum += warp_sums[warp];
    __syncthreads();  // warp_sums may be written again
  }
  return sum;
}

// A group of threads (a warp, or the block) owns a row: all tangents of an example are neighbours, so that its p is read
// from memory once and then from the caches. A thread owns packs of `width` elements, `group` packs apart. Reads t once as
// far as `kept` packs per thread go, what is beyond is read a second time from the caches; writes out once:
// (2 + 1 / k) * sizeof(T) bytes per element. Order of summation: a thread from left to right, then group_sum's tree.
template <class T, int width, int group, int kept, bool any_length>
__global__ void __launch_bounds__(group > kThreads ? group : kThreads, 1) rows_kernel(const SoftmaxCurvature s) {
  using W = Wide<T>;
  constexpr int kStep = group * width, kMostKept = kept * kStep;
  const int kept_columns = static_cast<int>(any_length && s.c > kMostKept ? kMostKept : s.c);
  const int64_t groups = int64_t(gridDim.x) * (blockDim.x / group);
  const int lane = threadIdx.x % group;

  for (int64_t row = int64_t(blockIdx.x) * (blockDim.x / group) + threadIdx.x / group; row < s.n * s.k; row += groups) {
    const int64_t example = row / s.k, tangent = row % s.k;
    const T* p = static_cast<const T*>(s.p) + example * s.p_stride;
    const T* t = static_cast<const T*>(s.t) + tangent * s.t_tangent_stride + example * s.t_stride;
    T* out = static_cast<T*>(s.out) + tangent * s.out_tangent_stride + example * s.out_stride;

    W sum = 0;
    auto add = [&](const Pack<T, width>& p_e, const Pack<T, width>& t_e) {
#pragma unroll
      for (int e = 0; e < width; ++e) sum += widen(p_e.element[e]) * widen(t_e.element[e]);
    };
    Pack<T, width> t_pack[kept];
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const int column = i * kStep + lane * width;
      if (column < kept_columns) t_pack[i] = load_pack<width>(t + column);
    }
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const int column = i * kStep + lane * width;
      if (column < kept_columns) add(load_pack<width>(p + column), t_pack[i]);
    }
    if constexpr (any_length) {
      for (int64_t column = kMostKept + lane * width; column < s.c; column += kStep) {
        add(load_pack<width>(p + column), load_pack<width>(t + column));
      }
    }

    const W mean = group_sum<group>(sum), weight = weight_of<W>(s, example);
    auto finish = [&](int64_t column, Pack<T, width> pack) {
      const Pack<T, width> p_pack = load_pack<width>(p + column);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const W weighted = weight * widen(p_pack.element[e]);
        pack.element[e] = narrow(softmax_curvature_element<W>(weighted, widen(pack.element[e]), mean), T());
      }
      store_pack(out + column, pack);
    };
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const int column = i * kStep + lane * width;
      if (column < kept_columns) finish(column, t_pack[i]);
    }
    if constexpr (any_length) {
      for (int64_t column = kMostKept + lane * width; column < s.c; column += kStep) {
        finish(column, load_pack<width>(t + column));
      }
    }
  }
}

template <class T, int width, int group, int registers>
constexpr int64_t kMostKept = int64_t(group) * kPacksIn<T, width>(registers) * width;  // elements of a row

template <class T, int width, int group, int registers, bool any_length = false>
const char* launch_rows(const SoftmaxCurvature& s, void* stream) {
  constexpr int kBlock = group > kThreads ? group : kThreads, kKept = kPacksIn<T, width>(registers);
  const int64_t blocks = (s.n * s.k + kBlock / group - 1) / (kBlock / group);
  return launch(rows_kernel<T, width, group, kKept, any_length>, grid_x(blocks), kBlock, stream, s);
}

// The smallest group that can keep a row. With few registers more groups run at a time, which short rows need to keep enough
// loads in flight; the largest fills a multiprocessor's registers with 128 KiB of a row, or 96 where elements move alone.
template <class T, int width>
const char* enqueue(const SoftmaxCurvature& s, void* stream) {
  constexpr int kMost = width > 1 ? 64 : 48;
  if (s.c <= kShort && s.packed()) return launch_short_rows<T, width>(s, stream);
  if (s.c <= kMostKept<T, width, kWarp, 8>) return launch_rows<T, width, kWarp, 8>(s, stream);
  if (s.c <= kMostKept<T, width, kWarp, 32>) return launch_rows<T, width, kWarp, 32>(s, stream);
  if (s.c <= kMostKept<T, width, kThreads, 32>) return launch_rows<T, width, kThreads, 32>(s, stream);
  if (s.c <= kMostKept<T, width, 512, kMost>) return launch_rows<T, width, 512, kMost>(s, stream);
  return launch_rows<T, width, 512, 32, true>(s, stream);
}

// p, t and out, and each of their rows that the kernels load from, begin and end at a pack.
template <class T>
bool in_packs(const SoftmaxCurvature& s) {
  auto fit = [&](const void* pointer, int64_t tangent_stride, int64_t stride) {
    // Tiles of short rows begin at packs, whatever a row's length is; only the last one's end depends on it.
    const bool rows = s.c <= kShort && s.packed() ? s.n * s.c % kWidest<T> == 0
                                                  : s.c % kWidest<T> == 0 && (s.n == 1 || stride % kWidest<T> == 0);
    return rows && packs_fit<T>(pointer, tangent_stride, s.k);
  };
  return fit(s.p, 0, s.p_stride) && fit(s.t, s.t_tangent_stride, s.t_stride) &&
         fit(s.out, s.out_tangent_stride, s.out_stride);
}

}  // namespace

const char* softmax_curvature_cuda(const SoftmaxCurvature& s, void* stream) {
  return with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    return in_packs<T>(s) ? enqueue<T, kWidest<T>>(s, stream) : enqueue<T, 1>(s, stream);
  });
}

}  // namespace torch_influence
