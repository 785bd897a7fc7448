// Tensors as the kernels take them: in rows, whose elements are adjacent in memory and which are a stride apart.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <utility>

#include "common/add_rows.h"
#include "common/element.h"
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

// Returns t if it is contiguous, else a copy that is.
inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// What follows does the work of new_empty(), narrow() and transpose() at a fraction of the cost: these go through the
// dispatcher, which takes as long as all that a small op has to do.

// Returns memory for so many numbers, float64 or float32, on the device of `beside`.
inline Tensor empty_beside(const Tensor& beside, DType dtype, int64_t elements) {
  const int32_t type = dtype == DType::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside.get(), &device_index));
  const int64_t stride = 1;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &elements, &stride, type, device_type, device_index, &made));
  return Tensor(made);
}

// Returns a view of the memory of t from its element `offset` on. Nothing checks that the view stays inside.
inline Tensor view_of(const Tensor& t, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), dim, sizes, strides, offset, &made));
  return Tensor(made);
}

constexpr size_t kMostDims = 3;  // of the tensors that the two below take

// Returns a view of entries [start, start + length) along a dimension, or t itself where these are all.
inline Tensor part(const Tensor& t, int64_t dim, int64_t start, int64_t length) {
  if (start == 0 && length == t.size(dim)) return t;
  std::array<int64_t, kMostDims> sizes{};
  const auto old = t.sizes(), strides = t.strides();
  std::copy(old.begin(), old.end(), sizes.begin());
  sizes[dim] = length;
  return view_of(t, old.size(), sizes.data(), strides.data(), start * strides[dim]);
}

// Returns a view in which two dimensions have changed places.
inline Tensor transposed(const Tensor& t, int64_t one, int64_t other) {
  std::array<int64_t, kMostDims> sizes{}, strides{};
  const auto old_sizes = t.sizes(), old_strides = t.strides();
  std::copy(old_sizes.begin(), old_sizes.end(), sizes.begin());
  std::copy(old_strides.begin(), old_strides.end(), strides.begin());
  std::swap(sizes[one], sizes[other]);
  std::swap(strides[one], strides[other]);
  return view_of(t, old_sizes.size(), sizes.data(), strides.data(), 0);
}

// Copies `used`, which adjacent_columns() or contiguous() made of `given`, back to `given`, unless they share their memory.
// `given` is passed by value, a reference to the same tensor, since the stable copy_() wants a Tensor&.
inline void write_back(Tensor given, const Tensor& used) {
  if (used.mutable_data_ptr() != given.mutable_data_ptr()) torch::stable::copy_(given, used);
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
