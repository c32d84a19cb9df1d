// nanogpt_cuda: the CUDA implementations of the ops that nanogpt_cpu declares (ops.cpp), and the ops that only CUDA has.

#include "cuda_kernels.h"
#include "ops.h"

namespace nanogpt {
namespace {

// Makes a tensor's device current while it lives, and gives PyTorch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_create_cuda_guard(index_, &guard_) == AOTI_TORCH_SUCCESS, "no CUDA device ", index_);
  }
  ~Device() { aoti_torch_delete_cuda_guard(guard_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CUstream_st* stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS, "no stream on CUDA device ",
                    index_);
    return static_cast<CUstream_st*>(stream);
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
};

void check_launch(const char* error, const char* op) { STD_TORCH_CHECK(error == nullptr, op, ": ", error); }

void adamw_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& shadows, const Tensor& lr, const Tensor& step, const std::vector<double>& weight_decays,
                double beta1, double beta2, double eps, const std::optional<Tensor>& norm, double max_norm,
                const std::optional<Tensor>& grad_scale, bool zero_grad) {
  if (params.empty()) return;
  STD_TORCH_CHECK(weight_decays.size() == params.size(), "weight_decays: ", weight_decays.size(), " values for ",
                  params.size(), " parameters");
  STD_TORCH_CHECK(max_norm <= 0 || norm, "max_norm ", max_norm, " needs norm");
  const auto p = pointers(params, "params", params), g = pointers(grads, "grads", params);
  const auto m = pointers(exp_avgs, "exp_avgs", params), v = pointers(exp_avg_sqs, "exp_avg_sqs", params);
  const auto numels = sizes(params);
  const auto shadow = shadow_pointers(shadows, params);
  check(step, "step", ScalarType::Float);
  const Device device(params[0]);
  const AdamW args = {
      static_cast<int64_t>(params.size()),
      p.data(),
      g.data(),
      m.data(),
      v.data(),
      shadow.data(),
      numels.data(),
      weight_decays.data(),
      shadows.empty() ? Type::bf16 : type_of(shadows[0]),
      optional_scalar(lr, "lr"),
      pointer<float>(step),
      optional_scalar(norm, "norm"),
      optional_scalar(grad_scale, "grad_scale"),
      beta1,
      beta2,
      eps,
      max_norm,
      zero_grad,
  };
  check_launch(adamw(args, device.stream()), "adamw_");
}

Tensor grad_norm_cuda(const Tensors& grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one gradient");
  const auto g = pointers(grads, "grads", grads);
  const auto numels = sizes(grads);
  const Device device(grads[0]);
  const int64_t count = static_cast<int64_t>(grads.size());
  const Tensor scratch = torch::stable::new_empty(grads[0], Shape{grad_norm_scratch(count)}, ScalarType::Double);
  const Tensor norm = torch::stable::new_empty(grads[0], Shape{}, ScalarType::Float);
  check_launch(grad_norm(count, g.data(), numels.data(), pointer<double>(scratch), pointer<float>(norm), device.stream()),
               "grad_norm");
  return norm;
}

void cross_entropy_rows_cuda(const Tensor& logits, const Tensor& targets, const Tensor& losses, int64_t ignore_index,
                             int64_t vocab_size, bool write_grad) {
  check_rows(logits, targets, losses, vocab_size);
  const Device device(logits);
  check_launch(cross_entropy_rows(logits.mutable_data_ptr(), type_of(logits), logits.size(0), logits.size(1),
                                  pointer<const int64_t>(targets), pointer<float>(losses), ignore_index, vocab_size,
                                  write_grad, device.stream()),
               "cross_entropy_rows_");
}

void check_matrix(const Tensor& t, const char* name, ScalarType type, int64_t rows, int64_t columns) {
  check(t, name, type);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected (", rows, ", ", columns, ")");
}

// Runs one product, or returns why there is no algorithm for it.
std::string run_linear_gelu(bool backward, const Tensor& a, const Tensor& w, const std::optional<Tensor>& bias,
                            const Tensor& d, const std::optional<Tensor>& aux) {
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "expected Half or BFloat16, got ", toString(type));
  STD_TORCH_CHECK(a.dim() == 2 && w.dim() == 2, "expected matrices");
  const int64_t m = a.size(0), k = a.size(1), n = w.size(backward ? 1 : 0);
  check_matrix(a, "a", type, m, k);
  check_matrix(w, "w", type, backward ? k : n, backward ? n : k);
  check_matrix(d, "d", type, m, n);
  if (aux) check_matrix(*aux, "aux", type, m, n);
  if (bias) {
    check(*bias, "bias", type);
    STD_TORCH_CHECK(bias->numel() == n, "bias: ", bias->numel(), " values for ", n, " columns");
  }
  STD_TORCH_CHECK(m > 0 && n > 0 && k > 0, "empty matrices: ", m, " x ", n, " x ", k);
  const std::string missing = linear_gelu_missing();
  if (!missing.empty()) return missing;

  const Device device(a);
  void* handle = nullptr;
  STD_TORCH_CHECK(torch_get_current_cuda_blas_handle(&handle) == AOTI_TORCH_SUCCESS, "no cuBLAS handle");
  const LinearGelu args = {
      backward,
      type_of(a),
      a.get_device_index(),
      m,
      n,
      k,
      a.const_data_ptr(),
      w.const_data_ptr(),
      d.mutable_data_ptr(),
      bias ? bias->mutable_data_ptr() : nullptr,
      aux ? aux->mutable_data_ptr() : nullptr,
  };
  size_t bytes = 0;
  const std::string unsupported = linear_gelu_workspace(handle, args, &bytes);
  if (!unsupported.empty()) return unsupported;
  const Tensor workspace = torch::stable::new_empty(a, Shape{static_cast<int64_t>(bytes)}, ScalarType::Byte);
  const std::string error = linear_gelu(handle, args, workspace.mutable_data_ptr(), device.stream());
  STD_TORCH_CHECK(error.empty(), error);
  return "";
}

std::string linear_gelu_cuda(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const Tensor& post,
                             const std::optional<Tensor>& pre) {
  return run_linear_gelu(false, x, w, bias, post, pre);
}

std::string linear_dgelu_cuda(const Tensor& dy, const Tensor& w, const Tensor& pre, const Tensor& dpre,
                              const std::optional<Tensor>& dbias) {
  return run_linear_gelu(true, dy, w, dbias, dpre, pre);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nanogpt, m) {
  m.def("linear_gelu_load(int cuda_major) -> str missing");
  m.def("linear_gelu_(Tensor x, Tensor w, Tensor? bias, Tensor(a!) post, Tensor(b!)? pre) -> str missing");
  m.def("linear_dgelu_(Tensor dy, Tensor w, Tensor pre, Tensor(a!) dpre, Tensor(b!)? dbias) -> str missing");
}

STABLE_TORCH_LIBRARY_IMPL(nanogpt, CompositeExplicitAutograd, m) {
  m.impl("linear_gelu_load", TORCH_BOX(&linear_gelu_load));
}

STABLE_TORCH_LIBRARY_IMPL(nanogpt, CUDA, m) {
  m.impl("linear_gelu_", TORCH_BOX(&linear_gelu_cuda));
  m.impl("linear_dgelu_", TORCH_BOX(&linear_dgelu_cuda));
  m.impl("adamw_", TORCH_BOX(&adamw_cuda));
  m.impl("grad_norm", TORCH_BOX(&grad_norm_cuda));
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_cuda));
}

}  // namespace nanogpt
