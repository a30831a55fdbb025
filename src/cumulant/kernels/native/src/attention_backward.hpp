// Gradients: the queries' forwards in time, where S grows again; the keys' and values' backwards,
// where dS does.
//
// With dy = dout / z and dz = -(dout . out) / z: d phi(q) = S dy + Z dz, and dS = sum phi(q) dy, dZ
// = sum phi(q) dz over the queries that see a key; d phi(k) = dS v + dZ, dv = phi(k) dS. Inside a
// chunk the weights w = p(q . k) are formed again: dw = dy v + dz, d(q . k) = dw p'(q . k). The two
// passes share nothing, so that they can run beside each other.
#pragma once

#include "attention_chunk.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// dq [K, n] from the chunk's own keys: y = w v and z = sum w, with w = p(q . k), so dw = dy v^T +
// dz, the scores' gradient is dw p'(q . k), and dq sums it times k. Scores and dw are formed again.
template <class R> void query_inside(Pass<R>& p, int n) {
  constexpr int W = LANES<R>;
  auto& w = p.w;
  p.template triangle<BY_COLUMN>(Pass<R>::UPPER, n, p.K, {w.k, CHUNK}, {w.q, CHUNK}, w.scores);
  p.template triangle<BY_ROW>(Pass<R>::UPPER, n, p.V, p.v, {w.dy_transposed, CHUNK}, w.dscores);
  for (int j = 0; j < n; j++) {  // a key's part in all queries
    R *row = w.dscores + j * CHUNK, *scores = w.scores + j * CHUNK;
    const int first = j / W * W;
    zero(row, first);
    const Vec<R> counted = p.lanes_from(j - first);
    for (int i = first; i < n; i += W) {
      // Zero behind the diagonal and at masked keys, where dz would give a gradient.
      Vec<R> x = (load(row + i) + load(w.dz + i)) * slope<R>(load(scores + i), p.a.order);
      if (i == first) x = counted != R(0) ? x : Vec<R>{};
      if (p.mask && !p.mask[j]) x = Vec<R>{};
      store(row + i, x);
    }
  }
  product<BY_ROW, R>(p.ahead, p.K, n, n, {w.k, CHUNK}, {w.dscores, CHUNK}, {w.dq, CHUNK}, false);
}

template <class R> void query_backward(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  auto& w = p.w;
  bool past = s.start || s.start_denominator;
  if (past || s.end - s.begin > a.chunk) p.load_sums(s.start, s.start_denominator);
  for (int64_t at = s.begin; at < s.end; at += a.chunk) {
    const int n = p.count(at);
    p.begin(at, a.chunk, p.QUERY | p.UPSTREAM | p.DQUERY | (a.is_causal ? p.KEY | p.VALUE : 0));
    if (a.is_causal) {
      p.read_key(at, n);
      p.read_value(at, n);
    }
    for (int r = 0; r < p.R_heads; r++) {
      p.read_query(r, at, n);
      p.read_upstream(r, at, n);
      transpose(n, p.V, w.dy, w.stride, w.dy_transposed, CHUNK);
      if (a.is_causal)
        query_inside(p, n);
      else
        zero(w.dq, p.K * CHUNK);
      // From the sums that the query read: d phi(q) = S dy + Z dz.
      if (past) p.sums_backward(w.q, n, w.dy_transposed, w.dz, w.dq);
      p.query_gradient(w.dq, n);
      write_transposed(p.rows_of(a.dquery, p.head(r), at, n, false), p.K, w.dq, w.rows);
    }
    // S as the forward pass had it for the next chunk; it is formed again rather than kept.
    if (a.is_causal && at + n < s.end) {
      p.add_sums(w.k, w.constant, n, p.v, nullptr);
      past = true;
    }
  }
}

// Adds to dk [K, n] and dv [n, V] what comes from the chunk's own queries of one head.
template <class R> void key_inside(Pass<R>& p, int n) {
  constexpr int W = LANES<R>;
  auto& w = p.w;
  p.template triangle<BY_COLUMN>(Pass<R>::LOWER, n, p.K, {w.q, CHUNK}, {w.k, CHUNK}, w.scores);
  p.template triangle<BY_ROW>(Pass<R>::LOWER, n, p.V, {w.dy, w.stride}, {w.v_transposed, CHUNK},
                              w.dscores);
  for (int i = 0; i < n; i++) {  // a query's weights of all keys
    R *scores = w.scores + i * CHUNK, *row = w.dscores + i * CHUNK;
    const int last = i / W * W;
    const Vec<R> hidden = p.lanes_from(i - last + 1);
    for (int j = 0; j <= last; j += W) {
      const Vec<R> x = load(scores + j);
      const Vec<R> counted =
          j == last ? (hidden != R(0) ? Vec<R>{} : load(w.constant + j)) : load(w.constant + j);
      const Vec<R> weight = polynomial<R>(x, p.a.order, p.a.constant_term);
      const Vec<R> grad = (load(row + j) + w.dz[i]) * slope<R>(x, p.a.order);
      store(scores + j, counted != R(0) ? weight : Vec<R>{});
      store(row + j, counted != R(0) ? grad : Vec<R>{});
    }
    zero(scores + last + W, padded<R>(n) - last - W);
    zero(row + last + W, padded<R>(n) - last - W);
  }
  product<BY_COLUMN, R>(p.ahead, n, p.V, n, {w.scores, CHUNK}, {w.dy, w.stride}, {w.dv, w.stride},
                        true, FROM);
  product<BY_ROW, R>(p.ahead, p.K, n, n, {w.q, CHUNK}, {w.dscores, CHUNK}, {w.dk, CHUNK});
}

template <class R> void key_backward(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  auto& w = p.w;
  const bool leaves = s.stop || s.stop_denominator;
  if (s.start || s.start_denominator || leaves || s.end - s.begin > a.chunk)
    p.load_sums(s.start, s.start_denominator);
  bool ahead = s.start || s.start_denominator;  // anything in the sums?
  const int64_t chunks = (s.end - s.begin + a.chunk - 1) / a.chunk;
  for (int64_t c = chunks - 1; c >= 0; c--) {
    const int64_t at = s.begin + c * a.chunk;
    const int n = p.count(at);
    p.begin(at, -a.chunk, p.KEY | p.VALUE | p.DKEY | (a.is_causal ? p.QUERY | p.UPSTREAM : 0));
    p.read_key(at, n);
    p.read_value(at, n);
    transpose(n, p.V, p.v.data, p.v.stride, w.v_transposed, CHUNK);
    zero(w.dk, p.K * CHUNK);
    zero(w.dv, n * w.stride);
    // Later queries: dv = phi(k) dS, d phi(k) = dS v + dZ. (The sums in w are dS and dZ here.)
    if (ahead) {
      p.read_sums(w.k, w.constant, n, w.dv, nullptr);
      p.sums_backward(w.k, n, w.v_transposed, nullptr, w.dk);
    }
    for (int r = 0; a.is_causal && r < p.R_heads; r++) {
      p.read_query(r, at, n);
      p.read_upstream(r, at, n);
      key_inside(p, n);
      // The chunk's own queries join dS after its keys have read it: those are counted inside.
      if (c > 0 || leaves) p.add_sums(w.q, w.ones, n, {w.dy, w.stride}, w.dz);
    }
    ahead = ahead || a.is_causal;
    activate_backward(w.k, w.dk, p.K, n, R(1), a.activation);
    // Masked keys take no part: dZ would give them a gradient all the same.
    if (p.mask) p.clear_masked(w.dk, n);
    write_transposed(p.rows_of(a.dkey, s.group, at, n, false), p.K, w.dk, w.rows);
    write(p.rows_of(a.dvalue, s.group, at, n, false), 0, p.V, w.dv, w.stride);
  }
  if (leaves) p.leave_sums(s.stop, s.stop_denominator);
}

// What the segment's queries add to the gradient of the sums.
template <class R> void sum_queries(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  p.load_sums(s.start, s.start_denominator);
  for (int64_t at = s.begin; at < s.end; at += a.chunk) {
    const int n = p.count(at);
    p.begin(at, a.chunk, p.QUERY | p.UPSTREAM);
    for (int r = 0; r < p.R_heads; r++) {
      p.read_query(r, at, n);
      p.read_upstream(r, at, n);
      p.add_sums(p.w.q, p.w.ones, n, {p.w.dy, p.w.stride}, p.w.dz);
    }
  }
  p.leave_sums(s.stop, s.stop_denominator);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
