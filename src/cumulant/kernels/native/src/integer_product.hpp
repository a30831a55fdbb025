// Products of many tokens with a matrix of 8 or 4 bits, by AVX-512 VNNI.
//
// Lanes are rows of the matrix. A panel has PANEL_ROWS rows, whose codes are transposed so that a
// vector has four neighbouring codes of each of 16 rows. A tile has TILE_TOKENS tokens, as integers
// of 16 bits in two bytes, as `VnniVector` rounds them. A product of a tile and a panel stays in
// registers for a group of 64 weights. It is then scaled and added to sums in fp32.
#pragma once

#include "quantized.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

#if CUMULANT_BYTES == 64
struct VnniProduct {
  static constexpr int TILE_TOKENS = 6, PANEL_ROWS = 32;
  static constexpr int FOURS = GROUP / 4;     // steps of four weights in a group
  static constexpr int64_t NEAR = 512 << 10;  // bytes of tiles, which stay in the second cache

  struct Group {
    int8_t bytes[FOURS][2][TILE_TOKENS][4];  // [1]: the low ones
    int32_t start[TILE_TOKENS];              // what takes off the codes' offset
    float factor[TILE_TOKENS];
    int32_t unused[4];
  };
  struct Panel {
    uint8_t codes[FOURS][PANEL_ROWS][4];
    float scales[PANEL_ROWS];
  };

  static int64_t tile_bytes(int64_t k) { return groups_of(k) * int64_t(sizeof(Group)); }
  static int64_t scratch_bytes(int64_t k) {
    return larger(groups_of(k) * int64_t(sizeof(Panel)), VnniVector::bytes(k));
  }

  // Tokens first .. first + TILE_TOKENS - 1 of x; those beyond the last one are zero.
  static void prepare(const QuantizedProduct& q, int64_t first, void* to, void* scratch) {
    Group* const tile = (Group*)to;
    const VnniVector::Group* const rounded = (const VnniVector::Group*)scratch;
    const int64_t groups = groups_of(q.k);
    memset(to, 0, size_t(tile_bytes(q.k)));
    for (int m = 0; m < TILE_TOKENS && first + m < q.T; m++) {
      VnniVector::prepare(q.bits, q.x + (first + m) * q.k, q.k, scratch);
      for (int64_t g = 0; g < groups; g++) {
        for (int i = 0; i < FOURS; i++) {
          memcpy(tile[g].bytes[i][0][m], rounded[g].high + 4 * i, 4);
          memcpy(tile[g].bytes[i][1][m], rounded[g].low + 4 * i, 4);
        }
        for (int i = 0; i < FOURS; i++) tile[g].start[m] += rounded[g].start[i];
        tile[g].factor[m] = rounded[g].factor;
      }
    }
  }

  // 16 rows of four bytes in each of 16 places, transposed: `to` has PANEL_ROWS rows a place.
  static void transpose(__m512i* r, uint8_t* to) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
      const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88),
                    odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd),
                    later_even = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88),
                    later_odd = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
      const auto put = [&](int place, __m512i x) {
        _mm512_storeu_si512(to + (4 * place + j) * PANEL_ROWS * 4, x);
      };
      put(0, _mm512_shuffle_i32x4(even, later_even, 0x88));
      put(1, _mm512_shuffle_i32x4(odd, later_odd, 0x88));
      put(2, _mm512_shuffle_i32x4(even, later_even, 0xdd));
      put(3, _mm512_shuffle_i32x4(odd, later_odd, 0xdd));
    }
  }

  // Rows first .. of the matrix, at most PANEL_ROWS; the scales of rows beyond the last are zero.
  template <int BITS> static void gather(const QuantizedProduct& q, int64_t first, Panel* panel) {
    constexpr int BYTES = GROUP * BITS / 8;
    const int64_t groups = groups_of(q.k);
    const int count = int(smaller<int64_t>(PANEL_ROWS, q.n - first));
    const __m512i fifteen = _mm512_set1_epi8(15);
    const __m512i halves = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    for (int64_t g = 0; g < groups; g++, panel++) {
      for (int half = 0; half < PANEL_ROWS; half += 16) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) {
          const int row = half + i < count ? half + i : 0;
          const uint8_t* const codes = q.codes + ((first + row) * groups + g) * BYTES;
          __builtin_prefetch(codes + PANEL_ROWS * groups * BYTES, 0, 2);  // the next panel's
          if (BITS == 8) {
            rows[i] = _mm512_loadu_si512(codes);
          } else {
            rows[i] = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)codes));
            rows[i] = _mm512_and_si512(_mm512_srlv_epi64(rows[i], halves), fifteen);
          }
        }
        transpose(rows, panel->codes[0][half]);
      }
      for (int i = 0; i < PANEL_ROWS; i++)
        panel->scales[i] = i < count ? q.scales[(first + i) * groups + g] : 0;
    }
  }

  // One token's products with the rows of a panel in a group. The compiler keeps its members in
  // registers, which it would not do with arrays.
  struct Token {
    __m512i high, later_high, low, later_low;

    INLINE VNNI void begin(int32_t start) {
      high = later_high = _mm512_setzero_si512();
      low = later_low = _mm512_set1_epi32(start);
    }
    INLINE VNNI void add(__m512i w, __m512i later_w, const int8_t (*bytes)[TILE_TOKENS][4], int m) {
      int32_t x, y;
      memcpy(&x, bytes[0][m], 4);
      memcpy(&y, bytes[1][m], 4);
      const __m512i above = _mm512_set1_epi32(x), below = _mm512_set1_epi32(y);
      accumulate(high, w, above), accumulate(later_high, later_w, above);
      accumulate(low, w, below), accumulate(later_low, later_w, below);
    }
    // By the intrinsic GCC 12 stores every sum to the stack after each step.
    static INLINE void accumulate(__m512i& sum, __m512i codes, __m512i x) {
      asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    }
    INLINE VNNI void end(float factor, const float* scales, float* sums) const {
      put(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), factor, scales, sums);
      put(_mm512_add_epi32(_mm512_slli_epi32(later_high, 8), later_low), factor, scales + 16,
          sums + 16);
    }
    static INLINE VNNI void put(__m512i whole, float factor, const float* scales, float* sums) {
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(factor));
      const __m512 before = _mm512_loadu_ps(sums);
      _mm512_storeu_ps(sums, _mm512_fmadd_ps(product, _mm512_loadu_ps(scales), before));
    }
  };

  // The products of a tile and a panel, as sums [TILE_TOKENS, PANEL_ROWS].
  static VNNI void multiply(const Group* tile, const Panel* panel, int64_t groups, float* sums) {
    static_assert(TILE_TOKENS == 6 && PANEL_ROWS == 32, "as many as the variables below");
    memset(sums, 0, sizeof(float) * TILE_TOKENS * PANEL_ROWS);
    for (int64_t g = 0; g < groups; g++, tile++, panel++) {
      Token a, b, c, d, e, f;
      a.begin(tile->start[0]), b.begin(tile->start[1]), c.begin(tile->start[2]);
      d.begin(tile->start[3]), e.begin(tile->start[4]), f.begin(tile->start[5]);
      for (int i = 0; i < FOURS; i++) {
        const __m512i w = _mm512_loadu_si512(panel->codes[i][0]),
                      later = _mm512_loadu_si512(panel->codes[i][16]);
        const auto* const x = tile->bytes[i];
        a.add(w, later, x, 0), b.add(w, later, x, 1), c.add(w, later, x, 2);
        d.add(w, later, x, 3), e.add(w, later, x, 4), f.add(w, later, x, 5);
      }
      const float *const scales = panel->scales, *const factor = tile->factor;
      constexpr int N = PANEL_ROWS;
      a.end(factor[0], scales, sums), b.end(factor[1], scales, sums + N);
      c.end(factor[2], scales, sums + 2 * N), d.end(factor[3], scales, sums + 3 * N);
      e.end(factor[4], scales, sums + 4 * N), f.end(factor[5], scales, sums + 5 * N);
    }
  }

  // The outputs of PANEL_ROWS rows for the tokens of tiles, from token `first` on.
  static void run(const QuantizedProduct& q, int64_t row, int64_t first, int64_t tokens,
                  const void* tiles, void* scratch) {
    Panel* const panel = (Panel*)scratch;
    if (q.bits == 8)
      gather<8>(q, row, panel);
    else
      gather<4>(q, row, panel);
    const int count = int(smaller<int64_t>(PANEL_ROWS, q.n - row));
    float bias[PANEL_ROWS] = {}, sums[TILE_TOKENS * PANEL_ROWS];
    if (q.bias) memcpy(bias, q.bias + row, sizeof(float) * size_t(count));
    for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
      const char* const tile = (const char*)tiles + t / TILE_TOKENS * tile_bytes(q.k);
      multiply((const Group*)tile, panel, groups_of(q.k), sums);
      for (int m = 0; m < TILE_TOKENS && t + m < tokens; m++) {
        float* const out = q.out + (first + t + m) * q.n + row;
        for (int i = 0; i < count; i++) out[i] = sums[m * PANEL_ROWS + i] + bias[i];
      }
    }
  }
};
#endif

}  // namespace CUMULANT_ISA
}  // namespace cumulant
