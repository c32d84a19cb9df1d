// Compiles only where csrc/cublaslt.h says what NVIDIA's cublasLt.h says.

#include <cublasLt.h>

#include <array>

#include "../csrc/cublaslt.h"

namespace lt = nanogpt::lt;

static_assert(lt::kCompute32F == CUBLAS_COMPUTE_32F);
static_assert(lt::kFloat == CUDA_R_32F && lt::kHalf == CUDA_R_16F && lt::kBFloat16 == CUDA_R_16BF);
static_assert(lt::kOpN == CUBLAS_OP_N && lt::kOpT == CUBLAS_OP_T);
static_assert(lt::kTransA == CUBLASLT_MATMUL_DESC_TRANSA && lt::kTransB == CUBLASLT_MATMUL_DESC_TRANSB);
static_assert(lt::kEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE && lt::kBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(lt::kAuxPointer == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
static_assert(lt::kAuxLd == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
static_assert(lt::kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(lt::kAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(lt::kAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(lt::kAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(lt::kAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(lt::kGelu == CUBLASLT_EPILOGUE_GELU && lt::kGeluBias == CUBLASLT_EPILOGUE_GELU_BIAS);
static_assert(lt::kGeluAux == CUBLASLT_EPILOGUE_GELU_AUX && lt::kGeluAuxBias == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
static_assert(lt::kDGelu == CUBLASLT_EPILOGUE_DGELU && lt::kDGeluBGrad == CUBLASLT_EPILOGUE_DGELU_BGRAD);
static_assert(CUBLAS_STATUS_SUCCESS == 0);

static_assert(sizeof(lt::Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(lt::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(lt::HeuristicResult, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(lt::HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));

// Both declarations of a function have arguments of the same sizes, in the same order.
template <typename R, typename... A>
constexpr std::array<size_t, sizeof...(A) + 1> sizes(R (*)(A...)) {
  return {sizeof(R), sizeof(A)...};
}
template <size_t N, size_t M>
constexpr bool equal(const std::array<size_t, N>& a, const std::array<size_t, M>& b) {
  if (N != M) return false;
  for (size_t i = 0; i < N; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}
namespace nanogpt::lt {
#define COMPARE(name, arguments) static_assert(equal(sizes(static_cast<Status(*) arguments>(nullptr)), sizes(&cublasLt##name)));
CUBLASLT_FUNCTIONS(COMPARE)
}  // namespace nanogpt::lt
