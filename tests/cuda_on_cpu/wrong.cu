// Kernels that are wrong, each in a way that the emulator must notice, and some that are right; test_emulator.py runs them.
#include <cstdio>

#include "common/launch.cuh"

namespace torch_influence {
namespace {

constexpr int kBlock = 64;

__global__ void barrier_in_branches_kernel(double*) {
  if (threadIdx.x < 32) {
    __syncthreads();  // one barrier
  } else {
    __syncthreads();  // another barrier
  }
}

__global__ void barrier_after_an_exit_kernel(double*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void lanes_that_never_come_kernel(double* out) {
  if (threadIdx.x == 5) return;
  out[0] = __shfl_xor_sync(kAllLanes, 1.0, 1);
}

__global__ void mask_without_its_lane_kernel(double* out) { out[0] = __shfl_xor_sync(0x0000ffffu, 1.0, 1); }

__global__ void different_shuffles_kernel(double* out) {
  double value = 1;
  if (threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(kAllLanes, value, 1);  // one shuffle
  } else {
    value = __shfl_xor_sync(kAllLanes, value, 1);  // another shuffle
  }
  out[0] = value;
}

__global__ void too_much_shared_memory_kernel(double* out) {
  TORCH_INFLUENCE_SHARED(double, values, [6145]);
  values[0] = 1;
  out[0] = values[0];
}

// Writes what other threads have left in shared memory, without waiting for them.
__global__ void no_barrier_kernel(double* out) {
  TORCH_INFLUENCE_SHARED(double, values, [kBlock]);
  values[threadIdx.x] = 1;
  out[blockIdx.x * kBlock + threadIdx.x] = values[kBlock - 1 - threadIdx.x];
}

__global__ void with_a_barrier_kernel(double* out) {
  TORCH_INFLUENCE_SHARED(double, values, [kBlock]);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = values[kBlock - 1 - threadIdx.x];
}

// Takes what a lane beyond the warp would have: of no use to anyone.
__global__ void from_beyond_the_mask_kernel(double* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0, 16);
}

// Which thread of which block writes last.
__global__ void last_writer_kernel(double* out) { out[0] = blockIdx.x * kBlock + threadIdx.x; }

__global__ void indices_kernel(double* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] += 1 + block;
}

}  // namespace
}  // namespace torch_influence

// Runs the kernel of this name on `out` and returns null, or the error.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, unsigned x, unsigned y, unsigned z,
                                                                  int threads, double* out) {
  using namespace torch_influence;
  struct Named {
    const char* name;
    void (*kernel)(double*);
  };
#define KERNEL(name)     \
  {                      \
    #name, name##_kernel \
  }
  const Named kernels[] = {
      KERNEL(barrier_in_branches),
      KERNEL(barrier_after_an_exit),
      KERNEL(lanes_that_never_come),
      KERNEL(mask_without_its_lane),
      KERNEL(different_shuffles),
      KERNEL(too_much_shared_memory),
      KERNEL(no_barrier),
      KERNEL(with_a_barrier),
      KERNEL(from_beyond_the_mask),
      KERNEL(last_writer),
      KERNEL(indices),
  };
  for (const Named& each : kernels) {
    if (std::strcmp(each.name, name) == 0) return launch(each.kernel, dim3(x, y, z), threads, nullptr, out);
  }
  return "no such kernel";
}
