// Shared by both bindings: what an op asks of its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "types.h"

namespace nanogpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected ", toString(type), ", got ", toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::fp32;
    case ScalarType::Half:
      return Type::fp16;
    case ScalarType::BFloat16:
      return Type::bf16;
    default:
      STD_TORCH_CHECK(false, "expected Float, Half or BFloat16, got ", toString(t.scalar_type()));
  }
}

// A list of fp32 tensors with as many entries and elements as `like`; their addresses.
inline std::vector<float*> pointers(const Tensors& tensors, const char* name, const Tensors& like) {
  STD_TORCH_CHECK(tensors.size() == like.size(), name, ": ", tensors.size(), " tensors for ", like.size(), " parameters");
  std::vector<float*> out;
  out.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(tensors[i], name, ScalarType::Float);
    STD_TORCH_CHECK(tensors[i].numel() == like[i].numel(), name, " ", i, ": ", tensors[i].numel(), " elements instead of ",
                    like[i].numel());
    out.push_back(pointer<float>(tensors[i]));
  }
  return out;
}

inline std::vector<int64_t> sizes(const Tensors& tensors) {
  std::vector<int64_t> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(t.numel());
  return out;
}

// Addresses of the 16-bit copies, all of one dtype; null where the entry is empty or there are none at all.
inline std::vector<void*> shadow_pointers(const Tensors& shadows, const Tensors& params) {
  std::vector<void*> out(params.size(), nullptr);
  STD_TORCH_CHECK(shadows.empty() || shadows.size() == params.size(), "shadows: ", shadows.size(), " tensors for ",
                  params.size(), " parameters");
  for (size_t i = 0; i < shadows.size(); ++i) {
    if (shadows[i].numel() == 0) continue;
    const ScalarType type = shadows[0].scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "shadows: expected Half or BFloat16, got ",
                    toString(type));
    check(shadows[i], "shadows", type);
    STD_TORCH_CHECK(shadows[i].numel() == params[i].numel(), "shadow ", i, ": ", shadows[i].numel(),
                    " elements instead of ", params[i].numel());
    out[i] = shadows[i].mutable_data_ptr();
  }
  return out;
}

inline const float* optional_scalar(const std::optional<Tensor>& t, const char* name) {
  if (!t) return nullptr;
  check(*t, name, ScalarType::Float);
  STD_TORCH_CHECK(t->numel() == 1, name, ": expected one value, got ", t->numel());
  return pointer<const float>(*t);
}

inline void check_rows(const Tensor& logits, const Tensor& targets, const Tensor& losses, int64_t vocab_size) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected (rows, columns), got ", logits.dim(), " dimensions");
  check(logits, "logits", logits.scalar_type());
  check(targets, "targets", ScalarType::Long);
  check(losses, "losses", ScalarType::Float);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(targets.numel() == rows, "targets: ", targets.numel(), " values for ", rows, " rows");
  STD_TORCH_CHECK(losses.numel() == rows, "losses: ", losses.numel(), " values for ", rows, " rows");
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= columns, "vocab_size ", vocab_size, " outside [1, ", columns, "]");
}

}  // namespace nanogpt
