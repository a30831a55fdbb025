// Reading tokens into scratch and writing them back: strides, number formats, masks, and both ways
// of lying: token-major [tokens, D] and token-minor [D, CHUNK], where a row holds one component of
// every token of the chunk.
#pragma once

#include "abi.hpp"
#include "matrix_product.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

INLINE float from_bits(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
INLINE uint32_t to_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}

INLINE float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }
INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  return x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__) || defined(__AVX512F__)
INLINE float from_f16(uint16_t x) { return _cvtsh_ss(x); }
INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, 0); }
#else
INLINE float from_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  if (rest >= 0x0f800000) return from_bits(sign | rest | 0x7f800000);  // infinite, NaN
  return from_bits(
      sign | to_bits(from_bits(rest) * 5.192296858534828e33f));  // 2^112, the exponents' difference
}
INLINE uint16_t to_f16(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (rest < 0x38800000)  // denormal: adding a half lets the addition round
    return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13));
}
#endif

template <class R> INLINE void copy(const R* from, R* to, int n) {
  int i = 0;
  for (; i + LANES<R> <= n; i += LANES<R>) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = from[i];
}

// One row of numbers, widened or narrowed.
template <class R> INLINE void read_row(const void* from, int64_t offset, int type, int n, R* to) {
  if (type == BF16) {
    const uint16_t* p = (const uint16_t*)from + offset;
    for (int i = 0; i < n; i++) to[i] = R(from_bf16(p[i]));
  } else if (type == F16) {
    const uint16_t* p = (const uint16_t*)from + offset;
    for (int i = 0; i < n; i++) to[i] = R(from_f16(p[i]));
  } else if (type == (sizeof(R) == 4 ? F32 : F64)) {
    copy((const R*)from + offset, to, n);
  } else {
    for (int i = 0; i < n; i++)
      to[i] = R(type == F32 ? ((const float*)from)[offset + i] : ((const double*)from)[offset + i]);
  }
}
template <class R> INLINE void write_row(void* to, int64_t offset, int type, int n, const R* from) {
  if (type == BF16) {
    uint16_t* p = (uint16_t*)to + offset;
    for (int i = 0; i < n; i++) p[i] = to_bf16(float(from[i]));
  } else if (type == F16) {
    uint16_t* p = (uint16_t*)to + offset;
    for (int i = 0; i < n; i++) p[i] = to_f16(float(from[i]));
  } else if (type == (sizeof(R) == 4 ? F32 : F64)) {
    copy(from, (R*)to + offset, n);
  } else if (type == F32) {
    for (int i = 0; i < n; i++) ((float*)to)[offset + i] = float(from[i]);
  } else {
    for (int i = 0; i < n; i++) ((double*)to)[offset + i] = double(from[i]);
  }
}

// The tokens of a chunk in one head of an array.
struct Rows {
  const Array& array;
  int type;
  int64_t offset;  // of the first token
  int count;
  const uint8_t* mask;  // of the tokens, or null

  // Whether `width` numbers of each lie in memory as scratch would hold them: whole vectors of
  // reals, none masked.
  template <class R> bool plain(int width) const {
    return type == (sizeof(R) == 4 ? F32 : F64) && !mask && count % LANES<R> == 0 &&
           width % LANES<R> == 0;
  }
  template <class R> R* at() const { return (R*)array.data + offset; }
};

// -> [count, width] from column `from`, zeros where masked and from `width` to the next whole
// vector.
template <class R> INLINE void read(Rows x, int64_t from, int width, R* to, int64_t stride) {
  for (int i = 0; i < x.count; i++) {
    R* row = to + i * stride;
    if (x.mask && !x.mask[i]) {
      zero(row, padded<R>(width));
      continue;
    }
    read_row(x.array.data, x.offset + i * x.array.row + from, x.type, width, row);
    for (int d = width; d < padded<R>(width); d++) row[d] = 0;
  }
}

template <class R>
INLINE void write(Rows x, int64_t from, int width, const R* rows, int64_t stride) {
  for (int i = 0; i < x.count; i++)
    write_row(x.array.data, x.offset + i * x.array.row + from, x.type, width, rows + i * stride);
}

// Lanes of a and b by turns: the first half of them, or the second.
#if defined(__clang__)
template <int... I> struct Indices {};
template <int N, int... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I> struct UpTo<0, I...> {
  typedef Indices<I...> Type;
};
template <class R, bool SECOND, int... I>
INLINE Vec<R> interleave(Vec<R> a, Vec<R> b, Indices<I...>) {
  constexpr int W = LANES<R>;
  return __builtin_shufflevector(a, b, ((SECOND ? W / 2 : 0) + I / 2 + (I % 2 ? W : 0))...);
}
template <class R, bool SECOND> INLINE Vec<R> interleave(Vec<R> a, Vec<R> b) {
  return interleave<R, SECOND>(a, b, typename UpTo<LANES<R>>::Type{});
}
#else
template <class R, bool SECOND> INLINE Vec<R> interleave(Vec<R> a, Vec<R> b) {
  constexpr int W = LANES<R>;
  typename Simd<R>::I at;
  for (int i = 0; i < W; i++) at[i] = (SECOND ? W / 2 : 0) + i / 2 + (i % 2 ? W : 0);
  return __builtin_shuffle(a, b, at);
}
#endif

// A square of LANES x LANES: interleaving rows i and i + LANES / 2, as often as halving takes,
// transposes it.
template <class R>
INLINE void transpose_square(const R* from, int64_t from_stride, R* to, int64_t to_stride) {
  constexpr int W = LANES<R>;
  Vec<R> a[W], b[W];
  for (int i = 0; i < W; i++) a[i] = load(from + i * from_stride);
  for (int step = 1; step < W; step *= 2) {
    for (int i = 0; i < W / 2; i++) {
      b[2 * i] = interleave<R, false>(a[i], a[i + W / 2]);
      b[2 * i + 1] = interleave<R, true>(a[i], a[i + W / 2]);
    }
    for (int i = 0; i < W; i++) a[i] = b[i];
  }
  for (int i = 0; i < W; i++) store(to + i * to_stride, a[i]);
}

// [rows, columns] -> [columns, rows]; both are rounded up to whole vectors.
template <class R>
void transpose(int rows, int columns, const R* from, int64_t from_stride, R* to,
               int64_t to_stride) {
  constexpr int W = LANES<R>;
  for (int i = 0; i < rows; i += W)
    for (int j = 0; j < columns; j += W)
      transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
}

// -> token-minor [width, CHUNK]. `rows`: room for a chunk of token-major rows.
template <class R> INLINE void read_transposed(Rows x, int width, R* rows, R* to) {
  if (x.plain<R>(width)) return transpose<R>(x.count, width, x.at<R>(), x.array.row, to, CHUNK);
  const int stride = padded<R>(width);
  read(x, 0, width, rows, stride);
  zero(rows + x.count * stride, int64_t(padded<R>(x.count) - x.count) * stride);
  transpose(x.count, width, rows, stride, to, CHUNK);
}

template <class R> INLINE void write_transposed(Rows x, int width, const R* from, R* rows) {
  if (x.plain<R>(width)) return transpose<R>(width, x.count, from, CHUNK, x.at<R>(), x.array.row);
  const int stride = padded<R>(width);
  transpose(width, x.count, from, CHUNK, rows, stride);
  write(x, 0, width, rows, stride);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
