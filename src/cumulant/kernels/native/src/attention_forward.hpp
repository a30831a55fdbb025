// Outputs, and the keys' sums.
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
  const bool in_place = p.in_place();
  if (in_place)
    p.use_sums_in_place();
  else if (past || leaves || s.end - s.begin > a.chunk)
    p.load_sums(s.start, s.start_denominator);
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
  if (leaves && !in_place) p.leave_sums(s.stop, s.stop_denominator);
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

}  // namespace CUMULANT_ISA
}  // namespace cumulant
