#include "ops/lissa_step/lissa_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/check.h"
#include "common/rows.h"
#include "common/stream.h"

namespace torch_influence {
namespace {

namespace st = torch::stable;
constexpr const char* kName = "lissa_step";

// Order of summation: lanes within a block are fixed by the SIMD level, blocks are added from left to right; neither depends
// on the number of threads.
void run_cpu(const LissaStep& p, double* norms) {
  const int64_t blocks = row_blocks(p.d);
  std::vector<double> partials(p.k * blocks);
  static const auto step = TORCH_INFLUENCE_SIMD_PICK(lissa_step_block);
  const int64_t grain = std::max<int64_t>(kRowBlock / p.d, 1);  // as many short rows as make a block
  st::parallel_for(0, p.k * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * kRowBlock;
      partials[i] = step(p, i / blocks, begin, std::min(begin + kRowBlock, p.d));
    }
  });
  for (int64_t row = 0; row < p.k; ++row) {
    norms[row] = std::accumulate(&partials[row * blocks], &partials[row * blocks] + blocks, 0.0);
  }
}

void run(const LissaStep& p, const Tensor& norms) {
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (on_gpu(norms)) {
    return launch_on_device_of(kName, norms, [&](void* stream) {
      const Tensor partials = st::new_empty(norms, {p.k * lissa_step_cuda_blocks(p.dtype, p.d)});
      return lissa_step_cuda(p, static_cast<double*>(partials.mutable_data_ptr()),
                             static_cast<double*>(norms.mutable_data_ptr()), stream);
    });
  }
#endif
  run_cpu(p, static_cast<double*>(norms.mutable_data_ptr()));
}

Tensor lissa_step(Tensor h, const Tensor& v, const Tensor& hvp, double damp, double scale) {
  check_dim(kName, "h", h, 2);
  const DType dtype = floating_dtype(kName, "h", h);
  check_written(kName, "h", h);
  check_like(kName, "v", v, "h", h);
  check_like(kName, "hvp", hvp, "h", h);
  check_finite(kName, "damp", damp);
  check_finite(kName, "scale", scale);
  if (scale == 0) fail(kName, "scale", "expected a nonzero number, got 0");

  const int64_t k = h.size(0), d = h.size(1);
  if (k == 0 || d == 0) return st::new_zeros(h, {k}, torch::headeronly::ScalarType::Double);
  const Tensor norms = empty_beside(h, DType::float64, k);
  const Tensor h_rows = adjacent_columns(h), v_rows = adjacent_columns(v), hvp_rows = adjacent_columns(hvp);
  const LissaStep step{
      .h = h_rows.mutable_data_ptr(),
      .v = v_rows.const_data_ptr(),
      .hvp = hvp_rows.const_data_ptr(),
      .h_stride = h_rows.stride(0),
      .v_stride = v_rows.stride(0),
      .hvp_stride = hvp_rows.stride(0),
      .k = k,
      .d = d,
      .dtype = dtype,
      .damp = damp,
      .inverse_scale = 1 / scale,
  };
  run(step, norms);
  write_back(h, h_rows);
  return norms;
}

}  // namespace
}  // namespace torch_influence

STABLE_TORCH_LIBRARY_FRAGMENT(torch_influence, m) {
  m.def("lissa_step(Tensor(a!) h, Tensor v, Tensor hvp, float damp, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CPU, m) { m.impl("lissa_step", TORCH_BOX(&torch_influence::lissa_step)); }
#if defined(TORCH_INFLUENCE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CUDA, m) { m.impl("lissa_step", TORCH_BOX(&torch_influence::lissa_step)); }
#endif
