// The instructions of a program (one token through a layer): what each does to its vectors.
#pragma once

#include "elita_step.hpp"
#include "quantized.hpp"
#include "softmax_step.hpp"

#include <cmath>

namespace cumulant {
namespace CUMULANT_ISA {

INLINE void add_products(const Instruction& s, int64_t i, int64_t count, const float* products,
                         float* to) {
  if (!s.bias) {
    for (int64_t c = 0; c < count; c++) to[c] = (s.add ? to[c] : 0) + products[c] + 0.0f;
    return;
  }
  for (int64_t c = 0; c < count; c++) {
    float bias = 0;
    if (s.bias) read_row(s.bias, i + c, int(s.type), 1, &bias);
    to[c] = (s.add ? to[c] : 0) + products[c] + bias;
  }
}

// Rows begin .. end - 1 of a matrix, each read from memory once for all rows of the batch.
template <class T>
void multiply_matrix(const Program& p, const Instruction& s, float* rows, int64_t begin,
                     int64_t end) {
  // M vectors and R rows of the matrix at a time, as many as registers hold
  constexpr int N = 8, M = 3, R = CUMULANT_BYTES == 64 ? 8 : 4;
  for (int64_t i = begin; i < end; i += N) {
    const int64_t count = smaller<int64_t>(N, end - i);
    const T* const W = (const T*)s.weight + i * s.k;
    const auto multiply_one = [&](int64_t b) {
      float* const row = rows + b * p.width;
      float out[N];
      if (count == N) {
        dot_rows<N>(W, s.k, row + s.source, out);
      } else {
        for (int64_t c = 0; c < count; c++) dot_rows<1>(W + c * s.k, s.k, row + s.source, out + c);
      }
      add_products(s, i, count, out, row + s.target + i);
    };
    multiply_one(0);  // which asks for the next rows
    int64_t b = 1;
    for (; count == N && b + M <= p.B; b += M) {
      float* const row = rows + b * p.width;
      float out[M * R];
      for (int c = 0; c < N; c += R) {
        dot_block<R, M, false>(W + c * s.k, s.k, row + s.source, p.width, out);
        for (int m = 0; m < M; m++)
          add_products(s, i + c, R, out + m * R, row + m * p.width + s.target + i + c);
      }
    }
    for (; b < p.B; b++) multiply_one(b);
  }
}

// The same of a matrix of 8 or 4 bits, with the rows' vectors as `X` prepares them.
template <class X, int BITS>
void multiply_codes(const Program& p, const Instruction& s, float* rows, const void* vectors,
                    int64_t begin, int64_t end) {
  constexpr int N = 16 / BITS;  // memory streams faster in few rows
  const int64_t groups = groups_of(s.k), bytes = groups * GROUP * BITS / 8;
  for (int64_t i = begin; i < end; i += N) {
    const int64_t count = smaller<int64_t>(N, end - i);
    const uint8_t* const codes = (const uint8_t*)s.weight + i * bytes;
    const float* const scales = s.scales + i * groups;
    for (int64_t b = 0; b < p.B; b++) {
      const void* const x = (const char*)vectors + b * X::bytes(s.k);
      float out[N];
      if (count == N) {
        X::template dot<BITS, N>(codes, scales, groups, x, out);
      } else {
        for (int64_t c = 0; c < count; c++)
          X::template dot<BITS, 1>(codes + c * bytes, scales + c * groups, groups, x, out + c);
      }
      add_products(s, i, count, out, rows + b * p.width + s.target + i);
    }
  }
}

// The weights of an instruction in fp32, where they are, or widened to `to`.
INLINE const float* widened(const Instruction& s, const void* weights, int64_t n, float* to) {
  if (!weights || s.type == F32) return (const float*)weights;
  read_row(weights, 0, int(s.type), int(n), to);
  return to;
}

// The numbers 0 .. n - 1 as whole vectors, then one by one.
template <class Vectors, class Single>
INLINE void for_numbers(int64_t n, const Vectors& vectors, const Single& single) {
  int64_t i = 0;
  for (; i + LANES<float> <= n; i += LANES<float>) vectors(i);
  for (; i < n; i++) single(i);
}

// `weight` and `bias`: [k], or null; of SCALE a single number.
inline void normalise(const Instruction& s, const float* weight, const float* bias, const float* x,
                      float* y) {
  const auto total = [&](const auto& of) {  // the sum of `of` a number, or a vector of them
    Vec<float> sums{};
    float rest = 0;
    for_numbers(
        s.k, [&](int64_t i) { sums += of(load(x + i)); }, [&](int64_t i) { rest += of(x[i]); });
    return sum<float>(sums) + rest;
  };
  const float n = float(s.k);
  const float mean = s.kind == LAYER ? total([](auto z) { return z; }) / n : 0;
  const float squares = total([&](auto z) { return (z - mean) * (z - mean); }) / n;
  if (s.kind == SCALE) {
    const float factor = weight[0] / larger(std::sqrt(squares), float(s.scalar));
    for (int64_t i = 0; i < s.k; i++) y[i] = x[i] * factor;
    return;
  }
  const float factor = 1 / std::sqrt(squares + float(s.scalar));
  const auto put = [&](auto z, auto w, auto b) { return (z - mean) * factor * w + b; };
  const Vec<float> none{}, one = none + 1;
  for_numbers(
      s.k,
      [&](int64_t i) {
        store(y + i,
              put(load(x + i), weight ? load(weight + i) : one, bias ? load(bias + i) : none));
      },
      [&](int64_t i) { y[i] = put(x[i], weight ? weight[i] : 1, bias ? bias[i] : 0); });
}

// weight [n, k], the newest tap first; the state [n - 1, k], the newest input last.
template <class T>
void convolve(const Instruction& s, const float* weight, const T* before, T* after, const float* x,
              float* y) {
  const int64_t past = s.n - 1;
  for (int64_t c = 0; c < s.k; c++) y[c] = x[c] * weight[c];
  for (int64_t j = 1; j <= past; j++)
    for (int64_t c = 0; c < s.k; c++)
      y[c] += number(before[(past - j) * s.k + c]) * weight[j * s.k + c];
  if (past > 0) {
    memmove(after, before + s.k, sizeof(T) * size_t((past - 1) * s.k));  // it may be the same
    for (int64_t c = 0; c < s.k; c++) set_number(after + (past - 1) * s.k + c, x[c]);
  }
}

// The first or last k of n + k numbers from the token before.
template <class T>
void shift(const Instruction& s, const T* before, T* after, const float* x, float* y) {
  const int64_t kept = s.kind == FIRST_PART ? s.k : 0, shifted = s.kind == FIRST_PART ? 0 : s.n;
  memcpy(y + kept, x + kept, sizeof(float) * size_t(s.n));
  for (int64_t c = 0; c < s.k; c++) {
    y[shifted + c] = number(before[c]);
    set_number(after + c, x[shifted + c]);
  }
}

// Cosine and sine of pair i of n at a position; whole turns are taken off in double.
struct Angle {
  float cosine, sine;
  Angle(double base, int64_t position, int64_t i, int64_t n) {
    const double frequency = std::pow(base, -2.0 * double(i) / double(n)) / (2 * M_PI);
    const double turns = double(position) * frequency;
    const float angle = float((turns - std::floor(turns)) * (2 * M_PI));
    cosine = std::cos(angle), sine = std::sin(angle);
  }
};

inline void rotate(const Instruction& s, int64_t position, float* x) {
  for (int64_t i = 0; i < s.rotated / 2; i++) {
    const Angle angle(s.scalar, position, i, s.rotated);
    for (int64_t h = 0; h < s.n; h++) {
      float* const pair = x + h * s.k + 2 * i;
      const float even = pair[0], odd = pair[1];
      pair[0] = even * angle.cosine - odd * angle.sine;
      pair[1] = even * angle.sine + odd * angle.cosine;
    }
  }
}

// x += weight [sines, cosines], with a single weight.
inline void add_sinusoid(const Instruction& s, int64_t position, float* x) {
  float weight;
  read_row(s.weight, 0, int(s.type), 1, &weight);
  for (int64_t i = 0; i < s.n / 2; i++) {
    const Angle angle(s.scalar, position, i, s.n);
    x[i] += angle.sine * weight;
    x[s.n / 2 + i] += angle.cosine * weight;
  }
}

// n scaled and offset copies of x; weight and bias [n, k].
inline void copies(const Instruction& s, const float* weight, const float* bias, const float* x,
                   float* y) {
  for (int64_t h = 0; h < s.n; h++)
    for (int64_t i = 0; i < s.k; i++)
      y[h * s.k + i] = x[i] * weight[h * s.k + i] + bias[h * s.k + i];
}

inline void activate(const Instruction& s, const float* x, const float* up, float* y) {
  constexpr int L = LANES<float>;
  int64_t i = 0;
  if (s.kind == SWIGLU) {
    for (; i + L <= s.n; i += L) store(y + i, load(x + i) * sigmoid(load(x + i)) * load(up + i));
    for (; i < s.n; i++) y[i] = x[i] * sigmoid(x[i]) * up[i];
  } else if (s.kind == SILU) {
    for (; i + L <= s.n; i += L) store(y + i, load(x + i) * sigmoid(load(x + i)));
    for (; i < s.n; i++) y[i] = x[i] * sigmoid(x[i]);
  } else if (s.kind == PRODUCT) {
    for (; i < s.n; i++) y[i] = x[i] * up[i];
  } else if (s.kind == CLAMP) {
    const float limit = float(s.scalar);
    for (; i < s.n; i++) y[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
  } else {
    for (; i < s.n; i++) y[i] = 0.5f * x[i] * (1 + std::erf(x[i] * float(M_SQRT1_2)));
  }
}

inline float softplus(float x) { return larger(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

// Log decays: constants, logsigmoid(x) times a factor, or -exp(weight) softplus(x).
inline void decay(const Instruction& s, const float* weight, const float* x, float* y) {
  for (int64_t h = 0; h < s.n; h++) {
    if (s.kind == FIXED)
      y[h] = weight[h];
    else if (s.kind == GATED)
      y[h] = -softplus(-x[h]) * float(s.scalar);
    else
      y[h] = -std::exp(weight[h]) * softplus(x[h]);
  }
}

// Instructions that keep a state of the program's type of numbers, for row b of the batch.
template <class T> void keep(const Program& p, const Instruction& s, float* row, int64_t b) {
  const int64_t size = s.operation == SHIFT ? s.k : (s.n - 1) * s.k, slot = slot_of(p, b);
  const T* const before = (const T*)p.before[s.state] + slot * size;
  T* const after = (T*)p.after[s.state] + slot * size;
  const float* const x = row + s.source;
  if (s.operation == SHIFT) return shift(s, before, after, x, row + s.target);
  const float* const weight = widened(s, s.weight, s.n * s.k, row + s.fourth);
  convolve(s, weight, before, after, x, row + s.target);
}

inline void elita(const Program& p, const Instruction& s, float* row, int64_t b) {
  const int64_t sums = slot_of(p, b) * s.n, means = sums * s.k;
  elita_step(s.n, s.k, row + s.source, row + s.second, row + s.third, row + s.fourth,
             (const double*)p.before[s.state] + sums, (const double*)p.before[s.state + 1] + means,
             (double*)p.after[s.state] + sums, (double*)p.after[s.state + 1] + means,
             row + s.target);
}

// SOFTMAX: one key/value head of the rows begin .. end - 1, which see each other if they have the
// same states.
inline void attend_softmax(const Program& p, const Instruction& s, float* rows, int64_t group,
                           int64_t begin, int64_t end) {
  with_type(p.type, [&](auto x) {
    for (int64_t b = begin; b < end; b++) SoftmaxStep<decltype(x)>(p, s, rows, b, group).run();
  });
}

// MATRIX: outputs begin .. end - 1 of all rows. Others: rows begin .. end - 1.
template <class X>
void instruct(const Program& p, const Instruction& s, float* rows, const void* vectors,
              int64_t begin, int64_t end) {
  if (s.operation == MATRIX && s.bits == 8)
    return multiply_codes<X, 8>(p, s, rows, vectors, begin, end);
  if (s.operation == MATRIX && s.bits == 4)
    return multiply_codes<X, 4>(p, s, rows, vectors, begin, end);
  if (s.operation == MATRIX)
    return with_type(s.type, [&](auto x) { multiply_matrix<decltype(x)>(p, s, rows, begin, end); });
  for (int64_t b = begin; b < end; b++) {
    float* const row = rows + b * p.width;
    const float *x = row + s.source, *second = row + s.second;
    float *const y = row + s.target, *const fourth = row + s.fourth;
    switch (s.operation) {
      case NORM: {
        const int64_t size = s.kind == SCALE ? 1 : s.k;
        const float* const weight = widened(s, s.weight, size, fourth);
        const float* const bias = widened(s, s.bias, size, fourth + size);
        for (int64_t h = 0; h < s.n; h++) normalise(s, weight, bias, x + h * s.k, y + h * s.k);
        break;
      }
      case CONVOLUTION:
      case SHIFT:
        with_type(p.type, [&](auto z) { keep<decltype(z)>(p, s, row, b); });
        break;
      case ROTARY:
        rotate(s, p.position[b], y);
        break;
      case SINUSOID:
        add_sinusoid(s, p.position[b], y);
        break;
      case COPIES: {
        const int64_t size = s.n * s.k;
        copies(s, widened(s, s.weight, size, fourth), widened(s, s.bias, size, fourth + size), x,
               y);
        break;
      }
      case GATE:
        for (int64_t h = 0; h < s.n; h++)
          for (int64_t i = 0; i < s.k; i++) y[h * s.k + i] *= sigmoid(second[h]);
        break;
      case DECAY:
        decay(s, widened(s, s.weight, s.n, fourth), x, y);
        break;
      case ACTIVATE:
        activate(s, x, second, y);
        break;
      case POSITION_LOGITS: {
        const int64_t size = s.n * s.k;
        position_logits(s, widened(s, s.weight, size, fourth),
                        widened(s, s.bias, size, fourth + size),
                        widened(s, s.amplitudes, size, fourth + 2 * size), p.position[b],
                        s.add ? x : nullptr, y);
        break;
      }
      case ELITA:
        elita(p, s, row, b);
        break;
      case OUTER:
        for (int64_t i = 0; i < s.n; i++)
          for (int64_t j = 0; j < s.k; j++) y[i * s.k + j] = x[i] * second[j];
        break;
    }
  }
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
