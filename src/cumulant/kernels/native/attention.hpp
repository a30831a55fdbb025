// What the passes of linear and Taylor attention share: scratch for one chunk, reading it, and the products with the sums.
//
// For a chunk of n tokens: q, k [K, CHUNK] (scaled, activated), v [n, V], sums S [F, V], Z [F]. Features exist a slab at a
// time: SLAB rows of CHUNK tokens, beside SLAB rows of S, stay in the first cache.
#pragma once

#include "features.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

constexpr int SLAB = 48;

// Matrices of one thread. With a null base it only counts how much they need.
template <class R> struct Workspace {
  int64_t used = 0;
  R *q, *k, *v, *rows, *scores, *dscores, *phi, *dphi, *out, *S, *Z, *z, *ones, *constant, *powers;
  R *v_turned, *dy_turned, *dy, *dz, *dq, *dk, *dv;
  int64_t stride;  // of rows of values

  Workspace(const Attention& a, R* base) {
    const int64_t K = padded<R>(int(a.K)), V = padded<R>(int(a.V));
    stride = V;
    auto take = [&](int64_t n) {
      R* at = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16;
      return at;
    };
    q = take(K * CHUNK), k = take(K * CHUNK), dq = take(K * CHUNK), dk = take(K * CHUNK);
    rows = take(larger(K, V) * CHUNK);
    v = take(V * CHUNK), out = take(V * CHUNK), v_turned = take(V * CHUNK);
    dy = take(V * CHUNK), dy_turned = take(V * CHUNK), dv = take(V * CHUNK);
    scores = take(CHUNK * CHUNK), dscores = take(CHUNK * CHUNK);
    phi = take(SLAB * CHUNK), dphi = take(SLAB * CHUNK);
    z = take(CHUNK), dz = take(CHUNK), ones = take(CHUNK), constant = take(CHUNK);
    powers = take(2 * MAX_ORDER * CHUNK);
    S = take(a.F * V), Z = take(a.F);
  }
};

template <class R> struct Pass {
  static constexpr int W = LANES<R>;
  const Attention& a;
  const Segment& s;
  Workspace<R> w;
  int K, V, columns, F, R_heads;  // columns: of the values, that this segment is about
  const uint8_t* mask = nullptr;
  Ahead ahead;

  Pass(const Attention& attention, const Segment& segment, void* scratch)
      : a(attention), s(segment), w(attention, (R*)scratch), K(int(a.K)), V(int(a.V)), columns(int(s.to - s.from)),
        F(int(a.F)), R_heads(int(a.H / a.G)) {
    for (int i = 0; i < CHUNK; i++) w.ones[i] = 1;
  }

  // Begin with the chunk at `at`: its successor's rows will be fetched. `step`: where that lies, in tokens.
  void begin(int64_t at, int64_t step) {
    const int64_t next = at + step;
    ahead.clear();
    for (int r = 0; r < R_heads; r++) expect(a.out, head(r), at, count(at), s.from, columns, true);
    if (next < s.begin || next >= s.end) return;
    const int n = count(next);
    for (int r = 0; r < R_heads; r++) expect(a.query, head(r), next, n, 0, K);
    if (a.is_causal || step < 0) expect(a.key, s.group, next, n, 0, K), expect(a.value, s.group, next, n, s.from, columns);
  }
  void expect(const Array& x, int64_t h, int64_t at, int n, int64_t from, int width, bool written = false) {
    const int size = a.type == F64 ? 8 : a.type == F32 ? 4 : 2;
    const int64_t offset = s.batch * x.batch + h * x.head + (s.first + at) * x.row + from;
    ahead.add((const char*)x.data + offset * size, x.row * size, n, width * size, written);
  }

  int count(int64_t at) const { return int(smaller(a.chunk, s.end - at)); }
  int64_t head(int r) const { return s.group * R_heads + r; }
  Rows rows_of(const Array& x, int64_t h, int64_t at, int n, bool masked) const {
    const int64_t offset = s.batch * x.batch + h * x.head + (s.first + at) * x.row;
    return {x, a.type, offset, n, masked ? mask : nullptr};
  }
  Monomials<R> monomials(const R* x, const R* constant, int n) const {
    return Monomials<R>(x, constant, K, n, a.order, a.constant_term, w.powers);
  }

  // ---- reading ----

  void read_query(int r, int64_t at, int n) {
    read_turned(rows_of(a.query, head(r), at, n, false), K, w.rows, w.q);
    rescale(w.q, n);
    activate(w.q, K, n, a.activation);
  }

  // Keys, and `constant`, the feature of degree 0: what is masked, or behind the last token, counts for nothing.
  void read_key(int64_t at, int n) {
    mask = a.key_mask ? a.key_mask + s.batch * a.S + s.first + at : nullptr;
    for (int i = 0; i < CHUNK; i++) w.constant[i] = i < n && (!mask || mask[i]) ? R(1) : R(0);
    read_turned(rows_of(a.key, s.group, at, n, true), K, w.rows, w.k);
    activate(w.k, K, n, a.activation);
    if (a.activation == ELU) clear_masked(w.k, n);  // of zero it is 1
  }

  void rescale(R* x, int n) const {
    if (a.scale == 1.0) return;
    for (int d = 0; d < K; d++)
      for (int i = 0; i < n; i += W) store(x + d * CHUNK + i, load(x + d * CHUNK + i) * R(a.scale));
  }
  void clear_masked(R* x, int n) const {
    for (int d = 0; d < K; d++)
      for (int i = 0; i < n; i += W) {
        R* at = x + d * CHUNK + i;
        store(at, load(w.constant + i) != R(0) ? load(at) : Vec<R>{});
      }
  }

  void read_value(int64_t at, int n) { read(rows_of(a.value, s.group, at, n, true), s.from, columns, w.v, w.stride); }

  // Gradients at the numerators, dy = dout / z, and at the denominators, dz = -(dout . out) / z.
  void read_upstream(int r, int64_t at, int n) {
    read(rows_of(a.dout, head(r), at, n, false), 0, V, w.dy, w.stride);
    for (int i = 0; i < CHUNK; i++) w.dz[i] = 0;
    if (!a.normalize) return;
    read(rows_of(a.out, head(r), at, n, false), 0, V, w.rows, w.stride);
    const R* denominators = (const R*)a.denominators + (s.batch * a.H + head(r)) * a.T + s.first + at;
    for (int i = 0; i < n; i++) {
      R* row = w.dy + i * w.stride;
      Vec<R> total{};
      for (int d = 0; d < V; d += W) total += load(row + d) * load(w.rows + i * w.stride + d);
      divide(row, V, denominators[i]);
      R dz = -sum<R>(total);
      divide_one(dz, denominators[i]);
      w.dz[i] = dz;
    }
  }

  static void divide_one(R& x, R z) { x = z == 0 ? R(0) : x / z; }
  // Zero where the denominator is: nothing to attend to.
  static void divide(R* row, int n, R z) {
    const bool tiny = z < R(1e-30) && z > R(-1e-30);  // its reciprocal may overflow
    const R inverse = z == 0 ? R(0) : R(1) / z;
    for (int d = 0; d < n; d += W) {
      const Vec<R> x = load(row + d);
      store(row + d, z == 0 ? Vec<R>{} : tiny ? x / z : x * inverse);
    }
  }

  // ---- sums ----

  void load_sums(const void* numerator, const void* denominator) {
    for (int f = 0; f < F; f++) {
      R* row = w.S + f * w.stride;
      if (numerator) {
        memcpy(row, (const R*)numerator + int64_t(f) * V + s.from, sizeof(R) * size_t(columns));
        for (int d = columns; d < padded<R>(columns); d++) row[d] = 0;
      } else {
        zero(row, padded<R>(columns));
      }
      w.Z[f] = denominator ? ((const R*)denominator)[f] : R(0);
    }
  }
  void leave_sums(void* numerator, void* denominator) const {
    if (numerator)
      for (int f = 0; f < F; f++)
        memcpy((R*)numerator + int64_t(f) * V + s.from, w.S + f * w.stride, sizeof(R) * size_t(columns));
    if (denominator && s.from == 0) memcpy(denominator, w.Z, sizeof(R) * size_t(F));
  }

  // Calls visit(first feature, count, rows of features) for every slab of x's features.
  template <class Visit> void slabs(const R* x, const R* constant, int n, Visit visit) {
    if (a.order == 0) return visit(0, F, x);
    Monomials<R> m = monomials(x, constant, n);
    for (int f = 0; f < F; f += SLAB) {
      const int rows = smaller(SLAB, F - f);
      m.form(rows, w.phi);
      visit(f, rows, (const R*)w.phi);
    }
  }

  // out += phi^T S, z += phi . Z
  void read_sums(const R* x, const R* constant, int n, R* out, R* z) {
    slabs(x, constant, n, [&](int f, int rows, const R* phi) {
      product<BY_COLUMN, R>(ahead, n, columns, rows, {phi, CHUNK}, {w.S + f * w.stride, w.stride}, {out, w.stride});
      if (!z) return;
      for (int i = 0; i < n; i += W) {
        Vec<R> total = load(z + i);
        for (int j = 0; j < rows; j++) total += w.Z[f + j] * load(phi + j * CHUNK + i);
        store(z + i, total);
      }
    });
  }

  // S += phi y, Z += phi . weights (null: of 1)
  void add_sums(const R* x, const R* constant, int n, const R* y, const R* weights) {
    slabs(x, constant, n, [&](int f, int rows, const R* phi) {
      product<BY_ROW, R>(ahead, rows, columns, n, {phi, CHUNK}, {y, w.stride}, {w.S + f * w.stride, w.stride});
      if (!a.normalize) return;
      for (int j = 0; j < rows; j++) {
        Vec<R> total{};
        for (int i = 0; i < n; i += W) total += weights ? load(phi + j * CHUNK + i) * load(weights + i) : load(phi + j * CHUNK + i);
        w.Z[f + j] += sum<R>(total);
      }
    });
  }

  // Adds to dx what reaches a vector x through its features: d phi = S y^T + Z weights (null: of 1).
  void sums_backward(const R* x, int n, const R* y_turned, const R* weights, R* dx) {
    Monomials<R> m = monomials(x, w.ones, n);
    const int slab = a.order == 0 ? F : SLAB;
    for (int f = 0; f < F; f += slab) {
      const int rows = smaller(slab, F - f);
      R* dphi = a.order == 0 ? dx : w.dphi;
      product<BY_ROW, R>(ahead, rows, n, columns, {w.S + f * w.stride, w.stride}, {y_turned, CHUNK}, {dphi, CHUNK}, a.order == 0);
      if (a.normalize)
        for (int j = 0; j < rows; j++)
          for (int i = 0; i < n; i += W) {
            R* at = dphi + j * CHUNK + i;
            store(at, load(at) + w.Z[f + j] * (weights ? load(weights + i) : splat<R>(1)));
          }
      if (a.order) m.backward(rows, w.dphi, dx);
    }
  }

  // ---- inside a chunk ----

  // C [n, n] = op(A) B where the column is not before the row (UPPER), or not behind it; in blocks of 16 rows.
  enum Half { UPPER, LOWER };
  template <Layout LAYOUT>
  void triangle(Half half, int n, int inner, Matrix<const R> A, Matrix<const R> B, R* C) {
    for (int i = 0; i < n; i += 16) {
      const int rows = smaller(16, n - i), from = half == UPPER ? i : 0, to = half == UPPER ? n : i + rows;
      const Matrix<const R> block{LAYOUT == BY_COLUMN ? A.data + i : A.row(i), A.stride};
      product<LAYOUT, R>(ahead, rows, to - from, inner, block, {B.data + from, B.stride}, {C + i * CHUNK + from, CHUNK}, false);
    }
  }

  static Vec<R> lanes_from(int first) {  // 1 in lanes `first` and after
    Vec<R> x;
    for (int i = 0; i < W; i++) x[i] = i >= first ? R(1) : R(0);
    return x;
  }
};

}  // namespace CUMULANT_ISA
}  // namespace cumulant
