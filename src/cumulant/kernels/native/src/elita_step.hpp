// One token of ELiTA's attention in a program, and its position logits.
#pragma once

#include "abi.hpp"

#include <cmath>

namespace cumulant {
namespace CUMULANT_ISA {

// y = x + the sum of amplitude sin(frequency tau + phase) over k sines, for each of n heads; x may
// be null.
inline void position_logits(const Instruction& s, const float* frequency, const float* phase,
                            const float* amplitude, int64_t position, const float* x, float* y) {
  const float tau = float(s.scalar * double(position));
  for (int64_t h = 0; h < s.n; h++) {
    float total = 0;
    for (int64_t m = h * s.k; m < (h + 1) * s.k; m++)
      total += amplitude[m] * std::sin(tau * frequency[m] + phase[m]);
    y[h] = (x ? x[h] : 0) + total;
  }
}

// The running log-sum m takes in the key's logit c, and the mean u moves towards the value by
// exp(c - m). The output lies between u and the token's own value. In double, as
// elita_recurrence.hpp.
inline void elita_step(int64_t heads, int64_t V, const float* key, const float* query,
                       const float* own, const float* value, const double* log_weight,
                       const double* mean, double* new_log_weight, double* new_mean, float* out) {
  for (int64_t h = 0; h < heads; h++) {
    const double before = log_weight[h], c = key[h], top = larger(before, c);
    double after = top, part = 0;  // nothing seen yet, and this key has no weight
    if (top != -INFINITY) {
      after = top + std::log1p(std::exp(-std::fabs(before - c)));
      part = std::exp(c - after);
    }
    new_log_weight[h] = after;
    const double gate = 1 / (1 + std::exp(double(query[h]) - double(own[h]) + after));
    for (int64_t d = h * V; d < (h + 1) * V; d++) {
      const double u = mean[d] + part * (value[d] - mean[d]);
      new_mean[d] = u;
      out[d] = float(u + gate * (value[d] - u));
    }
  }
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
