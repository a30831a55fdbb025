// Outputs of mixed chunk attention, and the sums of its keys.
#pragma once

#include "mixed_chunk_groups.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

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
        p.transpose_queries(n);
        for (int64_t j = 0; j < (m.is_causal ? i + 1 : size); j += CHUNK) {
          const int keys = p.block(j, size);
          R* const scores = w.all + j * CHUNK;
          p.form_scores(h, j, i, keys, n, scores);
          if (!m.summed)
            product<BY_ROW, R>(p.ahead, keys, n, p.L, p.rows_from(p.lin_key, j),
                               {w.lin_transposed, CHUNK}, {w.weights, CHUNK}, false);
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
          product<BY_COLUMN, R>(p.ahead, n, p.columns, p.L, {w.lin_transposed, CHUNK}, {w.S, w.V},
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

}  // namespace CUMULANT_ISA
}  // namespace cumulant
