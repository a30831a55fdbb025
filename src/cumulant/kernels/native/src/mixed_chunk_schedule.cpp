// Mixed chunk attention: the tasks of a call. Parts of sequences are whole groups.
#include "schedule.hpp"

namespace cumulant {
namespace {

class MixedCall : Schedule<MixedChunk> {
  const MixedChunk& m;
  const size_t scratch;
  int64_t longest = 0;       // tokens of the longest sequence
  std::vector<char> biases;  // [rows, parts, heads, size, size]: the bias's gradients

 public:
  explicit MixedCall(const MixedChunk& c)
      : Schedule(c, c.L, c.size, std::max(c.span, c.size), c.bounds, false),
        m(c),
        scratch(size_t(k.mixed_scratch(c))) {
    for (int64_t n = 0; n < m.N; n++) longest = std::max(longest, m.bounds[n + 1] - m.bounds[n]);
  }

  bool forward() {
    use_large_pages(m.out.data, size_t(m.B * m.H * m.T * m.V) * bytes_of(m.type));
    const int64_t most = std::max<int64_t>(m.V / 64, 1),
                  idle = (m.threads + rows - 1) / std::max<int64_t>(rows, 1),
                  split = std::min(most, std::max<int64_t>(idle, 1));
    if (!m.is_causal) return forward_both(split);
    const auto kernel = [&](const Segment& s) { return steps(s) ? k.mixed_step : k.mixed_forward; };
    return forward_causal(scratch, k.mixed_sum_keys, kernel, split, longest, m.numerator,
                          m.final_numerator);
  }

  bool backward() {
    const int64_t P = count_parts(2 * rows, longest);
    biases.assign(m.biases ? size_t(rows * P * bias_numbers()) * real : 0, 0);
    const auto prepare = [&](Segment& s, Segment&, int64_t p, int64_t parts) {
      const int64_t before = (s.row * parts + p) * bias_numbers();
      s.dbias = m.biases ? biases.data() + size_t(before) * real : nullptr;
    };
    if (!m.is_causal) return backward_both(P, prepare);
    return backward_causal(scratch, k.mixed_sum_keys, k.mixed_sum_queries, k.mixed_key_backward,
                           k.mixed_query_backward, prepare, P, longest, m.numerator,
                           m.dfinal_numerator, m.dnumerator);
  }

  // The gradient of the bias [biases, size, size], by key and query: all parts' together.
  void sum_biases(void* to) const {
    if (!m.biases) return;
    const int64_t width = bias_numbers(),
                  each = int64_t(biases.size() / real) / std::max<int64_t>(rows, 1);
    for (int64_t i = 0; i < int64_t(biases.size() / real); i++) {
      const int64_t row = i / std::max<int64_t>(each, 1), group = m.biases > 1 ? row % m.G : 0,
                    at = group * width + i % width;
      if (m.type == F64)
        static_cast<double*>(to)[at] += reinterpret_cast<const double*>(biases.data())[i];
      else
        static_cast<float*>(to)[at] += reinterpret_cast<const float*>(biases.data())[i];
    }
  }

 private:
  // Numbers of the bias that the heads of one row read.
  int64_t bias_numbers() const { return (m.biases > 1 ? m.H / m.G : 1) * m.size * m.size; }

  // Whether the sequence is one token onto a state, and its group stays open.
  bool steps(const Segment& s) const {
    const int64_t begin = m.bounds[s.sequence], end = m.bounds[s.sequence + 1];
    if (m.T > 1 || m.H == 0 || !m.numerator || !m.final_numerator) return false;
    return begin < end && end - begin < m.size && m.index[end - 1] >= 0;
  }

  // In both directions every query reads the sums over all groups; without `summed` there are none.
  bool forward_both(int64_t split) {
    const int64_t P = count_parts(rows * split, longest);
    reserve(m.summed ? rows * P : 0);
    each_row([&](Segment s) {
      for (int64_t p = 0; m.summed && p < P; p++) {
        cut(s, 0, p, P);
        add_columns(k.mixed_sum_keys, s, {}, own(s.row * P + p), split);
      }
    });
    run(scratch);
    each_row([&](Segment s) {
      const Sums all = m.summed ? own(s.row * P) : Sums{};
      for (int64_t p = 1; m.summed && p < P; p++) total(all, all, own(s.row * P + p));
      for (int64_t p = 0; p < P; p++) {
        cut(s, 0, p, P);
        add_columns(k.mixed_forward, s, all, {}, split);
      }
    });
    return run(scratch);
  }

  // The sums over all keys are not kept, so they are formed beside their gradient from all queries.
  template <class Prepare> bool backward_both(int64_t P, Prepare prepare) {
    reserve(m.summed ? 2 * rows * P : 0);
    each_row([&](Segment s) {
      for (int64_t p = 0; m.summed && p < P; p++) {
        cut(s, 0, p, P);
        add(k.mixed_sum_keys, s, {}, own(2 * s.row * P + p));
        add(k.mixed_sum_queries, s, {}, own((2 * s.row + 1) * P + p));
      }
    });
    run(scratch);
    each_row([&](Segment s) {
      const Sums keys = m.summed ? own(2 * s.row * P) : Sums{},
                 queries = m.summed ? own((2 * s.row + 1) * P) : Sums{};
      for (int64_t p = 1; m.summed && p < P; p++) {
        total(keys, keys, own(2 * s.row * P + p));
        total(queries, queries, own((2 * s.row + 1) * P + p));
      }
      for (int64_t p = 0; p < P; p++) {
        cut(s, 0, p, P);
        add(k.mixed_key_backward, s, queries, {});
        Segment query_segment = s;
        prepare(query_segment, s, p, P);
        add(k.mixed_query_backward, query_segment, keys, {});
      }
    });
    return run(scratch);
  }
};

}  // namespace
}  // namespace cumulant

extern "C" {
int cumulant_mixed_chunk_forward(const cumulant::MixedChunk* m) {
  return cumulant::guarded(m->isa, [&] { return cumulant::MixedCall(*m).forward(); });
}
// Adds the gradient of the bias, [biases, size, size] by key and query, to `dbias`.
int cumulant_mixed_chunk_backward(const cumulant::MixedChunk* m, void* dbias) {
  return cumulant::guarded(m->isa, [&] {
    cumulant::MixedCall call(*m);
    if (!call.backward()) return false;
    call.sum_biases(dbias);
    return true;
  });
}
}
