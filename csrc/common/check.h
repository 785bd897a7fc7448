// Argument checks of the ops. They protect memory; the Python wrappers check again in their callers' words.
//
// std::invalid_argument reaches Python as ValueError. Check everything before st::parallel_for: what is thrown inside it
// loses its message.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/element.h"

namespace torch_influence {

using torch::stable::Tensor;

// fail("lissa_step", "v", "expected 2 dimensions, got ", 3): ValueError "lissa_step: v: expected 2 dimensions, got 3".
template <class... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": " << argument << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "[") << t.size(i);
  return t.dim() ? text.str() + "]" : "[]";
}

inline void check_dim(const char* op, const char* argument, const Tensor& t, int64_t dim) {
  if (t.dim() != dim) fail(op, argument, "expected ", dim, " dimensions, got shape ", shape_text(t));
}

// t has the shape, dtype and device of `like`, which the message calls `name`.
inline void check_like(const char* op, const char* argument, const Tensor& t, const char* name, const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  if (!same) fail(op, argument, "expected the shape of ", name, ", ", shape_text(like), ", got ", shape_text(t));
  if (t.scalar_type() != like.scalar_type()) fail(op, argument, "expected the dtype of ", name, ", got another");
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index()) {
    fail(op, argument, "expected the device of ", name, ", got another");
  }
}

inline DType floating_dtype(const char* op, const char* argument, const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: fail(op, argument, "expected dtype float32, float64, float16 or bfloat16, got another");
  }
}

}  // namespace torch_influence
