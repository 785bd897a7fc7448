#include "common/launch.cuh"
#include "ops/lissa_step/lissa_step.h"

namespace torch_influence {
namespace {

constexpr int kInFlight = 4;  // packs per thread and array that are loaded before the first is used

template <class T>
constexpr int64_t kColumns = int64_t(kThreads) * kInFlight * kWidest<T>;  // per block: 16 KiB of a row

// A block owns kColumns<T> columns of a row (of every gridDim.y-th row, where there are more rows than a grid has), a thread
// packs of `width` elements, kThreads packs apart. Reads h, v and hvp once, writes h once: 4 * sizeof(T) bytes per element
// and 8 bytes per block. Order of summation: a thread from left to right, then block_sum's tree; the blocks of a row are
// added by sum_kernel.
template <class T, int width>
__global__ void __launch_bounds__(kThreads) step_kernel(const LissaStep p, double* __restrict__ partials) {
  using W = Wide<T>;
  const W damp = static_cast<W>(p.damp), inverse_scale = static_cast<W>(p.inverse_scale);
  constexpr int64_t kStride = int64_t(kThreads) * width;
  const int64_t block_begin = blockIdx.x * kColumns<T>;

  for (int64_t row = blockIdx.y; row < p.k; row += gridDim.y) {
    T* h = static_cast<T*>(p.h) + row * p.h_stride;
    const T* v = static_cast<const T*>(p.v) + row * p.v_stride;
    const T* hvp = static_cast<const T*>(p.hvp) + row * p.hvp_stride;
    double sum = 0;

    auto step = [&](T h_old, T v_old, T hvp_old) {
      const W h_new = lissa_step_element<W>(widen(h_old), widen(v_old), widen(hvp_old), damp, inverse_scale);
      const T stored = narrow(h_new, T());
      const double x = widen(stored);
      sum += x * x;
      return stored;
    };

#pragma unroll 1
    for (int64_t base = block_begin; base < block_begin + kColumns<T>; base += kInFlight * kStride) {
      const int64_t first = base + threadIdx.x * width;
      Pack<T, width> h_pack[kInFlight], v_pack[kInFlight], hvp_pack[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t column = first + i * kStride;
        if (column + width > p.d) continue;
        h_pack[i] = load_pack<width>(h + column);
        v_pack[i] = load_pack<width>(v + column);
        hvp_pack[i] = load_pack<width>(hvp + column);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t column = first + i * kStride;
        if (column + width <= p.d) {
#pragma unroll
          for (int e = 0; e < width; ++e) {
            T& h_e = h_pack[i].element[e];
            h_e = step(h_e, v_pack[i].element[e], hvp_pack[i].element[e]);
          }
          store_pack(h + column, h_pack[i]);
        } else {
          for (int64_t j = column; j < p.d; ++j) h[j] = step(h[j], v[j], hvp[j]);
        }
      }
    }

    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[row * gridDim.x + blockIdx.x] = sum;
  }
}

// A block owns a row's partial sums, a thread every kThreads-th of them. Reads 8 bytes per block of step_kernel, writes 8
// per row. Order of summation: a thread from left to right, then block_sum's tree.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* __restrict__ partials, int64_t blocks, double* __restrict__ norms) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += partials[blockIdx.x * blocks + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

template <class T>
int64_t blocks_of(int64_t d) {
  return (d + kColumns<T> - 1) / kColumns<T>;
}

}  // namespace

int64_t lissa_step_cuda_blocks(DType dtype, int64_t d) {
  return with_element_type(dtype, [&](auto element) { return blocks_of<decltype(element)>(d); });
}

const char* lissa_step_cuda(const LissaStep& p, double* partials, double* norms, void* stream) {
  const int64_t blocks = lissa_step_cuda_blocks(p.dtype, p.d);
  const dim3 grid(static_cast<unsigned>(blocks), grid_y(p.k));
  const char* error = with_element_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool packed =
        packs_fit<T>(p.h, p.h_stride, p.k) && packs_fit<T>(p.v, p.v_stride, p.k) && packs_fit<T>(p.hvp, p.hvp_stride, p.k);
    return launch(packed ? step_kernel<T, kWidest<T>> : step_kernel<T, 1>, grid, kThreads, stream, p, partials);
  });
  return error ? error : launch(sum_kernel, grid_x(p.k), kThreads, stream, partials, blocks, norms);
}

}  // namespace torch_influence
