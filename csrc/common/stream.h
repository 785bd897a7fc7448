// Which tensors the CUDA kernels take, and the current stream of their device, in a library that loads on CPU builds of torch
// as well.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

// Lives in libtorch_cuda.so, which a CPU build of torch lacks: a weak reference is null there, a strong one would keep the
// library from loading.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace torch_influence {

#if defined(TORCH_INFLUENCE_EMULATE)

// The kernels run on the CPU, on its tensors (tests/cuda_on_cpu): at once, in the order of the calls.
inline bool on_gpu(const torch::stable::Tensor&) { return true; }
class GpuGuard {
 public:
  explicit GpuGuard(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

// Tells whether the kernels do the work for `t`.
inline bool on_gpu(const torch::stable::Tensor& t) { return t.is_cuda(); }

// Makes the device of `t` the current one as long as it lives; does nothing where that is not a GPU.
class GpuGuard {
 public:
  explicit GpuGuard(const torch::stable::Tensor& t) : device_(t.get_device_index()) {
    if (on_gpu(t)) guard_.emplace(device_);
  }

  // Returns the device's current stream, a cudaStream_t. Only on a GPU, so libtorch_cuda.so is there.
  void* stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  int32_t device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

#endif

// Throws what a launch of op's kernels returned, unless that is null; std::runtime_error reaches Python as RuntimeError.
inline void check_launch(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
}

// Calls launch(stream) with the current stream of the device of `t`, which is the current device meanwhile, and throws the
// error that it returns, in the name of `op`.
template <class F>
void launch_on_device_of(const char* op, const torch::stable::Tensor& t, F launch) {
  const GpuGuard guard(t);
  check_launch(op, launch(guard.stream()));
}

}  // namespace torch_influence
