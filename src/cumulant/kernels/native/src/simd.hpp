// Vectors of `LANES<R>` reals (R: float or double), as wide as the instruction set this file is
// compiled for.
//
// GCC's and Clang's vector extensions: the same source serves AVX-512, AVX2, SSE2 and NEON. Each
// instruction set has a namespace of its own (CUMULANT_ISA), so that no linker can take a function
// compiled for another; for the same reason nothing here calls templates of the standard library.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)  // whose header reads registers that it never set
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__AVX512F__)
#define CUMULANT_BYTES 64
#elif defined(__AVX2__)
#define CUMULANT_BYTES 32
#else
#define CUMULANT_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))

namespace cumulant {
namespace CUMULANT_ISA {

template <class R> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(CUMULANT_BYTES)));
  typedef float Unaligned __attribute__((vector_size(CUMULANT_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(CUMULANT_BYTES)));
  typedef uint32_t U __attribute__((vector_size(CUMULANT_BYTES)));
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(CUMULANT_BYTES)));
  typedef double Unaligned __attribute__((vector_size(CUMULANT_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(CUMULANT_BYTES)));
};
template <class R> using Vec = typename Simd<R>::V;

template <class R> constexpr int LANES = CUMULANT_BYTES / int(sizeof(R));
// Vectors that a tile of a product spans, and accumulators it may use beside operands: 32 registers
// or 16.
constexpr int PANEL = CUMULANT_BYTES == 64 ? 4 : 2;
constexpr int ACCUMULATORS = CUMULANT_BYTES == 64 ? 24 : 12;

template <class T> INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T larger(T a, T b) { return a < b ? b : a; }
template <class R> INLINE int padded(int n) { return (n + LANES<R> - 1) / LANES<R> * LANES<R>; }

template <class R> INLINE Vec<R> load(const R* p) { return *(const typename Simd<R>::Unaligned*)p; }
template <class R> INLINE void store(R* p, Vec<R> x) { *(typename Simd<R>::Unaligned*)p = x; }
template <class R> INLINE Vec<R> splat(R x) { return x - Vec<R>{}; }
template <class R> INLINE R sum(Vec<R> x) {
#if CUMULANT_BYTES == 64
  typedef R Half __attribute__((vector_size(32), may_alias));
  const Half half = ((const Half*)&x)[0] + ((const Half*)&x)[1];
#elif CUMULANT_BYTES == 32
  const Vec<R> half = x;
#endif
#if CUMULANT_BYTES > 16
  typedef R Quarter __attribute__((vector_size(16), may_alias));
  const Quarter q = ((const Quarter*)&half)[0] + ((const Quarter*)&half)[1];
#else
  const Vec<R> q = x;
#endif
  if constexpr (sizeof(R) == 4) return (q[0] + q[2]) + (q[1] + q[3]);
  return q[0] + q[1];
}
template <class R> INLINE void zero(R* p, int64_t n) { memset(p, 0, sizeof(R) * size_t(n)); }

// exp(x) for x <= 0, NaN for NaN, within 2 units in the last place; 0 where it is below the
// smallest normal number. x = n log 2 + r, |r| <= log(2) / 2: e^r by its series, times 2^n.
template <class R> INLINE Vec<R> exponential(Vec<R> x) {
  typedef typename Simd<R>::I I;
  constexpr bool single = sizeof(R) == 4;
  constexpr int TERMS = single ? 7 : 13, MANTISSA = single ? 23 : 52;
  constexpr R least = single ? R(-87.3) : R(-708.3);
  constexpr R high = single
                         ? R(0.693145752)
                         : R(0.6931471803691238);  // log 2 in two parts, the first a short number
  constexpr R low = single ? R(1.42860677e-6) : R(1.9082149292705877e-10);
  // Adding it rounds to an integer, and leaves that with the exponent's bias in the lowest bits.
  constexpr R magic = single ? R(12582912 + 127) : R(6755399441055744.0 + 1023);
  const Vec<R> shifted = x * R(1.4426950408889634) + magic, n = shifted - magic;
  const Vec<R> r = (x - n * high) - n * low;
  R coefficient[TERMS + 1];
  coefficient[0] = 1;
  for (int p = 1; p <= TERMS; p++) coefficient[p] = coefficient[p - 1] / R(p);
  Vec<R> result = splat<R>(coefficient[TERMS]);
  for (int p = TERMS - 1; p >= 0; p--) result = result * r + coefficient[p];
  return x < least ? Vec<R>{} : result * (Vec<R>)((I)shifted << MANTISSA);
}

// 1 / (1 + exp(-x)), without overflow.
INLINE Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> e = exponential<float>(x < 0 ? x : -x), one = splat(1.0f);
  return (x < 0 ? e : one) / (one + e);
}
INLINE float sigmoid(float x) { return sigmoid(splat(x))[0]; }

}  // namespace CUMULANT_ISA
}  // namespace cumulant
