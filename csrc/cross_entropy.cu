// Cross-entropy of logits rows, with the gradient in place: losses[r] = logsumexp(x) - x[target], x <- softmax(x) - onehot.
//
// One block per row, which stays in shared memory between the reduction and the gradient (a bf16 row of 50,304 columns is
// 100 KB: two blocks fit an H100's SM, one an A100's), so device memory sees one read and one write of the logits. Rows too
// long for that are read twice, the second time mostly from L2. The softmax is online and in base 2.
//
// Columns from vocab_size on are padding: out of the sum, gradient 0. Rows whose target is ignore_index: loss 0, gradient 0.
// A target outside [0, vocab_size) gives a NaN loss, never an access out of bounds.

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace nanogpt {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kUnroll = 4;  // vectors in flight per thread

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float& out, float x) { out = x; }
__device__ __forceinline__ void from_float(__half& out, float x) { out = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }

// One instruction; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T x[kVec];
};

// The running maximum and the sum of exp(x - maximum). The start value leaves exp2(x - maximum) at 0, never at nan.
struct Softmax {
  float maximum = -FLT_MAX;
  float sum = 0.0f;

  __device__ void merge(float other_maximum, float other_sum) {
    const float m = fmaxf(maximum, other_maximum);
    sum = sum * exp2_fast((maximum - m) * kLog2e) + other_sum * exp2_fast((other_maximum - m) * kLog2e);
    maximum = m;
  }
};

__device__ Softmax block_merge(Softmax s) {
  __shared__ float maxima[32], sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int offset = 16; offset; offset /= 2) {
    s.merge(__shfl_xor_sync(~0u, s.maximum, offset), __shfl_xor_sync(~0u, s.sum, offset));
  }
  if (lane == 0) {
    maxima[warp] = s.maximum;
    sums[warp] = s.sum;
  }
  __syncthreads();
  // Every warp merges all partial results, in the same order.
  s.maximum = lane < warps ? maxima[lane] : -FLT_MAX;
  s.sum = lane < warps ? sums[lane] : 0.0f;
  for (int offset = 16; offset; offset /= 2) {
    s.merge(__shfl_xor_sync(~0u, s.maximum, offset), __shfl_xor_sync(~0u, s.sum, offset));
  }
  return s;
}

template <typename T, int kVec>
__device__ __forceinline__ void accumulate(Softmax& s, const Vector<T, kVec>& v, int valid) {
  float x[kVec];
  float m = s.maximum;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    x[k] = k < valid ? to_float(v.x[k]) : -INFINITY;
    m = fmaxf(m, x[k]);
  }
  float sum = s.sum * exp2_fast((s.maximum - m) * kLog2e);
#pragma unroll
  for (int k = 0; k < kVec; ++k) sum += exp2_fast((x[k] - m) * kLog2e);
  s.maximum = m;
  s.sum = sum;
}

template <typename T, int kVec, bool kStaged>
__global__ void __launch_bounds__(1024)
rows_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets, float* __restrict__ losses, int columns,
            int vocab_size, int64_t ignore_index, bool write_grad) {
  using V = Vector<T, kVec>;
  extern __shared__ __align__(16) unsigned char shared[];
  V* const staged = reinterpret_cast<V*>(shared);
  const int64_t row = blockIdx.x;
  T* const x = logits + row * columns;
  V* const vectors = reinterpret_cast<V*>(x);
  const int count = columns / kVec;
  const int64_t target = targets[row];

  if (target == ignore_index) {
    if (threadIdx.x == 0) losses[row] = 0.0f;
    if (write_grad) {
      V zero;
#pragma unroll
      for (int k = 0; k < kVec; ++k) from_float(zero.x[k], 0.0f);
      for (int i = threadIdx.x; i < count; i += blockDim.x) vectors[i] = zero;
    }
    return;
  }
  const bool in_range = target >= 0 && target < vocab_size;
  const float x_target = in_range ? to_float(x[target]) : NAN;

  Softmax s;
  const int used = (vocab_size + kVec - 1) / kVec;
  for (int begin = threadIdx.x; begin < used; begin += kUnroll * blockDim.x) {
    V v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = begin + u * blockDim.x;
      if (i < used) v[u] = vectors[i];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = begin + u * blockDim.x;
      if (i < used) {
        accumulate(s, v[u], vocab_size - i * kVec);
        if (kStaged) staged[i] = v[u];
      }
    }
  }
  s = block_merge(s);  // its barrier also orders the read of x[target] before the writes below
  const float log2_sum = log2f(s.sum);
  if (threadIdx.x == 0) losses[row] = (s.maximum - x_target) + log2_sum * kLn2;
  if (!write_grad) return;

  const int hot = in_range ? static_cast<int>(target) : -1;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    V v;
    if (kStaged) {
      if (i < used) v = staged[i];
    } else {
      v = vectors[i];
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const int column = i * kVec + k;
      float p = exp2_fast((to_float(v.x[k]) - s.maximum) * kLog2e - log2_sum);
      if (column == hot) p -= 1.0f;
      from_float(v.x[k], column < vocab_size ? p : 0.0f);
    }
    vectors[i] = v;
  }
}

template <typename T, int kVec>
cudaError_t launch(T* logits, int64_t rows, int columns, const int64_t* targets, float* losses, int64_t ignore_index,
                   int vocab_size, bool write_grad, cudaStream_t stream) {
  int device = 0, limit = 0, per_processor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t bytes = static_cast<int64_t>(columns) * sizeof(T);
  const bool staged = write_grad && bytes + 1024 <= limit;  // 1 KB is the system's and block_merge's
  // Where two rows do not fit an SM, one block must fill it.
  const int most = staged && 2 * (bytes + 2048) > per_processor ? 1024 : 512;
  const int wanted = (columns / kVec + kUnroll - 1) / kUnroll;
  const int threads = std::clamp((wanted + 31) / 32 * 32, 32, most);
  const auto kernel = staged ? rows_kernel<T, kVec, true> : rows_kernel<T, kVec, false>;
  const int shared = staged ? static_cast<int>(bytes) : 0;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(rows), threads, shared, stream>>>(logits, targets, losses, columns, vocab_size,
                                                                   ignore_index, write_grad);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_aligned(void* logits, int64_t rows, int columns, const int64_t* targets, float* losses,
                           int64_t ignore_index, int vocab_size, bool write_grad, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool whole = columns % kVec == 0 && (reinterpret_cast<uintptr_t>(logits) & 15) == 0;
  const auto run = whole ? launch<T, kVec> : launch<T, 1>;
  return run(static_cast<T*>(logits), rows, columns, targets, losses, ignore_index, vocab_size, write_grad, stream);
}

}  // namespace

const char* cross_entropy_rows(void* logits, Type type, int64_t rows, int64_t columns, const int64_t* targets,
                               float* losses, int64_t ignore_index, int64_t vocab_size, bool write_grad,
                               CUstream_st* stream) {
  if (rows == 0) return nullptr;
  const auto run = type == Type::fp32   ? launch_aligned<float>
                   : type == Type::fp16 ? launch_aligned<__half>
                                        : launch_aligned<__nv_bfloat16>;
  const cudaError_t error = run(logits, rows, static_cast<int>(columns), targets, losses, ignore_index,
                                static_cast<int>(vocab_size), write_grad, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nanogpt
