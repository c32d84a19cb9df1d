// AdamW over all parameters in one launch for each 512 of them, and one of a single thread that advances the step. GPT-2 124M
// has 148 tensors of parameters (75 without biases), 1.5B has 580 (291).
//
// Per parameter: read p g m v, write p m v (g) and the 16-bit shadow: 28 to 34 bytes, in 128-bit accesses.

#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_kernels.h"
#include "multi_tensor.cuh"

namespace nanogpt {
namespace {

constexpr int kTensors = 512;

struct Table {
  Chunks<kTensors> chunks;
  float* p[kTensors];
  float* g[kTensors];
  float* m[kTensors];
  float* v[kTensors];
  void* shadow[kTensors];
  float decay[kTensors];
};

struct Scalars {
  const float* lr;
  const float* step;
  const float* norm;
  const float* grad_scale;
  double log_beta1, log_beta2;
  float one_minus_beta1, beta2, one_minus_beta2, eps, max_norm;
  bool zero_grad;
};
static_assert(sizeof(Table) + sizeof(Scalars) <= kMaxArguments);

struct Coefficients {
  float lr, grad, step_size, rsqrt_correction2;
};

// The bias corrections 1 - beta^t in double: near t = 1 and beta = 0.999 fp32 would lose three digits.
__device__ Coefficients coefficients(const Scalars& s) {
  const double t = static_cast<double>(*s.step) + 1.0;
  const double correction1 = -expm1(t * s.log_beta1);
  const double correction2 = -expm1(t * s.log_beta2);
  const float scale = s.grad_scale ? *s.grad_scale : 1.0f;
  const float clip = s.max_norm > 0 ? fminf(s.max_norm / (*s.norm / scale + 1e-6f), 1.0f) : 1.0f;
  const float lr = *s.lr;
  return {lr, clip / scale, static_cast<float>(lr / correction1), static_cast<float>(1.0 / sqrt(correction2))};
}

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, float keep, const Coefficients& c,
                                       const Scalars& s) {
  g *= c.grad;
  m += s.one_minus_beta1 * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  p = keep * p - c.step_size * (m / (sqrtf(v) * c.rsqrt_correction2 + s.eps));
}

__device__ __forceinline__ void store_shadow(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_shadow(__half* out, float x) { *out = __float2half_rn(x); }

__device__ __forceinline__ void store_shadow(__nv_bfloat16* out, const float4& x) {
  const __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(pair);
}
__device__ __forceinline__ void store_shadow(__half* out, const float4& x) {
  const __half2 pair[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(pair);
}

__device__ __forceinline__ bool aligned(const void* pointer, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}
__device__ __forceinline__ float4& vector(float* pointer) { return *reinterpret_cast<float4*>(pointer); }

template <typename Shadow>
__global__ void __launch_bounds__(kThreads)
adamw_kernel(const __grid_constant__ Table table, const __grid_constant__ Scalars s) {
  const bool skip = s.norm && !isfinite(*s.norm);
  if (skip && !s.zero_grad) return;

  __shared__ Coefficients shared;
  if (threadIdx.x == 0 && !skip) shared = coefficients(s);
  __syncthreads();
  const Coefficients c = shared;

  for_each_chunk(table.chunks, [&](int i, int64_t element, int64_t left) {
    float* const g = table.g[i] + element;
    float* const p = table.p[i] + element;
    float* const m = table.m[i] + element;
    float* const v = table.v[i] + element;
    Shadow* const shadow = table.shadow[i] ? static_cast<Shadow*>(table.shadow[i]) + element : nullptr;
    const bool whole = left >= 4 && aligned(p, 16) && aligned(g, 16) && aligned(m, 16) && aligned(v, 16) && aligned(shadow, 8);
    const int n = left < 4 ? static_cast<int>(left) : 4;
    if (skip) {
      for (int k = 0; k < n; ++k) g[k] = 0.0f;
      return;
    }
    const float keep = 1.0f - c.lr * table.decay[i];
    if (whole) {
      float4 p4 = vector(p), m4 = vector(m), v4 = vector(v);
      const float4 g4 = vector(g);
      update(p4.x, g4.x, m4.x, v4.x, keep, c, s);
      update(p4.y, g4.y, m4.y, v4.y, keep, c, s);
      update(p4.z, g4.z, m4.z, v4.z, keep, c, s);
      update(p4.w, g4.w, m4.w, v4.w, keep, c, s);
      vector(p) = p4;
      vector(m) = m4;
      vector(v) = v4;
      if (s.zero_grad) vector(g) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (shadow) store_shadow(shadow, p4);
    } else {
      for (int k = 0; k < n; ++k) {
        update(p[k], g[k], m[k], v[k], keep, c, s);
        if (s.zero_grad) g[k] = 0.0f;
        if (shadow) store_shadow(shadow + k, p[k]);
      }
    }
  });
}

// Apart from the update, whose blocks all read the step.
__global__ void advance_step(float* step, const float* norm) {
  if (!norm || isfinite(*norm)) *step += 1.0f;
}

}  // namespace

const char* adamw(const AdamW& args, CUstream_st* stream) {
  const Scalars scalars = {
      args.lr,
      args.step,
      args.norm,
      args.grad_scale,
      std::log(args.beta1),
      std::log(args.beta2),
      static_cast<float>(1.0 - args.beta1),
      static_cast<float>(args.beta2),
      static_cast<float>(1.0 - args.beta2),
      static_cast<float>(args.eps),
      static_cast<float>(args.max_norm),
      args.zero_grad,
  };
  const auto kernel = args.shadow_type == Type::fp16 ? adamw_kernel<__half> : adamw_kernel<__nv_bfloat16>;
  const int resident = resident_blocks(kernel);
  for (int64_t begin = 0; begin < args.count; begin += kTensors) {
    Table table;
    const int n = static_cast<int>(std::min<int64_t>(kTensors, args.count - begin));
    table.chunks.assign(n, args.numels + begin);
    for (int i = 0; i < n; ++i) {
      table.p[i] = args.params[begin + i];
      table.g[i] = args.grads[begin + i];
      table.m[i] = args.exp_avgs[begin + i];
      table.v[i] = args.exp_avg_sqs[begin + i];
      table.shadow[i] = args.shadows[begin + i];
      table.decay[i] = static_cast<float>(args.weight_decays[begin + i]);
    }
    if (table.chunks.total() == 0) continue;
    const int blocks = static_cast<int>(std::min<int64_t>(table.chunks.total(), resident));
    kernel<<<blocks, kThreads, 0, stream>>>(table, scalars);
  }
  advance_step<<<1, 1, 0, stream>>>(args.step, args.norm);
  return last_error();
}

}  // namespace nanogpt
