#include "common/launch.cuh"
#include "ops/softmax_curvature/softmax_curvature.h"

namespace torch_influence {
namespace {

template <class W>
__device__ W weight_of(const SoftmaxCurvature& s, int64_t example) {
  return s.weights ? static_cast<const W*>(s.weights)[example] : W(1);
}

// ---- short rows: as many as fill a block ----

constexpr int64_t kShort = 32;  // elements of a row, at most

// Elements of a tile: four packs for each thread of a block; 16 KiB, and 32 KiB of 16-bit ones once they are widened.
template <class T>
constexpr int kTile = 4 * kThreads * kWidest<T>;

// A block owns as many whole examples as a tile holds (so many that every tile begins at a pack), for every gridDim.y-th
// tangent; a thread owns packs of the tile, kThreads packs apart, in registers. Reads t and writes out once, p once per block:
// (2 + gridDim.y / k) * sizeof(T) bytes per element. Means are summed from shared memory by groups of lanes, as many as the
// largest power of two within c. Order of summation: a lane from left to right, then lanes by halves.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, aligned ? 3 : 2) short_rows_kernel(const SoftmaxCurvature s, int rows_per_tile) {
  using W = Wide<T>;
  using Words = Pack<W, kWidest<W>>;
  constexpr int width = kWidest<T>, kPacks = kTile<T> / width / kThreads;
  TORCH_INFLUENCE_SHARED(Words, words, [kTile<T> / kWidest<W>]);
  W* const products = words[0].element;  // and then every row's mean in the place of its first product

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
    if (first < size) p_pack[i] = load_pack<aligned, width>(p + first, size - first);
  }

  for (int64_t tangent = blockIdx.y; tangent < s.k; tangent += gridDim.y) {
    const T* t = static_cast<const T*>(s.t) + tangent * s.t_tangent_stride + first_example * c;
    T* out = static_cast<T*>(s.out) + tangent * s.out_tangent_stride + first_example * c;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int first = (i * kThreads + threadIdx.x) * width;
      if (first < size) t_pack[i] = load_pack<aligned, width>(t + first, size - first);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int first = (i * kThreads + threadIdx.x) * width;
      if (first >= size) continue;
      Pack<W, width> product;
#pragma unroll
      for (int e = 0; e < width; ++e) product.element[e] = widen(p_pack[i].element[e]) * widen(t_pack[i].element[e]);
      // Whole words of 16 bytes: one by one, the elements of a warp's packs would meet in a few of the memory's banks.
#pragma unroll
      for (int e = 0; e < width; e += kWidest<W>) {
        Words word;
#pragma unroll
        for (int j = 0; j < kWidest<W>; ++j) word.element[j] = product.element[e + j];
        words[(first + e) / kWidest<W>] = word;
      }
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
        if (first + e == end && first + e < size) {
          ++row;
          end += c;
        }
        const W weighted = weight_of<W>(s, first_example + row) * widen(p_pack[i].element[e]);
        const W t_wide = widen(t_pack[i].element[e]);
        t_pack[i].element[e] = narrow(softmax_curvature_element<W>(weighted, t_wide, products[row * c]), T());
      }
      store_pack<aligned>(out + first, t_pack[i], size - first);
    }
    __syncthreads();
  }
}

template <class T, bool aligned>
const char* launch_short_rows(const SoftmaxCurvature& s, void* stream) {
  constexpr int64_t kEnoughBlocks = 4096;  // beyond, a block does all tangents and reads p once
  const int rows_per_tile = static_cast<int>(kTile<T> / s.c / kWidest<T> * kWidest<T>);
  const int64_t tiles = (s.n + rows_per_tile - 1) / rows_per_tile;
  const int64_t shares = (kEnoughBlocks + tiles - 1) / tiles;
  const dim3 grid(static_cast<unsigned>(tiles), grid_y(shares < s.k ? shares : s.k));
  return launch(short_rows_kernel<T, aligned>, grid, kThreads, stream, s, rows_per_tile);
}

// ---- longer rows: one per group of threads ----

// A group of threads (2^bits lanes of a warp, or the block) owns a row: all tangents of an example are neighbours, so that its p
// is read from memory once and then from the caches. A thread owns packs of kWidest<T> elements, as many packs apart as the
// group has threads. Reads t once as far as `kept` packs per thread go, what is beyond is read a second time from the caches;
// writes out once: (2 + 1 / k) * sizeof(T) bytes per element. Order of summation: a thread from left to right, then lanes by
// halves or group_sum's tree.
template <class T, bool aligned, int group, int kept, bool any_length>
__global__ void __launch_bounds__(group > kThreads ? group : kThreads, 1) rows_kernel(const SoftmaxCurvature s, int bits) {
  using W = Wide<T>;
  constexpr int width = kWidest<T>;
  const int lanes = group > kWarp ? group : 1 << bits, lane = threadIdx.x & (lanes - 1);
  const int step = lanes * width, most_kept = kept * step;
  const int64_t rows = s.n * s.k, rows_of_block = blockDim.x / lanes, rows_of_grid = gridDim.x * rows_of_block;

  // A warp stays together, as shuffles need all of its lanes: beyond the last row a group has no columns.
  for (int64_t first = blockIdx.x * rows_of_block; first < rows; first += rows_of_grid) {
    const int64_t row = first + threadIdx.x / lanes;
    const int64_t c = row < rows ? s.c : 0;
    const int kept_columns = static_cast<int>(any_length && c > most_kept ? most_kept : c);
    const Division at = divided(row < rows ? row : first, s.k);
    const int64_t example = at.quotient, tangent = at.remainder;
    const T* p = static_cast<const T*>(s.p) + example * s.p_stride;
    const T* t = static_cast<const T*>(s.t) + tangent * s.t_tangent_stride + example * s.t_stride;
    T* out = static_cast<T*>(s.out) + tangent * s.out_tangent_stride + example * s.out_stride;

    W sum = 0;
    auto left_of = [&](int64_t column) { return static_cast<int>(c - column < width ? c - column : width); };
    auto load = [&](const T* from, int64_t column) { return load_pack<aligned, width>(from + column, left_of(column)); };
    auto add = [&](const Pack<T, width>& p_pack, const Pack<T, width>& t_pack) {
#pragma unroll
      for (int e = 0; e < width; ++e) sum += widen(p_pack.element[e]) * widen(t_pack.element[e]);
    };
    Pack<T, width> t_pack[kept];
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const int column = i * step + lane * width;
      if (column < kept_columns) t_pack[i] = load(t, column);
    }
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const int column = i * step + lane * width;
      if (column < kept_columns) add(load(p, column), t_pack[i]);
    }
    // Beyond what is kept: kAhead packs of p and t are loaded before the first is used.
    auto beyond = [&](auto use) {
      constexpr int kAhead = 3;
#pragma unroll 1
      for (int64_t column = most_kept + lane * width; column < c; column += kAhead * step) {
        Pack<T, width> p_ahead[kAhead], t_ahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (column + i * step >= c) continue;
          p_ahead[i] = load(p, column + i * step);
          t_ahead[i] = load(t, column + i * step);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (column + i * step < c) use(column + i * step, p_ahead[i], t_ahead[i]);
        }
      }
    };
    if constexpr (any_length) {
      beyond([&](int64_t, const Pack<T, width>& p_pack, const Pack<T, width>& t_pack) { add(p_pack, t_pack); });
    }

    W mean = sum;
    if constexpr (group > kWarp) {
      mean = group_sum<group>(sum);
    } else {
      for (int offset = lanes / 2; offset > 0; offset /= 2) mean += __shfl_xor_sync(kAllLanes, mean, offset);
    }
    const W weight = weight_of<W>(s, example);
    auto finish = [&](int64_t column, const Pack<T, width>& p_pack, Pack<T, width> pack) {
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const W weighted = weight * widen(p_pack.element[e]);
        pack.element[e] = narrow(softmax_curvature_element<W>(weighted, widen(pack.element[e]), mean), T());
      }
      store_pack<aligned>(out + column, pack, left_of(column));
    };
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const int column = i * step + lane * width;
      if (column < kept_columns) finish(column, load(p, column), t_pack[i]);
    }
    if constexpr (any_length) beyond(finish);
  }
}

// Elements of a row that a group of threads keeps, `kept` packs in each.
template <class T, int group, int kept>
constexpr int64_t kMostColumns = int64_t(group) * kept * kWidest<T>;

template <class T, bool aligned, int group, int kept, bool any_length = false>
const char* launch_rows(const SoftmaxCurvature& s, void* stream) {
  constexpr int kBlock = group > kThreads ? group : kThreads;
  int bits = 0;  // of the fewest lanes of a warp that can keep a row
  while (bits < 5 && (int64_t(kept) * kWidest<T> << bits) < s.c) ++bits;
  const int64_t rows_of_block = group > kWarp ? 1 : kBlock >> bits;
  const unsigned blocks = grid_x((s.n * s.k + rows_of_block - 1) / rows_of_block);
  return launch(rows_kernel<T, aligned, group, kept, any_length>, blocks, kBlock, stream, s, bits);
}

// The smallest group that can keep a row. With few packs more groups run at a time, which short rows need to keep enough
// loads in flight; the largest fills a multiprocessor's registers with 128 KiB of a row.
template <class T, bool aligned>
const char* enqueue(const SoftmaxCurvature& s, void* stream) {
  if (s.c <= kShort && s.packed()) return launch_short_rows<T, aligned>(s, stream);
  if (s.c <= kMostColumns<T, kWarp, 2>) return launch_rows<T, aligned, kWarp, 2>(s, stream);
  if (s.c <= kMostColumns<T, kWarp, 8>) return launch_rows<T, aligned, kWarp, 8>(s, stream);
  if (s.c <= kMostColumns<T, kThreads, 8>) return launch_rows<T, aligned, kThreads, 8>(s, stream);
  constexpr int kMost = aligned ? 16 : 14;  // moved one by one, elements take more registers
  if (s.c <= kMostColumns<T, 512, kMost>) return launch_rows<T, aligned, 512, kMost>(s, stream);
  return launch_rows<T, aligned, 512, 8, true>(s, stream);
}

// Tells whether p, t and out, and each of their rows that the kernels load from, begin and end at a pack.
template <class T>
bool all_aligned(const SoftmaxCurvature& s) {
  auto aligned = [&](const void* pointer, int64_t tangent_stride, int64_t stride) {
    // Tiles of short rows begin at packs, whatever a row's length is; only the last one's end depends on it.
    const bool rows = s.c <= kShort && s.packed() ? s.n * s.c % kWidest<T> == 0
                                                  : s.c % kWidest<T> == 0 && (s.n == 1 || stride % kWidest<T> == 0);
    return rows && rows_aligned<T>(pointer, tangent_stride, s.k);
  };
  return aligned(s.p, 0, s.p_stride) && aligned(s.t, s.t_tangent_stride, s.t_stride) &&
         aligned(s.out, s.out_tangent_stride, s.out_stride);
}

}  // namespace

const char* softmax_curvature_cuda(const SoftmaxCurvature& s, void* stream) {
  return with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    return all_aligned<T>(s) ? enqueue<T, true>(s, stream) : enqueue<T, false>(s, stream);
  });
}

}  // namespace torch_influence
