// One token's step of linear and Taylor attention, in one pass over the state. With one token,
// features lie one after another: [F], not the [F, CHUNK] of a chunk.
#pragma once

#include "attention_chunk.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// The Taylor features of one vector, with the same roundings as Monomials.
template <class R> struct TokenFeatures {
  static constexpr int W = LANES<R>;
  const R* x;
  int K;
  R* to;  // of the next feature; whole vectors are written from there

  void write(const Attention& a, R constant) {
    if (a.order == 0) return copy(x, to, K);
    if (a.constant_term) *to++ = constant;
    copy(x, to, K);
    to += K;
    for (int degree = 2; degree <= a.order; degree++)
      for (int i = 0; i < K; i++) extend(x[i], i, 1, degree - 1);
  }

 private:
  // All features that begin with the factors of `prefix`, whose last `run` ones are x[last], and
  // have `left` more.
  void extend(R prefix, int last, int run, int left) {
    const R weight = weight_of_run<R>(run + 1);  // of another factor x[last]
    if (left > 1) {
      extend(prefix * x[last] * weight, last, run + 1, left - 1);
      for (int i = last + 1; i < K; i++) extend(prefix * x[i], i, 1, left - 1);
      return;
    }
    const int n = K - last;
    for (int j = 0; j < n; j += W) store(to + j, load(x + last + j) * prefix);
    *to *= weight;
    to += n;
  }
};

template <class R> class Step {
  static constexpr int W = LANES<R>;
  const Attention& a;
  const Segment& s;
  Pass<R> p;
  R *const by_key, *const by_query;  // features [F]

 public:
  Step(const Attention& attention, const Segment& segment, void* scratch)
      : a(attention),
        s(segment),
        p(attention, segment, scratch),
        by_key(p.w.S),
        by_query(p.w.S + padded<R>(p.F)) {}

  void run() {
    read_key();
    p.read_value(0, 1);
    for (int r = 0; r < p.R_heads; r++) {
      read_query(r);
      const R z = a.normalize ? denominator(r == 0) : R(0);
      int d = 0;
      for (; d + PANEL * W <= p.V; d += PANEL * W)
        r ? columns<PANEL, false>(d) : columns<PANEL, true>(d);
      for (; d + W <= p.V; d += W) r ? columns<1, false>(d) : columns<1, true>(d);
      for (; d < p.V; d++) column(d, r == 0);
      p.write_out(r, 0, 1, p.w.out, &z);
    }
  }

 private:
  // One row of numbers, with zeros up to a whole vector and one more.
  R* row(const Array& x, int64_t head) {
    zero(p.w.rows, padded<R>(p.K) + W);
    read_row(x.data, p.batch * x.batch + head * x.head, a.type, p.K, p.w.rows);
    return p.w.rows;
  }
  void read_key() {
    p.read_mask(0, 1);
    if (p.mask && !p.mask[0]) return zero(by_key, padded<R>(p.F));
    R* const x = row(a.key, s.group);
    activate(x, 1, p.K, R(1), a.activation);
    TokenFeatures<R>{x, p.K, by_key}.write(a, R(1));
  }
  void read_query(int r) {
    R* const x = row(a.query, p.head(r));
    if (p.levels()) level_one(x);
    activate(x, 1, p.K, p.levels() ? R(1) : R(a.scale), a.activation);
    TokenFeatures<R>{x, p.K, by_query}.write(a, R(1));
  }

  // What `level` does to a chunk.
  void level_one(R* x) const {
    const int whole = p.K / W * W;
    R tops[W], top = 0;
    Vec<R> most{};
    for (int d = 0; d < p.K; d += W) store(x + d, load(x + d) * R(a.scale));
    if (a.activation == ELU) most = splat(top = x[0]);
    const auto size = [&](auto y) { return a.activation == IDENTITY ? (y < R(0) ? -y : y) : y; };
    for (int d = 0; d < whole; d += W) {
      const Vec<R> y = size(load(x + d));
      most = y > most ? y : most;
    }
    store(tops, most);
    for (int i = 0; i < W; i++) top = larger(top, tops[i]);
    for (int d = whole; d < p.K; d++) top = larger(top, R(size(x[d])));
    const Vec<R> factor = level_factor<R>(splat(top));
    for (int d = 0; d < p.K; d += W)
      store(x + d, a.activation == ELU ? load(x + d) - smaller(top, R(0)) : load(x + d) * factor);
  }

  // The query's denominator, from the denominators that the token is added to if that is yet to do.
  R denominator(bool add) {
    const R* const Z = (const R*)s.start_denominator;
    R* const next = (R*)s.stop_denominator;
    Vec<R> total{};
    int f = 0;
    for (; f + W <= p.F; f += W) {
      if (add) store(next + f, p.add_decayed(load(Z + f), load(by_key + f)));
      total += load(by_query + f) * load(next + f);
    }
    R z = sum<R>(total);
    for (; f < p.F; f++) {
      if (add) next[f] = p.add_decayed(Z[f], by_key[f]);
      z += by_query[f] * next[f];
    }
    return z;
  }

  // N vectors of columns of the new state, to which the token is added if that is yet to do, and of
  // the output.
  template <int N, bool ADD> INLINE void columns(int d) {
    const R* const S = (const R*)s.start;
    R* const next = (R*)s.stop;
    Vec<R> out[N], v[N];
    for (int i = 0; i < N; i++) out[i] = Vec<R>{}, v[i] = load(p.v.data + d + i * W);
    constexpr int AHEAD = 4096;  // bytes by which memory is asked for ahead
    for (int f = 0; f < p.F; f++) {
      const int64_t at = int64_t(f) * p.V + d;
      const R key = by_key[f], query = by_query[f];
      for (int i = 0; i < N; i++) {
        Vec<R> x;
        if (ADD) __builtin_prefetch((const char*)(S + at + i * W) + AHEAD);
        if (ADD) {
          x = p.add_decayed(load(S + at + i * W), key * v[i]);
          store(next + at + i * W, x);
        } else {
          x = load(next + at + i * W);
        }
        out[i] += query * x;
      }
    }
    for (int i = 0; i < N; i++) store(p.w.out + d + i * W, out[i]);
  }
  void column(int d, bool add) {
    const R* const S = (const R*)s.start;
    R* const next = (R*)s.stop;
    R out = 0;
    for (int f = 0; f < p.F; f++) {
      const int64_t at = int64_t(f) * p.V + d;
      if (add) next[at] = p.add_decayed(S[at], by_key[f] * p.v.data[d]);
      out += by_query[f] * next[at];
    }
    p.w.out[d] = out;
  }
};

template <class R> void step(const Attention& a, const Segment& s, void* scratch) {
  Step<R>(a, s, scratch).run();
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
