// The current CUDA stream, in a library that loads on CPU builds of torch as well; and how an op launches its kernels there.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

// Lives in libtorch_cuda.so, which a CPU build of torch lacks: a weak reference is null there, a strong one would keep the
// library from loading.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace torch_influence {

// A cudaStream_t. Only for tensors that are on a CUDA device, so libtorch_cuda.so is there.
inline void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

// Throws what a launch of op's kernels returned, unless that is null; std::runtime_error reaches Python as RuntimeError.
inline void check_launch(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
}

// Calls launch(stream) with the current stream of the device of `t`, which is the current device meanwhile, and throws the
// error that it returns, in the name of `op`.
template <class F>
void launch_on_device_of(const char* op, const torch::stable::Tensor& t, F launch) {
  const int32_t device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(op, launch(current_stream(device)));
}

}  // namespace torch_influence
