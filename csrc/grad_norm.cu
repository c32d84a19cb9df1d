// Global L2 norm in two launches: one partial sum of squares per block, then their sum by one block in a fixed order, so
// that the result is the same bits every time. Beyond 1,024 tensors, one more for each 1,024. An inf or nan anywhere comes out
// as inf or nan.
//
// Threads sum in fp32, some hundred squares each; blocks and the final sum in double. I/O: 4 bytes per gradient.

#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "multi_tensor.cuh"

namespace nanogpt {
namespace {

constexpr int kTensors = 1024;
constexpr int kFinalThreads = 1024;

struct Table {
  Chunks<kTensors> chunks;
  const float* g[kTensors];
};
static_assert(sizeof(Table) + sizeof(double*) <= kMaxArguments);

// Sum over the block, valid in thread 0.
__device__ double block_sum(double x) {
  __shared__ double warps[32];
  for (int offset = 16; offset; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0;
  if (threadIdx.x < 32) {
    for (int offset = 16; offset; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  }
  return x;
}

__global__ void __launch_bounds__(kThreads) partial_kernel(const __grid_constant__ Table table, double* partials) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for_each_chunk(table.chunks, [&](int i, int64_t element, int64_t left) {
    const float* const g = table.g[i] + element;
    if (left >= 4 && (reinterpret_cast<uintptr_t>(g) & 15) == 0) {
      const float4 x = *reinterpret_cast<const float4*>(g);
      sum.x += x.x * x.x;
      sum.y += x.y * x.y;
      sum.z += x.z * x.z;
      sum.w += x.w * x.w;
    } else {
      const int n = left < 4 ? static_cast<int>(left) : 4;
      for (int k = 0; k < n; ++k) sum.x += g[k] * g[k];
    }
  });
  const double total = block_sum(static_cast<double>(sum.x) + sum.y + (static_cast<double>(sum.z) + sum.w));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kFinalThreads) final_kernel(const double* partials, int count, float* norm) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kFinalThreads) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

}  // namespace

int64_t grad_norm_scratch(int64_t count) {
  return (count + kTensors - 1) / kTensors * resident_blocks(partial_kernel);
}

const char* grad_norm(int64_t count, const float* const* grads, const int64_t* numels, double* scratch, float* norm,
                      CUstream_st* stream) {
  const int resident = resident_blocks(partial_kernel);
  int partials = 0;
  for (int64_t begin = 0; begin < count; begin += kTensors) {
    Table table;
    const int n = static_cast<int>(std::min<int64_t>(kTensors, count - begin));
    table.chunks.assign(n, numels + begin);
    for (int i = 0; i < n; ++i) table.g[i] = grads[begin + i];
    const int blocks = static_cast<int>(std::min<int64_t>(table.chunks.total(), resident));
    if (blocks == 0) continue;
    partial_kernel<<<blocks, kThreads, 0, stream>>>(table, scratch + partials);
    partials += blocks;
  }
  final_kernel<<<1, kFinalThreads, 0, stream>>>(scratch, partials, norm);
  return last_error();
}

}  // namespace nanogpt
