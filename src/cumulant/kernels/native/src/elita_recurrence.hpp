// ELiTA's attention as a recurrence, a block of tokens at a time: first the gates, two numbers a
// token, then the columns of the values, PANEL at a time, whose means stay in registers.
//
// With the running log-sum m of the key logits c: a = exp(c - m), g = sigmoid(s - r - m), u += a (v
// - u), out = u + g (v - u). Backwards, with the gradient Q of u, Q = sum_r (1 - g) dout + carry,
// and the gradient M of m: dv = a Q + sum_r g dout, and the carry is (1 - a) Q; ds = g (1 - g) dout
// . (v - u), b = a Q . (v - u), M = -sum_r ds + carry, dc = b + a M, and the carry is (1 - a) M -
// b. v - u is (1 - a) times the distance from the mean before, and both a and 1 - a come from the
// odds a / (1 - a): so gradients of logits that hardly matter are small products, and not
// differences of large sums. All in double: a mean in float would stop moving once its steps are
// smaller than its last digit.
#pragma once

#include "tokens.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

constexpr int BLOCK =
    16;  // tokens whose rows of doubles stay in the first cache; ELITA_BLOCK in library.py
constexpr int COLUMNS = CUMULANT_BYTES == 64 ? 8 : 4;  // vectors of doubles that a panel spans
constexpr int WIDTH = COLUMNS * LANES<double>;
constexpr double LOWEST = -1.7976931348623157e308, INFINITE = __builtin_inf();

// Scratch: rows of a panel for BLOCK tokens, for values, outputs and their gradients; numbers a
// token.
struct ElitaScratch {
  alignas(64) double v[BLOCK * WIDTH], x[BLOCK * WIDTH], y[BLOCK * WIDTH];
  alignas(64) double a[BLOCK], odds[BLOCK], top[BLOCK], total[BLOCK], decay[BLOCK], fresh[BLOCK],
      logit[BLOCK];
  alignas(64) double keep[BLOCK], by_value[BLOCK], own[BLOCK], own_total[BLOCK], grad[BLOCK];
};

// And behind it: columns of all panels, and for each query head three numbers a token.
inline int64_t elita_scratch(const Elita& e) {
  return int64_t(sizeof(ElitaScratch)) +
         int64_t(sizeof(double)) * (e.V + WIDTH + e.H / e.G * 3 * BLOCK);
}

// The means before the block that begins at token t: [V].
INLINE double* kept_means(const Elita& e, const ElitaSegment& s, int64_t t) {
  return e.means + ((s.batch * e.G + s.group) * (e.T / BLOCK + 2) + t / BLOCK) * e.V;
}

template <int N> struct Count {
  static constexpr int value = N;
};

// Columns in whole vectors, of which a panel has 1, 2, 4 or 8.
INLINE int rounded(int width) {
  const int vectors = (width + LANES<double> - 1) / LANES<double>;
  return (vectors <= 2 ? larger(vectors, 1) : vectors <= 4 ? 4 : COLUMNS) * LANES<double>;
}

INLINE void exponentials(const double* x, double* y, int n) {
  for (int i = 0; i < n; i += LANES<double>) store(y + i, exponential<double>(load(x + i)));
}

// Rows [n, width] of an array from column `from`, as doubles, WIDTH apart.
INLINE void read_panel(const Array& x, int type, int64_t b, int64_t h, int64_t t, int n,
                       int64_t from, int width, double* to) {
  for (int i = 0; i < n; i++) {
    double* row = to + i * WIDTH;
    const int64_t offset = b * x.batch + h * x.head + (t + i) * x.row + from;
    if (type == F32 && width == rounded(width)) {
      typedef float Narrow __attribute__((vector_size(CUMULANT_BYTES / 2), aligned(4), may_alias));
      const float* p = (const float*)x.data + offset;
      for (int d = 0; d < width; d += LANES<double>)
        store(row + d, __builtin_convertvector(*(const Narrow*)(p + d), Vec<double>));
    } else {
      read_row<double>(x.data, offset, type, width, row);
      for (int d = width; d < rounded(width); d++) row[d] = 0;
    }
  }
}
INLINE void write_panel(const Array& x, int type, int64_t b, int64_t h, int64_t t, int n,
                        int64_t from, int width, const double* rows) {
  for (int i = 0; i < n; i++) {
    const double* row = rows + i * WIDTH;
    const int64_t offset = b * x.batch + h * x.head + (t + i) * x.row + from;
    if (type == F32 && width % LANES<double> == 0) {
      typedef float Narrow __attribute__((vector_size(CUMULANT_BYTES / 2), aligned(4), may_alias));
      float* p = (float*)x.data + offset;
      for (int d = 0; d < width; d += LANES<double>)
        *(Narrow*)(p + d) = __builtin_convertvector(load(row + d), Narrow);
    } else {
      write_row<double>(x.data, offset, type, width, row);
    }
  }
}

// Key gates of a block, and how far the sums have come: `top` is the running maximum of the logits,
// `total` the running sum of exp(c - top), so that nothing larger than 1 is exponentiated.
INLINE void key_gates(const Elita& e, const ElitaSegment& s, int64_t t, int n, double& top,
                      double& total, ElitaScratch& w) {
  read_row<double>(e.key_logit, (s.batch * e.G + s.group) * e.T + t, e.logits, n, w.logit);
  for (int i = 0; i < n; i++) {
    const bool first = e.first && e.first[t + i];
    const double before = first ? LOWEST : top, c = w.logit[i];
    top = c > before ? c : before;
    w.decay[i] = first ? -INFINITE : before - top;
    w.fresh[i] = c - top;
    w.top[i] = top;
  }
  for (int i = n; i < BLOCK; i++) w.decay[i] = w.fresh[i] = 0;
  exponentials(w.decay, w.decay, n);
  exponentials(w.fresh, w.fresh, n);
  for (int i = 0; i < n; i++) {
    const double before = w.decay[i] * total;
    total = before + w.fresh[i];
    w.total[i] = total;
    w.odds[i] = w.fresh[i] > 0 ? w.fresh[i] / before : 0;
    w.a[i] =
        w.fresh[i] / larger(total, 0.5);  // sums are at least 1, but zero where nothing was seen
  }
}

// Odds 1 / (total exp(r + top - s)) for one query head, and its gates g.
INLINE void own_gates(const Elita& e, const ElitaSegment& s, int64_t h, int64_t t, int n,
                      ElitaScratch& w, double* g) {
  read_row<double>(e.query_logit, (s.batch * e.H + h) * e.T + t, e.logits, n, w.grad);
  read_row<double>(e.self_logit, (s.batch * e.H + h) * e.T + t, e.logits, n, w.own);
  for (int i = 0; i < n; i++) {
    w.logit[i] = (w.grad[i] + w.top[i]) - w.own[i];
    w.keep[i] = w.logit[i] > 0 ? -w.logit[i] : w.logit[i];
  }
  for (int i = n; i < BLOCK; i++) w.keep[i] = 0;
  exponentials(w.keep, w.keep, n);
  for (int i = 0; i < n; i++) {
    const double x = w.keep[i];
    const double odds = w.own[i] == -INFINITE ? 0
                        : w.logit[i] > 0      ? x / w.total[i]
                                              : 1 / (w.total[i] * x);
    w.own[i] = odds;
    g[i] = 1 / (1 + 1 / odds);
  }
  if (e.own_odds) write_row<double>(e.own_odds, (s.batch * e.H + h) * e.T + t, e.gates, n, w.own);
}

// Moves the means of a panel over n tokens; every token's mean goes to w.x.
template <int N> void advance(const Elita& e, int64_t t, int n, double* mean, ElitaScratch& w) {
  constexpr int W = LANES<double>;
  Vec<double> u[N];
  for (int d = 0; d < N; d++) u[d] = load(mean + d * W);
  for (int i = 0; i < n; i++) {
    const double a = w.a[i];
    if (e.first && e.first[t + i])
      for (int d = 0; d < N; d++) u[d] = Vec<double>{};
    for (int d = 0; d < N; d++) {
      u[d] += a * (load(w.v + i * WIDTH + d * W) - u[d]);
      store(w.x + i * WIDTH + d * W, u[d]);
    }
  }
  for (int d = 0; d < N; d++) store(mean + d * W, u[d]);
}

// A function of a panel, in the form for as many vectors as `width` columns are rounded to.
template <class Run> INLINE void by_vectors(int width, Run run) {
  const int vectors = rounded(width) / LANES<double>;
  if (vectors == 1) return run(Count<1>{});
  if (vectors == 2) return run(Count<2>{});
  if (vectors == 4) return run(Count<4>{});
  return run(Count<COLUMNS>{});
}

inline void elita_forward(const Elita& e, const ElitaSegment& s, void* scratch) {
  ElitaScratch& w = *(ElitaScratch*)scratch;
  double* const means = (double*)((char*)scratch + sizeof(ElitaScratch));  // [V], to whole panels
  const int64_t heads = e.H / e.G, panels = (e.V + WIDTH - 1) / WIDTH * WIDTH;
  double* const gates = means + panels;  // [heads, BLOCK]
  const bool seen = s.start && s.start[0] != -INFINITE;
  double top = seen ? s.start[0] : LOWEST, total = seen ? 1 : 0;
  for (int64_t d = 0; d < panels; d++) means[d] = s.start && d < e.V ? s.start[2 + d] : 0;
  for (int64_t t = s.begin; t < s.end; t += BLOCK) {
    const int n = int(smaller<int64_t>(BLOCK, s.end - t));
    key_gates(e, s, t, n, top, total, w);
    if (!s.passing) {
      if (e.key_odds)
        write_row<double>(e.key_odds, (s.batch * e.G + s.group) * e.T + t, e.gates, n, w.odds);
      if (e.means) memcpy(kept_means(e, s, t), means, sizeof(double) * size_t(e.V));
      for (int64_t r = 0; r < heads; r++)
        own_gates(e, s, s.group * heads + r, t, n, w, gates + r * BLOCK);
    }
    for (int64_t from = 0; from < e.V; from += WIDTH) {
      const int width = int(smaller<int64_t>(WIDTH, e.V - from));
      read_panel(e.value, e.type, s.batch, s.group, t, n, from, width, w.v);
      by_vectors(width, [&](auto N) { advance<N.value>(e, t, n, means + from, w); });
      const int used = rounded(width);
      for (int64_t r = 0; !s.passing && r < heads; r++) {
        const double* const g = gates + r * BLOCK;
        for (int i = 0; i < n; i++)
          for (int d = 0; d < used; d += LANES<double>) {
            const Vec<double> u = load(w.x + i * WIDTH + d);
            store(w.y + i * WIDTH + d, u + g[i] * (load(w.v + i * WIDTH + d) - u));
          }
        write_panel(e.out, e.type, s.batch, s.group * heads + r, t, n, from, width, w.y);
      }
    }
  }
  if (!s.stop) return;
  s.stop[0] = total > 0 ? top + __builtin_log(total) : -INFINITE;
  s.stop[1] = 0;
  for (int64_t t = s.begin; e.first && t < s.end; t++) s.stop[1] += e.first[t];
  for (int64_t d = 0; d < e.V; d++) s.stop[2 + d] = means[d];
}

// The values of a panel in w.v become their distances v - u from the means; `before`: the means
// before the n tokens.
template <int N>
void distances(const Elita& e, int64_t t, int n, const double* before, ElitaScratch& w) {
  constexpr int W = LANES<double>;
  Vec<double> u[N];
  for (int d = 0; d < N; d++) u[d] = load(before + d * W);
  for (int i = 0; i < n; i++) {
    const double a = w.a[i], decay = w.decay[i];
    const bool first = e.first && e.first[t + i];
    for (int d = 0; d < N; d++) {
      double* const at = w.v + i * WIDTH + d * W;
      if (first) u[d] = Vec<double>{};
      const Vec<double> apart = load(at) - u[d];
      store(at, decay * apart);
      u[d] += a * apart;
    }
  }
}

// The gradients of a panel's means over n tokens, backwards, from sums of (1 - g) dout in w.y: Q .
// (v - u), whose second factor stands in w.v, and dv, whose part of the query heads stands in w.x.
template <int N> void retreat(int n, double* carry, ElitaScratch& w) {
  constexpr int W = LANES<double>;
  Vec<double> Q[N];
  for (int d = 0; d < N; d++) Q[d] = load(carry + d * W);
  for (int i = n - 1; i >= 0; i--) {
    const double a = w.a[i], decay = w.decay[i];
    Vec<double> by_value{};
    for (int d = 0; d < N; d++) {
      const int at = i * WIDTH + d * W;
      // Q is whole once the token's own outputs, sum (1 - g) dout, join what later tokens sent.
      Q[d] += load(w.y + at);
      by_value += Q[d] * load(w.v + at);
      // u = (1 - a) u_before + a v: the value gets a Q, and the mean before gets (1 - a) Q.
      store(w.x + at, load(w.x + at) + a * Q[d]);
      Q[d] *= decay;
    }
    w.by_value[i] += sum<double>(by_value);
  }
  for (int d = 0; d < N; d++) store(carry + d * W, Q[d]);
}

// a and 1 - a from a's odds, for a block; `gates`: g, 1 - g and zeros for each query head.
INLINE void read_gates(const Elita& e, const ElitaSegment& s, int64_t t, int n, ElitaScratch& w,
                       double* gates) {
  read_row<double>(e.key_odds, (s.batch * e.G + s.group) * e.T + t, e.gates, n, w.odds);
  for (int i = 0; i < n; i++) {
    w.a[i] = 1 / (1 + 1 / w.odds[i]);
    w.decay[i] = e.first && e.first[t + i] ? 0 : 1 / (1 + w.odds[i]);
  }
  const int64_t heads = e.H / e.G;
  for (int64_t r = 0; r < heads; r++, gates += 3 * BLOCK) {
    read_row<double>(e.own_odds, (s.batch * e.H + s.group * heads + r) * e.T + t, e.gates, n,
                     w.own);
    for (int i = 0; i < n; i++) {
      gates[i] = 1 / (1 + 1 / w.own[i]);
      gates[BLOCK + i] = 1 / (1 + w.own[i]);
      gates[2 * BLOCK + i] = 0;
    }
  }
}

// What one query head adds to a panel: g dout to w.x, (1 - g) dout to w.y, dout . (v - u) to the
// third row of its gates.
INLINE void gather(const Elita& e, const ElitaSegment& s, int64_t h, int64_t t, int n, int64_t from,
                   int width, double* gates, ElitaScratch& w) {
  alignas(64) double dout[WIDTH];
  const int used = rounded(width);
  for (int i = 0; i < n; i++) {
    read_panel(e.dout, e.type, s.batch, h, t + i, 1, from, width, dout);
    const double g = gates[i], keep = gates[BLOCK + i];
    Vec<double> by_value{};
    for (int d = 0; d < used; d += LANES<double>) {
      const int at = i * WIDTH + d;
      const Vec<double> y = load(dout + d);
      by_value += y * load(w.v + at);
      store(w.x + at, load(w.x + at) + g * y);
      store(w.y + at, load(w.y + at) + keep * y);
    }
    gates[2 * BLOCK + i] += sum<double>(by_value);
  }
}

inline void elita_backward(const Elita& e, const ElitaSegment& s, void* scratch) {
  ElitaScratch& w = *(ElitaScratch*)scratch;
  const int64_t heads = e.H / e.G, panels = (e.V + WIDTH - 1) / WIDTH * WIDTH;
  double* const carry = (double*)((char*)scratch + sizeof(ElitaScratch));  // [V], to whole panels
  double* const gates = carry + panels;                                    // [heads, 3, BLOCK]
  double M = s.start ? s.start[0] : 0, product = 1;
  for (int64_t d = 0; d < panels; d++) carry[d] = s.start && d < e.V ? s.start[2 + d] : 0;
  for (int64_t blocks = (s.end - s.begin + BLOCK - 1) / BLOCK; blocks > 0; blocks--) {
    const int64_t t = s.begin + (blocks - 1) * BLOCK;
    const int n = int(smaller<int64_t>(BLOCK, s.end - t));
    read_gates(e, s, t, n, w, gates);
    // Columns first: the logits' gradients need Q . (v - u) and dout . (v - u) over all of them.
    zero(w.by_value, BLOCK);
    for (int64_t from = 0; from < e.V; from += WIDTH) {
      const int width = int(smaller<int64_t>(WIDTH, e.V - from));
      zero(w.x, BLOCK * WIDTH);
      zero(w.y, BLOCK * WIDTH);
      read_panel(e.value, e.type, s.batch, s.group, t, n, from, width, w.v);
      if (!s.passing) {
        // The means inside the block are formed again from the one before it, which was kept.
        alignas(64) double before[WIDTH] = {};
        memcpy(before, kept_means(e, s, t) + from, sizeof(double) * size_t(width));
        by_vectors(width, [&](auto N) { distances<N.value>(e, t, n, before, w); });
      }
      for (int64_t r = 0; r < heads; r++)
        gather(e, s, s.group * heads + r, t, n, from, width, gates + r * 3 * BLOCK, w);
      by_vectors(width, [&](auto N) { retreat<N.value>(n, carry + from, w); });
      if (!s.passing) write_panel(e.dvalue, e.type, s.batch, s.group, t, n, from, width, w.x);
    }
    zero(w.own_total, BLOCK);
    for (int64_t r = 0; r < heads; r++) {
      const double* const g = gates + r * 3 * BLOCK;
      // ds = g (1 - g) dout . (v - u), of which s - r - m is the argument: M gets -ds.
      for (int i = 0; i < n; i++) w.grad[i] = g[i] * g[BLOCK + i] * g[2 * BLOCK + i];
      for (int i = 0; i < n; i++) w.own_total[i] += w.grad[i];
      if (!s.passing)
        write_row<double>(e.dself_logit, (s.batch * e.H + s.group * heads + r) * e.T + t, e.gates,
                          n, w.grad);
    }
    // m = log(e^m_before + e^c) and a = e^(c - m): c gets b = a Q . (v - u) through a, and a M
    // through m; the log-sum before gets the rest of M, and loses b.
    for (int i = n - 1; i >= 0; i--) {
      const double b = w.a[i] * w.by_value[i];
      M -= w.own_total[i];
      w.grad[i] = b + w.a[i] * M;
      M = w.decay[i] * M - b;
      product *= w.decay[i];
    }
    if (!s.passing)
      write_row<double>(e.dkey_logit, (s.batch * e.G + s.group) * e.T + t, e.gates, n, w.grad);
  }
  if (!s.stop) return;
  s.stop[0] = M;
  s.stop[1] = product;
  for (int64_t d = 0; d < e.V; d++) s.stop[2 + d] = carry[d];
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
