// A libcublasLt for CPUs, which tests/test_cublaslt.py puts under csrc/linear_gelu.cpp: column-major products of bf16 matrices,
// as NVIDIA documents them, that refuse what the real library refuses. With -DDRIVER: a C function around linear_gelu.cpp.

#ifdef DRIVER
#include <cstring>

#include "../csrc/cuda_kernels.h"

// 0: done; 1: no algorithm; 2: an error; the message goes to `message`.
extern "C" int run(int cuda_major, int backward, long m, long n, long k, void* a, void* w, void* d, void* bias, void* aux, char* message) {
  using namespace nanogpt;
  const LinearGelu x = {backward != 0, Type::bf16, 0, m, n, k, a, w, d, bias, aux};
  size_t bytes = 0;
  std::string text = linear_gelu_load(cuda_major);
  int code = text.empty() ? 0 : 1;
  if (!code) code = (text = linear_gelu_workspace(nullptr, x, &bytes)).empty() ? 0 : 1;
  if (!code) code = (text = linear_gelu(nullptr, x, bytes ? new char[bytes] : nullptr, nullptr)).empty() ? 0 : 2;
  std::strncpy(message, text.c_str(), 255);
  return code;
}
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>

#include "../csrc/cublaslt.h"

using namespace nanogpt::lt;

namespace {

constexpr Status kInvalid = 7, kNotSupported = 15;
constexpr uint64_t kMark = 0x5eed;
constexpr size_t kNeeds = 512;  // bytes of workspace

struct Desc {
  std::map<int, int64_t> values;
  int64_t get(int attribute, int64_t missing = 0) const {
    const auto at = values.find(attribute);
    return at == values.end() ? missing : at->second;
  }
};
struct Layout {
  int type;
  int64_t rows, cols, ld;
};

float decode(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
uint16_t encode(float x) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double inner(double x) { return std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x); }
double gelu(double x) { return 0.5 * x * (1 + std::tanh(inner(x))); }
double dgelu(double x) {
  const double t = std::tanh(inner(x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

Status set(void* object, int attribute, const void* value, size_t bytes) {
  int64_t wide = 0;
  std::memcpy(&wide, value, bytes);
  static_cast<Desc*>(object)->values[attribute] = wide;
  return 0;
}

// What the header asks of an operation with these matrices.
Status judge(const Desc& op, const Layout& a, const Layout& b, const Layout& d) {
  const int64_t epilogue = op.get(kEpilogue, 1);
  const bool bias = epilogue & (4 | 16), aux = epilogue & 128;
  if (bias != (op.get(kBiasPointer) != 0) || aux != (op.get(kAuxPointer) != 0)) return kInvalid;
  if (aux && (op.get(kAuxLd) % 8 || op.get(kAuxLd) < d.rows || op.get(kAuxPointer) % 16)) return kInvalid;
  const bool ta = op.get(kTransA), tb = op.get(kTransB);
  const int64_t m = ta ? a.cols : a.rows, k = ta ? a.rows : a.cols;
  if (m != d.rows || (tb ? b.cols : b.rows) != k || (tb ? b.rows : b.cols) != d.cols) return kInvalid;
  for (const Layout& x : {a, b, d}) {
    if (x.type != kBFloat16 || x.ld < x.rows) return kInvalid;
  }
  return 0;
}

}  // namespace

extern "C" {
int heuristics = 0;  // calls

Status cublasLtMatmulDescCreate(MatmulDesc* out, int compute, int scale) {
  *out = new Desc;
  return compute == 68 && scale == 0 ? 0 : kInvalid;
}
Status cublasLtMatmulDescSetAttribute(MatmulDesc d, int attribute, const void* value, size_t n) {
  const std::map<int, size_t> sizes = {{kTransA, 4}, {kTransB, 4}, {kEpilogue, 4}, {kBiasPointer, 8}, {kAuxPointer, 8}, {kAuxLd, 8}};
  const auto at = sizes.find(attribute);
  return at == sizes.end() || at->second != n ? kInvalid : set(d, attribute, value, n);
}
Status cublasLtMatmulDescDestroy(MatmulDesc d) { return delete static_cast<Desc*>(d), 0; }
Status cublasLtMatrixLayoutCreate(MatrixLayout* out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *out = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld};
  return 0;
}
Status cublasLtMatrixLayoutDestroy(MatrixLayout x) { return delete static_cast<Layout*>(x), 0; }
Status cublasLtMatmulPreferenceCreate(Preference* out) { return *out = new Desc, 0; }
Status cublasLtMatmulPreferenceSetAttribute(Preference p, int attribute, const void* value, size_t n) {
  return n == (attribute == kMaxWorkspace ? 8 : 4) ? set(p, attribute, value, n) : kInvalid;
}
Status cublasLtMatmulPreferenceDestroy(Preference p) { return delete static_cast<Desc*>(p), 0; }

Status cublasLtMatmulAlgoGetHeuristic(Handle, MatmulDesc desc, MatrixLayout a, MatrixLayout b, MatrixLayout, MatrixLayout d,
                                      Preference preference, int wanted, HeuristicResult* results, int* found) {
  ++heuristics;
  *found = 0;
  const Desc& p = *static_cast<Desc*>(preference);
  const auto& [A, B, D] = std::tie(*static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(d));
  if (const Status status = judge(*static_cast<Desc*>(desc), A, B, D)) return status;
  if (D.cols == 77) return kNotSupported;  // a shape that nothing serves
  for (const int attribute : {kAlignmentA, kAlignmentB, kAlignmentD}) {
    if (p.get(attribute, 256) < 16) return kNotSupported;
  }
  if (wanted < 1 || p.get(kMaxWorkspace) < static_cast<int64_t>(kNeeds)) return kNotSupported;
  results[0] = {{{kMark}}, kNeeds, 0, 1.0f, {}};
  *found = 1;
  return 0;
}

Status cublasLtMatmul(Handle, MatmulDesc desc, const void* alpha, const void* pa, MatrixLayout a, const void* pb, MatrixLayout b,
                      const void* beta, const void*, MatrixLayout, void* pd, MatrixLayout d, const Algorithm* algorithm,
                      void* workspace, size_t workspace_bytes, void*) {
  const Desc& op = *static_cast<Desc*>(desc);
  const auto& [A, B, D] = std::tie(*static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(d));
  if (const Status status = judge(op, A, B, D)) return status;
  if (algorithm->data[0] != kMark || workspace == nullptr || workspace_bytes < kNeeds) return kInvalid;
  if (*static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0) return kInvalid;
  const auto* x = static_cast<const uint16_t*>(pa);
  const auto* y = static_cast<const uint16_t*>(pb);
  auto* out = static_cast<uint16_t*>(pd);
  auto* bias = reinterpret_cast<uint16_t*>(op.get(kBiasPointer));
  auto* aux = reinterpret_cast<uint16_t*>(op.get(kAuxPointer));
  const int64_t epilogue = op.get(kEpilogue, 1);
  const bool ta = op.get(kTransA), tb = op.get(kTransB);
  const int64_t k = ta ? A.rows : A.cols;
  for (int64_t i = 0; i < D.rows; ++i) {
    double gradient = 0;  // of the bias: sums along rows
    for (int64_t j = 0; j < D.cols; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += decode(x[ta ? l + i * A.ld : i + l * A.ld]) * decode(y[tb ? j + l * B.ld : l + j * B.ld]);
      }
      if (epilogue & 4) sum += decode(bias[i]);
      if (epilogue & 32) {
        if (aux) aux[i + j * op.get(kAuxLd)] = encode(sum);
        sum = gelu(sum);
      } else if (epilogue & 64) {
        sum *= dgelu(decode(aux[i + j * op.get(kAuxLd)]));
      }
      gradient += sum;
      out[i + j * D.ld] = encode(sum);
    }
    if (epilogue & 16) bias[i] = encode(gradient);
  }
  return 0;
}
}
#endif
