// The CPU kernels; setup.py compiles this file once per instruction set, TABLE naming the result. Loops are written for the
// compiler's vectoriser; `omp simd` lets it reorder the reductions, which it may not do on its own.

#include "cpu_kernels.h"

#include "cpu_math.h"

// Short rows are copied faster by a loop than by a call to memcpy, which GCC would make of it.
#ifndef __clang__
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

namespace nanogpt {
namespace {

template <typename T>
struct Tag {
  using type = T;
};

template <typename F>
void dispatch(Type type, F f) {
  switch (type) {
    case Type::fp32:
      return f(Tag<float>{});
    case Type::fp16:
      return f(Tag<fp16>{});
    case Type::bf16:
      return f(Tag<bf16>{});
  }
}

// Sum of f(i) over [begin, end) in 16 lanes: for every instruction set the same order, and 16 times less rounding than in one.
template <typename F>
float sum_of(int64_t begin, int64_t end, F f) {
  constexpr int kLanes = 16;
  float lane[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += f(i + l);
  }
  for (int l = 0; i + l < end; ++l) lane[l] += f(i + l);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

double sum_squares(const float* g, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(g[i]) * g[i];
  return sum;
}

template <bool kZero>
void adamw_range(float* __restrict p, float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
                 const AdamWCoefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * c.grad;
    const float mi = m[i] + c.one_minus_beta1 * (grad - m[i]);
    const float vi = c.beta2 * v[i] + c.one_minus_beta2 * grad * grad;
    p[i] = c.keep * p[i] - c.step_size * (mi / (__builtin_sqrtf(vi) * c.rsqrt_correction2 + c.eps));
    m[i] = mi;
    v[i] = vi;
    if (kZero) g[i] = 0.0f;
  }
}

void adamw(float* p, float* g, float* m, float* v, void* shadow, Type shadow_type, int64_t begin, int64_t end,
           const AdamWCoefficients& c) {
  const auto range = c.zero_grad ? adamw_range<true> : adamw_range<false>;
  range(p + begin, g + begin, m + begin, v + begin, end - begin, c);
  if (!shadow) return;
  dispatch(shadow_type, [=](auto tag) {
    auto* __restrict out = static_cast<typename decltype(tag)::type*>(shadow);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) store(out[i], p[i]);
  });
}

template <typename T>
void cross_entropy_row(T* x, int64_t target, float* loss, int64_t columns, int64_t vocab_size, bool write_grad) {
  float maximum = -3.402823466e38f, sum = 0.0f;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < vocab_size; ++i) {
    const float xi = load(x[i]);
    maximum = xi > maximum ? xi : maximum;
  }
  // In parts, as even 16 running sums over 50,000 terms would lose a digit.
  for (int64_t begin = 0; begin < vocab_size; begin += 1024) {
    const int64_t end = begin + 1024 < vocab_size ? begin + 1024 : vocab_size;
    sum += sum_of(begin, end, [=](int64_t i) { return fast_exp(load(x[i]) - maximum); });
  }
  const bool in_range = target >= 0 && target < vocab_size;
  const float x_target = in_range ? load(x[target]) : __builtin_nanf("");
  *loss = (maximum - x_target) + __builtin_logf(sum);
  if (!write_grad) return;
  const float scale = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < vocab_size; ++i) store(x[i], fast_exp(load(x[i]) - maximum) * scale);
  if (in_range) store(x[target], fast_exp(x_target - maximum) * scale - 1.0f);
  for (int64_t i = vocab_size; i < columns; ++i) store(x[i], 0.0f);
}

void cross_entropy(Type type, void* logits, const int64_t* targets, float* losses, int64_t begin, int64_t end,
                   int64_t columns, int64_t ignore_index, int64_t vocab_size, bool write_grad) {
  dispatch(type, [=](auto tag) {
    for (int64_t row = begin; row < end; ++row) {
      auto* x = static_cast<typename decltype(tag)::type*>(logits) + row * columns;
      if (targets[row] != ignore_index) {
        cross_entropy_row(x, targets[row], losses + row, columns, vocab_size, write_grad);
        continue;
      }
      losses[row] = 0.0f;
      for (int64_t i = 0; write_grad && i < columns; ++i) store(x[i], 0.0f);
    }
  });
}

template <typename T>
void layer_norm_row(const T* x, const T* residual, const float* weight, const float* bias, T* __restrict y,
                    T* __restrict r, float* statistics, int64_t columns, float eps) {
  if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(r[i], load(x[i]) + load(residual[i]));
    x = r;  // the statistics are those of the rounded sum, which backward sees
  }
  const float mean = sum_of(0, columns, [=](int64_t i) { return load(x[i]); }) / columns;
  const float squares = sum_of(0, columns, [=](int64_t i) { return (load(x[i]) - mean) * (load(x[i]) - mean); });
  const float rstd = 1.0f / __builtin_sqrtf(squares / columns + eps);
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(y[i], (load(x[i]) - mean) * rstd * weight[i] + bias[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(y[i], (load(x[i]) - mean) * rstd * weight[i]);
  }
  statistics[0] = mean;
  statistics[1] = rstd;
}

void layer_norm(Type type, const void* x, const void* residual, const float* weight, const float* bias, void* y, void* r,
                float* statistics, int64_t begin, int64_t end, int64_t columns, float eps) {
  dispatch(type, [=](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      const T* const add = residual ? static_cast<const T*>(residual) + at : nullptr;
      layer_norm_row(static_cast<const T*>(x) + at, add, weight, bias, static_cast<T*>(y) + at,
                     residual ? static_cast<T*>(r) + at : nullptr, statistics + 2 * row, columns, eps);
    }
  });
}

template <bool kResidual, typename T>
void layer_norm_backward_row(const T* dy, const T* dr, const T* r, const float* weight, float mean, float rstd,
                             T* __restrict dx, float* __restrict dw, float* __restrict db, int64_t columns) {
  const float mean_g = sum_of(0, columns, [=](int64_t i) { return load(dy[i]) * weight[i]; }) / columns;
  const float mean_gn = sum_of(0, columns, [=](int64_t i) {
    return load(dy[i]) * weight[i] * (load(r[i]) - mean) * rstd;
  }) / columns;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) dw[i] += load(dy[i]) * (load(r[i]) - mean) * rstd;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    const float n = (load(r[i]) - mean) * rstd, g = load(dy[i]) * weight[i];
    const float dxi = rstd * (g - mean_g - n * mean_gn);
    store(dx[i], kResidual ? dxi + load(dr[i]) : dxi);
  }
  if (!db) return;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) db[i] += load(dy[i]);
}

void layer_norm_backward(Type type, const void* dy, const void* dr, const void* r, const float* weight,
                         const float* statistics, void* dx, float* dw, float* db, int64_t begin, int64_t end,
                         int64_t columns) {
  dispatch(type, [=](auto tag) {
    using T = typename decltype(tag)::type;
    const auto one = dr ? layer_norm_backward_row<true, T> : layer_norm_backward_row<false, T>;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      one(static_cast<const T*>(dy) + at, dr ? static_cast<const T*>(dr) + at : nullptr, static_cast<const T*>(r) + at,
          weight, statistics[2 * row], statistics[2 * row + 1], static_cast<T*>(dx) + at, dw, db, columns);
    }
  });
}

template <bool kTanh, bool kDerivative, typename T>
void gelu_row(T* __restrict x, T* __restrict derivative, const float* bias, int64_t columns) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(x[i], load(x[i]) + bias[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    const Gelu g = kTanh ? gelu_tanh(load(x[i])) : gelu_erf(load(x[i]));
    store(x[i], g.value);
    if (kDerivative) store(derivative[i], g.derivative);
  }
}

void gelu(Type type, void* x, void* derivative, const float* bias, bool tanh, int64_t begin, int64_t end,
          int64_t columns) {
  dispatch(type, [=](auto tag) {
    using T = typename decltype(tag)::type;
    const auto one = derivative ? (tanh ? gelu_row<true, true, T> : gelu_row<false, true, T>)
                                : (tanh ? gelu_row<true, false, T> : gelu_row<false, false, T>);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      one(static_cast<T*>(x) + at, derivative ? static_cast<T*>(derivative) + at : nullptr, bias, columns);
    }
  });
}

void gelu_backward(Type type, void* dy, const void* derivative, float* dbias, int64_t begin, int64_t end,
                   int64_t columns) {
  dispatch(type, [=](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t row = begin; row < end; ++row) {
      T* __restrict const out = static_cast<T*>(dy) + row * columns;
      const T* const factor = static_cast<const T*>(derivative) + row * columns;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) store(out[i], load(out[i]) * load(factor[i]));
      if (!dbias) continue;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) dbias[i] += load(out[i]);
    }
  });
}

}  // namespace
}  // namespace nanogpt

#include "cpu_attention.h"

namespace nanogpt {

const CpuKernels TABLE = {
    sum_squares, adamw,         cross_entropy,     layer_norm, layer_norm_backward,
    gelu,        gelu_backward, attention_scratch, attention,  attention_backward,
};

}  // namespace nanogpt
