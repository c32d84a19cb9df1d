// One launch over as many tensors as a table holds: they are cut into chunks, and blocks stride over the chunks of all of
// them. The table travels in the kernel's arguments (32,764 bytes since CUDA 12.1), which a captured graph keeps by value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cuda_runtime.h>

static_assert(CUDART_VERSION >= 12010, "kernel arguments of 32 KB need CUDA 12.1");

namespace nanogpt {

constexpr int kThreads = 256;
constexpr int kChunk = kThreads * 4;  // one 128-bit access per thread and array
constexpr int kMaxArguments = 32764;

// first[i] is the first chunk of tensor i, first[count] the number of chunks.
template <int kTensors>
struct Chunks {
  int64_t numel[kTensors];
  int64_t first[kTensors + 1];
  int count;

  void assign(int n, const int64_t* numels) {
    count = n;
    first[0] = 0;
    for (int i = 0; i < n; ++i) {
      numel[i] = numels[i];
      first[i + 1] = first[i] + (numels[i] + kChunk - 1) / kChunk;
    }
  }
  int64_t total() const { return first[count]; }
};

// Calls f(tensor, element, left) for this thread's four elements of each chunk, `left` of them inside the tensor. Blocks
// stay side by side in memory, which keeps the few pages they touch in the TLB.
template <int kTensors, typename F>
__device__ __forceinline__ void for_each_chunk(const Chunks<kTensors>& chunks, F f) {
  int tensor = 0;
  const int64_t total = chunks.first[chunks.count];
  for (int64_t chunk = blockIdx.x; chunk < total; chunk += gridDim.x) {
    while (chunk >= chunks.first[tensor + 1]) ++tensor;
    const int64_t element = (chunk - chunks.first[tensor]) * kChunk + threadIdx.x * 4;
    const int64_t left = chunks.numel[tensor] - element;
    if (left > 0) f(tensor, element, left);
  }
}

// As many blocks as the GPU holds at once.
template <typename Kernel>
int resident_blocks(Kernel kernel) {
  int device = 0, processors = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  return std::max(1, processors * blocks);
}

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nanogpt
