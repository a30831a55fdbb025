// The kernels of one instruction set: compiled once for each, with its flags and its name as CUMULANT_ISA.
#include "backward.hpp"
#include "elita.hpp"
#include "forward.hpp"
#include "mixed_chunk.hpp"
#include "mixed_step.hpp"
#include "pointwise.hpp"
#include "program.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

template <class R> int64_t scratch(const Attention& a) { return Workspace<R>(a, nullptr).used; }

template <class R> int64_t multiply(int64_t rounds) {
  constexpr int N = 10;  // enough to hide the latency, few enough for 16 registers
  Vec<R> x[N];
  for (int n = 0; n < N; n++) x[n] = splat<R>(R(n));
  const Vec<R> factor = splat<R>(R(0.999)), step = splat<R>(R(0.001));
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 10
    for (int n = 0; n < N; n++) x[n] = x[n] * factor + step;
  }
  Vec<R> total{};
  for (int n = 0; n < N; n++) total += x[n];
  return sum<R>(total) > 0 ? rounds * N * LANES<R> * 2 : 0;
}

#define KERNELS(R)                                                                                          \
  {                                                                                                         \
    scratch<R>, multiply<R>, elita_scratch, mixed_scratch<R>, mixed_forward<R>, mixed_step<R>, mixed_sum_keys<R>, mixed_sum_queries<R>, mixed_query_backward<R>, mixed_key_backward<R>, elita_forward, elita_backward, pointwise, instruct, forward<R>, sum_keys<R>, sum_queries<R>, query_backward<R>, key_backward<R>, step<R>        \
  }
extern const Kernels singles;
extern const Kernels doubles;
const Kernels singles = KERNELS(float);
const Kernels doubles = KERNELS(double);

}  // namespace CUMULANT_ISA
}  // namespace cumulant
