// The Python module torch_influence._C. It says how the op library beside it was built, and that library is found by this
// module's path; no tensor passes through here, so it links nothing of torch.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/simd.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native ops were built.";
  m.def(
      "build_info",
      [] {
        constexpr uint64_t target = TORCH_TARGET_VERSION;
        auto words = [](const char* list) { return py::tuple(py::str(list).attr("split")(",")); };
        py::dict info;
        info["ops"] = words(TORCH_INFLUENCE_OPS);
        info["torch_target"] = py::make_tuple(target >> 56 & 0xff, target >> 48 & 0xff);
        info["simd_levels"] = words(TORCH_INFLUENCE_SIMD);
        info["simd_level"] = torch_influence::simd_name(torch_influence::simd_level());
        info["cuda_archs"] = *TORCH_INFLUENCE_CUDA_ARCHS ? words(TORCH_INFLUENCE_CUDA_ARCHS) : py::tuple();
        info["nvcc"] = TORCH_INFLUENCE_NVCC;
        info["compiler"] = __VERSION__;
        info["csrc_sha256"] = TORCH_INFLUENCE_CSRC_SHA256;
        return info;
      },
      "Targets of the build as a dict; simd_level alone is this machine's.");
}
