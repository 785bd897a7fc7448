#include "ops/linear_curvature_product/linear_curvature_product.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/aten.h"
#include "common/check.h"
#include "common/rows.h"
#include "common/stream.h"
#include "ops/softmax_curvature/softmax_curvature.h"

namespace torch_influence {
namespace {

namespace st = torch::stable;
constexpr const char* kName = "linear_curvature_product";

// ---- few columns, on the CPU: loops of our own ----

// Up to here they are faster than BLAS, whose products of a tall matrix with so few columns wait for memory twice.
constexpr int64_t kFewColumns = 48;
// Examples are cut into slabs, each with sums of its own that are added from left to right: the result does not depend on
// the number of threads, and sums over many examples lose less. So much memory for the sums at most.
constexpr int64_t kMostSlabs = 64, kTilesPerSlab = 8, kMostSumBytes = 32 << 20;

int64_t slabs_of(const LinearCurvatureProduct& s) {
  const int64_t fit = kMostSumBytes / (s.k * s.row_length() * element_size(s.dtype));
  const int64_t rows = linear_curvature_tile(s) * kTilesPerSlab;
  return std::min({kMostSlabs, (s.n + rows - 1) / rows, fit});
}

template <class W>
void run_slabs(const LinearCurvatureProduct& s, int64_t slabs) {
  const int64_t d = s.row_length(), size = s.k * d;
  static const auto slab = TORCH_INFLUENCE_SIMD_PICK(linear_curvature_slab);
  std::vector<W> sums(slabs * size);
  st::parallel_for(0, slabs, 1, [&](int64_t first, int64_t last) {
    std::vector<W> scratch(linear_curvature_scratch(s));
    for (int64_t i = first; i < last; ++i) {
      slab(s, s.n * i / slabs, s.n * (i + 1) / slabs, sums.data() + i * size, scratch.data());
    }
  });
  st::parallel_for(0, size, 8192, [&](int64_t first, int64_t last) {
    for (int64_t i = 1; i < slabs; ++i) {
      for (int64_t j = first; j < last; ++j) sums[j] += sums[i * size + j];
    }
  });
  for (int64_t row = 0; row < s.k; ++row) {
    std::memcpy(static_cast<W*>(s.out) + row * s.out_stride, sums.data() + row * d, d * sizeof(W));
  }
}

// ---- many columns, and CUDA: tiles of examples, multiplied by BLAS ----

// Scratch of a tile in bytes. A tile that stays in a GPU's second-level cache is read by its second product from there.
constexpr int64_t kTileBytes = 24 << 20;
constexpr int64_t kLeastTile = 256;  // examples: below, BLAS is slower per example
// Columns of the vectors that are multiplied at a time: enough for BLAS, and few enough that what they are copied to, and
// their products, stay small. Fresh memory costs more than all that is done with it.
constexpr int64_t kColumnsAtOnce = 1024;

// t <- B t for `rows` examples from `first` on, B by their probabilities.
void apply_softmax(const LinearCurvatureProduct& s, const Tensor& t, int64_t first, int64_t rows) {
  const int64_t m = s.columns();
  void* elements = t.mutable_data_ptr();
  const SoftmaxCurvature p{
      .p = element_at(s.curvature, first * s.curvature_stride, s.dtype),
      .t = elements,
      .weights = s.weights ? element_at(s.weights, first, s.dtype) : nullptr,
      .out = elements,
      .p_stride = s.curvature_stride,
      .t_stride = m,
      .out_stride = m,
      .t_tangent_stride = s.c,
      .out_tangent_stride = s.c,
      .k = s.k,
      .n = rows,
      .c = s.c,
      .dtype = s.dtype,
  };
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (on_gpu(t)) return launch_on_device_of(kName, t, [&](void* stream) { return softmax_curvature_cuda(p, stream); });
#endif
  static const auto block = TORCH_INFLUENCE_SIMD_PICK(softmax_curvature_block);
  st::parallel_for(0, rows, std::max<int64_t>(32768 / m, 1),
                   [&](int64_t begin, int64_t end) { block(p, begin, end, 0, s.k); });
}

// [k, row_length] -> its weights [m, f], without gaps.
Tensor weights_of(const LinearCurvatureProduct& s, const Tensor& v) {
  return st::view(st::contiguous(part(v, 1, 0, s.c * s.f)), {s.columns(), s.f});
}

void run_tiles(const LinearCurvatureProduct& s, const Tensor& x, const Tensor& v, const Tensor& curvature,
               const Tensor& out) {
  const int64_t m = s.columns();
  const int64_t per_example = (m * (s.blocks ? 2 : 1) + (s.x_dtype == s.dtype ? 0 : s.f)) * element_size(s.dtype);
  const int64_t most = std::min(std::max(kTileBytes / per_example, kLeastTile), s.n);
  const int64_t weights = s.c * s.f, biases = s.bias ? s.c : 0;
  const Tensor columns = weights_of(s, v);
  std::optional<Tensor> bias;
  if (s.bias) bias = st::view(st::contiguous(part(v, 1, weights, biases)), {m});
  const Tensor product = st::new_empty(v, {m, s.f}), bias_sums = st::new_empty(v, {1, m});
  const Tensor all_t = st::new_empty(v, {most, m}), all_s = s.blocks ? st::new_empty(v, {most, m}) : all_t;
  Tensor ones = st::new_empty(v, {1, most});
  if (s.bias) st::fill_(ones, 1.0);
  // Columns [column, column + count) of out become, or grow by, what a tile gives.
  auto put = [&](const Tensor& sums_of_tile, int64_t column, int64_t count, bool first_tile) {
    Tensor to = part(out, 1, column, count);
    const Tensor from = st::view(sums_of_tile, {s.k, count});
    if (first_tile) {
      st::copy_(to, from);
    } else {
      add_rows(kName, to, from);
    }
  };

  for (int64_t first = 0; first < s.n; first += most) {
    const int64_t rows = std::min(most, s.n - first);
    Tensor x_tile = part(x, 0, first, rows);
    if (s.x_dtype != s.dtype) {
      Tensor widened = st::new_empty(v, {rows, s.f});
      st::copy_(widened, x_tile);
      x_tile = widened;
    }
    const Tensor t = part(all_t, 0, 0, rows), sums = part(all_s, 0, 0, rows);
    linear_out(x_tile, columns, bias, t);
    if (s.blocks) {
      const Tensor blocks = transposed(part(curvature, 0, first, rows), 1, 2);
      call_out("aten::bmm", st::view(t, {rows, s.k, s.c}), blocks, st::view(sums, {rows, s.k, s.c}));
    } else {
      apply_softmax(s, t, first, rows);
    }
    call_out("aten::mm", transposed(sums, 0, 1), x_tile, product);
    put(product, 0, weights, first == 0);
    if (!s.bias) continue;
    call_out("aten::mm", part(ones, 1, 0, rows), sums, bias_sums);
    put(bias_sums, weights, biases, first == 0);
  }
}

void run(const LinearCurvatureProduct& s, const Tensor& x, const Tensor& v, const Tensor& curvature, const Tensor& out) {
  const int64_t slabs = on_gpu(v) || s.columns() > kFewColumns ? 0 : slabs_of(s);
  if (slabs > 0) {
    s.dtype == DType::float64 ? run_slabs<double>(s, slabs) : run_slabs<float>(s, slabs);
    return;
  }
  const int64_t vectors = on_gpu(v) ? s.k : std::max<int64_t>(kColumnsAtOnce / s.c, 1);
  for (int64_t first = 0; first < s.k; first += vectors) {
    LinearCurvatureProduct some = s;
    some.k = std::min(vectors, s.k - first);
    some.v = element_at(s.v, first * s.v_stride, s.dtype);
    some.out = element_at(s.out, first * s.out_stride, s.dtype);
    run_tiles(some, x, part(v, 0, first, some.k), curvature, part(out, 0, first, some.k));
  }
}

// ---- checks ----

void linear_curvature_product(const Tensor& x, const Tensor& v, const Tensor& curvature,
                              const std::optional<Tensor>& weights, bool bias, Tensor out) {
  check_dim(kName, "x", x, 2);
  const DType x_dtype = floating_dtype(kName, "x", x);
  const DType dtype = wide_dtype(x_dtype);
  check_dim(kName, "v", v, 2);
  if (floating_dtype(kName, "v", v) != dtype) fail(kName, "v", "expected float64 if x is, float32 otherwise, got another");
  check_device(kName, "v", v, "x", x);
  const bool blocks = curvature.dim() == 3;
  if (!blocks) check_dim(kName, "curvature", curvature, 2);
  const int64_t n = x.size(0), f = x.size(1), c = curvature.size(1), k = v.size(0);
  if (curvature.size(0) != n || (blocks && curvature.size(2) != c)) {
    fail(kName, "curvature", "expected shape [", n, ", c] or [", n, ", c, c], got ", shape_text(curvature));
  }
  check_beside(kName, "curvature", curvature, "v", v);
  const int64_t d = c * f + (bias ? c : 0);
  if (v.size(1) != d) fail(kName, "v", "expected shape [k, ", d, "], got ", shape_text(v));
  check_like(kName, "out", out, "v", v);
  check_written(kName, "out", out);
  if (weights) {
    if (blocks) fail(kName, "weights", "expected none with blocks, got some");
    check_shape(kName, "weights", *weights, {n});
    check_beside(kName, "weights", *weights, "v", v);
  }

  if (k == 0 || d == 0) return;
  if (n == 0) return (void)st::zero_(out);
  const GpuGuard guard(v);
  const Tensor x_rows = adjacent_columns(x), v_rows = adjacent_columns(v), out_rows = adjacent_columns(out);
  const Tensor curvature_rows = blocks ? packed(curvature) : adjacent_columns(curvature);
  const Tensor weights_row = weights ? packed(*weights) : v;
  const LinearCurvatureProduct product{
      .x = x_rows.const_data_ptr(),
      .v = v_rows.const_data_ptr(),
      .curvature = curvature_rows.const_data_ptr(),
      .weights = weights ? weights_row.const_data_ptr() : nullptr,
      .out = out_rows.mutable_data_ptr(),
      .x_stride = x_rows.stride(0),
      .v_stride = v_rows.stride(0),
      .curvature_stride = curvature_rows.stride(0),
      .out_stride = out_rows.stride(0),
      .n = n,
      .f = f,
      .c = c,
      .k = k,
      .blocks = blocks,
      .bias = bias,
      .x_dtype = x_dtype,
      .dtype = dtype,
  };
  run(product, x_rows, v_rows, curvature_rows, out_rows);
  write_back(out, out_rows);
}

}  // namespace
}  // namespace torch_influence

STABLE_TORCH_LIBRARY_FRAGMENT(torch_influence, m) {
  m.def("linear_curvature_product(Tensor x, Tensor v, Tensor curvature, Tensor? weights, bool bias, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CPU, m) {
  m.impl("linear_curvature_product", TORCH_BOX(&torch_influence::linear_curvature_product));
}
#if defined(TORCH_INFLUENCE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CUDA, m) {
  m.impl("linear_curvature_product", TORCH_BOX(&torch_influence::linear_curvature_product));
}
#endif
