// Tensors as the kernels take them: in rows, whose elements are adjacent in memory and which are a stride apart.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/add_rows.h"
#include "common/stream.h"

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

// to += from, for two matrices of float32 or of float64 whose columns are adjacent. (Torch's own sum takes a Scalar, which its
// stable interface can't pass.) Errors of a launch are thrown in the name of `op`.
inline void add_rows([[maybe_unused]] const char* op, const Tensor& to, const Tensor& from) {
  const bool is_double = to.scalar_type() == torch::headeronly::ScalarType::Double;
  AddRows s{to.mutable_data_ptr(),
            from.const_data_ptr(),
            to.stride(0),
            from.stride(0),
            to.size(0),
            to.size(1),
            is_double ? DType::float64 : DType::float32};
  if (s.rows == 0 || s.columns == 0) return;
  if (s.to_stride == s.columns && s.from_stride == s.columns) {  // one long row
    s.columns *= s.rows;
    s.rows = 1;
  }
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (on_gpu(to)) return launch_on_device_of(op, to, [&](void* stream) { return add_rows_cuda(s, stream); });
#endif
  const int64_t blocks = row_blocks(s.columns);
  auto add = [&](auto element) {
    using W = decltype(element);
    torch::stable::parallel_for(0, s.rows * blocks, kRowBlock / s.columns + 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % blocks * kRowBlock, end = std::min(begin + kRowBlock, s.columns);
        W* sums = static_cast<W*>(s.to) + i / blocks * s.to_stride;
        const W* terms = static_cast<const W*>(s.from) + i / blocks * s.from_stride;
        for (int64_t j = begin; j < end; ++j) sums[j] += terms[j];
      }
    });
  };
  is_double ? add(double()) : add(float());
}

}  // namespace torch_influence
