// Products of many tokens with a matrix of 8 or 4 bits, where there is no AVX-512 VNNI.
//
// A panel of rows is decoded into a thread's scratch, where it stays while all tokens of a block
// multiply it. Lanes are tokens: a tile has as many as a product keeps in registers, transposed.
#pragma once

#include "matrix_product.hpp"
#include "quantized.hpp"
#include "tokens.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

struct DecodedProduct {
  static constexpr int TILE_TOKENS = PANEL * LANES<float>, PANEL_ROWS = 48;
  static constexpr int DEPTH = 128;         // weights of a row at a time: a tile's fit a cache
  static constexpr int64_t NEAR = 1 << 20;  // bytes of tiles that all panels take in turn

  static int64_t tile_bytes(int64_t k) { return k * TILE_TOKENS * int64_t(sizeof(float)); }
  // Numbers between two rows of weights, which do not all begin in the same sets of a cache.
  static int64_t stride(int64_t k) { return k + 16; }
  // The panel's weights, its outputs, and these transposed.
  static int64_t scratch_bytes(int64_t k) {
    return PANEL_ROWS * (stride(k) + 2 * TILE_TOKENS) * int64_t(sizeof(float));
  }

  // Tokens first .. first + TILE_TOKENS - 1 of x as [k, TILE_TOKENS], zeros beyond the last.
  static void prepare(const QuantizedProduct& q, int64_t first, void* to, void*) {
    constexpr int W = LANES<float>;
    const int count = int(smaller<int64_t>(TILE_TOKENS, q.T - first));
    for (int m = 0; m < TILE_TOKENS; m += W) {
      const float* const x = q.x + (first + m) * q.k;
      float* const tile = (float*)to + m;
      int64_t j = 0;
      for (; m + W <= count && j + W <= q.k; j += W)
        transpose_square(x + j, q.k, tile + j * TILE_TOKENS, TILE_TOKENS);
      for (; j < q.k; j++)
        for (int i = 0; i < W; i++)
          tile[j * TILE_TOKENS + i] = m + i < count ? x[i * q.k + j] : 0.0f;
    }
  }

  // The outputs of PANEL_ROWS rows for the tokens of tiles, from token `first` on.
  static void run(const QuantizedProduct& q, int64_t row, int64_t first, int64_t tokens,
                  const void* tiles, void* scratch) {
    const int rows = int(smaller<int64_t>(PANEL_ROWS, q.n - row));
    const int64_t groups = groups_of(q.k), bytes = groups * GROUP * q.bits / 8;
    float* const weights = (float*)scratch;
    float* const sums = weights + PANEL_ROWS * stride(q.k);
    float* const outputs = sums + PANEL_ROWS * TILE_TOKENS;
    for (int i = 0; i < rows; i++)
      decode_row(q.codes + (row + i) * bytes, q.scales + (row + i) * groups, q.bits, q.k,
                 weights + i * stride(q.k));
    Ahead ahead;
    for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
      const float* const tile = (const float*)tiles + t * q.k;
      const int count = int(smaller<int64_t>(TILE_TOKENS, tokens - t));
      for (int64_t j = 0; j < q.k; j += DEPTH)
        product<BY_ROW, float>(ahead, rows, count, int(smaller<int64_t>(DEPTH, q.k - j)),
                               {weights + j, stride(q.k)}, {tile + j * TILE_TOKENS, TILE_TOKENS},
                               {sums, TILE_TOKENS}, j > 0);
      transpose(rows, count, sums, TILE_TOKENS, outputs, PANEL_ROWS);
      for (int m = 0; m < count; m++) {
        float* const out = q.out + (first + t + m) * q.n + row;
        const float* const from = outputs + m * PANEL_ROWS;
        for (int i = 0; i < rows; i++) out[i] = q.bias ? from[i] + q.bias[row + i] : from[i];
      }
    }
  }
};

}  // namespace CUMULANT_ISA
}  // namespace cumulant
