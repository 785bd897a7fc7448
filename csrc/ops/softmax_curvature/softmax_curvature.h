// The curvature of softmax cross-entropy with respect to the logits, times k tangents for each of n examples:
//
//     out = w * (diag(p) - p p^T) t = w * p * (t - mean),    mean = sum_j p_j t_j
//
// In the second form a tangent costs one pass: its mean, and then its elements again while they are in the cache. It also
// cancels less than the first where p is close to one class.
#pragma once

#include "common/element.h"
#include "common/simd.h"

namespace torch_influence {

struct SoftmaxCurvature {
  const void* p;        // [n, c], elements of a row adjacent, as in t and out
  const void* t;        // [k, n, c]
  const void* weights;  // [n] of the type that the arithmetic is done in, or null for ones
  void* out;            // [k, n, c]; may be t
  int64_t p_stride, t_stride, out_stride;  // elements from one example to the next
  int64_t t_tangent_stride, out_tangent_stride;
  int64_t k, n, c;
  DType dtype;

  // Whole examples follow each other without gaps.
  bool packed() const { return p_stride == c && t_stride == c && out_stride == c; }
};

// The arithmetic, for one element.
template <class W>
TORCH_INFLUENCE_INLINE W softmax_curvature_element(W weighted_p, W t, W mean) {
  return weighted_p * (t - mean);
}

// CPU: all of a range of examples for a range of tangents.
TORCH_INFLUENCE_SIMD_DECLARE(void softmax_curvature_block(const SoftmaxCurvature& s, int64_t first_example,
                                                          int64_t last_example, int64_t first_tangent, int64_t last_tangent))

// CUDA: enqueues everything on `stream`, a cudaStream_t. Returns null, or what is wrong with the launch.
const char* softmax_curvature_cuda(const SoftmaxCurvature& s, void* stream);

}  // namespace torch_influence
