#include "common/launch.cuh"
#include "ops/grad_dot/grad_dot.h"

namespace torch_influence {
namespace {

constexpr int kInFlight = 4;       // packs of U that a thread loads before it uses the first
constexpr int64_t kEnough = 8192;  // groups of threads that the largest GPU has work for at a time

// How the sums are divided: a group of 2^bits lanes of a warp adds up a part of the positions and of the outputs for an
// example, and for one vector or kInFlight of them. It depends on the sizes alone, and so does the order of summation.
struct Split {
  int bits;
  int64_t vectors;                    // of a group
  int64_t vector_groups;              // of all vectors
  int64_t positions, position_parts;  // of a group; groups that share an example's
  int64_t outputs, output_parts;      // likewise
  int64_t parts;                      // of an example's sum for a vector
  int64_t groups;
};

int64_t ratio(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

Split split_of(const GradDotSums& s) {
  const int width = 16 / static_cast<int>(element_size(wide_dtype(s.dtype)));
  Split split{};
  while (split.bits < 5 && (int64_t(2 * width) << split.bits) <= s.o) ++split.bits;
  split.vectors = s.k < kInFlight ? 1 : kInFlight;
  split.vector_groups = ratio(s.k, split.vectors);
  const int64_t wanted = ratio(kEnough, s.examples * split.vector_groups);  // groups for an example and its vectors
  const int64_t positions_at_once = kInFlight / split.vectors, outputs_at_once = int64_t(width) << split.bits;
  split.positions = ratio(ratio(s.positions, least(wanted, s.positions)), positions_at_once) * positions_at_once;
  split.position_parts = ratio(s.positions, split.positions);
  const int64_t steps = ratio(s.o, outputs_at_once);
  split.outputs = ratio(steps, least(ratio(wanted, split.position_parts), ratio(steps, 2))) * outputs_at_once;
  split.output_parts = ratio(s.o, split.outputs);
  split.parts = split.position_parts * split.output_parts;
  split.groups = s.examples * split.vector_groups * split.parts;
  return split;
}

// A group of lanes owns what its Split says, a lane packs of outputs. Neighbouring groups own neighbouring vectors,
// so that they read neighbouring rows of U and the same g. Reads U once, g and b from the caches after the first of k vectors:
// sizeof(W) bytes per element of U. Order of summation: a lane position by position, kInFlight sums side by side, then lanes by
// halves; the parts of an element are added by parts_kernel.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const GradDotSums s, const Split split, Wide<T>* __restrict__ parts) {
  using W = Wide<T>;
  constexpr int width = kWidest<W>;
  const int lanes = 1 << split.bits, lane = threadIdx.x & (lanes - 1);
  const int64_t groups_per_warp = kWarp >> split.bits;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kWarp);
  const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const bool one_vector = split.vectors == 1;
  // A warp stays together, as shuffles need all of its lanes.
  for (int64_t first = warp * groups_per_warp; first < split.groups; first += warps * groups_per_warp) {
    const int64_t group = first + (threadIdx.x % kWarp >> split.bits);
    const Division of_vectors = divided(group, split.vector_groups), of_parts = divided(of_vectors.quotient, split.parts);
    const Division of_outputs = divided(of_parts.remainder, split.output_parts);
    const int64_t example = of_parts.quotient, vector = of_vectors.remainder * split.vectors;
    W sum[kInFlight] = {};
    if (group < split.groups) {
      const int64_t first_position = of_outputs.quotient * split.positions,
                    first_output = of_outputs.remainder * split.outputs;
      const int64_t positions =
          first_position + split.positions < s.positions ? first_position + split.positions : s.positions;
      const int64_t outputs = first_output + split.outputs < s.o ? first_output + split.outputs : s.o;
      for (int64_t t = first_position; t < positions; t += one_vector ? kInFlight : 1) {
        const W* u = static_cast<const W*>(s.u) + ((example * s.positions + t) * s.k + vector) * s.o;
        const T* g = static_cast<const T*>(s.g) + example * s.g_example_stride + t * s.g_position_stride;
        const W* b = static_cast<const W*>(s.b) + vector * s.b_stride;
        const int64_t u_next = one_vector ? s.k * s.o : s.o;
        const int64_t g_next = one_vector ? s.g_position_stride : 0, b_next = one_vector ? 0 : s.b_stride;
        const int64_t count = one_vector ? positions - t : s.k - vector;
        for (int64_t p = first_output + lane * width; p < outputs; p += lanes * width) {
          const int left = static_cast<int>(outputs - p < width ? outputs - p : width);
          // At once: packs that are not aligned, or end beyond the outputs, take more registers.
          constexpr int kAtOnce = aligned ? kInFlight : kInFlight / 2;
#pragma unroll
          for (int begin = 0; begin < kInFlight; begin += kAtOnce) {
            Pack<W, width> u_pack[kAtOnce], b_pack[kAtOnce] = {};
            Pack<T, width> g_pack[kAtOnce];
#pragma unroll
            for (int a = 0; a < kAtOnce; ++a) {
              const int i = begin + a;
              if (i >= count) continue;
              u_pack[a] = load_pack<aligned, width>(u + i * u_next + p, left);
              g_pack[a] = load_pack<aligned, width>(g + i * g_next + p, left);
              if (s.b) b_pack[a] = load_pack<aligned, width>(b + i * b_next + p, left);
            }
#pragma unroll
            for (int a = 0; a < kAtOnce; ++a) {
              if (begin + a >= count) continue;
#pragma unroll
              for (int e = 0; e < width; ++e) {
                const W product = u_pack[a].element[e] + b_pack[a].element[e];
                sum[begin + a] = grad_dot_element<W>(sum[begin + a], product, widen(g_pack[a].element[e]));
              }
            }
          }
        }
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
    }
    if (group >= split.groups || lane != 0) continue;
    static_assert(kInFlight == 4);
    if (one_vector) sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t j = vector + i;
      if (i >= split.vectors || j >= s.k) continue;
      if (parts) {
        parts[(example * s.k + j) * split.parts + of_parts.remainder] = sum[i];
      } else {
        static_cast<W*>(s.out)[example * s.out_stride + j] += sum[i];
      }
    }
  }
}

// A warp owns an element of out, a lane every 32nd of its parts. Reads the parts, reads and writes out. Order of summation: a
// lane from left to right, then lanes by halves.
template <class W>
__global__ void __launch_bounds__(kThreads) parts_kernel(const GradDotSums s, int64_t count, const W* __restrict__ parts) {
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kWarp), elements = s.examples * s.k;
  const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (int64_t element = warp; element < elements; element += warps) {
    W sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += parts[element * count + i];
    sum = group_sum<kWarp>(sum);
    const Division at = divided(element, s.k);
    if (threadIdx.x % kWarp == 0) static_cast<W*>(s.out)[at.quotient * s.out_stride + at.remainder] += sum;
  }
}

// Tells whether packs of W's width are aligned in the rows of U, g and b.
template <class T>
bool all_aligned(const GradDotSums& s) {
  using W = Wide<T>;
  constexpr int width = kWidest<W>;
  return s.o % width == 0 && rows_aligned<W>(s.u, 0, 1) && rows_aligned<T, width>(s.g, s.g_example_stride, s.examples) &&
         rows_aligned<T, width>(s.g, s.g_position_stride, s.positions) && (!s.b || rows_aligned<W>(s.b, s.b_stride, s.k));
}

}  // namespace

int64_t grad_dot_cuda_parts(const GradDotSums& s) {
  const Split split = split_of(s);
  return split.parts > 1 ? s.examples * s.k * split.parts : 0;
}

const char* grad_dot_sums_cuda(const GradDotSums& s, void* scratch, void* stream) {
  return with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    constexpr int64_t kWarps = kThreads / kWarp;
    const Split split = split_of(s);
    W* parts = split.parts > 1 ? static_cast<W*>(scratch) : nullptr;
    const auto kernel = all_aligned<T>(s) ? sums_kernel<T, true> : sums_kernel<T, false>;
    const unsigned blocks = grid_x(ratio(ratio(split.groups, kWarp >> split.bits), kWarps));
    const char* error = launch(kernel, blocks, kThreads, stream, s, split, parts);
    if (error || !parts) return error;
    return launch(parts_kernel<W>, grid_x(ratio(s.examples * s.k, kWarps)), kThreads, stream, s, split.parts, parts);
  });
}

}  // namespace torch_influence
