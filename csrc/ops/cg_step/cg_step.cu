#include "common/launch.cuh"
#include "ops/cg_step/cg_step.h"

// Three kernels, or two where z is given: alpha must be known before r can change, and beta before p can, and only the end
// of a kernel waits for all of its blocks. Each one's sums are left as a part per block, and every block of the next adds
// them up for itself, in the same order. No kernel writes what another of its blocks reads: what the blocks of one must
// know of a row, the kernel before has copied into its CgPlan.

namespace torch_influence {
namespace {

constexpr int kResident = 3;  // blocks on a multiprocessor at least; the compiler would aim higher, and spill for it
constexpr int64_t kMostBlocks = 1024;  // per row: enough for the largest GPU, few enough to add up their parts

// Packs of each array that a thread loads before it uses the first: half as many where 16-bit elements are moved one by one,
// which takes more registers.
template <class T, int arrays, bool aligned>
constexpr int kInFlight = (arrays == 2 ? 4 : 2) / (aligned || sizeof(T) > 2 ? 1 : 2);

struct CgPlan {
  double steps;  // 1 where the kernel that reads it has anything to do
  double alpha;
  double rho_before;
};

// Columns of a row that a block owns: 16 KiB, or so many times that as keep the blocks of a row few.
template <class T>
int64_t columns_of(int64_t d) {
  constexpr int64_t kColumns = int64_t(kThreads) * kWidest<T> * 4;  // whole steps of every kernel
  const int64_t times = (d + kMostBlocks * kColumns - 1) / (kMostBlocks * kColumns);
  return (times < 1 ? 1 : times) * kColumns;
}

template <class T>
int64_t blocks_of(int64_t d) {
  return d ? (d + columns_of<T>(d) - 1) / columns_of<T>(d) : 1;
}

template <bool aligned, unsigned written, class T, int arrays, class F>
__device__ __forceinline__ void for_block(T* const (&row)[arrays], const Columns& columns, F f) {
  for_columns<aligned, written, kInFlight<T, arrays, aligned>>(row, columns, f);
}

// Casts const away because for_columns takes rows that are only read (`given`) in one array with those that are written.
template <class T>
__device__ __forceinline__ T* row_of(const void* rows, int64_t stride, int64_t row) {
  return static_cast<T*>(const_cast<void*>(rows)) + row * stride;
}

// The sums of a row's `blocks` parts, each of `count` doubles, in every thread. A thread from left to right, then group_sums'
// tree.
template <int count>
__device__ __forceinline__ void total(const double* parts, int64_t blocks, double (&sums)[count]) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
#pragma unroll
    for (int j = 0; j < count; ++j) sums[j] += parts[i * count + j];
  }
  group_sums<kThreads>(sums);
}

__device__ __forceinline__ double total(const double* parts, int64_t blocks) {
  double sums[] = {0};
  total(parts, blocks, sums);
  return sums[0];
}

// ---- the kernels ----
//
// In each a block owns columns_of<T>(d) columns of a row (of every gridDim.y-th row, where there are more rows than a grid
// has), a thread packs of kWidest<T> elements of them. Order of summation: a thread as it goes, then group_sums' tree; the
// parts of a row's blocks are added by total(). A row at rest costs a block a few reads.

// p'q, p'p and q'q. Reads p and q: 2 * sizeof(T) bytes per element; writes 24 bytes per block.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, kResident)
    dots_kernel(const CgStep s, int64_t columns, CgDots* __restrict__ parts) {
  for (int64_t row = blockIdx.y; row < s.k; row += gridDim.y) {
    if (cg_scalar(s, kActive, row) == 0) continue;
    T* const rows[] = {row_of<T>(s.p, s.p_stride, row), row_of<T>(s.given, s.given_stride, row)};
    double dots[] = {0, 0, 0};
    for_block<aligned, 0u>(rows, block_columns(columns, s.d), [&](T(&element)[2]) {
      const double p = widen(element[0]), q = widen(element[1]);
      dots[0] += p * q;
      dots[1] += p * p;
      dots[2] += q * q;
    });
    group_sums<kThreads>(dots);
    if (threadIdx.x == 0) parts[row * gridDim.x + blockIdx.x] = {dots[0], dots[1], dots[2]};
  }
}

// r <- r - alpha q and r'r; with a preconditioner x <- x + alpha p too. Reads r and q, writes r: 3 * sizeof(T) bytes per
// element, with x 6 * sizeof(T); reads 24 bytes per block of the row, writes 8 per block.
template <class T, bool aligned, bool with_x>
__global__ void __launch_bounds__(kThreads, kResident)
    residual_kernel(const CgStep s, int64_t columns, const CgDots* __restrict__ parts, double* __restrict__ residuals,
                    CgPlan* __restrict__ plans) {
  for (int64_t row = blockIdx.y; row < s.k; row += gridDim.y) {
    const bool active = cg_scalar(s, kActive, row) != 0;
    const double rho = cg_scalar(s, kRho, row);
    double alpha = 0;
    bool works = false;
    if (active) {
      double sums[] = {0, 0, 0};
      total(&parts[row * gridDim.x].pq, gridDim.x, sums);
      const CgDots dots = {sums[0], sums[1], sums[2]};
      alpha = cg_alpha<Wide<T>>(rho, dots, &works);
      if (blockIdx.x == 0 && threadIdx.x == 0) cg_record_dots(s, row, dots, alpha, works);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) plans[row] = {works ? 1.0 : 0.0, alpha, rho};
    if (!works) continue;

    const Wide<T> step = static_cast<Wide<T>>(alpha);
    double sum = 0;
    auto move_r = [&](T& r, T q) {
      r = cg_moved(r, -step, q);
      const double stored = widen(r);
      sum += stored * stored;
    };
    if constexpr (with_x) {
      T* const rows[] = {row_of<T>(s.r, s.r_stride, row), row_of<T>(s.given, s.given_stride, row),
                         row_of<T>(s.x, s.x_stride, row), row_of<T>(s.p, s.p_stride, row)};
      for_block<aligned, 5u>(rows, block_columns(columns, s.d), [&](T(&element)[4]) {
        move_r(element[0], element[1]);
        element[2] = cg_moved(element[2], step, element[3]);
      });
    } else {
      T* const rows[] = {row_of<T>(s.r, s.r_stride, row), row_of<T>(s.given, s.given_stride, row)};
      for_block<aligned, 1u>(rows, block_columns(columns, s.d), [&](T(&element)[2]) { move_r(element[0], element[1]); });
    }
    sum = group_sum<kThreads>(sum);
    if (threadIdx.x == 0) residuals[row * gridDim.x + blockIdx.x] = sum;
  }
}

// The end of a call that is followed by another with z. A block owns a row (every gridDim.x-th). Reads
// 8 bytes per block of residual_kernel.
__global__ void __launch_bounds__(kThreads)
    settle_kernel(const CgStep s, int64_t blocks, const double* __restrict__ residuals, const CgPlan* __restrict__ plans) {
  for (int64_t row = blockIdx.x; row < s.k; row += gridDim.x) {
    const bool steps = plans[row].steps != 0;
    const double residual = steps ? total(residuals + row * blocks, blocks) : 0;
    if (threadIdx.x == 0) cg_record_residual(s, row, steps, residual, cg_done(residual, cg_scalar(s, kTolerance, row)));
  }
}

// x <- x + alpha p and, where the row isn't done, p <- r + beta p. Reads x, p and r, writes x and p: 5 * sizeof(T) bytes per
// element; reads 8 bytes per block of the row.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, kResident)
    iterate_kernel(const CgStep s, int64_t columns, const double* __restrict__ residuals, const CgPlan* __restrict__ plans) {
  for (int64_t row = blockIdx.y; row < s.k; row += gridDim.y) {
    const CgPlan plan = plans[row];
    const bool steps = plan.steps != 0;
    const double residual = steps ? total(residuals + row * gridDim.x, gridDim.x) : 0;
    const bool done = cg_done(residual, cg_scalar(s, kTolerance, row));
    if (blockIdx.x == 0 && threadIdx.x == 0) cg_record_residual(s, row, steps, residual, done);
    if (!steps) continue;

    const auto alpha = static_cast<Wide<T>>(plan.alpha);
    const auto beta = static_cast<Wide<T>>(cg_beta<Wide<T>>(residual, plan.rho_before));
    T* const rows[] = {row_of<T>(s.x, s.x_stride, row), row_of<T>(s.p, s.p_stride, row), row_of<T>(s.r, s.r_stride, row)};
    for_block<aligned, 3u>(rows, block_columns(columns, s.d), [&](T(&element)[3]) {
      const T p = element[1];
      element[0] = cg_moved(element[0], alpha, p);
      element[1] = done ? p : cg_direction(element[2], beta, p);
    });
  }
}

// r'z. Reads r and z: 2 * sizeof(T) bytes per element; writes 8 bytes per block.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, kResident)
    rho_kernel(const CgStep s, int64_t columns, double* __restrict__ parts, CgPlan* __restrict__ plans) {
  for (int64_t row = blockIdx.y; row < s.k; row += gridDim.y) {
    const bool active = cg_scalar(s, kActive, row) != 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) plans[row] = {active ? 1.0 : 0.0, 0.0, cg_scalar(s, kRho, row)};
    if (!active) continue;
    T* const rows[] = {row_of<T>(s.r, s.r_stride, row), row_of<T>(s.given, s.given_stride, row)};
    double sum = 0;
    for_block<aligned, 0u>(rows, block_columns(columns, s.d),
                           [&](T(&element)[2]) { sum += double(widen(element[0])) * double(widen(element[1])); });
    sum = group_sum<kThreads>(sum);
    if (threadIdx.x == 0) parts[row * gridDim.x + blockIdx.x] = sum;
  }
}

// p <- z + beta p. Reads z and p, writes p: 3 * sizeof(T) bytes per element; reads 8 bytes per block of the row.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, kResident)
    turn_kernel(const CgStep s, int64_t columns, const double* __restrict__ parts, const CgPlan* __restrict__ plans) {
  for (int64_t row = blockIdx.y; row < s.k; row += gridDim.y) {
    const CgPlan plan = plans[row];
    if (plan.steps == 0) continue;
    const double rho = total(parts + row * gridDim.x, gridDim.x);
    if (blockIdx.x == 0 && threadIdx.x == 0) cg_scalar(s, kRho, row) = rho;
    const auto beta = static_cast<Wide<T>>(cg_beta<Wide<T>>(rho, plan.rho_before));
    T* const rows[] = {row_of<T>(s.p, s.p_stride, row), row_of<T>(s.given, s.given_stride, row)};
    for_block<aligned, 1u>(rows, block_columns(columns, s.d),
                           [&](T(&element)[2]) { element[0] = cg_direction(element[1], beta, element[0]); });
  }
}

template <class T, bool aligned>
const char* enqueue(const CgStep& s, double* scratch, void* stream) {
  const int64_t columns = columns_of<T>(s.d), blocks = blocks_of<T>(s.d);
  const dim3 grid(static_cast<unsigned>(blocks), grid_y(s.k));
  auto* const plans = reinterpret_cast<CgPlan*>(scratch);
  auto* const dots = reinterpret_cast<CgDots*>(plans + s.k);
  auto* const sums = reinterpret_cast<double*>(dots + s.k * blocks);
  if (s.call == CgCall::turn) {
    if (const char* error = launch(rho_kernel<T, aligned>, grid, kThreads, stream, s, columns, sums, plans)) return error;
    return launch(turn_kernel<T, aligned>, grid, kThreads, stream, s, columns, sums, plans);
  }
  if (const char* error = launch(dots_kernel<T, aligned>, grid, kThreads, stream, s, columns, dots)) return error;
  const bool moves = s.call == CgCall::move;
  const auto residual_kernel_of = moves ? residual_kernel<T, aligned, true> : residual_kernel<T, aligned, false>;
  if (const char* error = launch(residual_kernel_of, grid, kThreads, stream, s, columns, dots, sums, plans)) return error;
  if (moves) return launch(settle_kernel, grid_x(s.k), kThreads, stream, s, blocks, sums, plans);
  return launch(iterate_kernel<T, aligned>, grid, kThreads, stream, s, columns, sums, plans);
}

}  // namespace

int64_t cg_step_cuda_scratch(DType dtype, int64_t k, int64_t d) {
  static_assert(sizeof(CgPlan) == 3 * sizeof(double) && sizeof(CgDots) == 3 * sizeof(double));
  return with_element_type(dtype, [&](auto element) { return k * (3 + 4 * blocks_of<decltype(element)>(d)); });
}

const char* cg_step_cuda(const CgStep& s, double* scratch, void* stream) {
  return with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned<T>(s.x, s.x_stride, s.k) && rows_aligned<T>(s.r, s.r_stride, s.k) &&
                         rows_aligned<T>(s.p, s.p_stride, s.k) && rows_aligned<T>(s.given, s.given_stride, s.k);
    return aligned ? enqueue<T, true>(s, scratch, stream) : enqueue<T, false>(s, scratch, stream);
  });
}

}  // namespace torch_influence
