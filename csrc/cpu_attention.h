// Causal attention of one head on a CPU, forward and backward, on a small matrix product of its own: at the head sizes and
// lengths that people train on CPUs, calls to a BLAS cost more than they compute. Included by cpu_kernels.cpp.
//
// T sequence, D head size, both padded with zeros to multiples of kBlock (Tp, Dp) in fp32 scratch. Queries are taken kBlock at
// a time, with the n keys up to the diagonal only. Their scores are held transposed, (n, kBlock), so that the softmax runs
// down the lanes of vectors: no sum across lanes, no rest loop. No score outlives its block.
#pragma once

namespace nanogpt {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileRows = 8;
#elif defined(__AVX__)
constexpr int kWidth = 8, kTileRows = 4;
#else
constexpr int kWidth = 4, kTileRows = 4;
#endif
constexpr int64_t kBlock = 16;
static_assert(kBlock % kWidth == 0 && kBlock % kTileRows == 0, "padding must make whole tiles");

typedef float vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec& at(float* p) { return *reinterpret_cast<vec*>(p); }

// C (kTileRows, kVectors * kWidth) = or += A B with its sums in registers; A[r, k] lies at a[r * ar + k * ak].
template <int kVectors, bool kAdd>
inline void tile(int64_t K, const float* a, int64_t ar, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc) {
  vec sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = kAdd ? at(c + r * ldc + v * kWidth) : vec{};
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int r = 0; r < kTileRows; ++r) {
      const float ark = a[r * ar + k * ak];
      for (int v = 0; v < kVectors; ++v) sum[r][v] += ark * at(b + k * ldb + v * kWidth);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) at(c + r * ldc + v * kWidth) = sum[r][v];
  }
}

// C (M, N) = or += A (M, K) B (K, N); M, N multiples of kBlock.
template <bool kAdd>
void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t ar, int64_t ak, const float* b, int64_t ldb, float* c,
              int64_t ldc) {
  int64_t j = 0;
  for (; j + 2 * kWidth <= N; j += 2 * kWidth) {
    for (int64_t i = 0; i < M; i += kTileRows) tile<2, kAdd>(K, a + i * ar, ar, ak, b + j, ldb, c + i * ldc + j, ldc);
  }
  for (; j < N; j += kWidth) {
    for (int64_t i = 0; i < M; i += kTileRows) tile<1, kAdd>(K, a + i * ar, ar, ak, b + j, ldb, c + i * ldc + j, ldc);
  }
}

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// Rows of `stride` elements -> fp32 (Tp, Dp), zero outside (rows, columns).
template <typename T>
void copy_in(const T* x, int64_t stride, int64_t rows, int64_t columns, float* __restrict out) {
  const int64_t width = padded(columns);
  __builtin_memset(out, 0, padded(rows) * width * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[i * width + j] = load(x[i * stride + j]);
  }
}
template <typename T>
void copy_out(const float* x, int64_t rows, int64_t columns, T* __restrict out, int64_t stride) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) store(out[i * stride + j], x[i * width + j]);
  }
}
void transpose(const float* x, int64_t rows, int64_t columns, float* __restrict out) {
  for (int64_t j = 0; j < columns; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < rows; ++i) out[j * rows + i] = x[i * columns + j];
  }
}

// One head: qkv points at its first query, rows 3C apart, keys and values C and 2C further; out (T, D) rows C apart.
template <typename T>
void attention_head(const T* qkv, T* out, float* lse, int64_t length, int64_t D, int64_t C, float scale, float* scratch) {
  const int64_t Tp = padded(length), Dp = padded(D), size = Tp * Dp;
  float* const qt = scratch;  // (Dp, Tp)
  float* const k = qt + size;
  float* const v = k + size;
  float* const p = v + size;  // (Tp, kBlock)
  float* const o = p + kBlock * Tp;
  copy_in(qkv, 3 * C, length, D, k);
  transpose(k, Tp, Dp, qt);
  copy_in(qkv + C, 3 * C, length, D, k);
  copy_in(qkv + 2 * C, 3 * C, length, D, v);
  for (int64_t i0 = 0; i0 < length; i0 += kBlock) {
    const int64_t n = i0 + kBlock, rows = length - i0 < kBlock ? length - i0 : kBlock;
    multiply<false>(n, kBlock, Dp, k, Dp, 1, qt + i0, Tp, p, kBlock);
    float maximum[kBlock], sum[kBlock];
    for (int l = 0; l < kBlock; ++l) maximum[l] = p[l];  // key 0, which every query sees
    for (int64_t j = 1; j < n; ++j) {
      float* const pj = p + j * kBlock;
      for (int l = 0; l < kBlock; ++l) {
        pj[l] = j <= i0 + l ? pj[l] : -__builtin_inff();
        maximum[l] = pj[l] > maximum[l] ? pj[l] : maximum[l];
      }
    }
    for (int l = 0; l < kBlock; ++l) sum[l] = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
      float* const pj = p + j * kBlock;
      for (int l = 0; l < kBlock; ++l) {
        pj[l] = fast_exp((pj[l] - maximum[l]) * scale);
        sum[l] += pj[l];
      }
    }
    multiply<false>(kBlock, Dp, n, p, 1, kBlock, v, Dp, o, Dp);
    for (int64_t r = 0; r < rows; ++r) {
      const float inverse = 1.0f / sum[r];
      for (int64_t d = 0; d < Dp; ++d) o[r * Dp + d] *= inverse;
      lse[i0 + r] = maximum[r] * scale + __builtin_logf(sum[r]);
    }
    copy_out(o, rows, D, out + i0 * C, C);
  }
}

// With P = exp(S - lse), dP = dO V^T, dS = P (dP - rowsum(P dP)) scale: dV = P^T dO, dQ = dS K, dK = dS^T Q.
template <typename T>
void attention_head_backward(const T* dout, const T* qkv, const float* lse, T* dqkv, int64_t length, int64_t D, int64_t C,
                             float scale, float* scratch) {
  const int64_t Tp = padded(length), Dp = padded(D), size = Tp * Dp;
  float* const q = scratch;
  float* const k = q + size;
  float* const v = k + size;
  float* const d_o = v + size;
  float* const qt = d_o + size;   // (Dp, Tp)
  float* const dot = qt + size;   // (Dp, Tp)
  float* const dk = dot + size;
  float* const dv = dk + size;
  float* const p = dv + size;     // (Tp, kBlock)
  float* const ds = p + kBlock * Tp;
  float* const dq = ds + kBlock * Tp;
  copy_in(qkv, 3 * C, length, D, q);
  copy_in(qkv + C, 3 * C, length, D, k);
  copy_in(qkv + 2 * C, 3 * C, length, D, v);
  copy_in(dout, C, length, D, d_o);
  transpose(q, Tp, Dp, qt);
  transpose(d_o, Tp, Dp, dot);
  __builtin_memset(dk, 0, 2 * size * sizeof(float));
  for (int64_t i0 = 0; i0 < length; i0 += kBlock) {
    const int64_t n = i0 + kBlock, rows = length - i0 < kBlock ? length - i0 : kBlock;
    multiply<false>(n, kBlock, Dp, k, Dp, 1, qt + i0, Tp, p, kBlock);
    multiply<false>(n, kBlock, Dp, v, Dp, 1, dot + i0, Tp, ds, kBlock);
    float offset[kBlock], delta[kBlock];
    // A query of the padding has dO = 0 and so gives no gradient, whatever its P.
    for (int l = 0; l < kBlock; ++l) offset[l] = l < rows ? lse[i0 + l] : 0.0f, delta[l] = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
      float* const pj = p + j * kBlock;
      const float* const dpj = ds + j * kBlock;
      for (int l = 0; l < kBlock; ++l) {
        const float e = fast_exp(pj[l] * scale - offset[l]);
        pj[l] = j <= i0 + l ? e : 0.0f;
        delta[l] += pj[l] * dpj[l];
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      const float* const pj = p + j * kBlock;
      float* const dsj = ds + j * kBlock;
      for (int l = 0; l < kBlock; ++l) dsj[l] = pj[l] * (dsj[l] - delta[l]) * scale;
    }
    multiply<true>(n, Dp, kBlock, p, kBlock, 1, d_o + i0 * Dp, Dp, dv, Dp);
    multiply<true>(n, Dp, kBlock, ds, kBlock, 1, q + i0 * Dp, Dp, dk, Dp);
    multiply<false>(kBlock, Dp, n, ds, 1, kBlock, k, Dp, dq, Dp);
    copy_out(dq, rows, D, dqkv + i0 * 3 * C, 3 * C);
  }
  copy_out(dk, length, D, dqkv + C, 3 * C);
  copy_out(dv, length, D, dqkv + 2 * C, 3 * C);
}

int64_t attention_scratch(int64_t length, int64_t D) {
  const int64_t Tp = padded(length), Dp = padded(D);
  return 8 * Tp * Dp + 2 * kBlock * Tp + kBlock * Dp;  // what backward takes, forward needs less
}

// Heads [begin, end) of B * H: qkv (B, T, 3C) packed, out (B, T, C), lse (B, H, T).
void attention(Type type, const void* qkv, void* out, float* lse, int64_t begin, int64_t end, int64_t length, int64_t heads,
               int64_t D, float scale, float* scratch) {
  dispatch(type, [=](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t C = heads * D;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / heads * length * C + i % heads * D, packed = i / heads * length * 3 * C + i % heads * D;
      attention_head(static_cast<const T*>(qkv) + packed, static_cast<T*>(out) + first, lse + i * length, length, D, C, scale,
                     scratch);
    }
  });
}

void attention_backward(Type type, const void* dout, const void* qkv, const float* lse, void* dqkv, int64_t begin,
                        int64_t end, int64_t length, int64_t heads, int64_t D, float scale, float* scratch) {
  dispatch(type, [=](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t C = heads * D;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / heads * length * C + i % heads * D, packed = i / heads * length * 3 * C + i % heads * D;
      attention_head_backward(static_cast<const T*>(dout) + first, static_cast<const T*>(qkv) + packed, lse + i * length,
                              static_cast<T*>(dqkv) + packed, length, D, C, scale, scratch);
    }
  });
}

}  // namespace
}  // namespace nanogpt
