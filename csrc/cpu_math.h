// Scalar math that compilers vectorise: no calls, no branches, no tables. Everything is in an unnamed namespace, since this
// header is compiled for several instruction sets and the linker must not mix them up.
#pragma once

#include <stdint.h>

namespace nanogpt {
namespace {

inline float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline void store(float& out, float x) { out = x; }

inline float load(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline void store(bf16& out, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

// fp16 by arithmetic on fp32: 2^112 moves the exponent bias from 15 to 127 and makes subnormals come out right.
inline float load(fp16 x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * bits_to_float(0x77800000));  // 2^112
  const uint32_t special = magnitude | 0x7F800000;                                            // inf and nan
  return bits_to_float((magnitude < 0x0F800000 ? finite : special) | ((x.bits & 0x8000u) << 16));
}
inline void store(fp16& out, float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7FFFFFFF;
  // Below 2^-14 the spacing is 2^-24: adding 0.5 rounds there, and the low bits of the sum are the result.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477FF000 ? 0x7C00 : half;  // from 65,520 on: inf
  half = magnitude > 0x7F800000 ? 0x7E00 : half;   // nan
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
}

// exp(x) to about 1 ulp: 2^n times the Taylor polynomial of the rest, |rest| <= ln(2) / 2. Below -87.3: 0.
inline float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (float_to_bits(shifted) - float_to_bits(kRound) + 127) << 23;
  return x < -87.3f ? 0.0f : p * bits_to_float(exponent);
}

struct Gelu {
  float value, derivative;
};

// x Phi(x). The lower tail Phi(-u), u = |x|, is exp(-u^2 / 2) times a polynomial in t = 1 / (1 + 0.3 u), fitted in double
// to erfcx(u / sqrt(2)) / 2 over 0 <= u <= 13.5 (relative error 1.6e-7). The derivative is Phi(x) + x phi(x).
inline Gelu gelu_erf(float x) {
  const float u = x < 0 ? -x : x;
  const float e = fast_exp(-0.5f * u * u);
  const float t = 1.0f / (1.0f + 0.3f * u);
  float p = 0.036437839f;
  p = p * t - 0.160268328f;
  p = p * t + 0.211432062f;
  p = p * t - 0.058166899f;
  p = p * t + 0.130831552f;
  p = p * t + 0.0992562117f;
  p = p * t + 0.120854534f;
  p = p * t + 0.11962303f;
  const float tail = e * p * t;
  const float cdf = x < 0 ? tail : 1.0f - tail;
  return {x * cdf, cdf + x * e * 0.398942280f};
}

// 0.5 x (1 + tanh z) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3): GPT-2's own form.
inline Gelu gelu_tanh(float x) {
  constexpr float kTwoRoot = 1.59576912f;  // 2 sqrt(2 / pi)
  const float square = x * x;
  const float twice_z = kTwoRoot * x * (1.0f + 0.044715f * square);
  const float e = fast_exp(-(twice_z < 0 ? -twice_z : twice_z));  // never overflows
  const float s = (twice_z < 0 ? e : 1.0f) / (1.0f + e);
  return {x * s, s + x * s * (1.0f - s) * kTwoRoot * (1.0f + 3 * 0.044715f * square)};
}

}  // namespace
}  // namespace nanogpt
