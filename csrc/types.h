#pragma once

namespace nanogpt {

// What logits, activations and shadows may be.
enum class Type { fp32, fp16, bf16 };

}  // namespace nanogpt
