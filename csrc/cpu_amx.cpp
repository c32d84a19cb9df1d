// C = A B in fp32, each factor split into the sum of two bfloat16 numbers: with x = hi + lo, A B = hi hi + hi lo + lo hi, where
// lo lo is left out. The products are exact and their sums fp32, so that each product is off by 3 * 2^-16 of itself at most, where
// TF32's is by 2 * 2^-11. It is what PyTorch's float32_matmul_precision "high" stands for. The units take subnormal numbers for
// zero, so that factors below 2^-118 lose their lo and those below 2^-126 all; infinities, and what rounds to one in bfloat16
// (from 3.396e38 on), turn into NaN.
//
// A tile holds 16 rows of 16 pairs. C (16, 16) += A (16, 32) B (32, 16): A's pairs are neighbours in a row; B's row p holds
// rows 2p and 2p + 1, interleaved. Either is reached from memory by pairing elements along the depth, vector by vector, and a
// transposition of 16x16 pairs where the vectors run the other way.

#include "cpu_amx.h"

#include <immintrin.h>
#include <new>

namespace nanogpt {
namespace {

constexpr int64_t kTile = 16;           // rows of a tile, pairs of a row
constexpr int64_t kPairs = 2 * kTile;   // depth of a tile
constexpr int64_t kWords = 512;         // 16-bit words of a tile
constexpr int64_t kGroup = 4 * kWords;  // two tiles side by side, as hi hi lo lo
constexpr int64_t kBlock = 256;         // rows of A and columns of B that are packed at a time
constexpr int64_t kDepth = 512;         // depth to which they are: with kBlock two times 512 KB of second-level cache

struct Split {
  __m512i hi, lo;  // 32 bfloat16 each
};

// Rounds to nearest, so that lo has either sign; a and b give the low and the high halves of the 32-bit lanes where
// `interleave`, else words 0 to 15 and 16 to 31.
template <bool interleave>
inline Split split(__m512 a, __m512 b) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i a_hi = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(a), half), upper);
  const __m512i b_hi = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(b), half), upper);
  const __m512 a_lo = _mm512_sub_ps(a, _mm512_castsi512_ps(a_hi)), b_lo = _mm512_sub_ps(b, _mm512_castsi512_ps(b_hi));
  // Of words 0 to 15 (a) and 16 to 31 (b). Unlike the rounding above, the instruction keeps every NaN one.
  const __m512i hi = (__m512i)_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(b_hi), _mm512_castsi512_ps(a_hi));
  const __m512i lo = (__m512i)_mm512_cvtne2ps_pbh(b_lo, a_lo);
  if constexpr (!interleave) return {hi, lo};
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, hi), _mm512_permutexvar_epi16(order, lo)};
}

// 16x16 32-bit elements.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// Not std::min: the linker might take what is compiled here for machines without these instructions.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline __mmask16 mask(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

// One pair of tiles, hi at `out` and lo two tiles further, from x of which (lines, depth) lie inside the matrix. A line is a
// row of A or a column of B; `line` and `along` are the strides from one to the next and along the depth.
inline void pack_tile(const float* x, int64_t line, int64_t along, int64_t lines, int64_t depth, bool of_b, uint16_t* out) {
  __m512i hi[16], lo[16];
  if (along == 1) {  // vector i: the pairs of line i
    for (int64_t i = 0; i < 16; ++i) {
      const float* const at = x + i * line;
      const __mmask16 low = i < lines ? mask(depth) : 0, high = i < lines ? mask(depth - 16) : 0;
      const Split s = split<false>(_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at + 16));
      hi[i] = s.hi, lo[i] = s.lo;
    }
  } else {  // vector i: pair i of every line
    for (int64_t i = 0; i < 16; ++i) {
      const float* const at = x + 2 * i * along;
      const __mmask16 even = 2 * i < depth ? mask(lines) : 0, odd = 2 * i + 1 < depth ? mask(lines) : 0;
      const Split s = split<true>(_mm512_maskz_loadu_ps(even, at), _mm512_maskz_loadu_ps(odd, at + along));
      hi[i] = s.hi, lo[i] = s.lo;
    }
  }
  if ((along == 1) == of_b) {
    transpose(hi);
    transpose(lo);
  }
  for (int64_t i = 0; i < 16; ++i) {
    _mm512_store_si512(out + 32 * i, hi[i]);
    _mm512_store_si512(out + 2 * kWords + 32 * i, lo[i]);
  }
}

// 32 lines, as depth / kPairs groups of kGroup words.
void pack_lines(const float* x, int64_t line, int64_t along, int64_t lines, int64_t depth, bool of_b, uint16_t* out) {
  for (int64_t k = 0; k < depth; k += kPairs, out += kGroup) {
    pack_tile(x + k * along, line, along, lines, depth - k, of_b, out);
    pack_tile(x + k * along + kTile * line, line, along, lines - kTile, depth - k, of_b, out + kWords);
  }
}

inline void prefetch(const float* c, int64_t ldc) {
  for (int64_t i = 0; i < kAmxPanel; ++i) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + kTile, 1);
  }
}

// C (32, 32) = or += the product of `groups` groups of A and of B.
inline void multiply_tiles(const uint16_t* a, const uint16_t* b, int64_t groups, float* c, int64_t ldc, bool add) {
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + kTile, stride);
    _tile_loadd(2, c + kTile * ldc, stride);
    _tile_loadd(3, c + kTile * ldc + kTile, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t g = 0; g < groups; ++g, a += kGroup, b += kGroup) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kWords, 64);
    _tile_loadd(5, a + kWords, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, b + 2 * kWords, 64);
    _tile_loadd(7, b + 3 * kWords, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a + 2 * kWords, 64);
    _tile_loadd(5, a + 3 * kWords, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kWords, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + kTile, stride);
  _tile_stored(2, c + kTile * ldc, stride);
  _tile_stored(3, c + kTile * ldc + kTile, stride);
}

// The same for a C of which only (rows, columns) exist.
void multiply_edge(const uint16_t* a, const uint16_t* b, int64_t groups, float* c, int64_t ldc, int64_t rows, int64_t columns,
                   bool add) {
  alignas(64) float whole[kAmxPanel * kAmxPanel];
  multiply_tiles(a, b, groups, whole, kAmxPanel, false);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] = whole[i * kAmxPanel + j] + (add ? c[i * ldc + j] : 0.0f);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kConfig;  // in memory as it stands: GCC's _tile_loadconfig says that it reads 8 bytes of the 64

// A thread's packed parts of A and B. No class of the standard library: see least().
struct Scratch {
  uint16_t* const words = static_cast<uint16_t*>(::operator new[](4 * kBlock * kDepth * sizeof(uint16_t), std::align_val_t(64)));
  ~Scratch() { ::operator delete[](words, std::align_val_t(64)); }
};

}  // namespace

void amx_multiply(const Matrix& a, const Matrix& b, const float* bias, float* c, int64_t ldc, Range rows, Range columns,
                  int64_t depth, bool add) {
  static thread_local const Scratch scratch;
  uint16_t *const a_packed = scratch.words, *const b_packed = a_packed + 2 * kBlock * kDepth;
  if (bias) {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = columns.begin; j < columns.end; ++j) c[i * ldc + j] = bias[j] + (add ? c[i * ldc + j] : 0.0f);
    }
    add = true;
  }
  _tile_loadconfig(&kConfig);
  for (int64_t j0 = columns.begin; j0 < columns.end; j0 += kBlock) {
    const int64_t j1 = least(columns.end, j0 + kBlock);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t deep = least(kDepth, depth - k), groups = (deep + kPairs - 1) / kPairs, panel = groups * kGroup;
      for (int64_t j = j0; j < j1; j += kAmxPanel) {
        pack_lines(b.data + k * b.row + j * b.column, b.column, b.row, j1 - j, deep, true,
                   b_packed + (j - j0) / kAmxPanel * panel);
      }
      for (int64_t i0 = rows.begin; i0 < rows.end; i0 += kBlock) {
        const int64_t i1 = least(rows.end, i0 + kBlock);
        for (int64_t i = i0; i < i1; i += kAmxPanel) {
          pack_lines(a.data + i * a.row + k * a.column, a.row, a.column, i1 - i, deep, false,
                     a_packed + (i - i0) / kAmxPanel * panel);
        }
        for (int64_t j = j0; j < j1; j += kAmxPanel) {
          for (int64_t i = i0; i < i1; i += kAmxPanel) {
            const uint16_t* const a_panel = a_packed + (i - i0) / kAmxPanel * panel;
            const uint16_t* const b_panel = b_packed + (j - j0) / kAmxPanel * panel;
            float* const out = c + i * ldc + j;
            // C is seldom in the cache, and its short rows are nothing that the hardware fetches ahead.
            if (i + kAmxPanel < i1) {
              prefetch(out + kAmxPanel * ldc, ldc);
            } else if (j + kAmxPanel < j1) {
              prefetch(c + i0 * ldc + j + kAmxPanel, ldc);
            }
            if (i1 - i >= kAmxPanel && j1 - j >= kAmxPanel) {
              multiply_tiles(a_panel, b_panel, groups, out, ldc, add || k);
            } else {
              multiply_edge(a_panel, b_panel, groups, out, ldc, least(kAmxPanel, i1 - i), least(kAmxPanel, j1 - j), add || k);
            }
          }
        }
      }
    }
  }
  _tile_release();
}

}  // namespace nanogpt
