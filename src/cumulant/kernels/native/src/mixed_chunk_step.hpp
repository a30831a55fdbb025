// One token of mixed chunk attention onto a state, where its group stays open: values and sums are
// read once, and left for the state that goes out as they pass.
#pragma once

#include "mixed_chunk_groups.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

template <class R> INLINE R inner(const R* x, const R* y, int n) {
  Vec<R> total{};
  int d = 0;
  for (; d + LANES<R> <= n; d += LANES<R>) total += load(x + d) * load(y + d);
  R result = sum<R>(total);
  for (; d < n; d++) result += x[d] * y[d];
  return result;
}

// out += sum of x[i] row[i] over N rows, which are left at `to` unless that is null.
template <class R, int N>
INLINE void pass_rows(const R* x, const R* rows, R* to, int64_t stride, int width, R* out) {
  constexpr int W = LANES<R>;
  int d = 0;
  for (; d + W <= width; d += W) {
    Vec<R> total = load(out + d);
    for (int i = 0; i < N; i++) {
      const Vec<R> row = load(rows + i * stride + d);
      if (to) store(to + i * stride + d, row);
      total += x[i] * row;
    }
    store(out + d, total);
  }
  for (; d < width; d++)
    for (int i = 0; i < N; i++) {
      const R number = rows[i * stride + d];
      if (to) to[i * stride + d] = number;
      out[d] += x[i] * number;
    }
}
template <class R>
void pass(int64_t count, const R* x, const R* rows, R* to, int64_t stride, int width, R* out) {
  constexpr int N = 4;
  int64_t i = 0;
  for (; i + N <= count; i += N)
    pass_rows<R, N>(x + i, rows + i * stride, to ? to + i * stride : nullptr, stride, width, out);
  for (; i < count; i++)
    pass_rows<R, 1>(x + i, rows + i * stride, to ? to + i * stride : nullptr, stride, width, out);
}

template <class R> void mixed_step(const MixedChunk& m, const Segment& s, void* scratch) {
  MixedPass<R> p(m, s, scratch);
  auto& w = p.w;
  const int64_t last = p.length - 1;  // the token's slot
  p.gather(m.quad_key, nullptr, s.group, last, 1, p.K, 0, p.K, w.quad_key, w.K);
  p.gather(m.lin_key, nullptr, s.group, last, 1, p.L, 0, p.L, w.lin_key, w.L);
  p.gather(m.value, nullptr, s.group, last, 1, p.V, s.from, p.columns, w.value, w.V);
  const R* const values = p.open_row(m.open_value, 0, p.V) + s.from;
  R* const left = p.final_row(m.final_value, 0, p.V) + s.from;
  for (int64_t r = 0; r < p.heads; r++) {
    const int64_t h = s.group * p.heads + r;
    R* const weights = w.all;
    p.read_queries(h, last, 1);
    for (int64_t j = 0; j < last; j++)
      weights[j] = inner(w.quad_query, p.open_row(m.open_quad_key, j, p.K), p.K);
    weights[last] = inner<R>(w.quad_query, w.quad_key, p.K);
    if (m.biases) {
      const R* bias = p.bias_of(m.bias, h) + last * m.size;
      for (int64_t j = 0; j <= last; j++) weights[j] += bias[j];
    }
    for (int64_t j = 0; j <= last; j += LANES<R>)
      store(weights + j, gate<R>(load(weights + j), m.activation));
    zero(w.out, w.V);
    pass(last, weights, values, r ? nullptr : left, p.V, p.columns, w.out);
    pass<R>(1, weights + last, w.value, nullptr, w.V, p.columns, w.out);
    pass(p.L, w.lin_query, (const R*)s.start + s.from, r ? nullptr : (R*)s.stop + s.from, p.V,
         p.columns, w.out);
    p.scatter(m.out, nullptr, h, last, 1, p.V, s.from, p.columns, w.out, w.V);
  }
  copy(w.value, left + last * p.V, p.columns);
  if (s.from == 0) {
    memcpy(p.final_row(m.final_quad_key, 0, p.K), p.open_row(m.open_quad_key, 0, p.K),
           sizeof(R) * size_t(last * p.K));
    memcpy(p.final_row(m.final_lin_key, 0, p.L), p.open_row(m.open_lin_key, 0, p.L),
           sizeof(R) * size_t(last * p.L));
    copy(w.quad_key, p.final_row(m.final_quad_key, last, p.K), p.K);
    copy(w.lin_key, p.final_row(m.final_lin_key, last, p.L), p.L);
  }
  p.clear_open(last + 1);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
