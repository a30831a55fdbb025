// Linear and Taylor attention: the tasks of a call, and the memory that no task writes.
#include "decay_gradient.hpp"
#include "schedule.hpp"

#include <cstring>

namespace cumulant {
namespace {

class AttentionCall : Schedule<Attention> {
  const Attention& a;
  const size_t scratch;
  const Sums before, after, upstream, downstream;  // [rows, ...] of the states and their gradients

 public:
  explicit AttentionCall(const Attention& c)
      : Schedule(c, c.F, c.chunk, c.span, c.offsets, c.normalize),
        a(c),
        scratch(size_t(k.scratch(c)) * real),
        before(c.numerator, c.denominator),
        after(c.final_numerator, c.final_denominator),
        upstream(c.dfinal_numerator, c.dfinal_denominator),
        downstream(c.dnumerator, c.ddenominator) {}

  bool forward() {
    use_large_pages(a.out.data, size_t(a.B * a.H * a.T * a.V) * real);
    if (a.is_causal && !a.offsets && a.T == 1 && a.numerator && a.final_numerator) {
      each_row([&](Segment s) { add(k.step, s, at(before, s.row), at(after, s.row)); });
      return run(scratch);
    }
    clear_behind(a.out, a.H, a.T, a.V, real);
    if (a.normalize && a.denominators) clear_denominators();
    if (!a.is_causal) return forward_both();
    const auto kernel = [&](const Segment&) { return k.forward; };
    return forward_causal(scratch, k.sum_keys, kernel, count_columns(), a.T, before, after);
  }

  bool backward() {
    use_large_pages(a.dquery.data, size_t(a.B * a.H * a.T * a.K) * bytes_of(a.type));
    use_large_pages(a.dkey.data, size_t(a.B * a.G * a.S * a.K) * bytes_of(a.type));
    use_large_pages(a.dvalue.data, size_t(a.B * a.G * a.S * a.V) * bytes_of(a.type));
    clear_behind(a.dquery, a.H, a.T, a.K, bytes_of(a.type));
    clear_behind(a.dkey, a.G, a.S, a.K, bytes_of(a.type));
    clear_behind(a.dvalue, a.G, a.S, a.V, bytes_of(a.type));
    if (!a.is_causal) return backward_both();
    DecayGradient decays(a, real);
    const auto prepare = [&](Segment& queries, Segment& keys, int64_t, int64_t) {
      decays.prepare(queries, keys);
    };
    const bool done =
        backward_causal(scratch, k.sum_keys, k.sum_queries, k.key_backward, k.query_backward,
                        prepare, count_parts(2 * rows, a.T), a.T, before, upstream, downstream);
    if (done)
      each_row(
          [&](const Segment& s) { decays.write(s, at(before, s.row), at(downstream, s.row)); });
    return done;
  }

 private:
  double decay(const Segment& s) const override {
    double sum = 0;
    for (int64_t t = s.begin; a.log_decay.data && t < s.end; t++) sum += log_decay(a, s, t);
    return std::exp(sum);
  }

  // How many ranges the columns of the values are cut into: for threads without work, and for sums
  // that fit a cache.
  int64_t count_columns() const {
    const int64_t most = std::max<int64_t>(1, a.V / 32),
                  idle = (a.threads + rows - 1) / std::max<int64_t>(rows, 1);
    int64_t wanted = idle;
    if (idle == 1 && rows % a.threads && rows < 4 * a.threads) wanted = 2;
    return std::max(std::min(most, wanted), (a.V + 255) / 256);
  }

  // In both directions every query reads the sums of all keys, which are left in the final state.
  bool forward_both() {
    const int64_t split = count_columns(), P = count_parts(rows * split, a.S),
                  Q = count_parts(rows * split, a.T);
    reserve(rows * (P - 1));
    each_row([&](Segment s) {
      for (int64_t p = 0; p < P; p++) {
        cut(s, a.S, p, P);
        add_columns(k.sum_keys, s, p ? Sums{} : at(before, s.row),
                    p ? own(s.row * (P - 1) + p - 1) : at(after, s.row), split);
      }
    });
    run(scratch);
    each_row([&](Segment s) {
      const Sums all = at(after, s.row);
      for (int64_t p = 1; p < P; p++) total(all, all, own(s.row * (P - 1) + p - 1));
      for (int64_t p = 0; p < Q; p++) {
        cut(s, a.T, p, Q);
        add_columns(k.forward, s, all, {}, split);
      }
    });
    return run(scratch);
  }

  // The forward pass kept the sums, so the queries' gradients need no run before them. The keys'
  // need the gradient of the sums from all queries, which the same run forms.
  bool backward_both() {
    const int64_t P = count_parts(rows, a.S), Q = count_parts(2 * rows, a.T);
    reserve(rows * Q);
    each_row([&](Segment s) {
      for (int64_t p = 0; p < Q; p++) {
        cut(s, a.T, p, Q);
        add(k.sum_queries, s, p ? Sums{} : at(upstream, s.row), own(s.row * Q + p));
        add(k.query_backward, s, at(after, s.row), {});
      }
    });
    run(scratch);
    each_row([&](Segment s) {
      const Sums first = own(s.row * Q);
      for (int64_t p = 1; p < Q; p++) total(first, first, own(s.row * Q + p));
      total(at(downstream, s.row), first, {});
      for (int64_t p = 0; p < P; p++) {
        cut(s, a.S, p, P);
        add(k.key_backward, s, first, {});
      }
    });
    return run(scratch);
  }

  // Zeros in the rows behind the last packed sequence.
  void clear_behind(const Array& x, int64_t heads, int64_t length, int64_t width,
                    size_t size) const {
    if (!a.offsets) return;
    for (int64_t h = 0; h < heads; h++)
      for (int64_t t = a.offsets[a.N]; t < length; t++)
        std::memset(static_cast<char*>(x.data) + size_t(h * x.head + t * x.row) * size, 0,
                    size_t(width) * size);
  }
  void clear_denominators() const {
    if (!a.offsets || a.offsets[a.N] == a.T) return;
    for (int64_t h = 0; h < a.H; h++)
      std::memset(static_cast<char*>(a.denominators) + size_t(h * a.T + a.offsets[a.N]) * real, 0,
                  size_t(a.T - a.offsets[a.N]) * real);
  }
};

// A call with other tensors, which lie like those of the first.
Attention moved(Attention a, const Addresses& at) {
  a.query.data = at.query, a.key.data = at.key, a.value.data = at.value, a.out.data = at.out;
  a.log_decay.data = at.log_decay, a.denominators = at.denominators;
  a.numerator = at.numerator, a.denominator = at.denominator;
  a.final_numerator = at.final_numerator, a.final_denominator = at.final_denominator;
  return a;
}

// Whether a log decay is above 0, or NaN.
bool any_grows(const Attention& a) {
  const Array& x = a.log_decay;
  if (!x.data) return false;
  const auto grows = [&](const auto* from) {
    for (int64_t t = 0; t < a.S; t++)
      if (!(from[t * x.row] <= 0)) return true;
    return false;
  };
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t g = 0; g < a.G; g++) {
      const int64_t at = b * x.batch + g * x.head;
      if (a.decay_type == F64 ? grows((const double*)x.data + at)
                              : grows((const float*)x.data + at))
        return true;
    }
  return false;
}

}  // namespace
}  // namespace cumulant

extern "C" {
int cumulant_attention_forward(const cumulant::Attention* a) {
  return cumulant::guarded(a->isa, [&] { return cumulant::AttentionCall(*a).forward(); });
}
// A call like an earlier one, `like`, whose tensors are elsewhere. Decays are checked here.
int cumulant_attention_repeat(const cumulant::Attention* like, const cumulant::Addresses* at) {
  const cumulant::Attention a = cumulant::moved(*like, *at);
  if (cumulant::any_grows(a)) return cumulant::GROWING;
  return cumulant_attention_forward(&a);
}
int cumulant_attention_backward(const cumulant::Attention* a) {
  return cumulant::guarded(a->isa, [&] { return cumulant::AttentionCall(*a).backward(); });
}
int cumulant_attention_repeat_backward(const cumulant::Attention* like,
                                       const cumulant::GradientAddresses* at) {
  cumulant::Attention a = cumulant::moved(*like, at->forward);
  a.dout = at->dout, a.dlog_decay = (double*)at->dlog_decay;
  a.dquery.data = at->dquery, a.dkey.data = at->dkey, a.dvalue.data = at->dvalue;
  a.dnumerator = at->dnumerator, a.ddenominator = at->ddenominator;
  a.dfinal_numerator = at->dfinal_numerator, a.dfinal_denominator = at->dfinal_denominator;
  return cumulant_attention_backward(&a);
}
}
