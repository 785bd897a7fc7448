// One step of LiSSA's recursion on k rows of length d, in place:
//
//     h <- v + h - (hvp + damp * h) / scale
//
// with the squared norms of the new rows, for the divergence guard, from the same pass over memory.
#pragma once

#include "common/element.h"
#include "common/simd.h"

namespace torch_influence {

struct LissaStep {
  void* h;  // [k, d], elements of a row adjacent, as in v and hvp
  const void* v;
  const void* hvp;
  int64_t h_stride, v_stride, hvp_stride;  // elements from one row to the next
  int64_t k, d;
  DType dtype;
  double damp, inverse_scale;
};

// The arithmetic, for one element.
template <class W>
TORCH_INFLUENCE_INLINE W lissa_step_element(W h, W v, W hvp, W damp, W inverse_scale) {
  return v + h - inverse_scale * (hvp + damp * h);
}

// CPU: columns [begin, end) of one row; returns their part of the row's squared norm.
TORCH_INFLUENCE_SIMD_DECLARE(double lissa_step_block(const LissaStep& p, int64_t row, int64_t begin, int64_t end))

// CUDA: enqueues the whole step on `stream`, a cudaStream_t. `norms` has k entries, `partials` k * lissa_step_cuda_blocks().
// Returns null, or what is wrong with the launch.
int64_t lissa_step_cuda_blocks(DType dtype, int64_t d);
const char* lissa_step_cuda(const LissaStep& p, double* partials, double* norms, void* stream);

}  // namespace torch_influence
