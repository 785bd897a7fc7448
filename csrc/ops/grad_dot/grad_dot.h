// Dot products of per-example gradients of a linear layer with k vectors. An example i with inputs a[i] [s, f] and output
// gradients g[i] [s, o] has the gradient G_i = sum_t g[i, t] a[i, t]^T, and a vector is V_j [o, f], with bias followed by
// b_j [o]:
//
//     out[i, j] += <G_i, V_j> + <sum_t g[i, t], b_j> = sum_t <g[i, t], V_j a[i, t] + b_j>
//
// The matrix products are BLAS's, called from grad_dot.cpp; here is what BLAS does badly, or not at all.
#pragma once

#include "common/element.h"
#include "common/simd.h"

namespace torch_influence {

// Few products U = A V^T, in one pass over A.
struct GradDotProducts {
  const void* a;  // [examples, positions, f] of dtype, elements of a row adjacent
  const void* v;  // [k, o, f] of the type that the arithmetic is done in; [o, f] without gaps
  void* u;        // [examples * positions, k * o] of that type, without gaps
  int64_t a_example_stride, a_position_stride, v_stride;
  int64_t positions, k, o, f;
  DType dtype;
};

// out[i, j] += sum over positions and outputs of (U + b) g.
struct GradDotSums {
  const void* u;  // [examples, positions, k, o] of the type that the arithmetic is done in, without gaps
  const void* g;  // [examples, positions, o] of dtype, elements of a row adjacent
  const void* b;  // [k, o] of the type that the arithmetic is done in, elements of a row adjacent; null for zeros
  void* out;      // [examples, k] of that type, elements of a row adjacent
  int64_t g_example_stride, g_position_stride, b_stride, out_stride;
  int64_t examples, positions, k, o;
  DType dtype;
};

// The arithmetic, for one element.
template <class W>
TORCH_INFLUENCE_INLINE W grad_dot_element(W sum, W product, W g) {
  return sum + product * g;
}

// CPU: a range of the rows of U; a range of the elements of out, counted row by row.
TORCH_INFLUENCE_SIMD_DECLARE(void grad_dot_products(const GradDotProducts& s, int64_t first_row, int64_t last_row))
TORCH_INFLUENCE_SIMD_DECLARE(void grad_dot_sums(const GradDotSums& s, int64_t first, int64_t last))

// CUDA: enqueues everything on `stream`, a cudaStream_t; `parts` has grad_dot_cuda_parts() entries of the type that the
// arithmetic is done in. Returns null, or what is wrong with the launch.
int64_t grad_dot_cuda_parts(const GradDotSums& s);
const char* grad_dot_sums_cuda(const GradDotSums& s, void* parts, void* stream);

}  // namespace torch_influence
