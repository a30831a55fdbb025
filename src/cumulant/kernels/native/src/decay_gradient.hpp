// The gradient of log decays, from what the two backward passes leave: see attention_backward.hpp.
#pragma once

#include "schedule.hpp"

#include <cmath>

namespace cumulant {

// Where a sequence's tokens begin in its row of the batch.
inline int64_t first_token(const Attention& a, const Segment& s) {
  return a.offsets ? a.offsets[s.sequence] : 0;
}
inline int64_t batch_row(const Attention& a, const Segment& s) {
  return a.offsets ? 0 : s.sequence;
}
inline bool is_masked(const Attention& a, const Segment& s, int64_t t) {
  return a.key_mask && !a.key_mask[batch_row(a, s) * a.S + first_token(a, s) + t];
}

// Of token t of a segment's sequence, at most 0; 0 where it is masked.
inline double log_decay(const Attention& a, const Segment& s, int64_t t) {
  if (is_masked(a, s, t)) return 0;
  const Array& x = a.log_decay;
  const int64_t at = batch_row(a, s) * x.batch + s.group * x.head + (first_token(a, s) + t) * x.row;
  const double d = a.decay_type == F32 ? double(static_cast<const float*>(x.data)[at])
                                       : static_cast<const double*>(x.data)[at];
  return d > 0 ? 0 : d;
}

// With A_i, what query i reads of the sums before its chunk, and b_j, what key j passes on (to
// later chunks, and in its own: columns less rows), token l's gradient is X + sum A_i over i >= l +
// sum b_j over j < l. X is what passes the chunk, from keys before to queries after it. What passes
// its beginning, <S, dS>, is X + sum A_i, and what passes its end is X + sum b_j. So <S, dS> is
// known at some chunks' beginnings (anchors), and follows for the others: differences of few sums.
// Over the whole sequence they would lose the digits of strong decays.
class DecayGradient {
  static constexpr int64_t ANCHOR_CHUNKS = 16;
  const Attention& a;
  const size_t real;
  const int64_t size;  // numbers of a row's sums
  int64_t anchor_chunks = 0;
  std::vector<double> query_terms;               // [B, G, T]; those of keys are in dlog_decay
  std::vector<int64_t> first_anchor;             // [rows]
  std::vector<char> query_anchors, key_anchors;  // [anchors, F (V + 1)]

 public:
  DecayGradient(const Attention& call, size_t real_)
      : a(call), real(real_), size(call.F * (call.V + 1)) {
    if (!a.dlog_decay) return;
    std::fill_n(a.dlog_decay, size_t(a.B * a.G * a.T), 0.0);
    query_terms.resize(size_t(a.B * a.G * a.T));
    // No more memory than the tokens between two anchors take.
    const int64_t token = a.H / a.G * a.K + a.K + a.V;
    anchor_chunks = std::max(ANCHOR_CHUNKS, 2 * size / std::max<int64_t>(token * a.chunk, 1));
    int64_t count = 0;
    for (int64_t n = 0; n < a.N; n++) {
      const int64_t length = a.offsets ? a.offsets[n + 1] - a.offsets[n] : a.T;
      for (int64_t g = 0; g < a.G; g++) {
        first_anchor.push_back(count);
        count += std::max<int64_t>((length - 1) / (a.chunk * anchor_chunks), 0);
      }
    }
    query_anchors.resize(size_t(count * size) * real);
    key_anchors.resize(size_t(count * size) * real);
  }

  void prepare(Segment& queries, Segment& keys) {
    if (!a.dlog_decay) return;
    queries.terms = query_terms.data() + terms_of(queries);
    keys.terms = a.dlog_decay + terms_of(keys);
    queries.anchors = anchor(query_anchors, queries, 0);
    keys.anchors = anchor(key_anchors, keys, 0);
    queries.anchor_chunks = keys.anchor_chunks = anchor_chunks;
  }

  // The gradients of one row: its `initial` sums, and their gradients.
  void write(const Segment& s, Sums initial, Sums dinitial) {
    if (!a.dlog_decay) return;
    double* const of_queries = query_terms.data() + terms_of(s);
    double* const of_keys = a.dlog_decay + terms_of(s);
    const int64_t length = a.offsets ? a.offsets[s.sequence + 1] - a.offsets[s.sequence] : a.T;
    double crossing = 0;  // <S, dS> before the chunk
    if (initial.numerator) crossing = product(initial.numerator, dinitial.numerator, a.F * a.V);
    if (initial.denominator) crossing += product(initial.denominator, dinitial.denominator, a.F);
    for (int64_t c = 0; c * a.chunk < length; c++) {
      const int64_t begin = c * a.chunk, end = std::min(length, begin + a.chunk);
      if (c > 0 && c % anchor_chunks == 0) {
        const int64_t i = c / anchor_chunks - 1;
        crossing = product(anchor(query_anchors, s, i), anchor(key_anchors, s, i),
                           a.normalize ? size : a.F * a.V);
      }
      for (int64_t t = end - 2; t >= begin; t--) of_queries[t] += of_queries[t + 1];
      const double passing = crossing - of_queries[begin];
      double before = 0;
      for (int64_t t = begin; t < end; t++) {
        const double own = of_keys[t];
        of_keys[t] = is_masked(a, s, t) ? 0 : passing + of_queries[t] + before;
        before += own;
      }
      crossing = passing + before;
    }
  }

 private:
  int64_t terms_of(const Segment& s) const {
    return (batch_row(a, s) * a.G + s.group) * a.T + first_token(a, s);
  }
  char* anchor(std::vector<char>& anchors, const Segment& s, int64_t i) const {
    return anchors.data() + size_t((first_anchor[size_t(s.row)] + i) * size) * real;
  }
  double product(const char* x, const char* y, int64_t n) const {
    return real == 8 ? product_of<double>(x, y, n) : product_of<float>(x, y, n);
  }
  template <class R> static double product_of(const char* x, const char* y, int64_t n) {
    const R *p = reinterpret_cast<const R*>(x), *q = reinterpret_cast<const R*>(y);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += double(p[i]) * double(q[i]);
    return sum;
  }
};

}  // namespace cumulant
