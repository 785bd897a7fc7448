#include "ops/softmax_curvature/softmax_curvature.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "common/stream.h"

namespace torch_influence {
namespace {

namespace st = torch::stable;
constexpr const char* kName = "softmax_curvature";

// An item of work is as many examples as make kTile elements of p, which stay in the cache for as many tangents as make
// kItem elements. Less than kGrain elements per thread aren't worth waking it.
constexpr int64_t kTile = 2048, kItem = 32768, kGrain = 8192;

// No sum goes beyond a row, so nothing depends on how the work is divided.
void run_cpu(const SoftmaxCurvature& s) {
  const int64_t examples = std::clamp<int64_t>(kTile / s.c, 1, s.n);
  const int64_t tangents = std::clamp<int64_t>(kItem / (examples * s.c), 1, s.k);
  const int64_t groups = (s.k + tangents - 1) / tangents;
  const int64_t grain = std::max<int64_t>(kGrain / (examples * tangents * s.c), 1);
  static const auto block = TORCH_INFLUENCE_SIMD_PICK(softmax_curvature_block);
  st::parallel_for(0, (s.n + examples - 1) / examples * groups, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t example = i / groups * examples, tangent = i % groups * tangents;
      block(s, example, std::min(example + examples, s.n), tangent, std::min(tangent + tangents, s.k));
    }
  });
}

void run(const SoftmaxCurvature& s, [[maybe_unused]] const Tensor& out) {
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (out.is_cuda()) {
    const int32_t device = out.get_device_index();
    const st::accelerator::DeviceGuard guard(device);
    const char* error = softmax_curvature_cuda(s, current_stream(device));
    if (error) throw std::runtime_error(std::string(kName) + ": CUDA: " + error);
    return;
  }
#endif
  run_cpu(s);
}

Tensor adjacent_columns(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : st::contiguous(t);
}

void check_device(const char* argument, const Tensor& tensor, const Tensor& t) {
  if (tensor.is_cuda() != t.is_cuda() || tensor.get_device_index() != t.get_device_index()) {
    fail(kName, argument, "expected the device of t, got another");
  }
}

void check_p(const Tensor& p, const Tensor& t) {
  if (p.dim() != 2 || p.size(0) != t.size(1) || p.size(1) != t.size(2)) {
    fail(kName, "p", "expected shape [", t.size(1), ", ", t.size(2), "], got ", shape_text(p));
  }
  if (p.scalar_type() != t.scalar_type()) fail(kName, "p", "expected the dtype of t, got another");
  check_device("p", p, t);
}

void check_weights(const Tensor& weights, const Tensor& t) {
  using torch::headeronly::ScalarType;
  if (weights.dim() != 1 || weights.size(0) != t.size(1)) {
    fail(kName, "weights", "expected shape [", t.size(1), "], got ", shape_text(weights));
  }
  const bool is_double = t.scalar_type() == ScalarType::Double;
  if (weights.scalar_type() != (is_double ? ScalarType::Double : ScalarType::Float)) {
    fail(kName, "weights", "expected dtype ", is_double ? "float64" : "float32", ", got another");
  }
  check_device("weights", weights, t);
}

void softmax_curvature(const Tensor& p, const Tensor& t, const std::optional<Tensor>& weights, Tensor out) {
  check_dim(kName, "t", t, 3);
  const DType dtype = floating_dtype(kName, "t", t);
  check_p(p, t);
  check_like(kName, "out", out, "t", t);
  if (weights) check_weights(*weights, t);

  const int64_t k = t.size(0), n = t.size(1), c = t.size(2);
  if (k == 0 || n == 0 || c == 0) return;
  const Tensor p_rows = adjacent_columns(p), t_rows = adjacent_columns(t), out_rows = adjacent_columns(out);
  const std::optional<Tensor> weights_row = weights ? std::optional(st::contiguous(*weights)) : std::nullopt;
  run({p_rows.const_data_ptr(), t_rows.const_data_ptr(), weights_row ? weights_row->const_data_ptr() : nullptr,
       out_rows.mutable_data_ptr(), p_rows.stride(0), t_rows.stride(1), out_rows.stride(1), t_rows.stride(0),
       out_rows.stride(0), k, n, c, dtype},
      out);
  if (out_rows.mutable_data_ptr() != out.mutable_data_ptr()) st::copy_(out, out_rows);
}

}  // namespace
}  // namespace torch_influence

STABLE_TORCH_LIBRARY_FRAGMENT(torch_influence, m) {
  m.def("softmax_curvature(Tensor p, Tensor t, Tensor? weights, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CPU, m) {
  m.impl("softmax_curvature", TORCH_BOX(&torch_influence::softmax_curvature));
}
#if defined(TORCH_INFLUENCE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CUDA, m) {
  m.impl("softmax_curvature", TORCH_BOX(&torch_influence::softmax_curvature));
}
#endif
