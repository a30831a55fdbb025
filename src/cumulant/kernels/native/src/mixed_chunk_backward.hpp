// Gradients of mixed chunk attention.
//
// Weights and scores are not kept, so both passes form them again. They share nothing, so that they
// can run beside each other.
#pragma once

#include "mixed_chunk_groups.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

template <class R>
INLINE void copy_rows(Matrix<const R> from, int rows, int width, R* to, int64_t stride) {
  for (int i = 0; i < rows; i++) {
    copy(from.row(i), to + i * stride, width);
    for (int d = width; d < padded<R>(width); d++) to[i * stride + d] = 0;
  }
  zero(to + rows * stride, int64_t(padded<R>(rows) - rows) * stride);
}

// The group's rows from `first` on, transposed: [width, CHUNK].
template <class R>
INLINE void transpose_rows(MixedPass<R>& p, Matrix<const R> x, int64_t first, int n, int width,
                           int64_t stride, R* to) {
  copy_rows(p.rows_from(x, first), n, width, p.w.rows, stride);
  transpose(n, width, p.w.rows, stride, to, CHUNK);
}

// Adds what reaches tokens of the group that stays open through the state: rows [n, width] from its
// slot `first` on.
template <class R>
INLINE void add_open(const MixedPass<R>& p, const void* from, int64_t at, int64_t first, int n,
                     int width, R* rows, int64_t stride) {
  if (!from || p.closed(at)) return;
  for (int i = 0; i < n; i++) {
    const R* row = p.open_row(from, first + i, width);
    for (int d = 0; d < width; d++) rows[i * stride + d] += row[d];
  }
}

// What the segment's queries add to the gradient of the sums.
template <class R> void mixed_sum_queries(const MixedChunk& m, const Segment& s, void* scratch) {
  MixedPass<R> p(m, s, scratch);
  p.load_sums();
  for (int64_t at = s.begin; at < s.end; at += CHUNK) {
    const int n = p.block(at, s.end);
    p.add_queries(at, n);
  }
  p.leave_sums();
}

// The queries' gradients, forwards in time: S grows again as the forward pass had it.
template <class R> void mixed_query_backward(const MixedChunk& m, const Segment& s, void* scratch) {
  MixedPass<R> p(m, s, scratch);
  auto& w = p.w;
  bool past = m.summed && (s.start || s.begin > 0);
  p.load_sums();
  for (int64_t at = s.begin; at < s.end; at += m.size) {
    const int64_t size = p.size_at(at);
    p.read_group(at, true);
    for (int64_t i = p.asked(at); i < size; i += CHUNK) {
      const int n = p.block(i, size);
      for (int64_t r = 0; r < p.heads; r++) {
        const int64_t h = s.group * p.heads + r;
        p.read_queries(h, at + i, n);
        p.transpose_queries(n);
        p.read_upstream(h, at + i, n);
        transpose(n, p.V, w.dy, w.V, w.wide_transposed, CHUNK);
        zero(w.dquad, w.K * CHUNK);
        zero(w.dlin, w.L * CHUNK);
        for (int64_t j = 0; j < (m.is_causal ? i + 1 : size); j += CHUNK) {
          const int keys = p.block(j, size);
          p.form_scores(h, j, i, keys, n, w.scores);
          // dw = v dout^T: from out = w v. The linear weights r s^T / n are a part of w where
          // nothing is summed, so dr = dw s.
          product<BY_ROW, R>(p.ahead, keys, n, p.V, p.rows_from(p.value, j),
                             {w.wide_transposed, CHUNK}, {w.weights, CHUNK}, false);
          if (!m.summed)
            product<BY_COLUMN, R>(p.ahead, p.L, n, keys, p.rows_from(p.lin_key, j),
                                  {w.weights, CHUNK}, {w.dlin, CHUNK});
          // dscores = f'(scores) dw, zero where the query does not see the key.
          over_block<R>(keys, n, m.is_causal && i == j, false, [&](int at, auto seen) {
            const Vec<R> x =
                load(w.weights + at) * gate_slope<R>(load(w.scores + at), m.activation);
            store(w.scores + at, seen ? x : Vec<R>{});
          });
          // scores = q k^T + bias: dq = dscores k, and the bias's gradient is dscores itself.
          product<BY_COLUMN, R>(p.ahead, p.K, n, keys, p.rows_from(p.quad_key, j),
                                {w.scores, CHUNK}, {w.dquad, CHUNK});
          if (!s.dbias) continue;
          R* const dbias = (R*)s.dbias + (m.biases > 1 ? r : 0) * m.size * m.size + j * m.size + i;
          for (int k = 0; k < keys; k++)
            for (int l = 0; l < n; l++) dbias[k * m.size + l] += w.scores[k * CHUNK + l];
        }
        // out += r^T S, so dr += S dout, with the sums that the query read.
        if (past)
          product<BY_ROW, R>(p.ahead, p.L, n, p.V, {w.S, w.V}, {w.wide_transposed, CHUNK},
                             {w.dlin, CHUNK});
        // The scale is applied at the end: q was scaled when it was read.
        p.write_query_gradient(m.dquad_query, h, at + i, n, p.K, w.dquad, w.K, p.quad_scale);
        p.write_query_gradient(m.dlin_query, h, at + i, n, p.L, w.dlin, w.L, p.lin_scale);
      }
    }
    if (m.is_causal && p.closed(at)) {
      p.add_keys(size);
      past = true;
    }
  }
}

// The keys' and values' gradients, backwards in time: w.S is dS, the gradient of the sums from the
// queries behind the group.
template <class R> void mixed_key_backward(const MixedChunk& m, const Segment& s, void* scratch) {
  MixedPass<R> p(m, s, scratch);
  auto& w = p.w;
  p.load_sums();
  const int64_t groups = (s.end - s.begin + m.size - 1) / m.size;
  for (int64_t c = groups - 1; c >= 0; c--) {
    const int64_t at = s.begin + c * m.size, size = p.size_at(at), asked = p.asked(at);
    const bool reached = m.summed && (!m.is_causal || p.closed(at));
    p.read_group(at, true);
    for (int64_t j = 0; j < size; j += CHUNK) {
      const int n = p.block(j, size);
      R *const dquad = w.dquad, *const dlin = w.dlin, *const dv = w.out;
      zero(dquad, w.K * CHUNK);
      zero(dlin, w.L * CHUNK);
      zero(dv, n * w.V);
      transpose_rows(p, p.quad_key, j, n, p.K, w.K, w.quad_transposed);
      transpose_rows(p, p.value, j, n, p.V, w.V, w.wide_transposed);
      if (!m.summed) transpose_rows(p, p.lin_key, j, n, p.L, w.L, w.lin_transposed);
      // A group reaches queries of others through S = sum s v^T: dv = s dS, ds = dS v. (w.S is dS.)
      if (reached) {
        product<BY_ROW, R>(p.ahead, n, p.V, p.L, p.rows_from(p.lin_key, j), {w.S, w.V}, {dv, w.V});
        product<BY_ROW, R>(p.ahead, p.L, n, p.V, {w.S, w.V}, {w.wide_transposed, CHUNK},
                           {dlin, CHUNK});
      }
      for (int64_t i = m.is_causal ? larger(j, asked) : 0; i < size; i += CHUNK) {
        const int queries = p.block(i, size);
        const bool diagonal = m.is_causal && i == j;
        for (int64_t r = 0; r < p.heads; r++) {
          const int64_t h = s.group * p.heads + r;
          p.read_queries(h, at + i, queries);
          p.read_upstream(h, at + i, queries);
          // The same products as in mixed_query_backward, with queries in rows: the sums over
          // queries below then need no transposed matrix.
          product<BY_ROW, R>(p.ahead, queries, n, p.K, {w.quad_query, w.K},
                             {w.quad_transposed, CHUNK}, {w.scores, CHUNK}, false);
          p.add_bias(m.bias, h, i, j, queries, n, w.scores);
          product<BY_ROW, R>(p.ahead, queries, n, p.V, {w.dy, w.V}, {w.wide_transposed, CHUNK},
                             {w.weights, CHUNK}, false);
          if (!m.summed)
            product<BY_COLUMN, R>(p.ahead, p.L, n, queries, {w.lin_query, w.L}, {w.weights, CHUNK},
                                  {dlin, CHUNK});
          over_block<R>(queries, n, diagonal, true, [&](int at, auto seen) {
            const Vec<R> score = load(w.scores + at);
            const Vec<R> grad = load(w.weights + at) * gate_slope<R>(score, m.activation);
            store(w.scores + at, seen ? gate<R>(score, m.activation) : Vec<R>{});
            store(w.weights + at, seen ? grad : Vec<R>{});
          });
          // dk = sum dscores q, with q scaled as in the scores.
          product<BY_COLUMN, R>(p.ahead, p.K, n, queries, {w.quad_query, w.K}, {w.weights, CHUNK},
                                {dquad, CHUNK});
          if (!m.summed)
            product<BY_ROW, R>(p.ahead, queries, n, p.L, {w.lin_query, w.L},
                               {w.lin_transposed, CHUNK}, {w.scores, CHUNK});
          // dv = sum w dout; w.scores are the weights now, with the linear ones.
          product<BY_COLUMN, R>(p.ahead, n, p.V, queries, {w.scores, CHUNK}, {w.dy, w.V}, {dv, w.V},
                                true, diagonal ? FROM : ALL);
        }
      }
      // Tokens of the group that stays open are in the final state as they are.
      transpose(p.K, n, dquad, CHUNK, w.rows, w.K);
      add_open(p, m.dfinal_quad_key, at, j, n, p.K, w.rows, w.K);
      p.scatter(m.dquad_key, m.dopen_quad_key, s.group, at + j, n, p.K, 0, p.K, w.rows, w.K);
      transpose(p.L, n, dlin, CHUNK, w.rows, w.L);
      add_open(p, m.dfinal_lin_key, at, j, n, p.L, w.rows, w.L);
      p.scatter(m.dlin_key, m.dopen_lin_key, s.group, at + j, n, p.L, 0, p.L, w.rows, w.L);
      add_open(p, m.dfinal_value, at, j, n, p.V, dv, w.V);
      p.scatter(m.dvalue, m.dopen_value, s.group, at + j, n, p.V, 0, p.V, dv, w.V);
    }
    // Only now, as the group's own queries read the sums before its keys joined them.
    for (int64_t i = asked; m.summed && m.is_causal && i < size; i += CHUNK)
      p.add_queries(at + i, p.block(i, size));
  }
  if (m.is_causal) p.leave_sums();
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
