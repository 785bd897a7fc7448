#include "common/launch.cuh"
#include "ops/linear_curvature_product/linear_curvature_product.h"

// What lies between cuBLAS's products of tiles. Neither kernel sums anything, so no order of summation depends on the grid.

namespace torch_influence {
namespace {

unsigned grid_for(int64_t threads) { return grid_x((threads + kThreads - 1) / kThreads); }

// t[row][j] += v_b[j]. A thread owns every gridDim.x * kThreads-th element of the tile. Reads and writes t once, the biases
// from the cache: 2 * sizeof(W) bytes per element.
template <class W>
__global__ void __launch_bounds__(kThreads) bias_kernel(const LinearCurvatureProduct s, W* __restrict__ t, int64_t size) {
  const int64_t m = s.k * s.c, stride = int64_t(gridDim.x) * kThreads;
  const W* v = static_cast<const W*>(s.v);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += stride) {
    t[i] += v[linear_curvature_bias_at(i % m, s.c, s.f, s.v_stride)];
  }
}

// out += product, and the bias's part. A block owns kThreads elements of every gridDim.y-th column's row. Reads product and
// out, writes out: 3 * sizeof(W) bytes per element, 2 for the first tile.
template <class W>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const LinearCurvatureProduct s, const W* __restrict__ product, const W* __restrict__ bias_sums, bool first) {
  W* out = static_cast<W*>(s.out);
  auto put = [first](W* to, W value) { *to = first ? value : *to + value; };
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t row = blockIdx.y; row < s.k * s.c; row += gridDim.y) {
    W* to = out + linear_curvature_weight_at(row, s.c, s.f, s.out_stride);
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < s.f; i += stride) put(to + i, product[row * s.f + i]);
    if (s.bias && blockIdx.x == 0 && threadIdx.x == 0) {
      put(out + linear_curvature_bias_at(row, s.c, s.f, s.out_stride), bias_sums[row]);
    }
  }
}

template <class W>
const char* launch_bias(const LinearCurvatureProduct& s, const LinearCurvatureTile& tile, void* stream) {
  const int64_t size = tile.rows * s.columns();
  return launch(bias_kernel<W>, grid_for(size), kThreads, stream, s, static_cast<W*>(tile.t), size);
}

template <class W>
const char* launch_add(const LinearCurvatureProduct& s, const LinearCurvatureTile& tile, bool first, void* stream) {
  const dim3 grid(grid_for(s.f > 0 ? s.f : 1), grid_y(s.columns()));
  return launch(add_kernel<W>, grid, kThreads, stream, s, static_cast<const W*>(tile.product),
                static_cast<const W*>(tile.bias_sums), first);
}

}  // namespace

const char* linear_curvature_product_cuda_bias(const LinearCurvatureProduct& s, const LinearCurvatureTile& tile,
                                               void* stream) {
  return s.dtype == DType::float64 ? launch_bias<double>(s, tile, stream) : launch_bias<float>(s, tile, stream);
}

const char* linear_curvature_product_cuda_add(const LinearCurvatureProduct& s, const LinearCurvatureTile& tile, bool first,
                                              void* stream) {
  return s.dtype == DType::float64 ? launch_add<double>(s, tile, first, stream) : launch_add<float>(s, tile, first, stream);
}

}  // namespace torch_influence
