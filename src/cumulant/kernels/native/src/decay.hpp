// Decays of the tokens in a chunk.
//
// A token's log decay d <= 0 multiplies all sums over earlier tokens by exp(d). With the running
// sums c_i = d_0 + ... + d_i of a chunk, query i weighs key j by exp(c_i - c_j), and reads what
// came before the chunk by exp(c_i). Running sums are doubles, and only differences of at most 0
// are exponentiated: after a large decay, singles would lose the small ones.
#pragma once

#include "tokens.hpp"

#include <cmath>

namespace cumulant {
namespace CUMULANT_ISA {

template <class R> struct ChunkDecay {
  static constexpr int W = LANES<R>, BLOCKS = CHUNK / W;
  static constexpr double LEAST = -750;  // exp is 0 from here on; differences of -inf would be NaN

  // c in two parts, as a single difference of both has every digit; exp(c_i) and exp(c_last - c_j).
  R high[CHUNK], low[CHUNK], from_start[CHUNK], to_end[CHUNK];
  // Tokens lie in blocks of W. For a key j of an earlier block than query i's, whose last token is
  // e: exp(c_i - c_j) = exp(c_i - c_e) exp(c_e - c_j). Neither factor is above 1.
  R from_block[BLOCKS][CHUNK], to_block_end[CHUNK];
  R kept, lost;  // exp(c_last) and 1 - exp(c_last), of what came before the chunk

  // Of `n` tokens; a masked one decays nothing.
  void read(const Array& logs, int type, int64_t offset, const uint8_t* mask, int n) {
    double c[CHUNK], sum = 0;
    const int last = padded<R>(n);
    for (int i = 0; i < n; i++) {
      const int64_t at = offset + i * logs.row;
      const double d =
          type == F32 ? double(((const float*)logs.data)[at]) : ((const double*)logs.data)[at];
      if (!mask || mask[i]) sum += d < LEAST ? LEAST : d > 0 ? 0 : d;
      c[i] = sum;
    }
    for (int i = n; i < last; i++) c[i] = sum;
    for (int i = 0; i < last; i += W) {
      const double block_end = c[i + W - 1];
      for (int j = i; j < i + W; j++) {
        high[j] = R(c[j]);
        low[j] = R(c[j] - double(high[j]));
        to_end[j] = R(sum - c[j]);
        to_block_end[j] = R(block_end - c[j]);
      }
      store(from_start + i, exponential<R>(load(high + i)));
      store(to_end + i, exponential<R>(load(to_end + i)));
      store(to_block_end + i, exponential<R>(load(to_block_end + i)));
      for (int b = 0; b < i / W; b++) {
        const int e = b * W + W - 1;
        store(from_block[b] + i,
              exponential<R>((load(high + i) - high[e]) + (load(low + i) - low[e])));
      }
    }
    kept = R(std::exp(sum)), lost = R(-std::expm1(sum));
  }

  // exp(c_i - c_j) of queries i .. i + W - 1 and key j of the same or an earlier block; 1 where the
  // query is before the key.
  INLINE Vec<R> of_queries(int i, int j) const {
    if (j / W < i / W) return load(from_block[j / W] + i) * to_block_end[j];
    const Vec<R> x = (load(high + i) - high[j]) + (load(low + i) - low[j]);
    return exponential<R>(x < R(0) ? x : Vec<R>{});
  }
  // The same of query i and keys j .. j + W - 1.
  INLINE Vec<R> of_keys(int i, int j) const {
    if (j / W < i / W) return load(to_block_end + j) * from_block[j / W][i];
    const Vec<R> x = (high[i] - load(high + j)) + (low[i] - load(low + j));
    return exponential<R>(x < R(0) ? x : Vec<R>{});
  }
};

// rows [n, width], each times its token's factor: -> to, which may be the same.
template <class R>
void scale_rows(int n, int width, Matrix<const R> rows, const R* factors, Matrix<R> to) {
  for (int i = 0; i < n; i++)
    for (int d = 0; d < width; d += LANES<R>)
      store(to.row(i) + d, load(rows.row(i) + d) * factors[i]);
}
// The same where tokens are columns: x [rows, CHUNK].
template <class R> void scale_columns(int rows, int n, const R* x, const R* factors, R* to) {
  for (int d = 0; d < rows; d++)
    for (int i = 0; i < n; i += LANES<R>)
      store(to + d * CHUNK + i, load(x + d * CHUNK + i) * load(factors + i));
}

// Adds lanes to doubles.
INLINE void add_wide(double* to, Vec<double> x) { store(to, load(to) + x); }
INLINE void add_wide(double* to, Vec<float> x) {
  typedef float Half __attribute__((vector_size(CUMULANT_BYTES / 2), may_alias));
  for (int i = 0; i < 2; i++) {
    double* const at = to + i * LANES<double>;
    store(at, load(at) + __builtin_convertvector(((const Half*)&x)[i], Vec<double>));
  }
}
// Lanes as doubles, those of singles two by two added up.
INLINE Vec<double> fold(Vec<double> x) { return x; }
INLINE Vec<double> fold(Vec<float> x) {
  double lanes[LANES<float>] = {};
  add_wide(lanes, x);
  return load(lanes) + load(lanes + LANES<double>);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
