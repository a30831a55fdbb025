// Feature maps of a chunk and their derivatives. Vectors are token-minor, [K, CHUNK]; features
// likewise, [F, CHUNK].
//
// A map is an elementwise activation (elu + 1, relu, none), then the Taylor monomials up to a
// degree (order 0: none). Monomials are ordered by degree, then lexicographically by their indices
// i1 <= i2 <= ..., and weigh 1 / sqrt(prod m_i!): each factor brings 1 / sqrt(r) where it is the
// r-th equal one in a row. All that share their first factors (a prefix) follow one another, so a
// prefix is multiplied out once, and features are formed a slab at a time.
#pragma once

#include "tokens.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// The power of two that brings numbers >= 0 near 1.
template <class R> INLINE Vec<R> level_factor(Vec<R> top) {
  typedef typename Simd<R>::I I;
  constexpr int MANTISSA = sizeof(R) == 4 ? 23 : 52, HIGHEST = sizeof(R) == 4 ? 254 : 2046;
  I exponent = HIGHEST - ((I)top >> MANTISSA);
  exponent = exponent < 1 ? exponent - exponent + 1 : exponent;
  return (Vec<R>)(exponent << MANTISSA);
}

// In place: queries times `scale`, and times or plus what brings their largest feature near 1, so
// that products with small keys, and quotients by them, neither vanish nor overflow. Powers of two,
// of which `level` holds each token's, or, for elu + 1, which below zero is an exponential, what is
// added.
template <class R> void level(R* x, int K, int n, R scale, int activation, R* level) {
  constexpr int W = LANES<R>;
  constexpr R lowest = sizeof(R) == 4 ? R(-3.4028234663852886e38) : R(-1.7976931348623157e308);
  for (int i = 0; i < n; i += W) {
    Vec<R> top = activation == ELU ? splat(lowest) : Vec<R>{};
    for (int d = 0; d < K; d++) {
      const Vec<R> y = load(x + d * CHUNK + i) * scale,
                   size = activation == IDENTITY ? (y < R(0) ? -y : y) : y;
      store(x + d * CHUNK + i, y);
      top = size > top ? size : top;
    }
    if (activation == ELU) {
      top = top > R(0) ? Vec<R>{} : top;
      for (int d = 0; d < K; d++) store(x + d * CHUNK + i, load(x + d * CHUNK + i) - top);
      store(level + i, -top);
      continue;
    }
    const Vec<R> factor = level_factor<R>(top);
    for (int d = 0; d < K; d++) store(x + d * CHUNK + i, load(x + d * CHUNK + i) * factor);
    store(level + i, factor);
  }
}

// In place, of x times `scale`.
template <class R> void activate(R* x, int K, int n, R scale, int activation) {
  constexpr int W = LANES<R>;
  if (activation == IDENTITY && scale == R(1)) return;
  for (int d = 0; d < K; d++)
    for (int i = 0; i < n; i += W) {
      const Vec<R> y = load(x + d * CHUNK + i) * scale;
      if (activation == ELU)
        store(x + d * CHUNK + i, y > R(0) ? y + R(1) : exponential<R>(y));
      else
        store(x + d * CHUNK + i, activation == RELU ? (y < R(0) ? Vec<R>{} : y) : y);
    }
}

// Gradient at the input before `scale`, in place, from the activated value: elu + 1 has slope
// min(value, 1), relu slope [value > 0].
template <class R>
void activate_backward(const R* activated, R* grad, int K, int n, R scale, int activation) {
  constexpr int W = LANES<R>;
  if (activation == IDENTITY && scale == R(1)) return;
  for (int d = 0; d < K; d++)
    for (int i = 0; i < n; i += W) {
      R* at = grad + d * CHUNK + i;
      const Vec<R> y = load(activated + d * CHUNK + i), g = load(at) * scale;
      if (activation == ELU)
        store(at, y > R(1) ? g : g * y);
      else
        store(at, activation == RELU ? (y > R(0) ? g : Vec<R>{}) : g);
    }
}

// sum_p s^p / p! by Horner's rule; without the constant the 1 that would swallow digits is never
// added.
template <class R> INLINE Vec<R> polynomial(Vec<R> s, int order, bool constant_term) {
  if (order == 0) return s;
  Vec<R> y = s * (R(1) / R(order));
  for (int p = order - 1; p > 0; p--) y = (y + R(1)) * s * (R(1) / R(p));
  return constant_term ? y + R(1) : y;
}

// Its derivative: the same sum with one term fewer.
template <class R> INLINE Vec<R> slope(Vec<R> s, int order) {
  Vec<R> y = splat<R>(1);
  for (int p = order - 1; p > 0; p--) y = y * s * (R(1) / R(p)) + R(1);
  return y;
}

template <class R> INLINE R weight_of_run(int run) { return R(1) / __builtin_sqrt(R(run)); }

// Walks the Taylor features in order, a slab at a time.
template <class R> class Monomials {
  static constexpr int W = LANES<R>;
  const R* x;
  const R* ones;  // the constant feature: 1, or 0 for masked tokens
  R* prefixes;    // [MAX_ORDER, CHUNK]: the products of the first 1, 2, ... factors
  R* grads;       // [MAX_ORDER, CHUNK]: their gradients
  int dim, tokens, order;
  int degree, next;        // the next feature's degree and last index
  int index[MAX_ORDER];    // its other indices, degree - 1 of them
  int run[MAX_ORDER + 1];  // run[l]: how many equal factors end the prefix of length l

  const R* prefix(int length) const {
    return length == 1 ? x + index[0] * CHUNK : prefixes + (length - 1) * CHUNK;
  }

  // Multiply out the prefixes of length `from` and above.
  void extend(int from) {
    run[0] = 0;
    for (int length = from; length < degree; length++) {
      const int last = index[length - 1];
      run[length] = length > 1 && index[length - 2] == last ? run[length - 1] + 1 : 1;
      if (length == 1) continue;
      const R *p = prefix(length - 1), *q = x + last * CHUNK,
              weight = weight_of_run<R>(run[length]);
      R* to = prefixes + (length - 1) * CHUNK;
      for (int i = 0; i < tokens; i += W) store(to + i, load(p + i) * load(q + i) * weight);
    }
  }

  void begin_degree(int d) {
    degree = d;
    next = 0;
    for (int l = 0; l + 1 < d; l++) index[l] = 0;
    extend(1);
  }

  bool exhausted() const { return next == (degree == 0 ? 1 : dim); }

  // On to the next prefix if this one's features are used up; then how many of `wanted` features
  // share it.
  int arrive(int wanted) {
    if (exhausted()) {
      int at = degree - 2;
      while (at >= 0 && index[at] == dim - 1) at--;
      if (at < 0) {
        begin_degree(degree + 1);
      } else {
        next = ++index[at];
        for (int l = at + 1; l + 1 < degree; l++) index[l] = next;
        extend(at + 1);
      }
    }
    return smaller(wanted, (degree == 0 ? 1 : dim) - next);
  }

  R first_weight() const {  // of a feature that repeats the prefix's last factor
    return degree > 1 && next == index[degree - 2] ? weight_of_run<R>(run[degree - 1] + 1) : R(1);
  }

 public:
  Monomials(const R* vectors, const R* constant, int K, int count, int highest, bool constant_term,
            R* scratch)
      : x(vectors),
        ones(constant),
        prefixes(scratch),
        grads(scratch + MAX_ORDER * CHUNK),
        dim(K),
        tokens(padded<R>(count)),
        order(highest) {
    begin_degree(constant_term ? 0 : 1);
  }

  // The next `count` features -> rows of `to`.
  void form(int count, R* to) {
    while (count > 0) {
      const int n = arrive(count);
      if (degree == 0) {
        for (int i = 0; i < tokens; i += W) store(to + i, load(ones + i));
      } else if (degree == 1) {
        for (int j = 0; j < n; j++)
          for (int i = 0; i < tokens; i += W)
            store(to + j * CHUNK + i, load(x + (next + j) * CHUNK + i));
      } else {
        const R *p = prefix(degree - 1), *q = x + next * CHUNK, weight = first_weight();
        for (int i = 0; i < tokens; i += W) store(to + i, load(p + i) * load(q + i) * weight);
        for (int j = 1; j < n; j++)
          for (int i = 0; i < tokens; i += W)
            store(to + j * CHUNK + i, load(p + i) * load(q + j * CHUNK + i));
      }
      next += n;
      to += n * CHUNK;
      count -= n;
    }
  }

  // Adds to `dx` what the gradients of the next `count` features, rows of `from`, come to at the
  // vectors; and to `dots`, unless null, each token's product of features and gradients.
  void backward(int count, const R* from, R* dx, R* dots) {
    if (order > 1) zero(grads, order * CHUNK);
    while (count > 0) {
      // A prefix's gradient is complete once the walk leaves it. Only then may its factors get it.
      if (exhausted()) pass_down(dx);
      const int n = arrive(count);
      if (degree == 0) {
        if (dots) add_dots(1, ones, from, dots);
      } else if (degree == 1) {  // these features are the vector itself
        for (int j = 0; j < n; j++)
          for (int i = 0; i < tokens; i += W) {
            R* to = dx + (next + j) * CHUNK + i;
            store(to, load(to) + load(from + j * CHUNK + i));
          }
        if (dots) add_dots(n, x + next * CHUNK, from, dots);
      } else {
        share(n, from, dx, dots);
      }
      next += n;
      from += n * CHUNK;
      count -= n;
    }
    pass_down(dx);
  }

 private:
  // n features of one prefix p: d(p x_j) = x_j dp + p dx_j.
  void share(int n, const R* from, R* dx, R* dots) {
    const R *p = prefix(degree - 1), weight = first_weight();
    R* dp = grads + (degree - 1) * CHUNK;
    for (int i = 0; i < tokens; i += W) {
      const Vec<R> whole = load(p + i);
      Vec<R> sum{};
      for (int j = 0; j < n; j++) {
        const int64_t at = (next + j) * CHUNK + i;
        Vec<R> d = load(from + j * CHUNK + i);
        if (j == 0) d *= weight;
        sum += d * load(x + at);
        store(dx + at, load(dx + at) + d * whole);
      }
      store(dp + i, load(dp + i) + sum);
      if (dots) store(dots + i, load(dots + i) + sum * whole);
    }
  }

  void add_dots(int n, const R* features, const R* from, R* dots) const {
    for (int j = 0; j < n; j++)
      for (int i = 0; i < tokens; i += W)
        store(dots + i,
              load(dots + i) + load(features + j * CHUNK + i) * load(from + j * CHUNK + i));
  }

  // Hands the gradients of the present prefixes down to their factors.
  void pass_down(R* dx) {
    for (int length = degree - 1; length >= 1; length--) {
      R* g = grads + length * CHUNK;
      R* to = dx + index[length - 1] * CHUNK;
      if (length == 1) {
        for (int i = 0; i < tokens; i += W) store(to + i, load(to + i) + load(g + i));
      } else {
        const R *p = prefix(length - 1), *q = x + index[length - 1] * CHUNK,
                weight = weight_of_run<R>(run[length]);
        R* below = grads + (length - 1) * CHUNK;
        for (int i = 0; i < tokens; i += W) {
          const Vec<R> d = load(g + i) * weight;
          store(to + i, load(to + i) + d * load(p + i));
          store(below + i, load(below + i) + d * load(q + i));
        }
      }
      zero(g, tokens);
    }
  }
};

}  // namespace CUMULANT_ISA
}  // namespace cumulant
