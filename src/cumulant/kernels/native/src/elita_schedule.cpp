// ELiTA's attention: shares a call out over threads.
//
// Rows of key/value heads run beside each other. When those are fewer than the threads, sequences
// are cut into parts. A first run computes how each part changes the mean that enters it
// (backwards: the gradient). The calling thread then computes what enters each part, and a second
// run walks the parts.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>

namespace cumulant {
namespace {

double read_number(const void* x, int type, int64_t i) {
  return type == F64 ? ((const double*)x)[i] : ((const float*)x)[i];
}

class ElitaCall {
  typedef decltype(Kernels::elita_forward) Kernel;
  const Elita& e;
  const Kernels& k;
  const int64_t rows, size, parts;
  std::vector<double> starts,
      ends;  // [rows, parts, size]: what each part is handed, and what it leaves
  std::vector<ElitaSegment> segments;

 public:
  explicit ElitaCall(const Elita& elita)
      : e(elita),
        k(kernels(elita.isa, F64)),
        rows(e.B * e.G),
        size(e.V + 2),
        parts(std::max<int64_t>(
            1, std::min((e.threads + rows - 1) / std::max<int64_t>(rows, 1), e.T / e.span))),
        starts(size_t(rows * parts * size)),
        ends(starts.size()) {}

  bool forward() {
    use_large_pages(e.out.data, size_t(e.B * e.H * e.T * e.V) * bytes_of(e.type));
    if (parts > 1 && !run(k.elita_forward, true, false)) return false;
    for (int64_t row = 0; row < rows; row++) {
      double* const first = start(row, 0);
      first[0] = e.log_weight ? e.log_weight[row] : -INFINITY;
      for (int64_t d = 0; d < e.V; d++) first[2 + d] = e.mean ? e.mean[row * e.V + d] : 0;
      for (int64_t p = 1; p < parts; p++) append(start(row, p - 1), start(row, p));
    }
    if (!run(k.elita_forward, false, false)) return false;
    for (int64_t row = 0; row < rows; row++) {
      const double* last = end(row, parts - 1);
      e.final_log_weight[row] = last[0];
      std::copy(last + 2, last + size, e.final_mean + row * e.V);
    }
    return true;
  }

  bool backward() {
    use_large_pages(e.dvalue.data, size_t(e.B * e.G * e.T * e.V) * bytes_of(e.type));
    if (parts > 1 && !run(k.elita_backward, true, true)) return false;
    for (int64_t row = 0; row < rows; row++) {
      double* const first = start(row, 0);
      first[0] = e.dfinal_log_weight ? e.dfinal_log_weight[row] : 0;
      for (int64_t d = 0; d < e.V; d++)
        first[2 + d] = e.dfinal_mean ? e.dfinal_mean[row * e.V + d] : 0;
      for (int64_t p = 1; p < parts; p++) {
        const double* before = start(row, p - 1);
        double* after = start(row, p);
        after[0] = 0;  // the gradient of m is added when all parts are known
        for (int64_t d = 2; d < size; d++) after[d] += after[1] * before[d];
      }
    }
    if (!run(k.elita_backward, false, true)) return false;
    for (int64_t row = 0; row < rows; row++) {
      double carried = end(row, 0)[0];
      for (int64_t p = 1; p < parts; p++) carried = hand_on(row, p, carried);
      if (!e.dlog_weight) continue;
      const double* last = end(row, parts - 1);
      const bool reached = e.log_weight[row] != -INFINITY;
      e.dlog_weight[row] = reached ? carried : 0;
      for (int64_t d = 0; d < e.V; d++) e.dmean[row * e.V + d] = reached ? last[2 + d] : 0;
    }
    return true;
  }

 private:
  double* start(int64_t row, int64_t p) { return starts.data() + (row * parts + p) * size; }
  double* end(int64_t row, int64_t p) { return ends.data() + (row * parts + p) * size; }

  // Where the part at `place` in time begins.
  int64_t edge(int64_t place) const {
    return std::min(e.T, (e.T + CHUNK - 1) / CHUNK * place / parts * CHUNK);
  }

  // Adds to part p, backwards, the gradient of m that comes from behind it; what goes on from
  // there.
  double hand_on(int64_t row, int64_t p, double carried) {
    const int64_t place = parts - 1 - p, from = edge(place), offset = row * e.T;
    double reaching = carried;
    for (int64_t t = edge(place + 1) - 1; t >= from && reaching != 0; t--) {
      const double odds = read_number(e.key_odds, e.gates, offset + t),
                   more = reaching / (1 + 1 / odds);
      if (e.gates == F64)
        ((double*)e.dkey_logit)[offset + t] += more;
      else
        ((float*)e.dkey_logit)[offset + t] += float(more);
      reaching = e.first && e.first[t] ? 0 : reaching / (1 + odds);
    }
    return end(row, p)[0] + reaching;
  }

  // All parts of all rows, counted in the direction of time; `passing`: only how the parts but the
  // last move what comes.
  bool run(Kernel kernel, bool passing, bool backwards) {
    segments.clear();
    for (int64_t row = 0; row < rows; row++)
      for (int64_t p = 0; p < parts - passing; p++) {
        const int64_t place = backwards ? parts - 1 - p : p;
        segments.push_back({row / e.G, row % e.G, edge(place), edge(place + 1),
                            passing ? nullptr : start(row, p),
                            passing ? start(row, p + 1) : end(row, p), passing});
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
