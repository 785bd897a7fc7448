#include "common/add_rows.h"
#include "common/launch.cuh"

namespace torch_influence {
namespace {

constexpr int kInFlight = 4;  // packs per thread and array that are loaded before the first is used

template <class W>
constexpr int64_t kColumns = int64_t(kThreads) * kInFlight * kWidest<W>;  // per block: 16 KiB of a row

// A block owns kColumns<W> columns of a row (of every gridDim.y-th row), a thread packs of them. Reads both, writes
// one: 3 * sizeof(W) bytes per element.
template <class W, bool aligned>
__global__ void __launch_bounds__(kThreads) add_kernel(const AddRows s) {
  const Columns columns = block_columns(kColumns<W>, s.columns);
  for (int64_t row = blockIdx.y; row < s.rows; row += gridDim.y) {
    W* const rows[] = {static_cast<W*>(s.to) + row * s.to_stride,
                       static_cast<W*>(const_cast<void*>(s.from)) + row * s.from_stride};
    for_columns<aligned, 1u, kInFlight>(rows, columns, [](W(&element)[2]) { element[0] += element[1]; });
  }
}

template <class W>
const char* enqueue(const AddRows& s, void* stream) {
  const bool aligned = rows_aligned<W>(s.to, s.to_stride, s.rows) && rows_aligned<W>(s.from, s.from_stride, s.rows);
  const dim3 grid(static_cast<unsigned>((s.columns + kColumns<W> - 1) / kColumns<W>), grid_y(s.rows));
  return launch(aligned ? add_kernel<W, true> : add_kernel<W, false>, grid, kThreads, stream, s);
}

}  // namespace

const char* add_rows_cuda(const AddRows& s, void* stream) {
  return s.dtype == DType::float64 ? enqueue<double>(s, stream) : enqueue<float>(s, stream);
}

}  // namespace torch_influence
