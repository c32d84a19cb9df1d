// fp32 matrix products on the bfloat16 matrix units (AMX) of recent x86 CPUs. Torch-free; see cpu_amx.cpp.
#pragma once

#include <stdint.h>

namespace nanogpt {

// An fp32 matrix whose element (i, j) lies at data[i * row + j * column]; one of the strides is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};

// Rows and columns of C are taken in panels of this many.
constexpr int64_t kAmxPanel = 32;

struct Range {
  int64_t begin, end;
};

// C (ldc apart) = or += A B + bias in the given rows and columns, for one thread; bias may be null.
void amx_multiply(const Matrix& a, const Matrix& b, const float* bias, float* c, int64_t ldc, Range rows, Range columns,
                  int64_t depth, bool add);

}  // namespace nanogpt
