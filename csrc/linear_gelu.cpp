// Matrix products with GELU or its gradient in cuBLASLt's epilogue. Its GELU is the tanh form.
//
// cuBLASLt's matrices are column-major, ours row-major: a row-major (rows, cols) matrix is the column-major (cols, rows) one of
// the same memory. So D (M, N) = A W' is asked for as D^T (N, M) = W'^T A^T, the operands swapped:
//
//   forward   W (N, K): post = gelu(A W^T + bias)     first operand: W as (K, N), transposed;  bias: one value a row of D^T
//   backward  W (K, N): dpre = (A W) * gelu'(pre)     first operand: W as (N, K), as it is;    dbias: sums along rows of D^T
//
// M rows of A, N columns of D, K the reduction; A, W, D and aux (pre) contiguous.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>

#include "cublaslt.h"
#include "cuda_kernels.h"

namespace nanogpt {
namespace {

using namespace lt;

constexpr size_t kWorkspace = 32 << 20;  // what NVIDIA recommends for Hopper; an algorithm takes what it needs of it

struct Library {
#define MEMBER(name, arguments) Status(*name) arguments = nullptr;
  CUBLASLT_FUNCTIONS(MEMBER)
#undef MEMBER
  std::string missing = "linear_gelu_load has not been called";  // why it cannot be used

  // Only the library that PyTorch has loaded: the handle is PyTorch's, and another copy or release would not know it.
  void load(int64_t cuda_major) {
    const std::string soname = "libcublasLt.so." + std::to_string(cuda_major);
    void* library = dlopen(soname.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) {
      missing = "PyTorch has loaded no " + soname;
      return;
    }
    missing.clear();
#define LOAD(name, arguments)                                                     \
  name = reinterpret_cast<decltype(name)>(dlsym(library, "cublasLt" #name));      \
  if (name == nullptr) missing = soname + " has no function cublasLt" #name;
    CUBLASLT_FUNCTIONS(LOAD)
#undef LOAD
  }
};

Library loaded;
const Library& library() { return loaded; }

// An object of the library's, destroyed at the end of the scope.
struct Owned {
  explicit Owned(Status (*destroy)(void*)) : destroy(destroy) {}
  ~Owned() {
    if (object) destroy(object);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  void* object = nullptr;
  Status (*destroy)(void*);
};

// The largest power of two up to 256 that divides an address; 256 of null.
uint32_t alignment(const void* pointer) {
  const uint32_t low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer)) | 256;
  return low & (~low + 1);
}

uint32_t epilogue(const LinearGelu& x) {
  if (x.backward) return x.bias ? kDGeluBGrad : kDGelu;
  if (x.aux) return x.bias ? kGeluAuxBias : kGeluAux;
  return x.bias ? kGeluBias : kGelu;
}

// Everything that cuBLASLt looks at when it chooses.
using Key = std::array<int64_t, 12>;
Key key(const LinearGelu& x) {
  return {x.device,        static_cast<int>(x.type), epilogue(x),    x.m,
          x.n,             x.k,                      alignment(x.a), alignment(x.w),
          alignment(x.d),  alignment(x.aux),         alignment(x.bias), x.backward};
}

struct Plan {
  Algorithm algorithm;
  size_t workspace_bytes;
  std::string missing;
};
std::mutex mutex;
std::map<Key, Plan> plans;

std::string failed(const char* function, Status status) {
  return std::string("cublasLt") + function + " returned status " + std::to_string(status);
}

// The operation and its matrices as cuBLASLt describes them; `error` names the call that failed.
struct Problem {
  Owned op{library().MatmulDescDestroy};
  Owned w{library().MatrixLayoutDestroy}, a{library().MatrixLayoutDestroy}, d{library().MatrixLayoutDestroy};
  std::string error;

  explicit Problem(const LinearGelu& x) {
    const int type = x.type == Type::bf16 ? kBFloat16 : kHalf;
    check("MatmulDescCreate", library().MatmulDescCreate(&op.object, kCompute32F, kFloat));
    layout(w, type, x.backward ? x.n : x.k, x.backward ? x.k : x.n);
    layout(a, type, x.k, x.m);
    layout(d, type, x.n, x.m);
    set(kTransA, x.backward ? kOpN : kOpT);
    set(kTransB, kOpN);
    set(kEpilogue, epilogue(x));
    // Ahead of the heuristic, which takes the alignment of bias and aux from their addresses.
    if (x.bias) set(kBiasPointer, x.bias);
    if (x.aux) {
      set(kAuxPointer, x.aux);
      set(kAuxLd, x.n);
    }
  }

 private:
  void check(const char* function, Status status) {
    if (status != 0 && error.empty()) error = failed(function, status);
  }
  void layout(Owned& matrix, int type, int64_t rows, int64_t cols) {
    if (!error.empty()) return;
    check("MatrixLayoutCreate", library().MatrixLayoutCreate(&matrix.object, type, rows, cols, rows));
  }
  template <typename T>
  void set(int attribute, T value) {
    if (!error.empty()) return;
    check("MatmulDescSetAttribute", library().MatmulDescSetAttribute(op.object, attribute, &value, sizeof value));
  }
};

// The heuristic's first choice.
Plan choose(void* handle, const LinearGelu& x) {
  const Problem problem(x);
  if (!problem.error.empty()) return {{}, 0, problem.error};
  Owned preference{library().MatmulPreferenceDestroy};
  Status status = library().MatmulPreferenceCreate(&preference.object);
  if (status != 0) return {{}, 0, failed("MatmulPreferenceCreate", status)};
  const auto prefer = [&](int attribute, auto value) {
    if (status == 0) {
      status = library().MatmulPreferenceSetAttribute(preference.object, attribute, &value, sizeof value);
    }
  };
  prefer(kMaxWorkspace, kWorkspace);
  prefer(kAlignmentA, alignment(x.w));
  prefer(kAlignmentB, alignment(x.a));
  prefer(kAlignmentC, alignment(x.d));
  prefer(kAlignmentD, alignment(x.d));
  if (status != 0) return {{}, 0, failed("MatmulPreferenceSetAttribute", status)};
  HeuristicResult result = {};
  int found = 0;
  status = library().MatmulAlgoGetHeuristic(handle, problem.op.object, problem.w.object, problem.a.object,
                                            problem.d.object, problem.d.object, preference.object, 1, &result, &found);
  if (status == 0 && found > 0) status = result.state;
  if (status != 0 || found == 0) {
    return {{}, 0, "cuBLASLt has no algorithm for this shape (status " + std::to_string(status) + ")"};
  }
  return {result.algorithm, result.workspace_bytes, ""};
}

const Plan& plan(void* handle, const LinearGelu& x) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = plans.try_emplace(key(x));  // entries never move, and are never removed
  if (is_new) entry->second = choose(handle, x);
  return entry->second;
}

}  // namespace

std::string linear_gelu_load(int64_t cuda_major) {
  static std::once_flag once;
  std::call_once(once, [&] { loaded.load(cuda_major); });
  return loaded.missing;
}

std::string linear_gelu_missing() { return library().missing; }

std::string linear_gelu_workspace(void* handle, const LinearGelu& x, size_t* bytes) {
  const Plan& chosen = plan(handle, x);
  *bytes = chosen.workspace_bytes;
  return chosen.missing;
}

std::string linear_gelu(void* handle, const LinearGelu& x, void* workspace, CUstream_st* stream) {
  const Plan& chosen = plan(handle, x);
  const Problem problem(x);
  if (!problem.error.empty()) return problem.error;
  const float one = 1.0f, zero = 0.0f;
  const Status status =
      library().Matmul(handle, problem.op.object, &one, x.w, problem.w.object, x.a, problem.a.object, &zero, x.d,
                       problem.d.object, x.d, problem.d.object, &chosen.algorithm, workspace, chosen.workspace_bytes, stream);
  return status == 0 ? "" : failed("Matmul", status);
}

}  // namespace nanogpt
