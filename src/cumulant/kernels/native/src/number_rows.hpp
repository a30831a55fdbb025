// Rows of numbers in fp32, bf16 or fp16, read as fp32, and their products with a vector.
#pragma once

#include "tokens.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

INLINE float number(float x) { return x; }
INLINE float number(Bf16 x) { return from_bf16(x.bits); }
INLINE float number(Half x) { return from_f16(x.bits); }
INLINE void set_number(float* to, float x) { *to = x; }
INLINE void set_number(Bf16* to, float x) { to->bits = to_bf16(x); }
INLINE void set_number(Half* to, float x) { to->bits = to_f16(x); }

typedef uint16_t HalfBits __attribute__((vector_size(CUMULANT_BYTES / 2)));

INLINE Vec<float> numbers(const float* p) { return load(p); }
INLINE Vec<float> numbers(const Bf16* p) {
  HalfBits bits;
  memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, typename Simd<float>::U) << 16);
}
INLINE Vec<float> numbers(const Half* p) {
#if CUMULANT_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif CUMULANT_BYTES == 32 && defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> x;
  for (int i = 0; i < LANES<float>; i++) x[i] = number(p[i]);
  return x;
#endif
}

// Calls body with a number of a type.
template <class Body> INLINE void with_type(int64_t type, const Body& body) {
  if (type == BF16) return body(Bf16{});
  if (type == F16) return body(Half{});
  body(0.0f);
}

#if CUMULANT_BYTES == 64
// The sums of eight vectors, [i] at a stride, each added up in the order of `sum`.
INLINE void sum_eight(const Vec<float>* x, int stride, float* out) {
  __m512 halves[4], quarters[2];
  for (int i = 0; i < 4; i++) {
    const __m512 a = (__m512)x[2 * i * stride], b = (__m512)x[(2 * i + 1) * stride];
    halves[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  }
  for (int i = 0; i < 2; i++) {
    const __m512 a = halves[2 * i], b = halves[2 * i + 1];
    quarters[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  const __m512 pairs =
      _mm512_unpacklo_ps(quarters[0], quarters[1]) + _mm512_unpackhi_ps(quarters[0], quarters[1]);
  const __m512 sums = pairs + _mm512_permute_ps(pairs, 0xee);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
}
#endif

// Products of N rows of a matrix with M vectors, `stride` numbers apart: out [M, N]. The sum of one
// row and one vector has the same order for every N and M. With AHEAD, memory is asked for ahead,
// to the second cache: half-precision rows are read 1.5 times as fast so.
template <int N, int M, bool AHEAD, class T>
INLINE void dot_block(const T* W, int64_t k, const float* x, int64_t stride, float* out) {
  constexpr int L = LANES<float>, BYTES = 16 << 10;
  Vec<float> sums[N][M];
  for (int i = 0; i < N; i++)
    for (int m = 0; m < M; m++) sums[i][m] = Vec<float>{};
  int64_t j = 0;
  for (; j + L <= k; j += L) {
    Vec<float> y[M];
    for (int m = 0; m < M; m++) {
      y[m] = load(x + m * stride + j);
      if (!AHEAD) __builtin_prefetch(x + (M + m) * stride + j, 0, 3);
    }
    for (int i = 0; i < N; i++) {
      if (AHEAD) __builtin_prefetch((const char*)(W + i * k + j) + BYTES, 0, 2);
      const Vec<float> w = numbers(W + i * k + j);
      for (int m = 0; m < M; m++) sums[i][m] += w * y[m];
    }
  }
  for (int m = 0; m < M; m++) {
#if CUMULANT_BYTES == 64
    if constexpr (N == 8)
      sum_eight(&sums[0][m], M, out + m * N);
    else
#endif
      for (int i = 0; i < N; i++) out[m * N + i] = sum<float>(sums[i][m]);
    for (int i = 0; i < N; i++) {
      float rest = 0;
      for (int64_t t = j; t < k; t++) rest += number(W[i * k + t]) * x[m * stride + t];
      out[m * N + i] += rest;
    }
  }
}

// Products of N rows of a matrix with a vector.
template <int N, class T> INLINE void dot_rows(const T* W, int64_t k, const float* x, float* out) {
  dot_block<N, 1, true>(W, k, x, 0, out);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
