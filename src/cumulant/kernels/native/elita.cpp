// ELiTA's attention: shares a call out over threads.
//
// Rows of key/value heads run beside each other. When those are fewer than the threads, sequences are cut into parts: how
// each part moves what it is handed (means forwards, gradients backwards), then what every part is handed, then the parts.
#include "dispatch.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>

namespace cumulant {
namespace {

class ElitaCall {
  typedef decltype(Kernels::elita_forward) Kernel;
  const Elita& e;
  const Kernels& k;
  const int64_t rows, size, parts;
  std::vector<double> moves;  // [rows, parts + 1, size]: what part p is handed, and in the end what the last one leaves
  std::vector<ElitaSegment> segments;

 public:
  explicit ElitaCall(const Elita& elita)
      : e(elita), k(kernels(elita.isa, F64)), rows(e.B * e.G), size(e.V + 2),
        parts(std::max<int64_t>(1, std::min((e.threads + rows - 1) / std::max<int64_t>(rows, 1), e.T / e.span))),
        moves(size_t(rows * (parts + 1) * size)) {}

  bool forward() {
    use_large_pages(e.out.data, size_t(e.B * e.H * e.T * e.V) * bytes_of(e.type));
    if (parts > 1 && !run(k.elita_forward, true, false)) return false;
    for (int64_t row = 0; row < rows; row++) {
      double* const first = move(row, 0);
      first[0] = e.log_weight ? e.log_weight[row] : -INFINITY;
      for (int64_t d = 0; d < e.V; d++) first[2 + d] = e.mean ? e.mean[row * e.V + d] : 0;
      for (int64_t p = 1; p < parts; p++) append(move(row, p - 1), move(row, p));
    }
    if (!run(k.elita_forward, false, false)) return false;
    for (int64_t row = 0; row < rows; row++) {
      const double* last = move(row, parts);
      e.final_log_weight[row] = last[0];
      std::copy(last + 2, last + size, e.final_mean + row * e.V);
    }
    return true;
  }

  bool backward() {
    use_large_pages(e.dvalue.data, size_t(e.B * e.G * e.T * e.V) * bytes_of(e.type));
    if (parts > 1 && !run(k.elita_backward, true, true)) return false;
    for (int64_t row = 0; row < rows; row++) {
      double *const first = move(row, 0), q = e.dfinal_log_weight ? -e.dfinal_log_weight[row] : 0;
      first[0] = q;
      for (int64_t d = 0; e.dfinal_mean && d < e.V; d++) {
        first[2 + d] = e.dfinal_mean[row * e.V + d];
        first[0] += first[2 + d] * e.final_mean[row * e.V + d];
      }
      for (int64_t p = 1; p < parts; p++) {
        const double* before = move(row, p - 1);
        double* after = move(row, p);
        after[0] += after[1] * before[0];
        for (int64_t d = 2; d < size; d++) after[d] += after[1] * before[d];
      }
    }
    if (!run(k.elita_backward, false, true)) return false;
    for (int64_t row = 0; e.dlog_weight && row < rows; row++) {
      const double* last = move(row, parts);
      const bool reached = e.log_weight[row] != -INFINITY;
      e.dlog_weight[row] = reached ? -last[0] : 0;
      for (int64_t d = 0; d < e.V; d++) {
        e.dmean[row * e.V + d] = reached ? last[2 + d] : 0;
        if (reached) e.dlog_weight[row] += last[2 + d] * e.mean[row * e.V + d];
      }
    }
    return true;
  }

 private:
  double* move(int64_t row, int64_t p) { return moves.data() + (row * (parts + 1) + p) * size; }

  // All parts of all rows, counted in the direction of time; `passing`: only how the parts but the last move what comes.
  bool run(Kernel kernel, bool passing, bool backwards) {
    segments.clear();
    for (int64_t row = 0; row < rows; row++)
      for (int64_t p = 0; p < parts - passing; p++) {
        const int64_t place = backwards ? parts - 1 - p : p, chunks = (e.T + CHUNK - 1) / CHUNK;
        const int64_t begin = std::min(e.T, chunks * place / parts * CHUNK);
        const int64_t end = std::min(e.T, chunks * (place + 1) / parts * CHUNK);
        const bool leaves = passing || p == parts - 1;
        segments.push_back({row / e.G, row % e.G, begin, end, passing ? nullptr : move(row, p), leaves ? move(row, p + 1) : nullptr, passing});
      }
    return parallel(e.threads, int64_t(segments.size()), size_t(k.elita_scratch(e)),
                    [&](int64_t i, void* scratch) { kernel(e, segments[size_t(i)], scratch); });
  }

  // after: the log-sum and mean of one part alone -> of all up to it.
  void append(const double* before, double* after) const {
    const double top = std::max(before[0], after[0]);
    if (top == -INFINITY || after[1] > 0) return;
    const double p = std::exp(before[0] - top), q = std::exp(after[0] - top);
    after[0] = top + std::log(p + q);
    for (int64_t d = 2; d < size; d++) after[d] = (p * before[d] + q * after[d]) / (p + q);
  }
};

}  // namespace
}  // namespace cumulant

extern "C" {
int cumulant_elita_forward(const cumulant::Elita* e) {
  return cumulant::guarded(e->isa, [&] { return cumulant::ElitaCall(*e).forward(); });
}
int cumulant_elita_backward(const cumulant::Elita* e) {
  return cumulant::guarded(e->isa, [&] { return cumulant::ElitaCall(*e).backward(); });
}
}
