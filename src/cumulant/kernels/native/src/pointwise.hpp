// What stands beside attention in a layer, number by number, in one pass over memory each.
#pragma once

#include "simd.hpp"

#include <cmath>

namespace cumulant {
namespace CUMULANT_ISA {

// body(i, number) for i = 0 .. n - 1: whole vectors, then single numbers.
template <class Body> INLINE void each_vector(int64_t n, Body body) {
  constexpr int L = LANES<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i, Vec<float>{});
  for (; i < n; i++) body(i, 0.0f);
}
INLINE Vec<float> read(const float* p, Vec<float>) { return load(p); }
INLINE float read(const float* p, float) { return *p; }
INLINE void write(float* p, Vec<float> x) { store(p, x); }
INLINE void write(float* p, float x) { *p = x; }
INLINE float total(Vec<float> x) { return sum<float>(x); }

INLINE const float* row_of(const Array& x, int64_t b, int64_t h, int64_t t) {
  return (const float*)x.data + b * x.batch + h * x.head + t * x.row;
}
INLINE float* row_to(const Array& x, int64_t b, int64_t h, int64_t t) {
  return (float*)x.data + b * x.batch + h * x.head + t * x.row;
}

inline void swiglu_forward(const Pointwise& p, int64_t begin, int64_t end) {
  const float *x = (const float*)p.x.data + begin, *up = p.second + begin;
  float* out = (float*)p.out.data + begin;
  each_vector(end - begin, [&](int64_t i, auto kind) {
    const auto a = read(x + i, kind);
    write(out + i, a * sigmoid(a) * read(up + i, kind));
  });
}

// out = a s(a) up, with the sigmoid s of slope s (1 - s): d out / d a = up (s + a s (1 - s)).
inline void swiglu_backward(const Pointwise& p, int64_t begin, int64_t end) {
  const float *x = (const float*)p.x.data + begin, *up = p.second + begin,
              *dout = (const float*)p.dout.data + begin;
  float *dx = (float*)p.dx.data + begin, *dup = p.dsecond + begin;
  each_vector(end - begin, [&](int64_t i, auto kind) {
    const auto a = read(x + i, kind), s = sigmoid(a), d = read(dout + i, kind);
    write(dup + i, d * a * s);
    write(dx + i, d * read(up + i, kind) * (s + a * s * (1 - s)));
  });
}

inline void rmsnorm_forward(const Pointwise& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const float* const x = row_of(p.x, i / p.T, 0, i % p.T);
    float* const out = row_to(p.out, i / p.T, 0, i % p.T);
    Vec<float> squares{};
    float rest = 0;
    each_vector(p.n, [&](int64_t j, auto kind) {
      const auto a = read(x + j, kind);
      if constexpr (sizeof(a) == sizeof(float))
        rest += a * a;
      else
        squares += a * a;
    });
    const float factor = 1 / std::sqrt((total(squares) + rest) / float(p.n) + float(p.epsilon));
    if (p.factors) p.factors[i] = factor;
    each_vector(p.n, [&](int64_t j, auto kind) {
      const auto y = read(x + j, kind) * factor;
      write(out + j, p.weight ? y * read(p.weight + j, kind) : y);
    });
  }
}

// With y = x r: dx = r (w dout - y mean(w dout y)), dw = sum dout y.
inline void rmsnorm_backward(const Pointwise& p, int64_t begin, int64_t end, float* dweight) {
  for (int64_t i = begin; i < end; i++) {
    const float *x = row_of(p.x, i / p.T, 0, i % p.T), *dout = row_of(p.dout, i / p.T, 0, i % p.T);
    float* const dx = row_to(p.dx, i / p.T, 0, i % p.T);
    const float factor = p.factors[i];
    // First the mean over the row, and dw, which needs the same products before the weight.
    Vec<float> products{};
    float rest = 0;
    each_vector(p.n, [&](int64_t j, auto kind) {
      auto d = read(dout + j, kind) * read(x + j, kind) * factor;
      if (p.weight) {
        write(dweight + j, read(dweight + j, kind) + d);
        d *= read(p.weight + j, kind);
      }
      if constexpr (sizeof(d) == sizeof(float))
        rest += d;
      else
        products += d;
    });
    const float mean = (total(products) + rest) / float(p.n);
    each_vector(p.n, [&](int64_t j, auto kind) {
      auto d = read(dout + j, kind);
      if (p.weight) d *= read(p.weight + j, kind);
      write(dx + j, factor * (d - read(x + j, kind) * (factor * mean)));
    });
  }
}

// Row t - j of a sequence, in what came before it where that is negative; null where there is none.
INLINE const float* past_row(const Pointwise& p, int64_t b, int64_t t, int64_t j) {
  if (j > 0 && p.offset && p.offset[t] < j) return nullptr;
  if (t >= j) return row_of(p.x, b, 0, t - j);
  return p.tail ? p.tail + (b * (p.taps - 1) + (p.taps - 1) + t - j) * p.n : nullptr;
}

inline void convolve_forward(const Pointwise& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / p.T, t = i % p.T;
    float* const out = row_to(p.out, b, 0, t);
    for (int64_t j = 0; j < p.taps; j++) {
      const float *x = past_row(p, b, t, j), *w = p.weight + j * p.n;
      if (!x) continue;
      if (j == 0)
        each_vector(p.n, [&](int64_t c, auto kind) {
          write(out + c, read(x + c, kind) * read(w + c, kind));
        });
      else
        each_vector(p.n, [&](int64_t c, auto kind) {
          write(out + c, read(out + c, kind) + read(x + c, kind) * read(w + c, kind));
        });
    }
  }
}

// dx_t = sum_j w_j dout_{t + j} within the sequence, dw_j = sum_t dout_t x_{t - j}.
inline void convolve_backward(const Pointwise& p, int64_t begin, int64_t end, float* dweight) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / p.T, t = i % p.T;
    float* const dx = row_to(p.dx, b, 0, t);
    const float* const dout = row_of(p.dout, b, 0, t);
    for (int64_t j = 0; j < p.taps; j++) {
      const float *x = past_row(p, b, t, j), *w = p.weight + j * p.n;
      float* const dw = dweight + j * p.n;
      if (x)
        each_vector(p.n, [&](int64_t c, auto kind) {
          write(dw + c, read(dw + c, kind) + read(dout + c, kind) * read(x + c, kind));
        });
      const bool seen = t + j < p.T && (!p.offset || p.offset[t + j] >= j);
      if (j == 0) {
        each_vector(p.n, [&](int64_t c, auto kind) {
          write(dx + c, read(dout + c, kind) * read(w + c, kind));
        });
      } else if (seen) {
        const float* const later = row_of(p.dout, b, 0, t + j);
        each_vector(p.n, [&](int64_t c, auto kind) {
          write(dx + c, read(dx + c, kind) + read(later + c, kind) * read(w + c, kind));
        });
      }
    }
    // The rows before the first token: each is read by the first outputs within taps of it.
    if (t != 0 || !p.dtail) continue;
    for (int64_t s = 0; s < p.taps - 1;
         s++) {  // slot s stands taps - 1 - s tokens before the first
      float* const to = p.dtail + (b * (p.taps - 1) + s) * p.n;
      memset(to, 0, sizeof(float) * size_t(p.n));
      for (int64_t j = p.taps - 1 - s; j < p.taps; j++) {
        const int64_t later = s - (p.taps - 1) + j;
        if (later >= p.T || (p.offset && p.offset[later] < j)) continue;
        const float *d = row_of(p.dout, b, 0, later), *w = p.weight + j * p.n;
        each_vector(p.n, [&](int64_t c, auto kind) {
          write(to + c, read(to + c, kind) + read(d + c, kind) * read(w + c, kind));
        });
      }
    }
  }
}

inline void rotate_pairs(const Pointwise& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / p.T, t = i % p.T, angles = b * p.angles + t * (p.n / 2);
    const float *cosine = p.cosine + angles, *sine = p.sine + angles, sign = p.back ? -1.0f : 1.0f;
    for (int64_t h = 0; h < p.H; h++) {
      const float* const x = row_of(p.x, b, h, t);
      float* const out = row_to(p.out, b, h, t);
      for (int64_t j = 0; j < p.n / 2; j++) {
        const float even = x[2 * j], odd = x[2 * j + 1], s = sign * sine[j];
        out[2 * j] = even * cosine[j] - odd * s;
        out[2 * j + 1] = even * s + odd * cosine[j];
      }
    }
  }
}

inline void pointwise(const Pointwise& p, int64_t begin, int64_t end, float* dweight) {
  switch (p.operation) {
    case SWIGLU_FORWARD:
      return swiglu_forward(p, begin, end);
    case SWIGLU_BACKWARD:
      return swiglu_backward(p, begin, end);
    case RMSNORM_FORWARD:
      return rmsnorm_forward(p, begin, end);
    case RMSNORM_BACKWARD:
      return rmsnorm_backward(p, begin, end, dweight);
    case CONVOLVE_FORWARD:
      return convolve_forward(p, begin, end);
    case CONVOLVE_BACKWARD:
      return convolve_backward(p, begin, end, dweight);
    case ROTATE_PAIRS:
      return rotate_pairs(p, begin, end);
  }
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
