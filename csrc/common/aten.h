// Calls of torch's own operators through the dispatcher, for the products of matrices that BLAS does best. From the thread
// that called the op only: autograd's modes do not reach the workers of parallel_for.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

namespace torch_influence {

// out = op(a, b), for an operator that has a variant with this signature: "aten::mm", "aten::bmm", "aten::mul".
inline void call_out(const char* op, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                     const torch::stable::Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // takes the returned reference over
}

// out = x weight^T + bias, with a bias that may be missing: torch adds it within the product where BLAS can.
inline void linear_out(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                       const std::optional<torch::stable::Tensor>& bias, const torch::stable::Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace torch_influence
