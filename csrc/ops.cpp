// nanogpt_cpu: the schemas of the ops that CPUs have, and their CPU implementations. nanogpt_cuda (ops_cuda.cpp) adds CUDA's.
//
// Only PyTorch's stable ABI is used, so one build serves several releases. Every op changes its declared arguments in place
// or returns new tensors; none keeps state. Work is cut into pieces of a fixed size, so that no result depends on the number
// of threads.

#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "cpu_amx.h"
#include "cpu_kernels.h"

#ifdef NANOGPT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nanogpt {
namespace {

#ifdef NANOGPT_AMX
// Whether this CPU has what cpu_amx.cpp needs and the operating system lets this process use it.
bool ask_for_amx() {
  uint32_t a, b, c, d;
  __cpuid_count(7, 0, a, b, c, d);
  const bool bf16 = d & 1u << 22, tiles = d & 1u << 24;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return bf16 && tiles && __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// The best instruction set of this machine; NANOGPT_CPU=baseline|avx2|avx512|amx asks for one, for tests.
std::pair<std::string, const CpuKernels*> choose_kernels() {
  std::vector<std::pair<std::string, const CpuKernels*>> available;
#ifdef NANOGPT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#ifdef NANOGPT_AMX
      if (ask_for_amx()) available.emplace_back("amx", &kernels_avx512);
#endif
      available.emplace_back("avx512", &kernels_avx512);
    }
    available.emplace_back("avx2", &kernels_avx2);
  }
#endif
  available.emplace_back("baseline", &kernels_baseline);
  const char* const wanted = std::getenv("NANOGPT_CPU");
  if (wanted == nullptr) return available.front();
  for (const auto& entry : available) {
    if (entry.first == wanted) return entry;
  }
  STD_TORCH_CHECK(false, "NANOGPT_CPU=", wanted, ": this machine has ", available.front().first, " at best");
}

const std::pair<std::string, const CpuKernels*>& chosen() {
  static const auto choice = choose_kernels();
  return choice;
}
const CpuKernels& cpu() { return *chosen().second; }

std::string cpu_instructions() { return chosen().first; }
bool cpu_has_amx() { return chosen().first == "amx"; }

// Calls f(begin, end) on ranges of rows, in parallel where there is enough to do.
constexpr int64_t kGrain = 8192;  // elements that pay for a thread
template <typename F>
void over_rows(int64_t rows, int64_t columns, F f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)), f);
}

// Calls f(tensor, begin, end, piece) for pieces of at most kPiece elements of all tensors, in parallel.
constexpr int64_t kPiece = 16384;
template <typename F>
int64_t over_tensors(const std::vector<int64_t>& numels, F f) {
  std::vector<int64_t> first(numels.size() + 1, 0);
  for (size_t i = 0; i < numels.size(); ++i) first[i + 1] = first[i] + (numels[i] + kPiece - 1) / kPiece;
  const auto run = [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t piece = begin; piece < end; ++piece) {
      while (piece >= first[i + 1]) ++i;
      const int64_t at = (piece - first[i]) * kPiece;
      f(i, at, std::min(numels[i], at + kPiece), piece);
    }
  };
  torch::stable::parallel_for(0, first.back(), 1, run);
  return first.back();
}

void adamw_cpu(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const Tensors& shadows, const Tensor& lr, const Tensor& step, const std::vector<double>& weight_decays,
               double beta1, double beta2, double eps, const std::optional<Tensor>& norm, double max_norm,
               const std::optional<Tensor>& grad_scale, bool zero_grad) {
  if (params.empty()) return;
  STD_TORCH_CHECK(weight_decays.size() == params.size(), "weight_decays: ", weight_decays.size(), " values for ",
                  params.size(), " parameters");
  STD_TORCH_CHECK(max_norm <= 0 || norm, "max_norm ", max_norm, " needs norm");
  const auto p = pointers(params, "params", params), g = pointers(grads, "grads", params);
  const auto m = pointers(exp_avgs, "exp_avgs", params), v = pointers(exp_avg_sqs, "exp_avg_sqs", params);
  const auto shadow = shadow_pointers(shadows, params);
  const Type shadow_type = shadows.empty() ? Type::bf16 : type_of(shadows[0]);
  const auto numels = sizes(params);
  const float rate = *optional_scalar(lr, "lr");
  const float* const norm_value = optional_scalar(norm, "norm");
  const float* const scale_value = optional_scalar(grad_scale, "grad_scale");
  check(step, "step", ScalarType::Float);

  if (norm_value && !std::isfinite(*norm_value)) {
    if (zero_grad) {
      over_tensors(numels, [&](size_t i, int64_t begin, int64_t end, int64_t) { std::fill(g[i] + begin, g[i] + end, 0.0f); });
    }
    return;
  }
  const double t = static_cast<double>(*pointer<float>(step)) + 1.0;
  const float scale = scale_value ? *scale_value : 1.0f;
  const float clip = max_norm > 0 ? std::min(static_cast<float>(max_norm) / (*norm_value / scale + 1e-6f), 1.0f) : 1.0f;
  AdamWCoefficients c;
  c.grad = clip / scale;
  c.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  c.beta2 = static_cast<float>(beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  c.eps = static_cast<float>(eps);
  c.step_size = static_cast<float>(rate / (1.0 - std::pow(beta1, t)));
  c.rsqrt_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
  c.zero_grad = zero_grad;
  over_tensors(numels, [&](size_t i, int64_t begin, int64_t end, int64_t) {
    AdamWCoefficients own = c;
    own.keep = static_cast<float>(1.0 - rate * weight_decays[i]);
    cpu().adamw(p[i], g[i], m[i], v[i], shadow[i], shadow_type, begin, end, own);
  });
  *pointer<float>(step) = static_cast<float>(t);
}

Tensor grad_norm_cpu(const Tensors& grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one gradient");
  const auto g = pointers(grads, "grads", grads);
  const auto numels = sizes(grads);
  int64_t pieces = 0;
  for (const int64_t n : numels) pieces += (n + kPiece - 1) / kPiece;
  std::vector<double> partials(pieces);
  over_tensors(numels, [&](size_t i, int64_t begin, int64_t end, int64_t piece) {
    partials[piece] = cpu().sum_squares(g[i] + begin, end - begin);
  });
  double sum = 0.0;
  for (const double partial : partials) sum += partial;
  const Tensor norm = torch::stable::new_empty(grads[0], Shape{}, ScalarType::Float);
  *pointer<float>(norm) = static_cast<float>(std::sqrt(sum));
  return norm;
}

void cross_entropy_rows_cpu(const Tensor& logits, const Tensor& targets, const Tensor& losses, int64_t ignore_index,
                            int64_t vocab_size, bool write_grad) {
  check_rows(logits, targets, losses, vocab_size);
  const Type type = type_of(logits);
  void* const x = logits.mutable_data_ptr();
  const int64_t columns = logits.size(1);
  over_rows(logits.size(0), columns, [&](int64_t begin, int64_t end) {
    cpu().cross_entropy(type, x, pointer<int64_t>(targets), pointer<float>(losses), begin, end, columns, ignore_index,
                        vocab_size, write_grad);
  });
}

// (rows, columns) of a tensor seen as a matrix of its last dimension.
std::pair<int64_t, int64_t> matrix(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, "expected at least one dimension");
  const int64_t columns = t.size(t.dim() - 1);
  return {columns ? t.numel() / columns : 0, columns};
}

void check_like(const Tensor& t, const char* name, const Tensor& like) {
  check(t, name, like.scalar_type());
  STD_TORCH_CHECK(t.numel() == like.numel(), name, ": ", t.numel(), " elements instead of ", like.numel());
}

const float* channels(const std::optional<Tensor>& t, const char* name, int64_t columns) {
  if (!t) return nullptr;
  check(*t, name, ScalarType::Float);
  STD_TORCH_CHECK(t->numel() == columns, name, ": ", t->numel(), " values for ", columns, " channels");
  return pointer<const float>(*t);
}

// Sums over rows: one partial sum per block of rows, added up in order. f(begin, end, sums) adds to `count` floats.
template <typename F>
std::vector<float> sum_over_rows(int64_t rows, int64_t columns, int64_t count, F f) {
  const int64_t block = std::max<int64_t>({1, kGrain / std::max<int64_t>(1, columns), (rows + 63) / 64});
  const int64_t blocks = (rows + block - 1) / block;
  std::vector<float> partials(std::max<int64_t>(1, blocks) * count, 0.0f);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * block, std::min(rows, (i + 1) * block), partials.data() + i * count);
  });
  for (int64_t i = 1; i < blocks; ++i) {
    for (int64_t k = 0; k < count; ++k) partials[k] += partials[i * count + k];
  }
  return partials;
}

std::tuple<Tensor, Tensor, Tensor> row_layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                  const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  const auto [rows, columns] = matrix(x);
  const Type type = type_of(x);
  check(x, "x", x.scalar_type());
  if (residual) check_like(*residual, "residual", x);
  const float* const w = channels(weight, "weight", columns);
  const float* const b = channels(bias, "bias", columns);
  Tensor y = torch::stable::empty_like(x);
  Tensor r = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, Shape{0});
  Tensor statistics = torch::stable::new_empty(x, Shape{rows, 2}, ScalarType::Float);
  const void* const add = residual ? residual->const_data_ptr() : nullptr;
  over_rows(rows, columns, [&, columns = columns](int64_t begin, int64_t end) {
    cpu().layer_norm(type, x.const_data_ptr(), add, w, b, y.mutable_data_ptr(), r.mutable_data_ptr(),
                     pointer<float>(statistics), begin, end, columns, static_cast<float>(eps));
  });
  return {y, r, statistics};
}

std::tuple<Tensor, Tensor, Tensor> row_layer_norm_backward(const Tensor& dy, const std::optional<Tensor>& dr,
                                                           const Tensor& r, const Tensor& weight,
                                                           const Tensor& statistics, bool has_bias) {
  const auto [rows, columns] = matrix(r);
  const Type type = type_of(r);
  check(r, "r", r.scalar_type());
  check_like(dy, "dy", r);
  if (dr) check_like(*dr, "dr", r);
  check(statistics, "statistics", ScalarType::Float);
  STD_TORCH_CHECK(statistics.numel() == 2 * rows, "statistics: ", statistics.numel(), " values for ", rows, " rows");
  const float* const w = channels(weight, "weight", columns);
  Tensor dx = torch::stable::empty_like(r);
  Tensor dw = torch::stable::empty_like(weight);
  Tensor db = torch::stable::new_empty(weight, Shape{has_bias ? columns : 0});
  const int64_t width = columns;
  const auto sums = sum_over_rows(rows, width, (has_bias ? 2 : 1) * width, [&](int64_t begin, int64_t end, float* sum) {
    cpu().layer_norm_backward(type, dy.const_data_ptr(), dr ? dr->const_data_ptr() : nullptr, r.const_data_ptr(), w,
                              pointer<const float>(statistics), dx.mutable_data_ptr(), sum,
                              has_bias ? sum + width : nullptr, begin, end, width);
  });
  std::copy_n(sums.data(), width, pointer<float>(dw));
  if (has_bias) std::copy_n(sums.data() + width, width, pointer<float>(db));
  return {dx, dw, db};
}

Tensor gelu_(const Tensor& x, const std::optional<Tensor>& bias, bool tanh, bool want_derivative) {
  const auto [rows, columns] = matrix(x);
  const Type type = type_of(x);
  check(x, "x", x.scalar_type());
  const float* const b = channels(bias, "bias", columns);
  Tensor derivative = want_derivative ? torch::stable::empty_like(x) : torch::stable::new_empty(x, Shape{0});
  void* const out = want_derivative ? derivative.mutable_data_ptr() : nullptr;
  over_rows(rows, columns, [&, columns = columns](int64_t begin, int64_t end) {
    cpu().gelu(type, x.mutable_data_ptr(), out, b, tanh, begin, end, columns);
  });
  return derivative;
}

Tensor gelu_backward_(const Tensor& dy, const Tensor& derivative, bool has_bias) {
  const auto [rows, columns] = matrix(dy);
  const Type type = type_of(dy);
  check(dy, "dy", dy.scalar_type());
  check_like(derivative, "derivative", dy);
  const int64_t count = has_bias ? columns : 0;
  Tensor db = torch::stable::new_empty(dy, Shape{count}, ScalarType::Float);
  const auto sums = sum_over_rows(rows, columns, count, [&, columns = columns](int64_t begin, int64_t end, float* sum) {
    cpu().gelu_backward(type, dy.mutable_data_ptr(), derivative.const_data_ptr(), has_bias ? sum : nullptr, begin, end,
                        columns);
  });
  std::copy_n(sums.data(), count, pointer<float>(db));
  return db;
}

struct Heads {
  int64_t batch, length, heads, size;
};

// Shape of packed qkv (B, T, 3 * heads * size).
Heads check_qkv(const Tensor& qkv, int64_t n_head) {
  check(qkv, "qkv", qkv.scalar_type());
  STD_TORCH_CHECK(qkv.dim() == 3, "qkv: expected (B, T, 3C), got ", qkv.dim(), " dimensions");
  STD_TORCH_CHECK(n_head > 0 && qkv.size(2) > 0 && qkv.size(2) % (3 * n_head) == 0, "qkv: ", qkv.size(2),
                  " channels for ", n_head, " heads");
  return {qkv.size(0), qkv.size(1), n_head, qkv.size(2) / (3 * n_head)};
}

std::tuple<Tensor, Tensor> head_attention(const Tensor& qkv, int64_t n_head, double scale) {
  const Heads s = check_qkv(qkv, n_head);
  const Type type = type_of(qkv);
  Tensor out = torch::stable::new_empty(qkv, Shape{s.batch, s.length, s.heads * s.size});
  Tensor lse = torch::stable::new_empty(qkv, Shape{s.batch, s.heads, s.length}, ScalarType::Float);
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[cpu().attention_scratch(s.length, s.size)]);
    cpu().attention(type, qkv.const_data_ptr(), out.mutable_data_ptr(), pointer<float>(lse), begin, end, s.length, s.heads,
                    s.size, static_cast<float>(scale), scratch.get());
  });
  return {out, lse};
}

Tensor head_attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& lse, int64_t n_head, double scale) {
  const Heads s = check_qkv(qkv, n_head);
  const Type type = type_of(qkv);
  check(dout, "dout", qkv.scalar_type());
  STD_TORCH_CHECK(3 * dout.numel() == qkv.numel(), "dout: ", dout.numel(), " elements for ", qkv.numel(), " of qkv");
  check(lse, "lse", ScalarType::Float);
  STD_TORCH_CHECK(lse.numel() == s.batch * s.heads * s.length, "lse: ", lse.numel(), " values for ",
                  s.batch * s.heads * s.length, " rows");
  Tensor dqkv = torch::stable::empty_like(qkv);
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[cpu().attention_scratch(s.length, s.size)]);
    cpu().attention_backward(type, dout.const_data_ptr(), qkv.const_data_ptr(), pointer<const float>(lse),
                             dqkv.mutable_data_ptr(), begin, end, s.length, s.heads, s.size, static_cast<float>(scale),
                             scratch.get());
  });
  return dqkv;
}

#ifdef NANOGPT_AMX
Matrix matrix_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected Float, got ", toString(t.scalar_type()));
  STD_TORCH_CHECK(t.stride(0) == 1 || t.stride(1) == 1, name, ": strides ", t.stride(0), " and ", t.stride(1),
                  ", one must be 1");
  return {pointer<const float>(t), t.stride(0), t.stride(1)};
}

constexpr int64_t kSmallProduct = 1 << 20;  // multiplications that do not pay for a second thread

// out = or += a b + bias.
void split_mm_(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool add) {
  STD_TORCH_CHECK(cpu_has_amx(), "split_mm_ needs amx, this is ", chosen().first);
  const Matrix A = matrix_of(a, "a"), B = matrix_of(b, "b"), C = matrix_of(out, "out");
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  STD_TORCH_CHECK(b.size(0) == depth && out.size(0) == rows && out.size(1) == columns, "split_mm_: (", rows, ", ", depth,
                  ") times (", b.size(0), ", ", columns, ") into (", out.size(0), ", ", out.size(1), ")");
  STD_TORCH_CHECK(depth > 0, "split_mm_: nothing to sum over");
  STD_TORCH_CHECK(C.column == 1 || columns <= 1, "out: expected rows of neighbouring elements");
  if (bias) {
    check(*bias, "bias", ScalarType::Float);
    STD_TORCH_CHECK(bias->numel() == columns, "bias: ", bias->numel(), " values for ", columns, " columns");
  }
  const float* const bias_data = bias ? pointer<const float>(*bias) : nullptr;
  float* const c = pointer<float>(out);
  // Each thread takes a rectangle of C, as near to a square as can be: what it packs of A and B, the others pack again.
  const int64_t row_panels = (rows + kAmxPanel - 1) / kAmxPanel, column_panels = (columns + kAmxPanel - 1) / kAmxPanel;
  const int64_t threads = rows * columns * depth < kSmallProduct ? 1 : torch::stable::get_num_threads();
  int64_t down = 1;
  for (int64_t d = 1; d <= threads; ++d) {
    if (threads % d == 0 && row_panels / d + column_panels * d / threads < row_panels / down + column_panels * down / threads) {
      down = d;
    }
  }
  const int64_t across = threads / down;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / across, j = t % across;
      const Range r = {row_panels * i / down * kAmxPanel, std::min(rows, row_panels * (i + 1) / down * kAmxPanel)};
      const Range s = {column_panels * j / across * kAmxPanel,
                       std::min(columns, column_panels * (j + 1) / across * kAmxPanel)};
      amx_multiply(A, B, bias_data, c, C.row, r, s, depth, add);
    }
  });
}
#else
void split_mm_(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool) {
  STD_TORCH_CHECK(false, "split_mm_: built without AMX");
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nanogpt, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] shadows, Tensor lr, Tensor(f!) step, float[] weight_decays, float beta1, float beta2, float eps, "
      "Tensor? norm, float max_norm, Tensor? grad_scale, bool zero_grad) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def(
      "cross_entropy_rows_(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, int ignore_index, int vocab_size, "
      "bool write_grad) -> ()");
  m.def(
      "row_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) "
      "-> (Tensor y, Tensor r, Tensor statistics)");
  m.def(
      "row_layer_norm_backward(Tensor dy, Tensor? dr, Tensor r, Tensor weight, Tensor statistics, bool has_bias) "
      "-> (Tensor dx, Tensor dw, Tensor db)");
  m.def("gelu_(Tensor(a!) x, Tensor? bias, bool tanh, bool want_derivative) -> Tensor derivative");
  m.def("gelu_backward_(Tensor(a!) dy, Tensor derivative, bool has_bias) -> Tensor dbias");
  m.def("head_attention(Tensor qkv, int n_head, float scale) -> (Tensor out, Tensor lse)");
  m.def("head_attention_backward(Tensor dout, Tensor qkv, Tensor lse, int n_head, float scale) -> Tensor dqkv");
  m.def("split_mm_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool add) -> ()");
  m.def("cpu_instructions() -> str");
  m.def("cpu_has_amx() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(nanogpt, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&adamw_cpu));
  m.impl("grad_norm", TORCH_BOX(&grad_norm_cpu));
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_cpu));
  m.impl("row_layer_norm", TORCH_BOX(&row_layer_norm));
  m.impl("row_layer_norm_backward", TORCH_BOX(&row_layer_norm_backward));
  m.impl("gelu_", TORCH_BOX(&gelu_));
  m.impl("gelu_backward_", TORCH_BOX(&gelu_backward_));
  m.impl("head_attention", TORCH_BOX(&head_attention));
  m.impl("head_attention_backward", TORCH_BOX(&head_attention_backward));
  m.impl("split_mm_", TORCH_BOX(&split_mm_));
}

STABLE_TORCH_LIBRARY_IMPL(nanogpt, CompositeExplicitAutograd, m) {
  m.impl("cpu_instructions", TORCH_BOX(&cpu_instructions));
  m.impl("cpu_has_amx", TORCH_BOX(&cpu_has_amx));
}

}  // namespace nanogpt
