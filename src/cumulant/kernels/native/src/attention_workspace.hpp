// Scratch of linear and Taylor attention for one chunk.
#pragma once

#include "abi.hpp"
#include "simd.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

constexpr int SLAB = 78;

// Matrices of one thread. With a null base it only counts how much they need.
template <class R> struct Workspace {
  int64_t used = 0;
  R *q, *k, *v, *rows, *scores, *dscores, *phi, *dphi, *out, *S, *Z, *z, *ones, *constant, *powers;
  R *v_transposed, *dy_transposed, *dy, *dz, *dq, *dk, *dv, *level;
  int64_t stride;     // of rows of values
  int64_t residuals;  // from sums that decay to what rounding took off them: see Keep

  Workspace(const Attention& a, R* base) {
    const int64_t K = padded<R>(int(a.K)), V = padded<R>(int(a.V));
    stride = V;
    auto take = [&](int64_t n) {
      R* at = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16;
      return at;
    };
    q = take(K * CHUNK), k = take(K * CHUNK), dq = take(K * CHUNK), dk = take(K * CHUNK);
    rows = take(larger(K, V) * CHUNK);
    v = take(V * CHUNK), out = take(V * CHUNK), v_transposed = take(V * CHUNK);
    dy = take(V * CHUNK), dy_transposed = take(V * CHUNK), dv = take(V * CHUNK);
    scores = take(CHUNK * CHUNK), dscores = take(CHUNK * CHUNK);
    phi = take(SLAB * CHUNK), dphi = take(SLAB * CHUNK);
    z = take(CHUNK), dz = take(CHUNK), level = take(CHUNK), ones = take(CHUNK),
    constant = take(CHUNK);
    powers = take(2 * MAX_ORDER * CHUNK);
    // One causal chunk without a state is the quadratic form alone: no sums, however many features
    // there would be.
    const bool sums = !a.is_causal || a.T > a.chunk || a.numerator || a.denominator ||
                      a.final_numerator || a.final_denominator || a.dfinal_numerator ||
                      a.dfinal_denominator;
    residuals = sums ? (a.F * (V + 1) + 15) / 16 * 16 : 0;
    S = take(a.log_decay.data ? 2 * residuals : residuals);
    Z = base && sums ? S + a.F * V : S;
  }
};

}  // namespace CUMULANT_ISA
}  // namespace cumulant
