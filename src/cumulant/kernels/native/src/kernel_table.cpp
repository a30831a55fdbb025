// The kernels of one instruction set: compiled once for each, with its flags and its name as
// CUMULANT_ISA.
#include "attention_backward.hpp"
#include "attention_forward.hpp"
#include "attention_step.hpp"
#include "decoded_product.hpp"
#include "elita_recurrence.hpp"
#include "integer_product.hpp"
#include "mixed_chunk_backward.hpp"
#include "mixed_chunk_forward.hpp"
#include "mixed_chunk_step.hpp"
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

inline void read_numbers(const void* from, int64_t begin, int type, int n, float* to) {
  read_row(from, begin, type, n, to);
}

// X: how products with quantised matrices read vectors.
template <class R, class X> constexpr Kernels table() {
  Kernels k{};
  k.scratch = scratch<R>;
  k.multiply = multiply<R>;
  k.forward = forward<R>;
  k.step = step<R>;
  k.sum_keys = sum_keys<R>;
  k.sum_queries = sum_queries<R>;
  k.query_backward = query_backward<R>;
  k.key_backward = key_backward<R>;
  k.mixed_scratch = mixed_scratch<R>;
  k.mixed_forward = mixed_forward<R>;
  k.mixed_step = mixed_step<R>;
  k.mixed_sum_keys = mixed_sum_keys<R>;
  k.mixed_sum_queries = mixed_sum_queries<R>;
  k.mixed_query_backward = mixed_query_backward<R>;
  k.mixed_key_backward = mixed_key_backward<R>;
  // these choose their reals themselves, by the types that they are handed
  k.elita_scratch = elita_scratch;
  k.elita_forward = elita_forward;
  k.elita_backward = elita_backward;
  k.pointwise = pointwise;
  k.instruct = instruct<X>;
  k.attend_softmax = attend_softmax;
  k.vector_bytes = X::bytes;
  k.prepare_vector = X::prepare;
  k.decode = decode;
  k.read_numbers = read_numbers;
  return k;
}
// P: products of many tokens with quantised matrices.
template <class P> constexpr Kernels with_products(Kernels k) {
  k.tile_tokens = P::TILE_TOKENS;
  k.panel_rows = P::PANEL_ROWS;
  k.near = P::NEAR;
  k.tile_bytes = P::tile_bytes;
  k.product_scratch = P::scratch_bytes;
  k.prepare_tile = P::prepare;
  k.multiply_panel = P::run;
  return k;
}
extern const Kernels singles, doubles;
const Kernels singles = with_products<DecodedProduct>(table<float, PlainVector>());
const Kernels doubles = table<double, PlainVector>();
#if CUMULANT_BYTES == 64
extern const Kernels vnni_singles;
const Kernels vnni_singles = with_products<VnniProduct>(table<float, VnniVector>());
#endif

}  // namespace CUMULANT_ISA
}  // namespace cumulant
