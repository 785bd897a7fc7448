// Tensors as the kernels take them: in rows, whose elements are adjacent in memory and which are a stride apart.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch_influence {

using torch::stable::Tensor;

// Long rows are cut into blocks of this many columns, so that one row keeps all threads busy; 64 KiB of float32, enough to
// make handing out a block cheap.
constexpr int64_t kRowBlock = 16384;

// Counts the blocks of a row of d columns.
inline int64_t row_blocks(int64_t d) { return (d + kRowBlock - 1) / kRowBlock; }

// Returns t if the elements along its last dimension are adjacent, else a copy where they are.
inline Tensor adjacent_columns(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

// Copies `used`, which adjacent_columns() or contiguous() made of `given`, back to `given`, unless they share their memory.
// `given` is passed by value, a reference to the same tensor, since the stable copy_() wants a Tensor&.
inline void write_back(Tensor given, const Tensor& used) {
  if (used.mutable_data_ptr() != given.mutable_data_ptr()) torch::stable::copy_(given, used);
}

// Returns a view of entries [start, start + length) along a dimension, or t itself where these are all. `t` is passed by
// value, a reference to the same tensor, since the stable narrow() wants a Tensor&, though it changes nothing.
inline Tensor part(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return start == 0 && length == t.size(dim) ? t : torch::stable::narrow(t, dim, start, length);
}

}  // namespace torch_influence
