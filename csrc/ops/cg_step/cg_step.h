// The vector work of one iteration of conjugate gradients on k rows of length d, in place, around the product q = A p:
//
//     alpha = rho / p'q,   x <- x + alpha p,   r <- r - alpha q,   beta = r'r / rho,   p <- r + beta p
//
// and with a preconditioner, where z = M r is needed half-way, the same in two calls. What is known of a row besides (its
// scalars) stays on the device, and so does the decision that a row is done.
#pragma once

#include "common/element.h"
#include "common/simd.h"

namespace torch_influence {

// The rows of `scalars`; ops/_cg_step.py says what they mean.
enum CgScalar { kActive, kTolerance, kRho, kAlpha, kCurvature, kResidual, kNegative, kLargest, kIterations, kCgScalars };

enum class CgCall {
  whole,  // all of the above
  move,   // with a preconditioner: x and r, given q
  turn,   // with a preconditioner: p <- z + beta p with beta = r'z / rho, given z
};

struct CgStep {
  CgCall call;
  DType dtype;
  void* x;  // [k, d], elements of a row adjacent, as in the others
  void* r;
  void* p;
  const void* given;                                   // q, in a turn z
  int64_t x_stride, r_stride, p_stride, given_stride;  // elements from one row to the next
  double* scalars;                                     // [kCgScalars, k], all adjacent
  int64_t k, d;
};

struct CgDots {
  double pq, pp, qq;
};

// ---- what becomes of a row's scalars ----

TORCH_INFLUENCE_INLINE bool cg_finite(double x) { return x - x == 0; }

// Rounded to what the rows' arithmetic can hold. 0 where no step makes sense: the row has broken down.
template <class W>
TORCH_INFLUENCE_INLINE double cg_alpha(double rho, const CgDots& dots, bool* works) {
  const double alpha = static_cast<W>(rho / dots.pq);
  *works = cg_finite(alpha) && cg_finite(dots.qq);
  return *works ? alpha : 0;
}

// rho = 0 marks a start, from where the direction begins anew.
template <class W>
TORCH_INFLUENCE_INLINE double cg_beta(double rho, double rho_before) {
  return rho_before == 0 ? 0 : static_cast<W>(rho / rho_before);
}

TORCH_INFLUENCE_INLINE bool cg_done(double residual, double tolerance) {
  return cg_finite(residual) && residual <= tolerance * tolerance;
}

TORCH_INFLUENCE_INLINE double& cg_scalar(const CgStep& s, CgScalar which, int64_t row) {
  return s.scalars[which * s.k + row];
}

// Of an active row. Neither reads nor writes anything that decides about the row.
TORCH_INFLUENCE_INLINE void cg_record_dots(const CgStep& s, int64_t row, const CgDots& dots, double alpha, bool works) {
  cg_scalar(s, kAlpha, row) = alpha;
  cg_scalar(s, kCurvature, row) = dots.pq;
  if (dots.pq <= 0) cg_scalar(s, kNegative, row) = 1;
  if (!works) return;
  const double ratio = dots.qq / dots.pp;
  if (ratio > cg_scalar(s, kLargest, row)) cg_scalar(s, kLargest, row) = ratio;
  cg_scalar(s, kIterations, row) += 1;
}

// The end of a row's call: at rest if it didn't step, or is done.
TORCH_INFLUENCE_INLINE void cg_record_residual(const CgStep& s, int64_t row, bool stepped, double residual, bool done) {
  if (stepped) cg_scalar(s, kResidual, row) = residual;
  if (stepped && !done && s.call == CgCall::whole) cg_scalar(s, kRho, row) = residual;
  if (!stepped || done) cg_scalar(s, kActive, row) = 0;
}

// ---- what becomes of an element ----

template <class T>
TORCH_INFLUENCE_INLINE T cg_moved(T from, Wide<T> step, T along) {
  return narrow(widen(from) + step * widen(along), T());
}

// p may hold anything at a start.
template <class T>
TORCH_INFLUENCE_INLINE T cg_direction(T z, Wide<T> beta, T p) {
  return beta == 0 ? z : cg_moved(z, beta, p);
}

// ---- CPU: columns [begin, end) of one row ----

TORCH_INFLUENCE_SIMD_DECLARE(CgDots cg_dots_block(const CgStep& s, int64_t row, int64_t begin, int64_t end))
TORCH_INFLUENCE_SIMD_DECLARE(double cg_residual_block(const CgStep& s, int64_t row, int64_t begin, int64_t end,
                                                      double alpha))
TORCH_INFLUENCE_SIMD_DECLARE(double cg_rho_block(const CgStep& s, int64_t row, int64_t begin, int64_t end))
TORCH_INFLUENCE_SIMD_DECLARE(void cg_iterate_block(const CgStep& s, int64_t row, int64_t begin, int64_t end, double alpha))
TORCH_INFLUENCE_SIMD_DECLARE(void cg_iterate_and_direction_block(const CgStep& s, int64_t row, int64_t begin, int64_t end,
                                                                 double alpha, double beta))
TORCH_INFLUENCE_SIMD_DECLARE(void cg_direction_block(const CgStep& s, int64_t row, int64_t begin, int64_t end, double beta))

// CUDA: enqueues the whole call on `stream`, a cudaStream_t; `scratch` has cg_step_cuda_scratch() entries. Returns null, or
// what is wrong with the launch.
int64_t cg_step_cuda_scratch(DType dtype, int64_t k, int64_t d);
const char* cg_step_cuda(const CgStep& s, double* scratch, void* stream);

}  // namespace torch_influence
