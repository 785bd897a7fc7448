#include "common/launch.cuh"
#include "ops/lissa_step/lissa_step.h"

namespace torch_influence {
namespace {

constexpr int kInFlight = 4;  // packs per thread and array that are loaded before the first is used

template <class T>
constexpr int64_t kColumns = int64_t(kThreads) * kInFlight * kWidest<T>;  // per block: 16 KiB of a row

// A block owns kColumns<T> columns of a row (of every gridDim.y-th row, where there are more rows than a grid has), a thread
// packs of kWidest<T> elements, kThreads packs apart. Reads h, v and hvp once, writes h once: 4 * sizeof(T) bytes per element
// and 8 bytes per block. Order of summation: a thread from left to right, then group_sum's tree; the blocks of a row are
// added by norms_kernel.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads) step_kernel(const LissaStep p, double* __restrict__ partials) {
  using W = Wide<T>;
  const W damp = static_cast<W>(p.damp), inverse_scale = static_cast<W>(p.inverse_scale);
  const Columns columns = block_columns(kColumns<T>, p.d);

  for (int64_t row = blockIdx.y; row < p.k; row += gridDim.y) {
    // for_columns takes the rows that are only read in one array with the one that is written.
    T* const rows[] = {static_cast<T*>(p.h) + row * p.h_stride, static_cast<T*>(const_cast<void*>(p.v)) + row * p.v_stride,
                       static_cast<T*>(const_cast<void*>(p.hvp)) + row * p.hvp_stride};
    double sum = 0;
    for_columns<aligned, 1u, kInFlight>(rows, columns, [&](T(&element)[3]) {
      const W h = lissa_step_element<W>(widen(element[0]), widen(element[1]), widen(element[2]), damp, inverse_scale);
      element[0] = narrow(h, T());
      const double stored = widen(element[0]);
      sum += stored * stored;
    });
    sum = group_sum<kThreads>(sum);
    if (threadIdx.x == 0) partials[row * gridDim.x + blockIdx.x] = sum;
  }
}

// A block owns a row's partial sums (of every gridDim.x-th row), a thread every kThreads-th of them. Reads 8 bytes per block
// of step_kernel, writes 8 per row. Order of summation: a thread from left to right, then group_sum's tree.
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const double* __restrict__ partials, int64_t k, int64_t blocks, double* __restrict__ norms) {
  for (int64_t row = blockIdx.x; row < k; row += gridDim.x) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += partials[row * blocks + i];
    sum = group_sum<kThreads>(sum);
    if (threadIdx.x == 0) norms[row] = sum;
  }
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
    const bool aligned = rows_aligned<T>(p.h, p.h_stride, p.k) && rows_aligned<T>(p.v, p.v_stride, p.k) &&
                         rows_aligned<T>(p.hvp, p.hvp_stride, p.k);
    return launch(aligned ? step_kernel<T, true> : step_kernel<T, false>, grid, kThreads, stream, p, partials);
  });
  return error ? error : launch(norms_kernel, grid_x(p.k), kThreads, stream, partials, p.k, blocks, norms);
}

}  // namespace torch_influence
