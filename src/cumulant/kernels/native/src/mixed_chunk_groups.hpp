// Mixed chunk attention: the quadratic form inside a group, by blocks of CHUNK queries on CHUNK
// keys, and sums across groups.
//
// Out = f(q k^T / size + bias) v inside the group, plus r^T S with the linear queries r and S = sum
// s v^T over linear keys s: of earlier groups if causal, else of all (where `summed`; else r s^T v
// inside the group). Keys and values are read in place where their layout allows it. Queries of a
// block are transposed: [K, CHUNK].
#pragma once

#include "tokens.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// f at scores s: relu(s)^2, or the Laplace function 1/2 erfc((sqrt(1/2) - s) sqrt(2 pi)); and its
// slope.
constexpr double LAPLACE_MEAN = 0.70710678118654752440, LAPLACE_RATE = 2.50662827463100050242;

template <class R> INLINE Vec<R> gate(Vec<R> s, int activation) {
  if (activation == RELU2) {
    const Vec<R> x = s > R(0) ? s : Vec<R>{};
    return x * x;
  }
  Vec<R> y;
  for (int i = 0; i < LANES<R>; i++)
    y[i] = R(__builtin_erfc((LAPLACE_MEAN - double(s[i])) * LAPLACE_RATE) / 2);
  return y;
}
template <class R> INLINE Vec<R> gate_slope(Vec<R> s, int activation) {
  if (activation == RELU2) return R(2) * (s > R(0) ? s : Vec<R>{});
  const Vec<R> z = (s - R(LAPLACE_MEAN)) * R(LAPLACE_RATE);
  return R(1.41421356237309504880) * exponential<R>(-z * z);
}

template <class R> struct MixedScratch {
  int64_t used = 0;
  R *quad_key, *lin_key, *value;                          // of a group, where they must be copied
  R *quad_query, *lin_query, *rows;                       // of a block: token-major
  R *quad_transposed, *lin_transposed, *wide_transposed;  // [K | L | V, CHUNK]
  R *dy, *out, *dquad, *dlin;     // [CHUNK, V], [CHUNK, V], [K, CHUNK], [L, CHUNK]
  R *scores, *weights, *all, *S;  // [CHUNK, CHUNK] twice, [size, CHUNK], [L, V]
  int64_t K, L, V;  // strides of rows; of values not a power of two, which would press a panel of
                    // them into few sets of a cache

  MixedScratch(const MixedChunk& m, R* base)
      : K(padded<R>(int(m.K))), L(padded<R>(int(m.L))), V(padded<R>(int(m.V)) + 16) {
    auto take = [&](int64_t n) {
      R* at = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16;
      return at;
    };
    const int64_t group = (m.size + CHUNK - 1) / CHUNK * CHUNK;
    quad_key = take(group * K), lin_key = take(group * L), value = take(group * V);
    quad_query = take(CHUNK * K), lin_query = take(CHUNK * L),
    rows = take(CHUNK * larger(larger(K, L), V));
    quad_transposed = take(CHUNK * K), lin_transposed = take(CHUNK * L),
    wide_transposed = take(CHUNK * V);
    dy = take(CHUNK * V), out = take(CHUNK * V), dquad = take(CHUNK * K), dlin = take(CHUNK * L);
    scores = take(CHUNK * CHUNK), weights = take(CHUNK * CHUNK), all = take(group * CHUNK);
    S = take(m.L * V);
  }
};

template <class R> int64_t mixed_scratch(const MixedChunk& m) {
  return MixedScratch<R>(m, nullptr).used * int64_t(sizeof(R));
}

template <class R> struct MixedPass {
  static constexpr int W = LANES<R>;
  const MixedChunk& m;
  const Segment& s;
  MixedScratch<R> w;
  const int64_t* index;  // of the sequence's slots
  int64_t length, heads;
  int K, L, V, columns;
  R quad_scale, lin_scale;
  Matrix<const R> quad_key{}, lin_key{}, value{};  // of the group
  Ahead ahead;

  MixedPass(const MixedChunk& call, const Segment& segment, void* scratch)
      : m(call),
        s(segment),
        w(call, (R*)scratch),
        index(call.index + call.bounds[segment.sequence]),
        length(call.bounds[segment.sequence + 1] - call.bounds[segment.sequence]),
        heads(call.H / call.G),
        K(int(call.K)),
        L(int(call.L)),
        V(int(call.V)),
        columns(int(segment.to - segment.from)),
        quad_scale(R(1) / R(call.size)),
        lin_scale(R(1) / R(call.is_causal ? call.size : larger<int64_t>(length, 1))) {}

  int64_t size_at(int64_t at) const { return smaller(m.size, length - at); }
  static int block(int64_t i, int64_t count) { return int(smaller<int64_t>(CHUNK, count - i)); }
  bool closed(int64_t at) const { return length - at >= m.size; }
  // Blocks before this slot have no queries: their tokens are of the open group that came in.
  int64_t asked(int64_t at) const {
    int64_t i = 0;
    while (i < size_at(at) && index[at + i] < 0) i++;
    return i / CHUNK * CHUNK;
  }

  // ---- rows by slots ----

  int64_t offset(const Array& x, int64_t h, int64_t token) const {
    return token / m.T * x.batch + h * x.head + token % m.T * x.row;
  }
  const R* open_row(const void* open, int64_t slot, int64_t width) const {
    return (const R*)open + (s.row * m.size + slot) * width;
  }
  // Slots at .. at + n - 1 -> rows of `to`; zeros where a slot of the open group asks nothing, and
  // behind the last row.
  void gather(const Array& x, const void* open, int64_t h, int64_t at, int n, int64_t width,
              int64_t from, int count, R* to, int64_t stride) const {
    for (int i = 0; i < n; i++) {
      R* row = to + i * stride;
      const int64_t token = index[at + i];
      if (token >= 0)
        read_row<R>(x.data, offset(x, h, token) + from, m.type, count, row);
      else if (open)
        copy(open_row(open, -1 - token, width) + from, row, count);
      else
        zero(row, count);
      for (int d = count; d < padded<R>(count); d++) row[d] = 0;
    }
    zero(to + n * stride, int64_t(padded<R>(n) - n) * stride);
  }
  void scatter(const Array& x, void* open, int64_t h, int64_t at, int n, int64_t width,
               int64_t from, int count, const R* rows, int64_t stride) const {
    for (int i = 0; i < n; i++) {
      const int64_t token = index[at + i];
      if (token >= 0)
        write_row<R>(x.data, offset(x, h, token) + from, m.type, count, rows + i * stride);
      else if (open)
        copy(rows + i * stride, (R*)open_row(open, -1 - token, width) + from, count);
    }
  }
  // The group's rows of keys or values: as they lie, if they are reals one token after another in
  // whole vectors.
  Matrix<const R> group_rows(const Array& x, const void* open, int64_t at, int64_t n, int64_t width,
                             int64_t from, int count, R* copies, int64_t stride) const {
    bool plain =
        m.type == (sizeof(R) == 4 ? F32 : F64) && count % W == 0 && n % W == 0 && index[at] >= 0;
    plain = plain && (count <= CHUNK || x.row * int64_t(sizeof(R)) % 1024);  // see MixedScratch::V
    plain = plain && index[at + n - 1] - index[at] == n - 1 &&
            index[at] / m.T == index[at + n - 1] / m.T;
    for (int64_t i = 1; plain && i < n; i++) plain = index[at + i] == index[at] + i;
    if (plain) return {(const R*)x.data + offset(x, s.group, index[at]) + from, x.row};
    for (int64_t i = 0; i < n; i += CHUNK)
      gather(x, open, s.group, at + i, block(i, n), width, from, count, copies + i * stride,
             stride);
    return {copies, stride};
  }
  void read_group(int64_t at, bool quadratic) {
    const int64_t n = size_at(at);
    if (quadratic)
      quad_key = group_rows(m.quad_key, m.open_quad_key, at, n, K, 0, K, w.quad_key, w.K);
    lin_key = group_rows(m.lin_key, m.open_lin_key, at, n, L, 0, L, w.lin_key, w.L);
    value = group_rows(m.value, m.open_value, at, n, V, s.from, columns, w.value, w.V);
  }
  static Matrix<const R> rows_from(Matrix<const R> x, int64_t i) { return {x.row(i), x.stride}; }

  // Queries of a block, scaled: as rows and transposed.
  void read_queries(int64_t h, int64_t at, int n) {
    gather(m.quad_query, nullptr, h, at, n, K, 0, K, w.quad_query, w.K);
    gather(m.lin_query, nullptr, h, at, n, L, 0, L, w.lin_query, w.L);
    for (int64_t i = 0; i < n * w.K; i += W)
      store(w.quad_query + i, load(w.quad_query + i) * quad_scale);
    for (int64_t i = 0; i < n * w.L; i += W)
      store(w.lin_query + i, load(w.lin_query + i) * lin_scale);
  }
  void read_upstream(int64_t h, int64_t at, int n) {
    gather(m.dout, nullptr, h, at, n, V, 0, V, w.dy, w.V);
  }
  void transpose_queries(int n) {
    transpose(n, K, w.quad_query, w.K, w.quad_transposed, CHUNK);
    transpose(n, L, w.lin_query, w.L, w.lin_transposed, CHUNK);
  }

  // Gradients of a block's queries, [width, CHUNK], scaled and transposed back.
  void write_query_gradient(const Array& x, int64_t h, int64_t at, int n, int width,
                            const R* transposed, int64_t stride, R scale) {
    transpose(width, n, transposed, CHUNK, w.rows, stride);
    for (int64_t i = 0; i < n * stride; i += W) store(w.rows + i, load(w.rows + i) * scale);
    scatter(x, nullptr, h, at, n, width, 0, width, w.rows, stride);
  }

  // ---- sums ----

  void load_sums() {
    for (int l = 0; l < L; l++) {
      R* row = w.S + l * w.V;
      if (s.start)
        copy((const R*)s.start + int64_t(l) * V + s.from, row, columns);
      else
        zero(row, columns);
      for (int d = columns; d < padded<R>(columns); d++) row[d] = 0;
    }
  }
  void leave_sums() const {
    for (int l = 0; s.stop && l < L; l++)
      copy(w.S + l * w.V, (R*)s.stop + int64_t(l) * V + s.from, columns);
  }
  R* final_row(void* open, int64_t slot, int64_t width) const {
    return (R*)open_row(open, slot, width);
  }
  // The group that stays open, which is the last that was read, for the state that goes out.
  void leave_open() const {
    const int64_t open = s.stop ? length % m.size : 0;
    for (int64_t i = 0; i < open; i++) {
      if (s.from == 0) copy(quad_key.row(i), final_row(m.final_quad_key, i, K), K);
      if (s.from == 0) copy(lin_key.row(i), final_row(m.final_lin_key, i, L), L);
      copy(value.row(i), final_row(m.final_value, i, V) + s.from, columns);
    }
    if (s.stop) clear_open(open);
  }
  // Zeros in the slots from `first` on.
  void clear_open(int64_t first) const {
    const int64_t left = m.size - first;
    if (s.from == 0) zero(final_row(m.final_quad_key, first, K), left * K);
    if (s.from == 0) zero(final_row(m.final_lin_key, first, L), left * L);
    if (columns == V) return zero(final_row(m.final_value, first, V), left * V);
    for (int64_t i = first; i < m.size; i++) zero(final_row(m.final_value, i, V) + s.from, columns);
  }
  void add_keys(int64_t n) {
    product<BY_COLUMN, R>(ahead, L, columns, int(n), lin_key, value, {w.S, w.V});
  }
  // Adds to the gradient of the sums what a block of queries reads of them, in all heads: out = r^T
  // S, so dS += r dout^T, with the scaled r.
  void add_queries(int64_t at, int n) {
    for (int64_t r = 0; r < heads; r++) {
      read_queries(s.group * heads + r, at, n);
      read_upstream(s.group * heads + r, at, n);
      product<BY_COLUMN, R>(ahead, L, columns, n, {w.lin_query, w.L}, {w.dy, w.V}, {w.S, w.V});
    }
  }

  // ---- scores ----

  const R* bias_of(const void* bias, int64_t h) const {
    return (const R*)bias + (m.biases > 1 ? h : 0) * m.size * m.size;
  }
  // Adds the bias of a block, its rows at `row` and columns at `column` of the group.
  void add_bias(const void* bias, int64_t h, int64_t row, int64_t column, int rows, int count,
                R* scores) const {
    if (!m.biases) return;
    const R* from = bias_of(bias, h) + row * m.size + column;
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < count; j++) scores[i * CHUNK + j] += from[i * m.size + j];
  }
  // The same of a block [keys, queries].
  void add_bias_transposed(int64_t h, int64_t key, int64_t query, int keys, int queries,
                           R* scores) const {
    if (!m.biases || m.bias_transposed)
      return add_bias(m.bias_transposed, h, key, query, keys, queries, scores);
    const R* from = bias_of(m.bias, h) + query * m.size + key;
    for (int j = 0; j < keys; j++)
      for (int i = 0; i < queries; i++) scores[j * CHUNK + i] += from[i * m.size + j];
  }
  // Scores of a block [keys, queries]: keys from `key` on, and the transposed queries from `query`
  // on.
  void form_scores(int64_t h, int64_t key, int64_t query, int keys, int queries, R* scores) {
    product<BY_ROW, R>(ahead, keys, queries, K, rows_from(quad_key, key),
                       {w.quad_transposed, CHUNK}, {scores, CHUNK}, false);
    add_bias_transposed(h, key, query, keys, queries, scores);
  }
};

// One block of queries on one block of keys, [keys, queries]: `seen` (diagonal: only where the
// query is not before the key).
template <class R, class Visit>
INLINE void over_block(int rows, int columns, bool diagonal, bool lower, Visit visit) {
  constexpr int W = LANES<R>;
  for (int j = 0; j < rows; j++)
    for (int i = 0; i < columns; i += W) {
      typename Simd<R>::I lane;
      for (int l = 0; l < W; l++) lane[l] = i + l;
      const auto seen = lower ? lane <= j : lane >= j;
      visit(j * CHUNK + i, diagonal ? seen : lane == lane);
    }
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
