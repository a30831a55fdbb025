// Gradients: the queries' forwards in time, where S grows again; the keys' and values' backwards,
// where dS does.
//
// With dy = dout / z and dz = -(dout . out) / z: d phi(q) = S dy + Z dz, and dS = sum phi(q) dy, dZ
// = sum phi(q) dz over the queries that see a key; d phi(k) = dS v + dZ, dv = phi(k) dS. Inside a
// chunk the weights w = p(q . k) are formed again: dw = dy v + dz, d(q . k) = dw p'(q . k). The two
// passes share nothing, so that they can run beside each other.
//
// With decays a query reads S times exp(c_i), and a weight is w = exp(c_i - c_j) p(q . k). Token
// l's log decay is part of what queries i >= l read of keys j < l, so its gradient sums w dw over
// these pairs. Inside l's chunk that is the sum over j < l of (column j - row j) of the matrix w
// dw. Where the query reads the sums before the chunk, the pair is part of phi(q_i) . d phi(q_i),
// and where a later chunk reads the key, of phi(k_j) . d phi(k_j). The query pass leaves the former
// for every token, the key pass columns, rows and the latter, and some sums each: see
// `DecayGradient` in decay_gradient.hpp.
#pragma once

#include "attention_chunk.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// dq [K, n], set or added to, from the chunk's own keys: y = w v and z = sum w, with w = p(q . k),
// so dw = dy v^T + dz, the scores' gradient is dw p'(q . k), and dq sums it times k. Scores and dw
// are formed again.
template <bool DECAYS, class R> void query_inside(Pass<R>& p, int n, bool add) {
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
      if (DECAYS) x *= p.decay.of_queries(i, j);
      store(row + i, x);
    }
  }
  product<BY_ROW, R>(p.ahead, p.K, n, n, {w.k, CHUNK}, {w.dscores, CHUNK}, {w.dq, CHUNK}, add);
}

// dq from the sums that the queries read, d phi(q) = S dy + Z dz; with decays also what each token
// leaves in `terms`.
template <class R> void query_across(Pass<R>& p, int n, int64_t at) {
  auto& w = p.w;
  if (!p.decays) return p.sums_backward(w.q, n, w.dy_transposed, w.dz, w.dq, nullptr);
  const R* const kept = p.decay.from_start;
  scale_columns(p.V, n, w.dy_transposed, kept, w.dv);
  scale_columns(1, n, w.dz, kept, w.z);
  p.sums_backward(w.q, n, w.dv, w.z, w.dq, p.s.terms ? w.phi : nullptr);
  for (int i = 0; p.s.terms && i < n; i++) p.s.terms[at + i] += double(w.phi[i]);
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
    p.leave_anchor(at);
    for (int i = 0; s.terms && i < n; i++) s.terms[at + i] = 0;
    for (int r = 0; r < p.R_heads; r++) {
      p.read_query(r, at, n);
      p.read_upstream(r, at, n);
      transpose(n, p.V, w.dy, w.stride, w.dy_transposed, CHUNK);
      if (past) query_across(p, n, at);
      if (a.is_causal)
        p.decays ? query_inside<true>(p, n, past) : query_inside<false>(p, n, past);
      else if (!past)
        zero(w.dq, p.K * CHUNK);
      p.query_gradient(w.dq, n);
      write_transposed(p.rows_of(a.dquery, p.head(r), at, n, false), p.K, w.dq, w.rows);
    }
    // S as the forward pass had it for the next chunk; it is formed again rather than kept.
    if (a.is_causal && at + n < s.end) {
      p.add_keys(n, w.dv);
      past = true;
    }
  }
}

// Adds to dk [K, n] and dv [n, V] what comes from the chunk's own queries of one head, and to
// `terms`, unless null, columns less rows of w dw.
template <bool DECAYS, class R> void key_inside(Pass<R>& p, int n, double* terms) {
  constexpr int W = LANES<R>;
  auto& w = p.w;
  p.template triangle<BY_COLUMN>(Pass<R>::LOWER, n, p.K, {w.q, CHUNK}, {w.k, CHUNK}, w.scores);
  p.template triangle<BY_ROW>(Pass<R>::LOWER, n, p.V, {w.dy, w.stride}, {w.v_transposed, CHUNK},
                              w.dscores);
  for (int i = 0; i < n; i++) {  // a query's weights of all keys
    R *scores = w.scores + i * CHUNK, *row = w.dscores + i * CHUNK;
    const int last = i / W * W;
    const Vec<R> hidden = p.lanes_from(i - last + 1);
    Vec<double> of_row{};
    for (int j = 0; j <= last; j += W) {
      const Vec<R> x = load(scores + j);
      const Vec<R> counted =
          j == last ? (hidden != R(0) ? Vec<R>{} : load(w.constant + j)) : load(w.constant + j);
      Vec<R> weight = polynomial<R>(x, p.a.order, p.a.constant_term);
      Vec<R> slopes = slope<R>(x, p.a.order);
      const Vec<R> dweight = load(row + j) + w.dz[i];
      if (DECAYS) {
        const Vec<R> kept = p.decay.of_keys(i, j);
        weight *= kept, slopes *= kept;
      }
      weight = counted != R(0) ? weight : Vec<R>{};
      store(scores + j, weight);
      store(row + j, counted != R(0) ? dweight * slopes : Vec<R>{});
      if (DECAYS && terms) {
        const Vec<R> pairs = counted != R(0) ? weight * dweight : Vec<R>{};
        add_wide(terms + j, pairs);
        of_row += fold(pairs);
      }
    }
    if (DECAYS && terms) terms[i] -= sum<double>(of_row);
    zero(scores + last + W, padded<R>(n) - last - W);
    zero(row + last + W, padded<R>(n) - last - W);
  }
  product<BY_COLUMN, R>(p.ahead, n, p.V, n, {w.scores, CHUNK}, {w.dy, w.stride}, {w.dv, w.stride},
                        true, FROM);
  product<BY_ROW, R>(p.ahead, p.K, n, n, {w.q, CHUNK}, {w.dscores, CHUNK}, {w.dk, CHUNK});
}

// dk and dv from later queries: dv = phi(k) dS, d phi(k) = dS v + dZ; and each token's phi(k) .
// d phi(k), added to `terms` unless null. (The sums in w are dS and dZ here.)
template <class R> void key_across(Pass<R>& p, int n, double* terms) {
  auto& w = p.w;
  p.read_sums(w.k, w.constant, n, w.dv, nullptr);
  if (!p.decays) return p.sums_backward(w.k, n, w.v_transposed, nullptr, w.dk, nullptr);
  const R* const kept = p.decay.to_end;
  scale_rows<R>(n, p.V, {w.dv, w.stride}, kept, {w.dv, w.stride});
  scale_columns(p.V, n, w.v_transposed, kept, w.dy_transposed);
  p.sums_backward(w.k, n, w.dy_transposed, kept, w.dk, terms ? w.phi : nullptr);
  for (int j = 0; terms && j < n; j++)
    if (w.constant[j] != R(0)) terms[j] += double(w.phi[j]);  // a masked key is in no sum
}

template <class R> void key_backward(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  auto& w = p.w;
  const bool leaves = s.stop || s.stop_denominator;
  if (s.start || s.start_denominator || leaves || s.end - s.begin > a.chunk || p.is_anchor(s.begin))
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
    double columns[CHUNK] = {}, *const terms = s.terms ? columns : nullptr;
    if (ahead) {
      key_across(p, n, terms);
    } else {
      zero(w.dk, p.K * CHUNK);
      zero(w.dv, n * w.stride);
    }
    for (int r = 0; a.is_causal && r < p.R_heads; r++) {
      p.read_query(r, at, n);
      p.read_upstream(r, at, n);
      p.decays ? key_inside<true>(p, n, terms) : key_inside<false>(p, n, terms);
      // The chunk's own queries join dS after its keys have read it: those are counted inside.
      if (c > 0 || leaves || p.is_anchor(at)) p.add_queries(n, r == 0);
    }
    p.leave_anchor(at);
    if (terms) memcpy(s.terms + at, terms, sizeof(double) * size_t(n));
    ahead = ahead || a.is_causal;
    activate_backward(w.k, w.dk, p.K, n, R(1), a.activation);
    // Masked keys take no part: dZ would give them a gradient all the same.
    if (p.mask) p.clear_masked(w.dk, n);
    write_transposed(p.rows_of(a.dkey, s.group, at, n, false), p.K, w.dk, w.rows);
    write(p.rows_of(a.dvalue, s.group, at, n, false), 0, p.V, w.dv, w.stride);
  }
  if (leaves) p.leave_sums(s.stop, s.stop_denominator);
}

// What the segment's queries add to the gradient of the sums, which decays backwards in time.
template <class R> void sum_queries(const Attention& a, const Segment& s, void* scratch) {
  Pass<R> p(a, s, scratch);
  p.load_sums(s.start, s.start_denominator);
  const int64_t chunks = (s.end - s.begin + a.chunk - 1) / a.chunk;
  for (int64_t c = chunks - 1; c >= 0; c--) {
    const int64_t at = s.begin + c * a.chunk;
    const int n = p.count(at);
    p.begin(at, -a.chunk, p.QUERY | p.UPSTREAM);
    if (p.decays) p.read_mask(at, n);
    for (int r = 0; r < p.R_heads; r++) {
      p.read_query(r, at, n);
      p.read_upstream(r, at, n);
      p.add_queries(n, r == 0);
    }
  }
  p.leave_sums(s.stop, s.stop_denominator);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
