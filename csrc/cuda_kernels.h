// Launchers of the CUDA kernels, free of torch: raw pointers and a stream in, null or an error message out.
// cudaStream_t is a CUstream_st*, so that the binding needs no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "types.h"

struct CUstream_st;

namespace nanogpt {

// One AdamW update. Arrays of `count` entries on the host hold device pointers; scalars that are pointers lie on the device.
struct AdamW {
  int64_t count;
  float* const* params;
  float* const* grads;
  float* const* exp_avgs;
  float* const* exp_avg_sqs;
  void* const* shadows;  // an entry may be null
  const int64_t* numels;
  const double* weight_decays;
  Type shadow_type;
  const float* lr;
  float* step;
  const float* norm;        // may be null
  const float* grad_scale;  // may be null
  double beta1, beta2, eps, max_norm;
  bool zero_grad;
};
const char* adamw(const AdamW& args, CUstream_st* stream);

// Doubles that grad_norm needs as scratch on the current device for this many tensors.
int64_t grad_norm_scratch(int64_t count);
const char* grad_norm(int64_t count, const float* const* grads, const int64_t* numels, double* scratch, float* norm,
                      CUstream_st* stream);

// logits (rows, columns) contiguous; overwritten by softmax - onehot if write_grad.
const char* cross_entropy_rows(void* logits, Type type, int64_t rows, int64_t columns, const int64_t* targets,
                               float* losses, int64_t ignore_index, int64_t vocab_size, bool write_grad,
                               CUstream_st* stream);

// One product with GELU's tanh form (forward) or its gradient (backward) in the epilogue; all contiguous, fp16 or bf16.
struct LinearGelu {
  bool backward;
  Type type;
  int device;
  int64_t m, n, k;
  const void* a;  // (m, k): x forward, dy backward
  const void* w;  // (n, k) forward, (k, n) backward
  void* d;        // (m, n): gelu(pre) forward, the gradient of pre backward
  void* bias;     // (n,) read forward, its gradient written backward; may be null
  void* aux;      // (m, n): pre, written forward unless null, read backward
};
// Finds cuBLASLt's functions in the library of this CUDA release, PyTorch's, on the first call, ahead of all below. Returns why
// cuBLASLt cannot be used at all; empty if it can.
std::string linear_gelu_load(int64_t cuda_major);
// The same again.
std::string linear_gelu_missing();
// The bytes of workspace that linear_gelu needs, or why there is no algorithm. Chosen once per shape, device and alignment.
std::string linear_gelu_workspace(void* handle, const LinearGelu& x, size_t* bytes);
// handle: cuBLASLt's, or cuBLAS's, which is one. Returns an error, or nothing.
std::string linear_gelu(void* handle, const LinearGelu& x, void* workspace, CUstream_st* stream);

}  // namespace nanogpt
