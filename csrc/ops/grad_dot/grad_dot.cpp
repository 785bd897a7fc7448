#include "ops/grad_dot/grad_dot.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>

#include "common/aten.h"
#include "common/check.h"
#include "common/rows.h"
#include "common/stream.h"

namespace torch_influence {
namespace {

namespace st = torch::stable;
constexpr const char* kName = "grad_dot";

// Scratch in elements: at most kProducts + 2 * kCopies in one order of contraction; in the other kGradients + kProducts, and
// kCopies more where 16-bit numbers are widened. That is 48 MiB in float64, as long as no row of o or of f elements is more.
constexpr int64_t kProducts = int64_t(1) << 21, kCopies = int64_t(1) << 21, kGradients = int64_t(1) << 22;

struct GradDot {
  Tensor a, g, v, out;  // [n, s, f], [n, s, o], [k, o * f (+ o)], [n, k]; elements of a row adjacent
  int64_t n, s, f, o, k;
  DType dtype;       // of a and g
  DType wide_dtype;  // of v and out: what the arithmetic is done in
  bool bias;

  bool wide() const { return dtype == wide_dtype; }

  const void* a_at(int64_t example, int64_t position) const {
    return element_at(a.const_data_ptr(), example * a.stride(0) + position * a.stride(1), dtype);
  }
  const void* g_at(int64_t example, int64_t position) const {
    return element_at(g.const_data_ptr(), example * g.stride(0) + position * g.stride(1), dtype);
  }
  const void* v_at(int64_t vector, int64_t column) const {
    return element_at(v.const_data_ptr(), vector * v.stride(0) + column, wide_dtype);
  }
  void* out_at(int64_t example, int64_t vector) const {
    return element_at(out.mutable_data_ptr(), example * out.stride(0) + vector, wide_dtype);
  }
};

// ---- tensors ----

// Memory for so many elements of the type of the arithmetic; where there are none, any tensor.
Tensor scratch_for(const GradDot& x, int64_t elements) {
  return elements ? empty_beside(x.out, x.wide_dtype, elements) : x.out;
}

// The beginning of a scratch tensor, in a shape: without gaps.
template <size_t dim>
Tensor shaped(const Tensor& scratch, const std::array<int64_t, dim>& shape) {
  std::array<int64_t, dim> strides;
  strides[dim - 1] = 1;
  for (size_t i = dim - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  return view_of(scratch, dim, shape.data(), strides.data(), 0);
}

// Examples [example, example + examples) and positions of a or g. Without scratch a view; else a copy there, without gaps and
// in the type of the arithmetic.
Tensor tile_of(const Tensor& t, int64_t example, int64_t examples, int64_t position, int64_t positions,
               const Tensor* scratch) {
  const Tensor tile = part(part(t, 0, example, examples), 1, position, positions);
  if (!scratch) return tile;
  Tensor copy = shaped<3>(*scratch, {examples, positions, t.size(2)});
  st::copy_(copy, tile);
  return copy;
}

// Calls f(first example, examples, first position, positions) for tiles of whole examples, or of parts of one.
template <class F>
void for_tiles(const GradDot& x, int64_t examples, int64_t positions, F f) {
  for (int64_t i = 0; i < x.n; i += examples) {
    for (int64_t t = 0; t < x.s; t += positions) {
      f(i, std::min(examples, x.n - i), t, std::min(positions, x.s - t));
    }
  }
}

// ---- kernels ----

// On the CPU an element of out is summed by one thread, so its order doesn't depend on how the work is divided.
void add_sums(const GradDotSums& s, [[maybe_unused]] const Tensor& out) {
#if defined(TORCH_INFLUENCE_WITH_CUDA)
  if (on_gpu(out)) {
    return launch_on_device_of(kName, out, [&](void* stream) {
      const int64_t count = grad_dot_cuda_parts(s);
      const Tensor parts = count ? st::new_empty(out, {count}) : out;
      return grad_dot_sums_cuda(s, parts.mutable_data_ptr(), stream);
    });
  }
#endif
  constexpr int64_t kGrain = 16384;  // elements of U that are worth waking a thread for
  static const auto block = TORCH_INFLUENCE_SIMD_PICK(grad_dot_sums);
  st::parallel_for(0, s.examples * s.k, kGrain / (s.positions * s.o) + 1,
                   [&](int64_t first, int64_t last) { block(s, first, last); });
}

void few_products(const GradDotProducts& s, int64_t rows) {
  constexpr int64_t kRows = 64, kGrain = 65536;  // rows of an item of work; multiplications worth waking a thread for
  static const auto block = TORCH_INFLUENCE_SIMD_PICK(grad_dot_products);
  st::parallel_for(0, (rows + kRows - 1) / kRows, kGrain / (kRows * s.k * s.o * (s.f + 1)) + 1,
                   [&](int64_t first, int64_t last) { block(s, first * kRows, std::min(last * kRows, rows)); });
}

// ---- order 1: vectors meet inputs, and the products U = V_j a meet g ----

constexpr int64_t kFewColumns = 16;  // of U: up to here our own kernel is faster than BLAS, at f = 784 up to 24
// And so many multiplications at any number of columns, since BLAS is slow to call. A short dot product costs as much as one
// of kLeastProduct elements.
constexpr int64_t kFewMultiplications = 32768, kLeastProduct = 16;
constexpr int64_t kColumns = 2048, kRows = 512;  // of U, for BLAS: rows and columns beyond that gain nothing more

// Tells whether our own kernel makes U faster than BLAS does.
bool few_products_do(const GradDot& x) {
  const double multiplications = double(x.n) * x.s * x.k * x.o * std::max(x.f, kLeastProduct);
  return !on_gpu(x.out) && (x.k * x.o <= kFewColumns || multiplications <= kFewMultiplications);
}

// Vectors [first, first + count) as [f, count * o]: a view, or a copy in `scratch` where they have gaps in between.
Tensor vectors(const GradDot& x, int64_t first, int64_t count, const Tensor* scratch) {
  Tensor matrix = part(part(x.v, 0, first, count), 1, 0, x.o * x.f);
  if (scratch) {
    Tensor copy = shaped<2>(*scratch, {count, x.o * x.f});
    st::copy_(copy, matrix);
    matrix = copy;
  }
  return transposed(st::view(matrix, {count * x.o, x.f}), 0, 1);
}

void vectors_first(const GradDot& x) {
  const bool few = few_products_do(x);
  const bool rows_apart = x.n > 1 && x.s > 1 && x.a.stride(0) != x.s * x.a.stride(1);
  const bool copy_a = !few && (!x.wide() || rows_apart);
  const bool copy_v = !few && x.k > 1 && x.v.stride(0) != x.o * x.f;
  auto fitting = [](int64_t elements, int64_t each, int64_t most) {
    return std::clamp<int64_t>(elements / std::max<int64_t>(each, 1), 1, most);
  };

  int64_t count = few ? x.k : fitting(kColumns, x.o, x.k);
  if (copy_v) count = fitting(kCopies, x.o * x.f, count);
  int64_t rows = fitting(kProducts, count * x.o, few ? kProducts : kRows);
  if (copy_a) rows = fitting(kCopies, x.f, rows);
  rows = std::min(rows, x.n * x.s);
  const int64_t examples = std::max<int64_t>(rows / x.s, 1), positions = std::min(rows, x.s);

  // A small U lies on the stack: where all is small, fresh memory takes as long as the work.
  constexpr int64_t kOnStack = 512;
  alignas(64) double on_stack[kOnStack];
  const int64_t elements = examples * positions * count * x.o;
  const bool on_heap = !few || elements > kOnStack;
  const Tensor u = scratch_for(x, on_heap ? elements : 0);
  void* const products = on_heap ? u.mutable_data_ptr() : on_stack;
  const Tensor a_copy = scratch_for(x, copy_a ? examples * positions * x.f : 0);
  const Tensor v_copy = scratch_for(x, copy_v && count > 1 ? count * x.o * x.f : 0);
  for (int64_t j = 0; j < x.k; j += count) {
    const int64_t k = std::min(count, x.k - j);
    const Tensor matrix = few ? x.v : vectors(x, j, k, copy_v && k > 1 ? &v_copy : nullptr);
    for_tiles(x, examples, positions, [&](int64_t example, int64_t n, int64_t position, int64_t s) {
      if (few) {
        const GradDotProducts few_columns{
            .a = x.a_at(example, position),
            .v = x.v_at(j, 0),
            .u = products,
            .a_example_stride = x.a.stride(0),
            .a_position_stride = x.a.stride(1),
            .v_stride = x.v.stride(0),
            .positions = s,
            .k = k,
            .o = x.o,
            .f = x.f,
            .dtype = x.dtype,
        };
        few_products(few_columns, n * s);
      } else {
        const Tensor a = tile_of(x.a, example, n, position, s, copy_a ? &a_copy : nullptr);
        call_out("aten::mm", st::view(a, {n * s, x.f}), matrix, shaped<2>(u, {n * s, k * x.o}));
      }
      const GradDotSums sums{
          .u = products,
          .g = x.g_at(example, position),
          .b = x.bias ? x.v_at(j, x.o * x.f) : nullptr,
          .out = x.out_at(example, j),
          .g_example_stride = x.g.stride(0),
          .g_position_stride = x.g.stride(1),
          .b_stride = x.v.stride(0),
          .out_stride = x.out.stride(0),
          .examples = n,
          .positions = s,
          .k = k,
          .o = x.o,
          .dtype = x.dtype,
      };
      add_sums(sums, x.out);
    });
  }
}

// ---- order 2: inputs meet g, and the gradients meet the vectors ----

void gradients_first(const GradDot& x) {
  // Gradients of `outputs` outputs at a time. BLAS likes both of these numbers large.
  constexpr int64_t kExamples = 128, kOutputs = 32;
  int64_t examples = std::clamp<int64_t>(kGradients / (std::min(kOutputs, x.o) * x.f), 1, kExamples);
  int64_t positions = x.s;
  if (!x.wide()) {
    examples = std::min(examples, std::max<int64_t>(kCopies / (x.s * (x.f + x.o)), 16));
    positions = std::clamp<int64_t>(kCopies / (examples * (x.f + x.o)), 1, x.s);
  }
  examples = std::min({examples, x.n, std::max<int64_t>(kProducts / x.k, 1)});
  const int64_t outputs = std::clamp<int64_t>(kGradients / (examples * x.f), 1, x.o);

  const Tensor gradients = scratch_for(x, examples * outputs * x.f), dots = scratch_for(x, examples * x.k);
  const Tensor a_copy = scratch_for(x, x.wide() ? 0 : examples * positions * x.f);
  const Tensor g_copy = scratch_for(x, x.wide() ? 0 : examples * positions * x.o);
  for_tiles(x, examples, positions, [&](int64_t example, int64_t n, int64_t position, int64_t s) {
    const Tensor a = tile_of(x.a, example, n, position, s, x.wide() ? nullptr : &a_copy);
    const Tensor g = tile_of(x.g, example, n, position, s, x.wide() ? nullptr : &g_copy);
    // out += left * (columns of v)^T
    auto add = [&](const Tensor& left, int64_t first_column, int64_t columns) {
      const Tensor products = shaped<2>(dots, {n, x.k});
      call_out("aten::mm", left, transposed(part(x.v, 1, first_column, columns), 0, 1), products);
      add_rows(kName, part(x.out, 0, example, n), products);
    };
    for (int64_t p = 0; p < x.o; p += outputs) {
      const int64_t o = std::min(outputs, x.o - p);
      const Tensor tile = shaped<3>(gradients, {n, o, x.f});
      call_out(s == 1 ? "aten::mul" : "aten::bmm", transposed(part(g, 2, p, o), 1, 2), a, tile);
      add(shaped<2>(gradients, {n, o * x.f}), p * x.f, o * x.f);
    }
    if (x.bias) add(s == 1 ? st::select(g, 1, 0) : st::sum(g, {{1}}), x.o * x.f, x.o);
  });
}

// In multiplications and additions for an example, where an element of U, or of a gradient, costs about as much as kMemory of
// them to write and to read again.
bool gradients_are_cheaper(const GradDot& x) {
  constexpr double kMemory = 32;
  const double k = x.k, s = x.s, o = x.o, f = x.f;
  return x.f > 0 && o * f * (2 * (s + k) + kMemory) < k * s * o * (2 * f + kMemory);
}

// ---- arguments ----

void grad_dot(const Tensor& a, const Tensor& g, const Tensor& v, bool bias, Tensor out) {
  check_dim(kName, "a", a, 3);
  const DType dtype = floating_dtype(kName, "a", a);
  const int64_t n = a.size(0), s = a.size(1), f = a.size(2);
  check_dim(kName, "g", g, 3);
  const int64_t o = g.size(2), d = o * f + (bias ? o : 0);
  if (g.size(0) != n || g.size(1) != s) fail(kName, "g", "expected shape [", n, ", ", s, ", o], got ", shape_text(g));
  check_beside(kName, "g", g, "a", a);
  if (v.dim() != 2 || v.size(1) != d) fail(kName, "v", "expected shape [k, ", d, "], got ", shape_text(v));
  check_wide(kName, "v", v, "a", a);
  const int64_t k = v.size(0);
  check_shape(kName, "out", out, {n, k});
  check_wide(kName, "out", out, "a", a);
  check_written(kName, "out", out);

  if (n == 0 || s == 0 || k == 0 || d == 0) return;
  const GradDot x{
      .a = adjacent_columns(a),
      .g = adjacent_columns(g),
      .v = adjacent_columns(v),
      .out = adjacent_columns(out),
      .n = n,
      .s = s,
      .f = f,
      .o = o,
      .k = k,
      .dtype = dtype,
      .wide_dtype = wide_dtype(dtype),
      .bias = bias,
  };
  if (!few_products_do(x) && gradients_are_cheaper(x)) {
    gradients_first(x);
  } else {
    vectors_first(x);
  }
  write_back(out, x.out);
}

}  // namespace
}  // namespace torch_influence

STABLE_TORCH_LIBRARY_FRAGMENT(torch_influence, m) {
  m.def("grad_dot(Tensor a, Tensor g, Tensor v, bool bias, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CPU, m) { m.impl("grad_dot", TORCH_BOX(&torch_influence::grad_dot)); }
#if defined(TORCH_INFLUENCE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(torch_influence, CUDA, m) { m.impl("grad_dot", TORCH_BOX(&torch_influence::grad_dot)); }
#endif
