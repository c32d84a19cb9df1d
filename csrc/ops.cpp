// nanogpt_cpu: the schemas of all ops, and their CPU implementations. nanogpt_cuda (ops_cuda.cpp) adds the CUDA ones.
//
// Only PyTorch's stable ABI is used, so one build serves several releases. Every op changes its declared arguments in place
// or returns new tensors; none keeps state.

#include "ops.h"

namespace nanogpt {

STABLE_TORCH_LIBRARY_FRAGMENT(nanogpt, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] shadows, Tensor lr, Tensor(f!) step, float[] weight_decays, float beta1, float beta2, float eps, "
      "Tensor? norm, float max_norm, Tensor? grad_scale, bool zero_grad) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def(
      "cross_entropy_rows_(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, int ignore_index, int vocab_size, "
      "bool write_grad) -> ()");
}

}  // namespace nanogpt
