#include "common/launch.cuh"
#include "ops/grad_dot/grad_dot.h"

namespace torch_influence {
namespace {

// A group of 2^group_bits lanes of a warp owns an element of out, a lane every so-manieth output of it, so that neighbouring
// groups read neighbouring rows of U. Reads U once, g and b from the caches after the first of k groups; reads and writes out
// once: sizeof(W) bytes per element of U. Order of summation: a lane position by position, then lanes by halves.
template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const GradDotSums s, int group_bits) {
  using W = Wide<T>;
  const int group = 1 << group_bits, groups_per_warp = kWarp >> group_bits, lane = threadIdx.x & (group - 1);
  const int64_t elements = s.examples * s.k, warps = int64_t(gridDim.x) * (kThreads / kWarp);
  const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  // A warp stays together, as shuffles need all of its lanes.
  for (int64_t first = warp * groups_per_warp; first < elements; first += warps * groups_per_warp) {
    const int64_t element = first + (threadIdx.x % kWarp >> group_bits);
    const int64_t example = element / s.k, j = element % s.k;
    W sum = 0;
    if (element < elements) {
      const W* u = static_cast<const W*>(s.u) + (example * s.positions * s.k + j) * s.o;
      const T* g = static_cast<const T*>(s.g) + example * s.g_example_stride;
      const W* b = static_cast<const W*>(s.b) + j * s.b_stride;
      for (int64_t t = 0; t < s.positions; ++t, u += s.k * s.o, g += s.g_position_stride) {
        for (int64_t p = lane; p < s.o; p += group) {
          sum = grad_dot_element<W>(sum, s.b ? u[p] + b[p] : u[p], s.g ? widen(g[p]) : W(1));
        }
      }
    }
    for (int offset = group / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (element < elements && lane == 0) static_cast<W*>(s.out)[example * s.out_stride + j] += sum;
  }
}

}  // namespace

const char* grad_dot_sums_cuda(const GradDotSums& s, void* stream) {
  int group_bits = 0;
  while (group_bits < 5 && (int64_t(2) << group_bits) <= s.o) ++group_bits;
  const int64_t groups_per_block = kThreads >> group_bits;
  const int64_t blocks = (s.examples * s.k + groups_per_block - 1) / groups_per_block;
  return with_element_type(s.dtype, [&](auto element) {
    return launch(sums_kernel<decltype(element)>, grid_x(blocks), kThreads, stream, s, group_bits);
  });
}

}  // namespace torch_influence
