// to += from, for two matrices whose rows may lie apart.
#pragma once

#include "common/element.h"

namespace torch_influence {

struct AddRows {
  void* to;  // [rows, columns] of float or double, elements of a row adjacent, as in from
  const void* from;
  int64_t to_stride, from_stride;  // elements from one row to the next
  int64_t rows, columns;
  DType dtype;
};

// CUDA: enqueues everything on `stream`, a cudaStream_t. Returns null, or what is wrong with the launch.
const char* add_rows_cuda(const AddRows& s, void* stream);

}  // namespace torch_influence
