// Mixed chunk attention: the quadratic form inside a group, by blocks of CHUNK queries on CHUNK
// keys, and sums across groups.
//
// Out = f(q k^T / size + bias) v inside the group, plus r^T S with the linear queries r and S = sum
// s v^T over linear keys s: of earlier groups if causal, else of all (where `summed`; else r s^T v
// inside the group). Keys and values are read where they lie if they can be; queries of a block are
// turned: [K, CHUNK].
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
  R *quad_key, *lin_key, *value;              // of a group, where they must be copied
  R *quad_query, *lin_query, *rows;           // of a block: token-major
  R *quad_turned, *lin_turned, *wide_turned;  // [K | L | V, CHUNK]
  R *dy, *out, *dquad, *dlin;                 // [CHUNK, V], [CHUNK, V], [K, CHUNK], [L, CHUNK]
  R *scores, *weights, *all, *S;              // [CHUNK, CHUNK] twice, [size, CHUNK], [L, V]
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
    quad_turned = take(CHUNK * K), lin_turned = take(CHUNK * L), wide_turned = take(CHUNK * V);
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
  // Blocks of the group before this slot ask nothing: they are of the open group that came in.
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

  // Queries of a block, scaled: rows and turned.
  void read_queries(int64_t h, int64_t at, int n) {
    gather(m.quad_query, nullptr, h, at, n, K, 0, K, w.quad_query, w.K);
    gather(m.lin_query, nullptr, h, at, n, L, 0, L, w.lin_query, w.L);
    for (int64_t i = 0; i < n * w.K; i += W)
      store(w.quad_query + i, load(w.quad_query + i) * quad_scale);
    for (int64_t i = 0; i < n * w.L; i += W)
      store(w.lin_query + i, load(w.lin_query + i) * lin_scale);
  }
  void turn_queries(int n) {
    transpose(n, K, w.quad_query, w.K, w.quad_turned, CHUNK);
    transpose(n, L, w.lin_query, w.L, w.lin_turned, CHUNK);
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
  void add_queries(int n) {
    product<BY_COLUMN, R>(ahead, L, columns, n, {w.lin_query, w.L}, {w.dy, w.V}, {w.S, w.V});
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
  void add_bias_turned(int64_t h, int64_t key, int64_t query, int keys, int queries,
                       R* scores) const {
    if (!m.biases || m.bias_turned)
      return add_bias(m.bias_turned, h, key, query, keys, queries, scores);
    const R* from = bias_of(m.bias, h) + query * m.size + key;
    for (int j = 0; j < keys; j++)
      for (int i = 0; i < queries; i++) scores[j * CHUNK + i] += from[i * m.size + j];
  }
};

template <class R>
INLINE void copy_rows(Matrix<const R> from, int rows, int width, R* to, int64_t stride) {
  for (int i = 0; i < rows; i++) {
    copy(from.row(i), to + i * stride, width);
    for (int d = width; d < padded<R>(width); d++) to[i * stride + d] = 0;
  }
  zero(to + rows * stride, int64_t(padded<R>(rows) - rows) * stride);
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

template <class R> void mixed_forward(const MixedChunk& m, const Segment& s, void* scratch) {
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
        p.turn_queries(n);
        for (int64_t j = 0; j < (m.is_causal ? i + 1 : size); j += CHUNK) {
          const int keys = p.block(j, size);
          R* const scores = w.all + j * CHUNK;
          product<BY_ROW, R>(p.ahead, keys, n, p.K, p.rows_from(p.quad_key, j),
                             {w.quad_turned, CHUNK}, {scores, CHUNK}, false);
          p.add_bias_turned(h, j, i, keys, n, scores);
          if (!m.summed)
            product<BY_ROW, R>(p.ahead, keys, n, p.L, p.rows_from(p.lin_key, j),
                               {w.lin_turned, CHUNK}, {w.weights, CHUNK}, false);
          over_block<R>(keys, n, m.is_causal && i == j, false, [&](int at, auto seen) {
            Vec<R> x = gate<R>(load(scores + at), m.activation);
            if (!m.summed) x += load(w.weights + at);
            store(scores + at, seen ? x : Vec<R>{});
          });
        }
        const int64_t whole = m.is_causal ? i : size;
        product<BY_COLUMN, R>(p.ahead, n, p.columns, int(whole), {w.all, CHUNK}, p.value,
                              {w.out, w.V}, false);
        if (m.is_causal)
          product<BY_COLUMN, R>(p.ahead, n, p.columns, n, {w.all + i * CHUNK, CHUNK},
                                p.rows_from(p.value, i), {w.out, w.V}, true, UP_TO);
        if (past)
          product<BY_COLUMN, R>(p.ahead, n, p.columns, p.L, {w.lin_turned, CHUNK}, {w.S, w.V},
                                {w.out, w.V});
        p.scatter(m.out, nullptr, h, at + i, n, p.V, s.from, p.columns, w.out, w.V);
      }
    }
    if (m.is_causal && p.closed(at)) {
      p.add_keys(size);
      past = true;
    }
  }
  if (!m.is_causal) return;
  p.leave_sums();
  p.leave_open();
}

// What the segment's whole groups (all of them, if not causal) add to the sums.
template <class R> void mixed_sum_keys(const MixedChunk& m, const Segment& s, void* scratch) {
  MixedPass<R> p(m, s, scratch);
  p.load_sums();
  for (int64_t at = s.begin; at < s.end; at += m.size)
    if (!m.is_causal || p.closed(at)) {
      p.read_group(at, false);
      p.add_keys(p.size_at(at));
    }
  p.leave_sums();
}

// What the segment's queries add to the gradient of the sums.
template <class R> void mixed_sum_queries(const MixedChunk& m, const Segment& s, void* scratch) {
  MixedPass<R> p(m, s, scratch);
  p.load_sums();
  for (int64_t at = s.begin; at < s.end; at += CHUNK) {
    const int n = p.block(at, s.end);
    for (int64_t r = 0; r < p.heads; r++) {
      const int64_t h = s.group * p.heads + r;
      p.read_queries(h, at, n);
      p.gather(m.dout, nullptr, h, at, n, p.V, 0, p.V, p.w.dy, p.w.V);
      p.add_queries(n);
    }
  }
  p.leave_sums();
}

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
        p.turn_queries(n);
        p.gather(m.dout, nullptr, h, at + i, n, p.V, 0, p.V, w.dy, w.V);
        transpose(n, p.V, w.dy, w.V, w.wide_turned, CHUNK);
        zero(w.dquad, w.K * CHUNK);
        zero(w.dlin, w.L * CHUNK);
        for (int64_t j = 0; j < (m.is_causal ? i + 1 : size); j += CHUNK) {
          const int keys = p.block(j, size);
          product<BY_ROW, R>(p.ahead, keys, n, p.K, p.rows_from(p.quad_key, j),
                             {w.quad_turned, CHUNK}, {w.scores, CHUNK}, false);
          p.add_bias_turned(h, j, i, keys, n, w.scores);
          product<BY_ROW, R>(p.ahead, keys, n, p.V, p.rows_from(p.value, j), {w.wide_turned, CHUNK},
                             {w.weights, CHUNK}, false);
          if (!m.summed)
            product<BY_COLUMN, R>(p.ahead, p.L, n, keys, p.rows_from(p.lin_key, j),
                                  {w.weights, CHUNK}, {w.dlin, CHUNK});
          over_block<R>(keys, n, m.is_causal && i == j, false, [&](int at, auto seen) {
            const Vec<R> x =
                load(w.weights + at) * gate_slope<R>(load(w.scores + at), m.activation);
            store(w.scores + at, seen ? x : Vec<R>{});
          });
          product<BY_COLUMN, R>(p.ahead, p.K, n, keys, p.rows_from(p.quad_key, j),
                                {w.scores, CHUNK}, {w.dquad, CHUNK});
          if (!s.dbias) continue;
          R* const dbias = (R*)s.dbias + (m.biases > 1 ? r : 0) * m.size * m.size + j * m.size + i;
          for (int k = 0; k < keys; k++)
            for (int l = 0; l < n; l++) dbias[k * m.size + l] += w.scores[k * CHUNK + l];
        }
        if (past)
          product<BY_ROW, R>(p.ahead, p.L, n, p.V, {w.S, w.V}, {w.wide_turned, CHUNK},
                             {w.dlin, CHUNK});
        transpose(p.K, n, w.dquad, CHUNK, w.rows, w.K);
        for (int64_t k = 0; k < n * w.K; k += LANES<R>)
          store(w.rows + k, load(w.rows + k) * p.quad_scale);
        p.scatter(m.dquad_query, nullptr, h, at + i, n, p.K, 0, p.K, w.rows, w.K);
        transpose(p.L, n, w.dlin, CHUNK, w.rows, w.L);
        for (int64_t k = 0; k < n * w.L; k += LANES<R>)
          store(w.rows + k, load(w.rows + k) * p.lin_scale);
        p.scatter(m.dlin_query, nullptr, h, at + i, n, p.L, 0, p.L, w.rows, w.L);
      }
    }
    if (m.is_causal && p.closed(at)) {
      p.add_keys(size);
      past = true;
    }
  }
}

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
      copy_rows(p.rows_from(p.quad_key, j), n, p.K, w.rows, w.K);
      transpose(n, p.K, w.rows, w.K, w.quad_turned, CHUNK);
      copy_rows(p.rows_from(p.value, j), n, p.V, w.rows, w.V);
      transpose(n, p.V, w.rows, w.V, w.wide_turned, CHUNK);
      if (!m.summed) {
        copy_rows(p.rows_from(p.lin_key, j), n, p.L, w.rows, w.L);
        transpose(n, p.L, w.rows, w.L, w.lin_turned, CHUNK);
      }
      if (reached) {
        product<BY_ROW, R>(p.ahead, n, p.V, p.L, p.rows_from(p.lin_key, j), {w.S, w.V}, {dv, w.V});
        product<BY_ROW, R>(p.ahead, p.L, n, p.V, {w.S, w.V}, {w.wide_turned, CHUNK}, {dlin, CHUNK});
      }
      for (int64_t i = m.is_causal ? larger(j, asked) : 0; i < size; i += CHUNK) {
        const int queries = p.block(i, size);
        const bool diagonal = m.is_causal && i == j;
        for (int64_t r = 0; r < p.heads; r++) {
          const int64_t h = s.group * p.heads + r;
          p.read_queries(h, at + i, queries);
          p.gather(m.dout, nullptr, h, at + i, queries, p.V, 0, p.V, w.dy, w.V);
          product<BY_ROW, R>(p.ahead, queries, n, p.K, {w.quad_query, w.K}, {w.quad_turned, CHUNK},
                             {w.scores, CHUNK}, false);
          p.add_bias(m.bias, h, i, j, queries, n, w.scores);
          product<BY_ROW, R>(p.ahead, queries, n, p.V, {w.dy, w.V}, {w.wide_turned, CHUNK},
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
          product<BY_COLUMN, R>(p.ahead, p.K, n, queries, {w.quad_query, w.K}, {w.weights, CHUNK},
                                {dquad, CHUNK});
          if (!m.summed)
            product<BY_ROW, R>(p.ahead, queries, n, p.L, {w.lin_query, w.L}, {w.lin_turned, CHUNK},
                               {w.scores, CHUNK});
          product<BY_COLUMN, R>(p.ahead, n, p.V, queries, {w.scores, CHUNK}, {w.dy, w.V}, {dv, w.V},
                                true, diagonal ? FROM : ALL);
        }
      }
      transpose(p.K, n, dquad, CHUNK, w.rows, w.K);
      add_open(p, m.dfinal_quad_key, at, j, n, p.K, w.rows, w.K);
      p.scatter(m.dquad_key, m.dopen_quad_key, s.group, at + j, n, p.K, 0, p.K, w.rows, w.K);
      transpose(p.L, n, dlin, CHUNK, w.rows, w.L);
      add_open(p, m.dfinal_lin_key, at, j, n, p.L, w.rows, w.L);
      p.scatter(m.dlin_key, m.dopen_lin_key, s.group, at + j, n, p.L, 0, p.L, w.rows, w.L);
      add_open(p, m.dfinal_value, at, j, n, p.V, dv, w.V);
      p.scatter(m.dvalue, m.dopen_value, s.group, at + j, n, p.V, 0, p.V, dv, w.V);
    }
    for (int64_t i = asked; m.summed && m.is_causal && i < size; i += CHUNK) {
      const int n = p.block(i, size);
      for (int64_t r = 0; r < p.heads; r++) {
        const int64_t h = s.group * p.heads + r;
        p.read_queries(h, at + i, n);
        p.gather(m.dout, nullptr, h, at + i, n, p.V, 0, p.V, w.dy, w.V);
        p.add_queries(n);
      }
    }
  }
  if (m.is_causal) p.leave_sums();
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
