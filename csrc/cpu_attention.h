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
constexpr int kVectors = kBlock / kWidth;
static_assert(kBlock % kWidth == 0 && kBlock % kTileRows == 0, "padding must make whole tiles");

typedef float vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec& at(float* p) { return *reinterpret_cast<vec*>(p); }

// C (kTileRows, kAcross * kWidth) = or += A B with its sums in registers; A[r, k] lies at a[r * ar + k * ak].
template <int kAcross, bool kAdd>
inline void tile(int64_t K, const float* a, int64_t ar, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc) {
  vec sum[kTileRows][kAcross];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kAcross; ++v) sum[r][v] = kAdd ? at(c + r * ldc + v * kWidth) : vec{};
  }
  int64_t k = 0;
  do {  // K > 0: GCC keeps `sum` in memory where it has to serve K = 0 too
    for (int r = 0; r < kTileRows; ++r) {
      const float ark = a[r * ar + k * ak];
      for (int v = 0; v < kAcross; ++v) sum[r][v] += ark * at(b + k * ldb + v * kWidth);
    }
  } while (++k < K);
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kAcross; ++v) at(c + r * ldc + v * kWidth) = sum[r][v];
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

// Fetches rows that are written soon: a store to a line that is in no near cache waits for it, and here they are far apart.
template <typename T>
void prefetch(const T* x, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) __builtin_prefetch(x + i * stride + j);
  }
}

// out[2 i] = x[i], out[2 i + 1] = x[i + n / 2] of n = 16 x 16 elements: rotates the bits of their indices by one place.
inline void interleave(const float* x, float* __restrict out) {
  constexpr int kHalf = kBlock * kBlock / 2;
  for (int i = 0; i < kHalf; ++i) out[2 * i] = x[i], out[2 * i + 1] = x[i + kHalf];
}

// (kBlock, columns) -> (columns, kBlock): four places exchange row and column. Compilers interleave on any instruction set; of
// two plain loops they make gathers, six times as slow.
void transpose(const float* x, int64_t columns, float* __restrict out) {
  float a[kBlock * kBlock], b[kBlock * kBlock];
  for (int64_t j = 0; j < columns; j += kBlock) {
    for (int r = 0; r < kBlock; ++r) __builtin_memcpy(a + r * kBlock, x + r * columns + j, kBlock * sizeof(float));
    interleave(a, b);
    interleave(b, a);
    interleave(a, b);
    interleave(b, out + j * kBlock);
  }
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }

// Scores (keys, queries) of a block on the diagonal: -inf for keys behind the query.
inline void mask(float* p) {
  for (int j = 1; j < kBlock; ++j) {
    for (int l = 0; l < kBlock; ++l) p[j * kBlock + l] = j <= l ? p[j * kBlock + l] : -__builtin_inff();
  }
}

// One head: qkv points at its first query, rows 3C apart, keys and values C and 2C further; out (T, D) rows C apart.
template <typename T>
void attention_head(const T* qkv, T* out, float* lse, int64_t length, int64_t D, int64_t C, float scale, float* scratch) {
  const int64_t Tp = padded(length), Dp = padded(D);
  float* const k = scratch;  // (Tp, Dp), like v filled block by block
  float* const v = k + Tp * Dp;
  float* const p = v + Tp * Dp;       // (Tp, kBlock)
  float* const q = p + Tp * kBlock;   // (kBlock, Dp), in the end the output
  float* const qt = q + kBlock * Dp;  // (Dp, kBlock)
  for (int64_t i0 = 0; i0 < length; i0 += kBlock) {
    const int64_t n = i0 + kBlock, rows = length - i0 < kBlock ? length - i0 : kBlock;
    const T* const x = qkv + i0 * 3 * C;
    copy_in(x, 3 * C, rows, D, q);
    copy_in(x + C, 3 * C, rows, D, k + i0 * Dp);
    copy_in(x + 2 * C, 3 * C, rows, D, v + i0 * Dp);
    transpose(q, Dp, qt);
    multiply<false>(n, kBlock, Dp, k, Dp, 1, qt, kBlock, p, kBlock);
    mask(p + i0 * kBlock);
    vec maximum[kVectors], sum[kVectors] = {};
    for (int u = 0; u < kVectors; ++u) maximum[u] = at(p + u * kWidth);
    for (int64_t j = 0; j < n; j += 4) {
      for (int u = 0; u < kVectors; ++u) {
        const float* const pj = p + j * kBlock + u * kWidth;
        const vec first = larger(at(pj), at(pj + kBlock)), second = larger(at(pj + 2 * kBlock), at(pj + 3 * kBlock));
        maximum[u] = larger(maximum[u], larger(first, second));
      }
    }
    float highest[kBlock];
    for (int u = 0; u < kVectors; ++u) at(highest + u * kWidth) = maximum[u];
    for (int64_t j = 0; j < n; ++j) {
      float* const pj = p + j * kBlock;
      for (int l = 0; l < kBlock; ++l) pj[l] = fast_exp((pj[l] - highest[l]) * scale);
      for (int u = 0; u < kVectors; ++u) sum[u] += at(pj + u * kWidth);
    }
    prefetch(out + i0 * C, C, rows, D);
    multiply<false>(kBlock, Dp, n, p, 1, kBlock, v, Dp, q, Dp);
    for (int64_t r = 0; r < rows; ++r) {
      const float total = sum[r / kWidth][r % kWidth], inverse = 1.0f / total;
      for (int64_t d = 0; d < Dp; ++d) q[r * Dp + d] *= inverse;
      lse[i0 + r] = highest[r] * scale + __builtin_logf(total);
    }
    copy_out(q, rows, D, out + i0 * C, C);
  }
}

// With P = exp(S - lse), dP = dO V^T, dS = P (dP - rowsum(P dP)) scale: dV = P^T dO, dQ = dS K, dK = dS^T Q.
template <typename T>
void attention_head_backward(const T* dout, const T* qkv, const float* lse, T* dqkv, int64_t length, int64_t D, int64_t C,
                             float scale, float* scratch) {
  const int64_t Tp = padded(length), Dp = padded(D), size = Tp * Dp, block = kBlock * Dp;
  float* const k = scratch;
  float* const v = k + size;
  float* const dk = v + size;
  float* const dv = dk + size;
  float* const p = dv + size;  // (Tp, kBlock)
  float* const ds = p + kBlock * Tp;
  float* const q = ds + kBlock * Tp;  // (kBlock, Dp)
  float* const d_o = q + block;
  float* const qt = d_o + block;  // (Dp, kBlock)
  float* const dot = qt + block;
  float* const dq = dot + block;
  for (int64_t i0 = 0; i0 < length; i0 += kBlock) {
    const int64_t n = i0 + kBlock, rows = length - i0 < kBlock ? length - i0 : kBlock;
    const T* const x = qkv + i0 * 3 * C;
    copy_in(x, 3 * C, rows, D, q);
    copy_in(x + C, 3 * C, rows, D, k + i0 * Dp);
    copy_in(x + 2 * C, 3 * C, rows, D, v + i0 * Dp);
    copy_in(dout + i0 * C, C, rows, D, d_o);
    transpose(q, Dp, qt);
    transpose(d_o, Dp, dot);
    __builtin_memset(dk + i0 * Dp, 0, block * sizeof(float));
    __builtin_memset(dv + i0 * Dp, 0, block * sizeof(float));
    multiply<false>(n, kBlock, Dp, k, Dp, 1, qt, kBlock, p, kBlock);
    multiply<false>(n, kBlock, Dp, v, Dp, 1, dot, kBlock, ds, kBlock);
    // A query of the padding has dO = 0 and so gives no gradient, whatever its P.
    float offset[kBlock] = {};
    for (int l = 0; l < rows; ++l) offset[l] = lse[i0 + l];
    mask(p + i0 * kBlock);
    vec delta[kVectors] = {};
    for (int64_t j = 0; j < n; ++j) {
      float* const pj = p + j * kBlock;
      for (int l = 0; l < kBlock; ++l) pj[l] = fast_exp(pj[l] * scale - offset[l]);
      for (int u = 0; u < kVectors; ++u) delta[u] += at(pj + u * kWidth) * at(ds + j * kBlock + u * kWidth);
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int u = 0; u < kVectors; ++u) {
        vec& dsj = at(ds + j * kBlock + u * kWidth);
        dsj = at(p + j * kBlock + u * kWidth) * (dsj - delta[u]) * scale;
      }
    }
    T* const dx = dqkv + i0 * 3 * C;
    prefetch(dx, 3 * C, rows, D);
    multiply<true>(n, Dp, kBlock, p, kBlock, 1, d_o, Dp, dv, Dp);
    prefetch(dx + C, 3 * C, rows, D);
    multiply<true>(n, Dp, kBlock, ds, kBlock, 1, q, Dp, dk, Dp);
    prefetch(dx + 2 * C, 3 * C, rows, D);
    multiply<false>(kBlock, Dp, n, ds, 1, kBlock, k, Dp, dq, Dp);
    copy_out(dq, rows, D, dqkv + i0 * 3 * C, 3 * C);
  }
  copy_out(dk, length, D, dqkv + C, 3 * C);
  copy_out(dv, length, D, dqkv + 2 * C, 3 * C);
}

int64_t attention_scratch(int64_t length, int64_t D) {
  const int64_t Tp = padded(length), Dp = padded(D);
  return 4 * Tp * Dp + 2 * kBlock * Tp + 5 * kBlock * Dp;  // what backward takes, forward needs less
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
