// What is used of cuBLASLt's C interface, declared here and not by cublasLt.h: not every toolkit brings that header, and the
// library is the one that PyTorch has loaded. tests/test_cublaslt.py compares all of it with the header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nanogpt::lt {

using Status = int;  // enumerations are ints in its ABI
using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;

constexpr int kCompute32F = 68;                       // CUBLAS_COMPUTE_32F
constexpr int kFloat = 0, kHalf = 2, kBFloat16 = 14;  // CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
constexpr int32_t kOpN = 0, kOpT = 1;                 // CUBLAS_OP_N, CUBLAS_OP_T

// CUBLASLT_MATMUL_DESC_*
constexpr int kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxLd = 12;

// CUBLASLT_MATMUL_PREF_*
constexpr int kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;

// CUBLASLT_EPILOGUE_*
constexpr uint32_t kGelu = 32, kGeluBias = 36, kGeluAux = 160, kGeluAuxBias = 164, kDGelu = 192, kDGeluBGrad = 208;

struct Algorithm {
  uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

// Its functions, without the prefix cublasLt: NAME, arguments.
#define CUBLASLT_FUNCTIONS(F)                                                                                             \
  F(MatmulDescCreate, (MatmulDesc*, int compute, int scale))                                                              \
  F(MatmulDescSetAttribute, (MatmulDesc, int attribute, const void* value, size_t bytes))                                 \
  F(MatmulDescDestroy, (MatmulDesc))                                                                                      \
  F(MatrixLayoutCreate, (MatrixLayout*, int type, uint64_t rows, uint64_t cols, int64_t ld))                              \
  F(MatrixLayoutDestroy, (MatrixLayout))                                                                                  \
  F(MatmulPreferenceCreate, (Preference*))                                                                                \
  F(MatmulPreferenceSetAttribute, (Preference, int attribute, const void* value, size_t bytes))                           \
  F(MatmulPreferenceDestroy, (Preference))                                                                                \
  F(MatmulAlgoGetHeuristic, (Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c, MatrixLayout d,          \
                             Preference, int wanted, HeuristicResult*, int* found))                                       \
  F(Matmul, (Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout, const void* b, MatrixLayout,             \
             const void* beta, const void* c, MatrixLayout, void* d, MatrixLayout, const Algorithm*, void* workspace,     \
             size_t workspace_bytes, void* stream))

}  // namespace nanogpt::lt
