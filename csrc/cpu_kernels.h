// The CPU kernels as a table of functions, compiled once per instruction set and chosen at run time. Torch-free; each works
// on the rows or elements [begin, end) that its caller gives to one thread.
//
// rows M, columns C (channels) or V (vocabulary). Matrices are contiguous. Statistics and accumulators are fp32.
#pragma once

#include <stdint.h>

#include "types.h"

namespace nanogpt {

struct AdamWCoefficients {
  float keep;  // 1 - lr * weight_decay
  float grad;  // what gradients are multiplied by: clipping and loss scale
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float step_size, rsqrt_correction2;
  bool zero_grad;
};

struct CpuKernels {
  double (*sum_squares)(const float* g, int64_t n);

  void (*adamw)(float* p, float* g, float* m, float* v, void* shadow, Type shadow_type, int64_t begin, int64_t end,
                const AdamWCoefficients& c);

  // losses = logsumexp(x) - x[target], x <- softmax(x) - onehot, as in cross_entropy.cu.
  void (*cross_entropy)(Type type, void* logits, const int64_t* targets, float* losses, int64_t begin, int64_t end,
                        int64_t columns, int64_t ignore_index, int64_t vocab_size, bool write_grad);

  // r = x + residual (not written without a residual), y = (r - mean) rstd w + b; statistics (M, 2).
  void (*layer_norm)(Type type, const void* x, const void* residual, const float* weight, const float* bias, void* y,
                     void* r, float* statistics, int64_t begin, int64_t end, int64_t columns, float eps);

  // dx = rstd (g - mean(g) - n mean(g n)) + dr with n = (r - mean) rstd, g = dy w; dw += dy n, db += dy unless null.
  void (*layer_norm_backward)(Type type, const void* dy, const void* dr, const void* r, const float* weight,
                              const float* statistics, void* dx, float* dw, float* db, int64_t begin, int64_t end,
                              int64_t columns);

  // x <- gelu(x + bias), derivative = gelu'(x + bias) unless null.
  void (*gelu)(Type type, void* x, void* derivative, const float* bias, bool tanh, int64_t begin, int64_t end,
               int64_t columns);

  // dy <- dy * derivative; dbias += its sum over rows unless null.
  void (*gelu_backward)(Type type, void* dy, const void* derivative, float* dbias, int64_t begin, int64_t end,
                        int64_t columns);

  // Causal attention of the heads [begin, end) of B * H: qkv (B, T, 3C), out (B, T, C), lse (B, H, T); see cpu_attention.h.
  int64_t (*attention_scratch)(int64_t length, int64_t head_size);  // floats that a thread needs
  void (*attention)(Type type, const void* qkv, void* out, float* lse, int64_t begin, int64_t end, int64_t length,
                    int64_t heads, int64_t head_size, float scale, float* scratch);
  void (*attention_backward)(Type type, const void* dout, const void* qkv, const float* lse, void* dqkv, int64_t begin,
                             int64_t end, int64_t length, int64_t heads, int64_t head_size, float scale, float* scratch);
};

extern const CpuKernels kernels_baseline;
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;

}  // namespace nanogpt
