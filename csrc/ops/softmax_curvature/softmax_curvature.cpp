#include "ops/softmax_curvature/softmax_curvature.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "common/rows.h"
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
  if (on_gpu(out)) {
    return launch_on_device_of(kName, out, [&](void* stream) { return softmax_curvature_cuda(s, stream); });
  }
#endif
  run_cpu(s);
}

void softmax_curvature(const Tensor& p, const Tensor& t, const std::optional<Tensor>& weights, Tensor out) {
  check_dim(kName, "t", t, 3);
  const DType dtype = floating_dtype(kName, "t", t);
  const int64_t k = t.size(0), n = t.size(1), c = t.size(2);
  check_shape(kName, "p", p, {n, c});
  check_beside(kName, "p", p, "t", t);
  check_like(kName, "out", out, "t", t);
  check_written(kName, "out", out);
  if (weights) {
    check_shape(kName, "weights", *weights, {n});
    check_wide(kName, "weights", *weights, "t", t);
  }

  if (k == 0 || n == 0 || c == 0) return;
  const Tensor p_rows = adjacent_columns(p), t_rows = adjacent_columns(t), out_rows = adjacent_columns(out);
  const Tensor weights_row = weights ? packed(*weights) : p;
  const SoftmaxCurvature curvature{
      .p = p_rows.const_data_ptr(),
      .t = t_rows.const_data_ptr(),
      .weights = weights ? weights_row.const_data_ptr() : nullptr,
      .out = out_rows.mutable_data_ptr(),
      .p_stride = p_rows.stride(0),
      .t_stride = t_rows.stride(1),
      .out_stride = out_rows.stride(1),
      .t_tangent_stride = t_rows.stride(0),
      .out_tangent_stride = out_rows.stride(0),
      .k = k,
      .n = n,
      .c = c,
      .dtype = dtype,
  };
  run(curvature, out);
  write_back(out, out_rows);
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
