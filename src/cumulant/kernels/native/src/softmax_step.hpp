// One token's softmax attention to itself and the tokens before it. Keys and values are read once,
// in blocks, and every block's weights are relative to the largest score so far.
#pragma once

#include "number_rows.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// One key/value head of one row of the batch, with its query heads. T: of keys and values.
template <class T> struct SoftmaxStep {
  static constexpr int L = LANES<float>, TOKENS = 64;
  const Instruction& s;
  const Past& past;
  int64_t batch, group, heads;       // query heads of the group
  int64_t length;                    // tokens of the row before this one
  const float *query, *key, *value;  // the token's own
  float *out, *most, *total;         // of each query head; total: the sum of the weights
  const T *keys, *values;            // [length, k]
  T *new_keys, *new_values;

  SoftmaxStep(const Program& p, const Instruction& instruction, float* rows, int64_t b, int64_t g)
      : s(instruction),
        past(p.pasts[s.past]),
        batch(b),
        group(g),
        heads(s.n / s.groups),
        length(past.lengths ? past.lengths[batch] : past.length) {
    float* const row = rows + batch * p.width;
    const int64_t first = group * heads;
    query = row + s.source + first * s.k, out = row + s.target + first * s.k;
    key = row + s.second + group * s.k, value = row + s.third + group * s.k;
    most = row + s.fourth + first, total = row + s.fourth + s.n + first;
    const int64_t head = slot_of(p, batch) * s.groups + group;
    const int64_t from = head * past.capacity * s.k, to = head * past.new_capacity * s.k;
    keys = (const T*)p.before[s.state] + from;
    values = (const T*)p.before[s.state + 1] + from;
    new_keys = (T*)p.after[s.state] + to, new_values = (T*)p.after[s.state + 1] + to;
  }

  void run() {
    for (int64_t r = 0; r < heads; r++) see_itself(r);
    int64_t begin = larger<int64_t>(0, length - past.seen);
    if (past.first) begin = larger(begin, past.first[batch]);
    for (int64_t j = begin; j < length; j += TOKENS)
      for (int64_t r = 0; r < heads; r++) see(r, j, int(smaller<int64_t>(TOKENS, length - j)));
    for (int64_t r = 0; r < heads; r++)
      for (int64_t d = 0; d < s.k; d++) out[r * s.k + d] /= total[r];
    remember(keys, key, new_keys);
    remember(values, value, new_values);
  }

 private:
  void see_itself(int64_t r) {
    float score;
    dot_rows<1>(key, s.k, query + r * s.k, &score);
    most[r] = score * float(s.scalar), total[r] = 1;
    memcpy(out + r * s.k, value, sizeof(float) * size_t(s.k));
  }

  // Tokens j .. j + n - 1 of the past.
  void see(int64_t r, int64_t j, int n) {
    const float* const q = query + r * s.k;
    float weights[TOKENS];
    int i = 0;
    for (; i + 8 <= n; i += 8) dot_rows<8>(keys + (j + i) * s.k, s.k, q, weights + i);
    for (; i < n; i++) dot_rows<1>(keys + (j + i) * s.k, s.k, q, weights + i);
    const float before = most[r];
    for (i = 0; i < n; i++) {
      weights[i] *= float(s.scalar);
      most[r] = larger(most[r], weights[i]);
    }
    for (i = n; i < TOKENS; i++) weights[i] = -__builtin_inff();
    Vec<float> sums{};
    for (i = 0; i < TOKENS; i += L) {
      const Vec<float> w = exponential<float>(load(weights + i) - most[r]);
      store(weights + i, w);
      sums += w;
    }
    const float factor = exponential<float>(splat(before - most[r]))[0];
    total[r] = total[r] * factor + sum<float>(sums);
    add_values(weights, n, values + j * s.k, factor, out + r * s.k);
  }

  // y = factor y + the weighted sum of n values.
  void add_values(const float* weights, int n, const T* v, float factor, float* y) const {
    int64_t d = 0;
    for (; d + PANEL * L <= s.k; d += PANEL * L) add_columns<PANEL>(weights, n, v, factor, y, d);
    for (; d + L <= s.k; d += L) add_columns<1>(weights, n, v, factor, y, d);
    for (; d < s.k; d++) {
      float x = y[d] * factor;
      for (int i = 0; i < n; i++) x += weights[i] * number(v[i * s.k + d]);
      y[d] = x;
    }
  }
  template <int N>
  INLINE void add_columns(const float* weights, int n, const T* v, float factor, float* y,
                          int64_t d) const {
    Vec<float> x[N];
    for (int c = 0; c < N; c++) x[c] = load(y + d + c * L) * factor;
    for (int i = 0; i < n; i++)
      for (int c = 0; c < N; c++) x[c] += weights[i] * numbers(v + i * s.k + d + c * L);
    for (int c = 0; c < N; c++) store(y + d + c * L, x[c]);
  }

  void remember(const T* before, const float* newest, T* after) const {
    const int64_t kept = length - past.dropped;
    const size_t row = sizeof(T) * size_t(s.k);
    if (after != before) memcpy(after, before + past.dropped * s.k, row * size_t(kept));
    for (int64_t d = 0; d < s.k; d++) set_number(after + kept * s.k + d, newest[d]);
  }
};

}  // namespace CUMULANT_ISA
}  // namespace cumulant
