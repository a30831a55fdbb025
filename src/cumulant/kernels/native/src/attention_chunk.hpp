// What the passes of linear and Taylor attention share: scratch for one chunk, reading it, and the
// products with the sums.
//
// For a chunk of n tokens: q, k [K, CHUNK] (scaled, activated), v [n, V], sums S [F, V], Z [F].
// Features exist a slab at a time: SLAB rows of CHUNK tokens, beside SLAB rows of S, stay in the
// first cache.
#pragma once

#include "attention_workspace.hpp"
#include "decay.hpp"
#include "taylor_features.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

template <class R> struct Pass {
  static constexpr int W = LANES<R>;
  const Attention& a;
  const Segment& s;
  const int64_t batch, first;  // the sequence's row of the batch, and its first token there
  Workspace<R> w;
  int K, V, columns, F, R_heads, slab;  // columns: of the values, that this segment is about
  const bool decays;
  const uint8_t* mask = nullptr;
  Matrix<const R> v{};  // the chunk's values
  // The sums that are read and those that are written, [F, columns] and [F]: scratch, unless the
  // segment is one chunk, which uses those before and after it.
  Matrix<const R> S_read{};
  Matrix<R> S_written{};
  const R* Z_read;
  R* Z_written;
  bool sums_begin = false;  // there are none yet, and adding sets them
  ChunkDecay<R> decay;
  Ahead ahead;

  Pass(const Attention& attention, const Segment& segment, void* scratch)
      : a(attention),
        s(segment),
        batch(a.offsets ? 0 : s.sequence),
        first(a.offsets ? a.offsets[s.sequence] : 0),
        w(attention, (R*)scratch),
        K(int(a.K)),
        V(int(a.V)),
        columns(int(s.to - s.from)),
        F(int(a.F)),
        R_heads(int(a.H / a.G)),
        decays(a.log_decay.data != nullptr) {
    const int slabs =
        a.order == 0 ? 1 : (F + SLAB - 1) / SLAB;  // of about the same size, in whole tiles
    slab = ((F + slabs - 1) / slabs + 5) / 6 * 6;
    for (int i = 0; i < CHUNK; i++) w.ones[i] = 1;
    S_read = {w.S, w.stride}, S_written = {w.S, w.stride};
    Z_read = Z_written = w.Z;
  }

  // What a pass reads of every chunk, and writes: see `begin`.
  enum Needs { QUERY = 1, KEY = 2, VALUE = 4, UPSTREAM = 8, OUT = 16, DQUERY = 32, DKEY = 64 };

  // Begin with the chunk at `at`: the rows it writes and those its successor, `step` tokens on,
  // reads will be fetched.
  void begin(int64_t at, int64_t step, int needs) {
    const int64_t next = at + step;
    const int n = count(at), m = next < s.begin || next >= s.end ? 0 : count(next);
    ahead.clear();
    for (int r = 0; r < R_heads; r++) {
      if (needs & OUT) expect(a.out, head(r), at, n, s.from, columns, true, reals());
      if (needs & DQUERY) expect(a.dquery, head(r), at, n, 0, K, true);
      if (needs & QUERY) expect(a.query, head(r), next, m, 0, K);
      if (needs & UPSTREAM) expect(a.dout, head(r), next, m, 0, V, false, reals());
      if (needs & UPSTREAM && a.normalize) expect(a.out, head(r), next, m, 0, V, false, reals());
    }
    if (needs & DKEY)
      expect(a.dkey, s.group, at, n, 0, K, true), expect(a.dvalue, s.group, at, n, 0, V, true);
    if (needs & KEY) expect(a.key, s.group, next, m, 0, K);
    if (needs & VALUE) expect(a.value, s.group, next, m, s.from, columns);
  }
  static constexpr int reals() { return sizeof(R) == 4 ? F32 : F64; }
  void expect(const Array& x, int64_t h, int64_t at, int n, int64_t from, int width,
              bool written = false) {
    expect(x, h, at, n, from, width, written, a.type);
  }
  void expect(const Array& x, int64_t h, int64_t at, int n, int64_t from, int width, bool written,
              int type) {
    const int size = type == F64 ? 8 : type == F32 ? 4 : 2;
    const int64_t offset = batch * x.batch + h * x.head + (first + at) * x.row + from;
    ahead.add((const char*)x.data + offset * size, x.row * size, n, width * size, written);
  }

  int count(int64_t at) const { return int(smaller(a.chunk, s.end - at)); }
  int64_t head(int r) const { return s.group * R_heads + r; }
  Rows rows_of(const Array& x, int64_t h, int64_t at, int n, bool masked) const {
    const int64_t offset = batch * x.batch + h * x.head + (first + at) * x.row;
    return {x, a.type, offset, n, masked ? mask : nullptr};
  }
  // Of outputs and the gradients at them, which are reals whatever the inputs are.
  Rows reals_of(const Array& x, int64_t h, int64_t at, int n) const {
    Rows rows = rows_of(x, h, at, n, false);
    rows.type = reals();
    return rows;
  }
  Monomials<R> monomials(const R* x, const R* constant, int n) const {
    return Monomials<R>(x, constant, K, n, a.order, a.constant_term, w.powers);
  }

  // ---- reading ----

  void read_query(int r, int64_t at, int n) {
    read_transposed(rows_of(a.query, head(r), at, n, false), K, w.rows, w.q);
    if (levels()) level(w.q, K, n, R(a.scale), a.activation, w.level);
    activate(w.q, K, n, levels() ? R(1) : R(a.scale), a.activation);
  }

  // Whether a query's features may be multiplied by any number, as outputs are quotients.
  bool levels() const { return a.normalize && a.order == 0; }

  // Gradients at features -> at queries, in place.
  void query_gradient(R* grad, int n) const {
    activate_backward(w.q, grad, K, n, R(a.scale), a.activation);
    if (!levels() || a.activation == ELU) return;
    for (int d = 0; d < K; d++)
      for (int i = 0; i < n; i += W)
        store(grad + d * CHUNK + i, load(grad + d * CHUNK + i) * load(w.level + i));
  }

  void read_mask(int64_t at, int n) {
    mask = a.key_mask ? a.key_mask + batch * a.S + first + at : nullptr;
    const Array& d = a.log_decay;
    if (decays)
      decay.read(d, a.decay_type, batch * d.batch + s.group * d.head + (first + at) * d.row, mask,
                 n);
  }

  // Keys, and `constant`, the feature of degree 0: what is masked, or behind the last token, counts
  // for nothing.
  void read_key(int64_t at, int n) {
    read_mask(at, n);
    for (int i = 0; i < CHUNK; i++) w.constant[i] = i < n && (!mask || mask[i]) ? R(1) : R(0);
    read_transposed(rows_of(a.key, s.group, at, n, true), K, w.rows, w.k);
    activate(w.k, K, n, R(1), a.activation);
    if (a.activation == ELU && (mask || n % W)) clear_masked(w.k, n);  // of zero it is 1
  }

  void clear_masked(R* x, int n) const {
    for (int d = 0; d < K; d++)
      for (int i = 0; i < n; i += W) {
        R* at = x + d * CHUNK + i;
        store(at, load(w.constant + i) != R(0) ? load(at) : Vec<R>{});
      }
  }

  // Values [n, columns], where they are if they can be used as they lie.
  void read_value(int64_t at, int n) {
    const Rows x = rows_of(a.value, s.group, at, n, true);
    if (x.plain<R>(columns)) {
      v = {x.at<R>() + s.from, x.array.row};
    } else {
      read(x, s.from, columns, w.v, w.stride);
      zero(w.v + n * w.stride, int64_t(padded<R>(n) - n) * w.stride);
      v = {w.v, w.stride};
    }
  }

  // Gradients at the numerators, dy = dout / z, and at the denominators, dz = -(dout . out) / z.
  void read_upstream(int r, int64_t at, int n) {
    const Rows upstream = reals_of(a.dout, head(r), at, n), x = reals_of(a.out, head(r), at, n);
    for (int i = 0; i < CHUNK; i++) w.dz[i] = 0;
    Matrix<const R> dout{w.dy, w.stride}, out{w.rows, w.stride};
    if (a.normalize && upstream.plain<R>(V)) {
      dout = {upstream.at<R>(), a.dout.row};
      out = {x.at<R>(), a.out.row};
    } else {
      read(upstream, 0, V, w.dy, w.stride);
      if (a.normalize) read(x, 0, V, w.rows, w.stride);
      zero(w.dy + n * w.stride, int64_t(padded<R>(n) - n) * w.stride);
    }
    if (!a.normalize) return;
    const R* denominators = (const R*)a.denominators + (batch * a.H + head(r)) * a.T + first + at;
    for (int i = 0; i < n; i++) {
      Vec<R> total{};
      for (int d = 0; d < V; d += W) total += load(dout.row(i) + d) * load(out.row(i) + d);
      divide(dout.row(i), V, denominators[i], w.dy + i * w.stride);
      w.dz[i] = vanishes(denominators[i]) ? R(0) : -sum<R>(total) / denominators[i];
    }
  }

  // Zero, or without its digits, below the smallest normal number.
  static bool vanishes(R z) {
    constexpr R least = sizeof(R) == 4 ? R(1.1754943508222875e-38) : R(2.2250738585072014e-308);
    return z < least && z > -least;
  }

  // to = row / z, zero where z vanishes: nothing to attend to.
  static void divide(const R* row, int n, R z, R* to) {
    const bool tiny = z < R(1e-30) && z > R(-1e-30),
               none = vanishes(z);  // its reciprocal may overflow
    const R inverse = none ? R(0) : R(1) / z;
    for (int d = 0; d < n; d += W) {
      const Vec<R> x = load(row + d);
      store(to + d, none ? Vec<R>{} : tiny ? x / z : x * inverse);
    }
  }

  // out [n, columns], over z if that is wanted, to the array.
  void write_out(int r, int64_t at, int n, R* out, const R* z) {
    const Rows x = reals_of(a.out, head(r), at, n);
    const bool direct = x.plain<R>(columns);
    for (int i = 0; a.normalize && i < n; i++)
      divide(out + i * w.stride, columns, z[i],
             direct ? x.at<R>() + i * x.array.row + s.from : out + i * w.stride);
    if (!a.normalize || !direct) write(x, s.from, columns, out, w.stride);
    if (a.normalize && a.denominators && s.from == 0)
      memcpy((R*)a.denominators + (batch * a.H + head(r)) * a.T + first + at, z,
             sizeof(R) * size_t(n));
  }

  // ---- sums ----

  // Whether the sums before and after the segment can be used where they are.
  bool in_place() const {
    return a.is_causal && s.end > s.begin && s.end - s.begin <= a.chunk && columns % W == 0;
  }
  void use_sums_in_place() {
    S_read = {(const R*)s.start + s.from, V}, S_written = {(R*)s.stop + s.from, V};
    Z_read = (const R*)s.start_denominator, Z_written = (R*)s.stop_denominator;
    sums_begin = !s.start;
  }

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
    if (decays) zero(w.S + w.residuals, w.residuals);
  }
  void leave_sums(void* numerator, void* denominator) const {
    if (numerator)
      for (int f = 0; f < F; f++)
        memcpy((R*)numerator + int64_t(f) * V + s.from, w.S + f * w.stride,
               sizeof(R) * size_t(columns));
    if (denominator && s.from == 0) memcpy(denominator, w.Z, sizeof(R) * size_t(F));
  }

  // Calls visit(first feature, count, rows of features) for every slab of x's features.
  template <class Visit> void slabs(const R* x, const R* constant, int n, Visit visit) {
    if (a.order == 0) return visit(0, F, x);
    Monomials<R> m = monomials(x, constant, n);
    for (int f = 0; f < F; f += slab) {
      const int rows = smaller(slab, F - f);
      m.form(rows, w.phi);
      visit(f, rows, (const R*)w.phi);
    }
  }

  // out = phi^T S, z = phi . Z
  void read_sums(const R* x, const R* constant, int n, R* out, R* z) {
    slabs(x, constant, n, [&](int f, int rows, const R* phi) {
      product<BY_COLUMN, R>(ahead, n, columns, rows, {phi, CHUNK}, {S_read.row(f), S_read.stride},
                            {out, w.stride}, f > 0);
      if (z)
        product<BY_ROW, R>(ahead, 1, n, rows, {Z_read + f, 0}, {phi, CHUNK}, {z, CHUNK}, f > 0);
    });
  }

  // A number of the sums after the token's decay, plus more.
  template <class X> INLINE X add_decayed(X sum, X more) const {
    return decays ? Keep<R>{decay.kept, decay.lost, 0}.plus(sum, more) : sum + more;
  }

  // S = kept S + phi y, Z = kept Z + phi . weights (null: of 1)
  void add_sums(const R* x, const R* constant, int n, Matrix<const R> y, const R* weights,
                R kept = 1, R lost = 0) {
    const bool scratch = Z_written == w.Z;
    const Keep<R> all{kept, lost, scratch ? w.residuals : 0}, *const keep =
                                                                  lost == R(0) ? nullptr : &all;
    const int64_t base =
        scratch || sums_begin
            ? 0
            : (intptr_t(S_read.data) - intptr_t(S_written.data)) / int64_t(sizeof(R));
    slabs(x, constant, n, [&](int f, int rows, const R* phi) {
      if (S_written.data)
        product<BY_ROW, R>(ahead, rows, columns, n, {phi, CHUNK}, y,
                           {S_written.row(f), S_written.stride}, !sums_begin, ALL, keep, base);
      if (!a.normalize || !Z_written || (!scratch && s.from)) return;
      for (int j = 0; j < rows; j++) {
        Vec<R> total{};
        for (int i = 0; i < n; i += W)
          total +=
              weights ? load(phi + j * CHUNK + i) * load(weights + i) : load(phi + j * CHUNK + i);
        const R more = sum<R>(total);
        if (!keep || sums_begin)
          Z_written[f + j] = sums_begin ? more : Z_read[f + j] + more;
        else if (keep->residuals)
          keep->add(&Z_written[f + j], more);
        else
          Z_written[f + j] = keep->plus(Z_read[f + j], more);
      }
    });
  }

  // The chunk's keys and values join the sums; where these decay, first by the whole chunk, and a
  // key by the tokens after it. `scaled` [n, columns]: room for values.
  void add_keys(int n, R* scaled) {
    if (!decays) return add_sums(w.k, w.constant, n, v, nullptr);
    scale_rows<R>(n, columns, v, decay.to_end, {scaled, w.stride});
    add_sums(w.k, w.constant, n, {scaled, w.stride}, decay.to_end, decay.kept, decay.lost);
  }

  // What the chunk's queries add to the gradient of the sums, dS += phi(q) dy; where sums decay, a
  // query reads exp(c_i) of them, and the first head's call brings dS to before the chunk.
  void add_queries(int n, bool first_head) {
    if (!decays) return add_sums(w.q, w.ones, n, {w.dy, w.stride}, w.dz);
    scale_rows<R>(n, V, {w.dy, w.stride}, decay.from_start, {w.dy, w.stride});
    scale_columns(1, n, w.dz, decay.from_start, w.dz);
    add_sums(w.q, w.ones, n, {w.dy, w.stride}, w.dz, first_head ? decay.kept : R(1),
             first_head ? decay.lost : R(0));
  }

  // The sums before some chunks are left for the gradient of decays.
  bool is_anchor(int64_t at) const {
    return s.anchors && at > 0 && at / a.chunk % s.anchor_chunks == 0;
  }
  void leave_anchor(int64_t at) const {
    if (!is_anchor(at)) return;
    R* const to = (R*)s.anchors + (at / a.chunk / s.anchor_chunks - 1) * F * (V + 1);
    leave_sums(to, a.normalize ? to + int64_t(F) * V : nullptr);
  }

  // dx = what reaches a vector x through its features: d phi = S y^T + Z weights (null: of 1).
  // `dots`, unless null: each token's phi . d phi.
  void sums_backward(const R* x, int n, const R* y_transposed, const R* weights, R* dx, R* dots) {
    if (dots) zero(dots, CHUNK);
    if (a.order) zero(dx, K * CHUNK);
    Monomials<R> m = monomials(x, w.ones, n);
    for (int f = 0; f < F; f += slab) {
      const int rows = smaller(slab, F - f);
      R* dphi = a.order == 0 ? dx : w.dphi;
      product<BY_ROW, R>(ahead, rows, n, columns, {w.S + f * w.stride, w.stride},
                         {y_transposed, CHUNK}, {dphi, CHUNK}, false);
      if (a.normalize)
        for (int j = 0; j < rows; j++)
          for (int i = 0; i < n; i += W) {
            R* at = dphi + j * CHUNK + i;
            store(at, load(at) + w.Z[f + j] * (weights ? load(weights + i) : splat<R>(1)));
          }
      if (a.order) m.backward(rows, w.dphi, dx, dots);
    }
    for (int d = 0; dots && a.order == 0 && d < K; d++)
      for (int i = 0; i < n; i += W)
        store(dots + i, load(dots + i) + load(x + d * CHUNK + i) * load(dx + d * CHUNK + i));
  }

  // ---- inside a chunk ----

  // C [n, n] = op(A) B where the column is not before the row (UPPER), or not behind it; in blocks
  // of 16 rows.
  enum Half { UPPER, LOWER };
  template <Layout LAYOUT>
  void triangle(Half half, int n, int inner, Matrix<const R> A, Matrix<const R> B, R* C) {
    for (int i = 0; i < n; i += 16) {
      const int rows = smaller(16, n - i), from = half == UPPER ? i : 0,
                to = half == UPPER ? n : i + rows;
      const Matrix<const R> block{LAYOUT == BY_COLUMN ? A.data + i : A.row(i), A.stride};
      product<LAYOUT, R>(ahead, rows, to - from, inner, block, {B.data + from, B.stride},
                         {C + i * CHUNK + from, CHUNK}, false);
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
