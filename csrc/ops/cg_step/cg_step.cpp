#include "ops/cg_step/cg_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/rows.h"
#include "common/stream.h"

namespace torch_influence {
namespace {

namespace st = torch::stable;
constexpr const char* kName = "cg_step";

// Rows up to this length are handed out whole, a row to a thread, in whose own cache it stays from phase to phase.
constexpr int64_t kShortRow = 2 * kRowBlock;

// Calls f(block, begin, end) for every block of a row of d columns, in parallel unless the calling thread is at work for a
// parallel_for already. A thread gets the same blocks every time.
template <class F>
void for_blocks(int64_t d, F f) {
  st::parallel_for(0, row_blocks(d), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i * kRowBlock, std::min((i + 1) * kRowBlock, d));
  });
}

// One row through all phases of the call, each in parallel over its blocks: alpha must be known before r can change, and
// beta before p can. Blocks' sums are added from left to right, whatever the number of threads. `partials` has an entry for
// every block.
template <class W>
void run_row(const CgStep& s, int64_t row, CgDots* partials) {
  static const auto dots_block = TORCH_INFLUENCE_SIMD_PICK(cg_dots_block);
  static const auto residual_block = TORCH_INFLUENCE_SIMD_PICK(cg_residual_block);
  static const auto rho_block = TORCH_INFLUENCE_SIMD_PICK(cg_rho_block);
  static const auto iterate_block = TORCH_INFLUENCE_SIMD_PICK(cg_iterate_block);
  static const auto iterate_and_direction_block = TORCH_INFLUENCE_SIMD_PICK(cg_iterate_and_direction_block);
  static const auto direction_block = TORCH_INFLUENCE_SIMD_PICK(cg_direction_block);
  if (cg_scalar(s, kActive, row) == 0) return;
  const int64_t blocks = row_blocks(s.d);
  const double rho_before = cg_scalar(s, kRho, row);
  auto total = [&] {
    CgDots sum{0, 0, 0};
    for (int64_t i = 0; i < blocks; ++i) {
      sum.pq += partials[i].pq;
      sum.pp += partials[i].pp;
      sum.qq += partials[i].qq;
    }
    return sum;
  };

  if (s.call == CgCall::turn) {
    for_blocks(s.d, [&](int64_t i, int64_t begin, int64_t end) { partials[i] = {rho_block(s, row, begin, end), 0, 0}; });
    const double rho = total().pq, beta = cg_beta<W>(rho, rho_before);
    cg_scalar(s, kRho, row) = rho;
    for_blocks(s.d, [&](int64_t, int64_t begin, int64_t end) { direction_block(s, row, begin, end, beta); });
    return;
  }

  for_blocks(s.d, [&](int64_t i, int64_t begin, int64_t end) { partials[i] = dots_block(s, row, begin, end); });
  const CgDots dots = total();
  bool works;
  const double alpha = cg_alpha<W>(rho_before, dots, &works);
  cg_record_dots(s, row, dots, alpha, works);
  if (!works) return cg_record_residual(s, row, false, 0, false);
  for_blocks(s.d, [&](int64_t i, int64_t begin, int64_t end) {
    partials[i] = {residual_block(s, row, begin, end, alpha), 0, 0};
    if (s.call == CgCall::move) iterate_block(s, row, begin, end, alpha);
  });
  const double residual = total().pq;
  const bool done = cg_done(residual, cg_scalar(s, kTolerance, row));
  cg_record_residual(s, row, true, residual, done);
  if (s.call == CgCall::move) return;
  const double beta = cg_beta<W>(residual, rho_before);
  for_blocks(s.d, [&](int64_t, int64_t begin, int64_t end) {
    if (done)
      iterate_block(s, row, begin, end, alpha);
    else
      iterate_and_direction_block(s, row, begin, end, alpha, beta);
  });
}

void run_cpu(const CgStep& s) {
  const int64_t blocks = row_blocks(s.d);
  std::vector<CgDots> partials(s.k * blocks);
  // Long rows come one after the other, so that the phases of one find in the shared cache what fits there.
  const int64_t rows_at_once = s.d > kShortRow ? s.k : std::max<int64_t>(kRowBlock / std::max<int64_t>(s.d, 1), 1);
  with_element_type(s.dtype, [&](auto element) {
    st::parallel_for(0, s.k, rows_at_once, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) run_row<Wide<decltype(element)>>(s, row, partials.data() + row * blocks);
    });
  });
}

void run(const CgStep& s, [[maybe_unused]] const Tensor& scalars) {
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (on_gpu(scalars)) {
    return launch_on_device_of(kName, scalars, [&](void* stream) {
      const Tensor scratch = st::new_empty(scalars, {cg_step_cuda_scratch(s.dtype, s.k, s.d)});
      return cg_step_cuda(s, static_cast<double*>(scratch.mutable_data_ptr()), stream);
    });
  }
#endif
  run_cpu(s);
}

void cg_step(Tensor x, Tensor r, Tensor p, Tensor scalars, const std::optional<Tensor>& q, const std::optional<Tensor>& z,
             bool preconditioned) {
  check_dim(kName, "x", x, 2);
  const DType dtype = floating_dtype(kName, "x", x);
  check_like(kName, "r", r, "x", x);
  check_like(kName, "p", p, "x", x);
  const int64_t k = x.size(0), d = x.size(1);
  check_dim(kName, "scalars", scalars, 2);
  check_shape(kName, "scalars", scalars, {kCgScalars, k});
  if (floating_dtype(kName, "scalars", scalars) != DType::float64) fail(kName, "scalars", "expected float64, got another");
  check_device(kName, "scalars", scalars, "x", x);
  if (q.has_value() == z.has_value()) fail(kName, "q, z", "expected one of them, got ", q ? "both" : "none");
  if (z && !preconditioned) fail(kName, "z", "expected none without a preconditioner, got one");
  if (q) check_like(kName, "q", *q, "x", x);
  if (z) check_like(kName, "z", *z, "x", x);
  check_written(kName, "x", x);
  check_written(kName, "r", r);
  check_written(kName, "p", p);
  check_written(kName, "scalars", scalars);
  if (k == 0) return;

  const CgCall call = z ? CgCall::turn : preconditioned ? CgCall::move : CgCall::whole;
  const Tensor x_rows = adjacent_columns(x), r_rows = adjacent_columns(r), p_rows = adjacent_columns(p);
  const Tensor given = adjacent_columns(z ? *z : *q), all_scalars = packed(scalars);
  const CgStep step{
      .call = call,
      .dtype = dtype,
      .x = x_rows.mutable_data_ptr(),
      .r = r_rows.mutable_data_ptr(),
      .p = p_rows.mutable_data_ptr(),
      .given = given.const_data_ptr(),
      .x_stride = x_rows.stride(0),
      .r_stride = r_rows.stride(0),
      .p_stride = p_rows.stride(0),
      .given_stride = given.stride(0),
      .scalars = static_cast<double*>(all_scalars.mutable_data_ptr()),
      .k = k,
      .d = d,
  };
  run(step, all_scalars);
  write_back(x, x_rows);
  write_back(r, r_rows);
  write_back(p, p_rows);
  write_back(scalars, all_scalars);
}

}  // namespace
}  // namespace torch_influence

STABLE_TORCH_LIBRARY_FRAGMENT(torch_influence, m) {
  m.def(
      "cg_step(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) scalars, Tensor? q=None, Tensor? z=None, "
      "bool preconditioned=False) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CPU, m) { m.impl("cg_step", TORCH_BOX(&torch_influence::cg_step)); }
#if defined(TORCH_INFLUENCE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CUDA, m) { m.impl("cg_step", TORCH_BOX(&torch_influence::cg_step)); }
#endif
