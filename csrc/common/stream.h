// The current CUDA stream, in a library that loads on CPU builds of torch as well.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

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

}  // namespace torch_influence
