// Outputs, the keys' sums, and one token's step.
#pragma once

#include "attention_chunk.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// Numerators and denominators of a chunk's queries over its own keys, by the quadratic form: out
// [n, V], z, set or added to.
template <bool DECAYS, class R> void attend_inside(Pass<R>& p, int n, bool add) {
  constexpr int W = LANES<R>;
  auto& w = p.w;
  p.template triangle<BY_COLUMN>(Pass<R>::UPPER, n, p.K, {w.k, CHUNK}, {w.q, CHUNK}, w.scores);
  if (!add || !p.a.normalize) zero(w.z, CHUNK);
  for (int j = 0; j < n; j++) {  // a key's weights for all queries
    R* row = w.scores + j * CHUNK;
    const int first = j / W * W;
    zero(row, first);
    const Vec<R> counted = p.lanes_from(j - first);
    for (int i = first; i < n; i += W) {
      Vec<R> x = polynomial<R>(load(row + i), p.a.order, p.a.constant_term);
      if (i == first) x = counted != R(0) ? x : Vec<R>{};
      if (p.mask && !p.mask[j]) x = Vec<R>{};
      if (DECAYS) x *= p.decay.of_queries(i, j);
      store(row + i, x);
      store(w.z + i, load(w.z + i) + x);
    }
  }
  product<BY_COLUMN, R>(p.ahead, n, p.columns, n, {w.scores, CHUNK}, p.v, {w.out, w.stride}, add,
                        UP_TO);
}

template <class R> void forward(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  auto& w = p.w;
  const bool leaves = s.stop || s.stop_denominator;
  bool past = s.start || s.start_denominator;  // anything in the sums?
  if (past || leaves || s.end - s.begin > a.chunk) p.load_sums(s.start, s.start_denominator);
  for (int64_t at = s.begin; at < s.end; at += a.chunk) {
    const int n = p.count(at);
    p.begin(at, a.chunk, p.OUT | p.QUERY | (a.is_causal ? p.KEY | p.VALUE : 0));
    if (a.is_causal) {
      p.read_key(at, n);
      p.read_value(at, n);
    }
    for (int r = 0; r < p.R_heads; r++) {
      p.read_query(r, at, n);
      if (past) p.read_sums(w.q, w.ones, n, w.out, a.normalize ? w.z : nullptr);
      if (past && p.decays) {
        scale_rows<R>(n, p.columns, {w.out, w.stride}, p.decay.from_start, {w.out, w.stride});
        scale_columns(1, n, w.z, p.decay.from_start, w.z);
      }
      if (a.is_causal) {
        p.decays ? attend_inside<true>(p, n, past) : attend_inside<false>(p, n, past);
      } else if (!past) {
        zero(w.out, n * w.stride);
        zero(w.z, CHUNK);
      }
      p.write_out(r, at, n, w.out, w.z);
    }
    if (a.is_causal && (leaves || at + n < s.end)) {
      p.add_keys(n, w.dv);
      past = true;
    }
  }
  if (leaves) p.leave_sums(s.stop, s.stop_denominator);
}

// What the segment's keys and values add to the sums.
template <class R> void sum_keys(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  p.load_sums(s.start, s.start_denominator);
  for (int64_t at = s.begin; at < s.end; at += a.chunk) {
    const int n = p.count(at);
    p.begin(at, a.chunk, p.KEY | p.VALUE);
    p.read_key(at, n);
    p.read_value(at, n);
    p.add_keys(n, p.w.dv);
  }
  p.leave_sums(s.stop, s.stop_denominator);
}

// N vectors of columns of the rows f .. f + rows - 1 of a state, which the token is added to if
// that is yet to do.
template <class R, int N>
INLINE void step_columns(Pass<R>& p, bool add, int f, int rows, int d, const R* phi, const R* S,
                         R* next) {
  constexpr int W = LANES<R>;
  auto& w = p.w;
  Vec<R> out[N], v[N];
  for (int i = 0; i < N; i++) out[i] = Vec<R>{}, v[i] = load(p.v.data + d + i * W);
  for (int j = 0; j < rows; j++) {
    const int64_t at = int64_t(f + j) * p.V + d;
    const R by_key = w.Z[f + j], by_query = phi[j * CHUNK];
    for (int i = 0; i < N; i++) {
      Vec<R> x = load((add ? S : next) + at + i * W);
      if (add) {
        x = p.add_decayed(x, by_key * v[i]);
        store(next + at + i * W, x);
      }
      out[i] += by_query * x;
    }
  }
  for (int i = 0; i < N; i++) store(w.out + d + i * W, load(w.out + d + i * W) + out[i]);
}

// One token: S' = exp(d) S + phi(k) v, out = phi(q) S' / z', in one pass over the state.
template <class R> void step(const Attention& a, const Segment& s, void* scratch) {
  constexpr int W = LANES<R>, N = PANEL;
  Pass<R> p(a, s, scratch);
  auto& w = p.w;
  const int V = p.V, whole = V / W * W;
  p.read_key(0, 1);
  p.read_value(0, 1);
  const R *S = (const R*)s.start, *Z = (const R*)s.start_denominator;
  R *next = (R*)s.stop, *next_Z = (R*)s.stop_denominator;
  p.slabs(w.k, w.constant, 1, [&](int f, int rows, const R* phi) {
    for (int j = 0; j < rows; j++) w.Z[f + j] = phi[j * CHUNK];
  });
  for (int r = 0; r < p.R_heads; r++) {
    p.read_query(r, 0, 1);
    zero(w.out, w.stride);
    R z = 0;
    p.slabs(w.q, w.ones, 1, [&](int f, int rows, const R* phi) {
      for (int j = 0; r == 0 && a.normalize && j < rows; j++)
        next_Z[f + j] = p.add_decayed(Z[f + j], w.Z[f + j]);
      R part = 0;
      for (int j = 0; a.normalize && j < rows; j++) part += phi[j * CHUNK] * next_Z[f + j];
      z += part;
      int d = 0;
      for (; d + N * W <= whole; d += N * W)
        step_columns<R, N>(p, r == 0, f, rows, d, phi, S, next);
      for (; d < whole; d += W) step_columns<R, 1>(p, r == 0, f, rows, d, phi, S, next);
      for (int j = 0; j < rows; j++)
        for (int d = whole; d < V; d++) {
          const int64_t at = int64_t(f + j) * V + d;
          if (r == 0) next[at] = p.add_decayed(S[at], w.Z[f + j] * p.v.data[d]);
          w.out[d] += phi[j * CHUNK] * next[at];
        }
    });
    p.write_out(r, 0, 1, w.out, &z);
  }
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
