// The curvature of a loss of n examples with respect to a linear layer z = W x + b, times k vectors of its parameters:
//
//     t = V_w x + v_b                  [c] per example and vector: what the layer's outputs do along the vector
//     s = B t                          the loss's curvature at the outputs, B = w (diag(p) - p p^T) or any [c, c] block
//     out_w = sum_i s x^T,  out_b = sum_i s
//
// m = k c columns in all. With few of them the features x are all that counts: they are read from memory once, a tile of
// examples taking both products while it is in the cache, by the loops of linear_curvature_product_simd.inc. With many of
// them BLAS multiplies tiles (linear_curvature_product.cpp).
#pragma once

#include "common/element.h"
#include "common/simd.h"

namespace torch_influence {

// What is not x is of the type that the arithmetic is done in, Wide<T> for an x of type T.
struct LinearCurvatureProduct {
  const void* x;          // [n, f], elements of a row adjacent, as in v and out
  const void* v;          // [k, c f], or [k, c f + c] with bias
  const void* curvature;  // [n, c] probabilities, or [n, c, c] blocks; an example's elements adjacent
  const void* weights;    // [n] or null for ones; null with blocks
  void* out;              // like v
  int64_t x_stride, v_stride, curvature_stride, out_stride;  // elements from one row or example to the next
  int64_t n, f, c, k;
  bool blocks, bias;
  DType x_dtype, dtype;

  int64_t columns() const { return k * c; }
  int64_t row_length() const { return c * f + (bias ? c : 0); }
};

// Examples of a tile, so that it and what is read beside it stay in a core's own cache.
inline int64_t linear_curvature_tile(const LinearCurvatureProduct& s) {
  const int64_t rows = 98304 / ((s.f > 0 ? s.f : 1) * element_size(s.dtype)) / 4 * 4;
  return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

// Elements of scratch that linear_curvature_slab needs.
inline int64_t linear_curvature_scratch(const LinearCurvatureProduct& s) {
  return linear_curvature_tile(s) * (s.f + 2 * s.columns());
}

// CPU: adds what examples first .. last contribute to sums [k, row_length].
TORCH_INFLUENCE_SIMD_DECLARE(void linear_curvature_slab(const LinearCurvatureProduct& s, int64_t first, int64_t last,
                                                        void* sums, void* scratch))

// Where element j of row `row` of the weights [m, f] is in a vector, and of the biases [m].
TORCH_INFLUENCE_INLINE int64_t linear_curvature_weight_at(int64_t row, int64_t c, int64_t f, int64_t stride) {
  return row / c * stride + row % c * f;
}
TORCH_INFLUENCE_INLINE int64_t linear_curvature_bias_at(int64_t row, int64_t c, int64_t f, int64_t stride) {
  return row / c * stride + c * f + row % c;
}

}  // namespace torch_influence
