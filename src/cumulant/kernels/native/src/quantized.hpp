// Matrices of 8 and 4 bits: rows in groups of 64 codes, each with a scale. A weight is
// (code - offset) scale, with an offset of 128 or 8. A group is 64 bytes; or 32, the codes of its
// first half in the low bits. The last group of a row is filled up with zeros (codes of 8 or 128).
//
// Vectors stay in fp32. With AVX-512 VNNI they become integers of 16 bits and a factor for each
// group, which is nearly as exact.
#pragma once

#include "simd.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

constexpr int GROUP = 64;
constexpr int HALF = GROUP / 2;

// How far ahead a product with a vector fetches codes to the second cache, in bytes.
template <int BITS> constexpr int AHEAD = 1024 * BITS;

INLINE int64_t groups_of(int64_t k) { return (k + GROUP - 1) / GROUP; }

// Codes 4 L i to 4 L (i + 1) - 1 of a group (L lanes), four in each lane, the first in its lowest
// bits. Their offset is taken off: what is left is a signed number of BITS.
template <int BITS> INLINE typename Simd<float>::U codes_at(const uint8_t* group, int i) {
  typedef typename Simd<float>::U U;
  U x;
  if constexpr (BITS == 8) {
    memcpy(&x, group + CUMULANT_BYTES * i, CUMULANT_BYTES);
    return x ^ 0x80808080u;
  } else {
#if CUMULANT_BYTES == 64
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)group));
    x = (U)_mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    (void)i;
#else
    constexpr int PARTS = HALF / CUMULANT_BYTES;
    memcpy(&x, group + CUMULANT_BYTES * (i % PARTS), CUMULANT_BYTES);
    if (i >= PARTS) x >>= 4;
#endif
    return x ^ 0x08080808u;
  }
}

// A vector as the products with codes read it, in scratch memory: filled up with zeros, and each
// block of 4 L numbers transposed, as codes lie in lanes.
struct PlainVector {
  static int64_t bytes(int64_t k) { return groups_of(k) * GROUP * int64_t(sizeof(float)); }

  static void prepare(int, const float* x, int64_t k, void* to) {
    constexpr int L = LANES<float>;
    float* y = (float*)to;
    for (int64_t begin = 0; begin < groups_of(k) * GROUP; begin += 4 * L, y += 4 * L)
      for (int i = 0; i < 4 * L; i++) y[i % 4 * L + i / 4] = begin + i < k ? x[begin + i] : 0;
  }

  // Products of N rows with the vector.
  template <int BITS, int N>
  static void dot(const uint8_t* codes, const float* scales, int64_t groups, const void* vector,
                  float* out) {
    constexpr int L = LANES<float>, BYTES = GROUP * BITS / 8;
    const float* x = (const float*)vector;
    Vec<float> sums[N];
    for (int i = 0; i < N; i++) sums[i] = Vec<float>{};
    for (int64_t g = 0; g < groups; g++, x += GROUP) {
      for (int n = 0; n < N; n++) {
        __builtin_prefetch(codes + (n * groups + g) * BYTES + AHEAD<BITS>, 0, 2);
        Vec<float> part{};
        for (int i = 0; i < GROUP / (4 * L); i++) {
          const auto four = codes_at<BITS>(codes + (n * groups + g) * BYTES, i);
          for (int j = 0; j < 4; j++) {
            const auto code = (typename Simd<float>::I)(four << (32 - BITS - 8 * j)) >> (32 - BITS);
            part += __builtin_convertvector(code, Vec<float>) * load(x + (4 * i + j) * L);
          }
        }
        sums[n] += part * scales[n * groups + g];
      }
    }
    for (int n = 0; n < N; n++) out[n] = sum<float>(sums[n]);
  }
};

// The weights of a row.
inline void decode_row(const uint8_t* codes, const float* scales, int bits, int64_t k, float* to) {
  float whole[GROUP];
  for (int64_t g = 0; g * GROUP < k; g++) {
    const uint8_t* const group = codes + g * (GROUP * bits / 8);
    const bool last = k - g * GROUP < GROUP;
    float* const out = last ? whole : to + g * GROUP;
    if (bits == 8) {
      for (int j = 0; j < GROUP; j++) out[j] = float(int(group[j]) - 128) * scales[g];
    } else {
      for (int j = 0; j < HALF; j++) {
        out[j] = float(int(group[j] & 15) - 8) * scales[g];
        out[HALF + j] = float(int(group[j] >> 4) - 8) * scales[g];
      }
    }
    if (last) memcpy(to + g * GROUP, whole, sizeof(float) * size_t(k - g * GROUP));
  }
}

#if CUMULANT_BYTES == 64
#define VNNI __attribute__((target("avx512vnni")))

// x = (256 high + low) factor in each group. The offset of the weights is taken off by what sums of
// low parts begin with.
struct VnniVector {
  struct Group {
    int8_t high[GROUP], low[GROUP];
    int32_t start[GROUP / 4];
    float factor, unused[15];
  };
  static int64_t bytes(int64_t k) { return groups_of(k) * int64_t(sizeof(Group)); }

  static VNNI void prepare(int bits, const float* x, int64_t k, void* to) {
    constexpr int LIMIT = 256 * 127 + 127;
    for (int64_t g = 0; g * GROUP < k; g++) {
      Group& group = ((Group*)to)[g];
      float whole[GROUP] = {};
      const int64_t count = smaller<int64_t>(GROUP, k - g * GROUP);
      memcpy(whole, x + g * GROUP, sizeof(float) * size_t(count));
      __m512 most = _mm512_setzero_ps(), strange = _mm512_setzero_ps();
      for (int j = 0; j < GROUP; j += 16) {
        const __m512 y = _mm512_loadu_ps(whole + j);
        const Vec<float> z = (Vec<float>)y, size = z < 0 ? -z : z;
        most = (Vec<float>)most < size ? (__m512)size : most;
        strange = _mm512_fmadd_ps(y, _mm512_setzero_ps(), strange);  // NaN for infinities and NaN
      }
      float largest = 0;
      for (int i = 0; i < 16; i++) largest = larger(largest, ((Vec<float>)most)[i]);
      group.factor = largest / LIMIT + sum<float>((Vec<float>)strange);
      // below this no factor would be a normal number, and all products are far below any other
      const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? LIMIT / largest : 0);
      for (int j = 0; j < GROUP; j += 16) {
        const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(whole + j), inverse));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i*)(group.high + j), _mm512_cvtepi32_epi8(high));
        const __m512i low = _mm512_sub_epi32(n, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i*)(group.low + j), _mm512_cvtepi32_epi8(low));
      }
      const __m512i ones = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
      const __m512i high = _mm512_dpbusd_epi32(none, ones, _mm512_loadu_si512(group.high));
      const __m512i low = _mm512_dpbusd_epi32(none, ones, _mm512_loadu_si512(group.low));
      const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
      _mm512_storeu_si512(group.start,
                          _mm512_mullo_epi32(total, _mm512_set1_epi32(bits == 8 ? -128 : -8)));
    }
  }

  template <int BITS, int N>
  static VNNI void dot(const uint8_t* codes, const float* scales, int64_t groups, const void* x,
                       float* out) {
    constexpr int BYTES = GROUP * BITS / 8;
    const Group* group = (const Group*)x;
    __m512 sums[N];
    for (int i = 0; i < N; i++) sums[i] = _mm512_setzero_ps();
    const __m512i none = _mm512_setzero_si512(), fifteen = _mm512_set1_epi8(15);
    const __m512i halves = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    for (int64_t g = 0; g < groups; g++, group++) {
      const __m512i high = _mm512_loadu_si512(group->high), low = _mm512_loadu_si512(group->low);
      const __m512i start = _mm512_loadu_si512(group->start);
      const __m512 factor = _mm512_set1_ps(group->factor);
      for (int i = 0; i < N; i++) {
        const uint8_t* const row = codes + (i * groups + g) * BYTES;
        __m512i w;
        __builtin_prefetch(row + AHEAD<BITS>, 0, 2);
        if (BITS == 8) {
          const __m256i* const two = (const __m256i*)row;  // memory streams faster by 32 bytes
          w = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(two)),
                                 _mm256_loadu_si256(two + 1), 1);
        } else {
          w = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)row));
          w = _mm512_and_si512(_mm512_srlv_epi64(w, halves), fifteen);
        }
        const __m512i products =
            _mm512_add_epi32(_mm512_slli_epi32(_mm512_dpbusd_epi32(none, w, high), 8),
                             _mm512_dpbusd_epi32(start, w, low));
        sums[i] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(products), factor),
                                  _mm512_set1_ps(scales[i * groups + g]), sums[i]);
      }
    }
    for (int i = 0; i < N; i++) out[i] = sum<float>((Vec<float>)sums[i]);
  }
};
#endif

// The rows of a matrix [n, k].
inline void decode(const Quantized& q, int64_t begin, int64_t end) {
  const int64_t bytes = groups_of(q.k) * GROUP * q.bits / 8;
  for (int64_t i = begin; i < end; i++)
    decode_row(q.codes + i * bytes, q.scales + i * groups_of(q.k), q.bits, q.k, q.out + i * q.k);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
