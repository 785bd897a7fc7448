#include "ops/lissa_step/lissa_step.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/check.h"
#include "common/stream.h"

namespace torch_influence {
namespace {

namespace st = torch::stable;
constexpr const char* kName = "lissa_step";

// Every row is cut into blocks of this many columns, so that one long row keeps all threads busy; 64 KiB of float32, enough
// to make handing out a block cheap.
constexpr int64_t kBlock = 16384;

// Order of summation: lanes within a block are fixed by the SIMD level, blocks are added from left to right; neither depends
// on the number of threads.
void run_cpu(const LissaStep& p, double* norms) {
  const int64_t blocks = (p.d + kBlock - 1) / kBlock;
  std::vector<double> partials(p.k * blocks);
  static const auto step = TORCH_INFLUENCE_SIMD_PICK(lissa_step_block);
  st::parallel_for(0, p.k * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * kBlock;
      partials[i] = step(p, i / blocks, begin, std::min(begin + kBlock, p.d));
    }
  });
  for (int64_t row = 0; row < p.k; ++row) {
    norms[row] = std::accumulate(&partials[row * blocks], &partials[row * blocks] + blocks, 0.0);
  }
}

void run(const LissaStep& p, const Tensor& norms) {
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (norms.is_cuda()) {
    const int32_t device = norms.get_device_index();
    const st::accelerator::DeviceGuard guard(device);
    const Tensor partials = st::new_empty(norms, {p.k * lissa_step_cuda_blocks(p.dtype, p.d)});
    const char* error = lissa_step_cuda(p, static_cast<double*>(partials.mutable_data_ptr()),
                                        static_cast<double*>(norms.mutable_data_ptr()), current_stream(device));
    if (error) throw std::runtime_error(std::string(kName) + ": CUDA: " + error);
    return;
  }
#endif
  run_cpu(p, static_cast<double*>(norms.mutable_data_ptr()));
}

Tensor adjacent_columns(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : st::contiguous(t); }

Tensor lissa_step(Tensor h, const Tensor& v, const Tensor& hvp, double damp, double scale) {
  check_dim(kName, "h", h, 2);
  const DType dtype = floating_dtype(kName, "h", h);
  check_like(kName, "v", v, "h", h);
  check_like(kName, "hvp", hvp, "h", h);

  const int64_t k = h.size(0), d = h.size(1);
  if (k == 0 || d == 0) return st::new_zeros(h, {k}, torch::headeronly::ScalarType::Double);
  const Tensor norms = st::new_empty(h, {k}, torch::headeronly::ScalarType::Double);
  const Tensor h_rows = adjacent_columns(h), v_rows = adjacent_columns(v), hvp_rows = adjacent_columns(hvp);
  run({h_rows.mutable_data_ptr(), v_rows.const_data_ptr(), hvp_rows.const_data_ptr(), h_rows.stride(0), v_rows.stride(0),
       hvp_rows.stride(0), k, d, dtype, damp, 1 / scale},
      norms);
  if (h_rows.mutable_data_ptr() != h.mutable_data_ptr()) st::copy_(h, h_rows);
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
