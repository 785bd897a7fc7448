// Calls of torch's own operators through the dispatcher, for the products that BLAS does best. From the thread that called
// the op only: autograd's modes do not reach the workers of parallel_for.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace torch_influence {

// out = a b, by the named product of two matrices or of two stacks of them.
inline void product_out(const char* op, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                        const torch::stable::Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // takes the returned reference over
}

inline void mm_out(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const torch::stable::Tensor& out) {
  product_out("aten::mm", a, b, out);
}

inline void bmm_out(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const torch::stable::Tensor& out) {
  product_out("aten::bmm", a, b, out);
}

}  // namespace torch_influence
