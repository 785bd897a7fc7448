// Argument checks of the ops. They protect memory, so an op makes them before it writes anything: the Python wrappers call it
// with arguments that nobody has checked, and say what is wrong in their callers' words once it has refused.
//
// What is thrown reaches Python as an exception. Check everything before st::parallel_for: what is thrown inside it
// loses its message.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/element.h"

namespace torch_influence {

using torch::stable::Tensor;

// fail("lissa_step", "v", "expected 2 dimensions, got ", 3): ValueError "lissa_step: v: expected 2 dimensions, got 3".
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": " << argument << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Returns "[2, 3]" for a matrix of two rows and three columns.
inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_text(std::vector<int64_t>(sizes.begin(), sizes.end()));
}

inline void check_dim(const char* op, const char* argument, const Tensor& t, int64_t dim) {
  if (t.dim() != dim) fail(op, argument, "expected ", dim, " dimensions, got shape ", shape_text(t));
}

inline void check_shape(const char* op, const char* argument, const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()))
    fail(op, argument, "expected shape ", shape_text(shape), ", got ", shape_text(t));
}

// Checks that t can be written to: an expanded tensor holds the same memory several times.
inline void check_written(const char* op, const char* argument, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  bool expanded = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    expanded |= strides[i] == 0 && sizes[i] > 1;
  }
  if (expanded) fail(op, argument, "expected a tensor with memory of its own, got an expanded one");
}

inline void check_finite(const char* op, const char* argument, double value) {
  if (!std::isfinite(value)) fail(op, argument, "expected a finite number, got ", value);
}

// The checks below compare t with `like`, another argument, which the message calls `name`.

inline void check_device(const char* op, const char* argument, const Tensor& t, const char* name, const Tensor& like) {
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index()) {
    fail(op, argument, "expected the device of ", name, ", got another");
  }
}

// Checks dtype and device.
inline void check_beside(const char* op, const char* argument, const Tensor& t, const char* name, const Tensor& like) {
  if (t.scalar_type() != like.scalar_type()) fail(op, argument, "expected the dtype of ", name, ", got another");
  check_device(op, argument, t, name, like);
}

// Checks shape, dtype and device.
inline void check_like(const char* op, const char* argument, const Tensor& t, const char* name, const Tensor& like) {
  const auto sizes = t.sizes(), wanted = like.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end())) {
    fail(op, argument, "expected the shape of ", name, ", ", shape_text(like), ", got ", shape_text(t));
  }
  check_beside(op, argument, t, name, like);
}

// Checks that t has the dtype that arithmetic with elements of `like` is done in (Wide<T>), and the device of `like`.
inline void check_wide(const char* op, const char* argument, const Tensor& t, const char* name, const Tensor& like) {
  using torch::headeronly::ScalarType;
  const bool is_double = like.scalar_type() == ScalarType::Double;
  if (t.scalar_type() != (is_double ? ScalarType::Double : ScalarType::Float)) {
    fail(op, argument, "expected dtype ", is_double ? "float64" : "float32", ", got another");
  }
  check_device(op, argument, t, name, like);
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
