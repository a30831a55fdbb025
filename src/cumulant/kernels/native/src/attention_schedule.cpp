// Linear and Taylor attention: shares a call out over threads and runs the kernels.
//
// Sequences of every key/value head run beside each other. When those are fewer than the threads,
// the columns of the values are shared out too (outputs only), then the sequences: each part's sums
// first, their running totals, then all parts at once.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cstring>

namespace cumulant {
namespace {

// Sums [rows, F V + F] of reals, where the state's two tensors are apart.
struct Sums {
  char *numerator, *denominator;  // may be null
};

class Call {
  const Attention& a;
  const Kernels& k;
  const size_t real;
  std::vector<char> partial;
  struct Task {
    Kernels::Kernel* kernel;
    Segment segment;
  };
  std::vector<Task> tasks;
  bool ok = true;

 public:
  explicit Call(const Attention& attention)
      : a(attention), k(kernels(attention.isa, attention.type)), real(a.type == F64 ? 8 : 4) {}

  bool forward() {
    use_large_pages(a.out.data, size_t(a.B * a.H * a.T * a.V) * real);
    if (a.is_causal && !a.offsets && a.T == 1 && a.numerator && a.final_numerator) {
      each_row([&](Segment s) { add(k.step, s, before(s.row), after(s.row)); });
      return run();
    }
    clear_behind(a.out, a.H, a.T, a.V, real);
    if (a.normalize) clear_denominators();
    return a.is_causal ? forward_causal() : forward_both();
  }

  bool backward() {
    use_large_pages(a.dquery.data, size_t(a.B * a.H * a.T * a.K) * bytes_of(a.type));
    use_large_pages(a.dkey.data, size_t(a.B * a.G * a.S * a.K) * bytes_of(a.type));
    use_large_pages(a.dvalue.data, size_t(a.B * a.G * a.S * a.V) * bytes_of(a.type));
    clear_behind(a.dquery, a.H, a.T, a.K, bytes_of(a.type));
    clear_behind(a.dkey, a.G, a.S, a.K, bytes_of(a.type));
    clear_behind(a.dvalue, a.G, a.S, a.V, bytes_of(a.type));
    return a.is_causal ? backward_causal() : backward_both();
  }

 private:
  int64_t rows() const { return a.N * a.G; }
  int64_t numbers() const { return a.F * a.V; }
  Sums at(void* numerator, void* denominator, int64_t row) const {
    return {numerator ? static_cast<char*>(numerator) + size_t(row * numbers()) * real : nullptr,
            denominator ? static_cast<char*>(denominator) + size_t(row * a.F) * real : nullptr};
  }
  Sums before(int64_t row) const { return at(a.numerator, a.denominator, row); }
  Sums after(int64_t row) const { return at(a.final_numerator, a.final_denominator, row); }
  Sums upstream(int64_t row) const { return at(a.dfinal_numerator, a.dfinal_denominator, row); }
  Sums downstream(int64_t row) const { return at(a.dnumerator, a.ddenominator, row); }

  // Room for `count` sums of our own.
  void reserve(int64_t count) { partial.resize(size_t(count * (numbers() + a.F)) * real); }
  Sums own(int64_t i) {
    char* p = partial.data() + size_t(i * (numbers() + a.F)) * real;
    return {p, a.normalize ? p + size_t(numbers()) * real : nullptr};
  }

  template <class Visit> void each_row(Visit visit) const {
    for (int64_t n = 0; n < a.N; n++)
      for (int64_t g = 0; g < a.G; g++) {
        Segment s{};
        s.batch = a.offsets ? 0 : n;
        s.first = a.offsets ? a.offsets[n] : 0;
        s.group = g;
        s.row = n * a.G + g;
        s.from = 0;
        s.to = a.V;
        visit(s);
      }
  }
  int64_t length(const Segment& s, int64_t whole) const {
    return a.offsets ? a.offsets[s.row / a.G + 1] - a.offsets[s.row / a.G] : whole;
  }

  // The p-th of `parts` parts of a sequence: whole chunks.
  void cut(Segment& s, int64_t whole, int64_t p, int64_t parts) const {
    const int64_t n = length(s, whole), chunks = (n + a.chunk - 1) / a.chunk;
    s.begin = std::min(n, chunks * p / parts * a.chunk);
    s.end = std::min(n, chunks * (p + 1) / parts * a.chunk);
  }
  // Parts that sequences are cut into so that `tasks` times as many occupy the threads.
  int64_t parts(int64_t tasks, int64_t whole) const {
    const int64_t wanted = (a.threads + tasks - 1) / std::max<int64_t>(tasks, 1);
    const int64_t chunks = (whole + a.chunk - 1) / a.chunk;
    return std::max<int64_t>(1, std::min({wanted, whole / std::max<int64_t>(a.span, 1), chunks}));
  }

  void add(Kernels::Kernel* kernel, Segment s, Sums start, Sums stop) {
    s.start = start.numerator, s.start_denominator = start.denominator;
    s.stop = stop.numerator, s.stop_denominator = stop.denominator;
    tasks.push_back({kernel, s});
  }
  // The same over all columns in `columns` parts.
  void add_columns(Kernels::Kernel* kernel, Segment s, Sums start, Sums stop, int64_t columns) {
    const int64_t width = std::max<int64_t>(16, ((a.V + columns - 1) / columns + 15) / 16 * 16);
    for (s.from = 0; s.from < std::max<int64_t>(a.V, 1); s.from += width) {
      s.to = std::min(a.V, s.from + width);
      add(kernel, s, start, stop);
    }
  }

  bool run() {
    if (ok && !tasks.empty())
      ok = parallel(a.threads, int64_t(tasks.size()), size_t(k.scratch(a)) * real,
                    [&](int64_t i, void* scratch) {
                      tasks[size_t(i)].kernel(a, tasks[size_t(i)].segment, scratch);
                    });
    tasks.clear();
    return ok;
  }

  // to = x + y, where any may be missing; to may be one of them.
  template <class R> static void add_numbers(char* to, const char* x, const char* y, int64_t n) {
    R* t = reinterpret_cast<R*>(to);
    const R *p = reinterpret_cast<const R*>(x), *q = reinterpret_cast<const R*>(y);
    for (int64_t i = 0; t && i < n; i++) t[i] = (p ? p[i] : R(0)) + (q ? q[i] : R(0));
  }
  void total(Sums to, Sums x, Sums y) const {
    const auto join = a.type == F64 ? add_numbers<double> : add_numbers<float>;
    join(to.numerator, x.numerator, y.numerator, numbers());
    join(to.denominator, x.denominator, y.denominator, a.F);
  }

  // How many parts the columns of the values are cut into: for threads without work, and for sums
  // that fit a cache.
  int64_t columns() const {
    const int64_t most = std::max<int64_t>(1, a.V / 32),
                  idle = (a.threads + rows() - 1) / std::max<int64_t>(rows(), 1);
    int64_t wanted = idle;
    if (idle == 1 && rows() % a.threads && rows() < 4 * a.threads) wanted = 2;
    return std::max(std::min(most, wanted), (a.V + 255) / 256);
  }

  bool forward_causal() {
    const int64_t split = columns(), P = parts(rows() * split, a.T);
    reserve(rows() * (P - 1));
    each_row([&](Segment s) {
      for (int64_t p = 0; p + 1 < P; p++) {
        cut(s, a.T, p, P);
        add_columns(k.sum_keys, s, {}, own(s.row * (P - 1) + p), split);
      }
    });
    run();
    each_row([&](Segment s) {
      for (int64_t p = 0; p < P; p++) {
        const Sums start = p ? own(s.row * (P - 1) + p - 1) : before(s.row);
        if (p) total(start, start, p == 1 ? before(s.row) : own(s.row * (P - 1) + p - 2));
        cut(s, a.T, p, P);
        add_columns(k.forward, s, start, p + 1 < P ? Sums{} : after(s.row), split);
      }
    });
    return run();
  }

  bool forward_both() {
    const int64_t split = columns(), P = parts(rows() * split, a.S), Q = parts(rows() * split, a.T);
    reserve(rows() * (P - 1));
    each_row([&](Segment s) {
      for (int64_t p = 0; p < P; p++) {
        cut(s, a.S, p, P);
        add_columns(k.sum_keys, s, p ? Sums{} : before(s.row),
                    p ? own(s.row * (P - 1) + p - 1) : after(s.row), split);
      }
    });
    run();
    each_row([&](Segment s) {
      for (int64_t p = 1; p < P; p++)
        total(after(s.row), after(s.row), own(s.row * (P - 1) + p - 1));
      for (int64_t p = 0; p < Q; p++) {
        cut(s, a.T, p, Q);
        add_columns(k.forward, s, after(s.row), {}, split);
      }
    });
    return run();
  }

  bool backward_causal() {
    const int64_t P = parts(2 * rows(), a.T), inner = P - 1;
    reserve(2 * rows() * inner);
    const auto past = [&](int64_t row, int64_t p) {
      return own(2 * row * inner + p);
    };  // the sums of part p's keys
    const auto ahead = [&](int64_t row, int64_t p) {
      return own((2 * row + 1) * inner + p);
    };  // of part p + 1's queries
    each_row([&](Segment s) {
      for (int64_t p = 0; p < inner; p++) {
        cut(s, a.T, p, P);
        add(k.sum_keys, s, {}, past(s.row, p));
        cut(s, a.T, p + 1, P);
        add(k.sum_queries, s, {}, ahead(s.row, p));
      }
    });
    run();
    each_row([&](Segment s) {
      for (int64_t p = 0; p < inner; p++)
        total(past(s.row, p), past(s.row, p), p ? past(s.row, p - 1) : before(s.row));
      for (int64_t p = inner; p-- > 0;)
        total(ahead(s.row, p), ahead(s.row, p),
              p + 1 < inner ? ahead(s.row, p + 1) : upstream(s.row));
      for (int64_t p = 0; p < P; p++) {
        cut(s, a.T, p, P);
        add(k.key_backward, s, p < inner ? ahead(s.row, p) : upstream(s.row),
            p ? Sums{} : downstream(s.row));
        add(k.query_backward, s, p ? past(s.row, p - 1) : before(s.row), {});
      }
    });
    return run();
  }

  bool backward_both() {
    const int64_t P = parts(rows(), a.S), Q = parts(2 * rows(), a.T);
    reserve(rows() * Q);
    each_row([&](Segment s) {
      for (int64_t p = 0; p < Q; p++) {
        cut(s, a.T, p, Q);
        add(k.sum_queries, s, p ? Sums{} : upstream(s.row), own(s.row * Q + p));
        add(k.query_backward, s, after(s.row), {});
      }
    });
    run();
    each_row([&](Segment s) {
      const Sums first = own(s.row * Q);
      for (int64_t p = 1; p < Q; p++) total(first, first, own(s.row * Q + p));
      total(downstream(s.row), first, {});
      for (int64_t p = 0; p < P; p++) {
        cut(s, a.S, p, P);
        add(k.key_backward, s, first, {});
      }
    });
    return run();
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

}  // namespace
}  // namespace cumulant

extern "C" {
int cumulant_attention_forward(const cumulant::Attention* a) {
  return cumulant::guarded(a->isa, [&] { return cumulant::Call(*a).forward(); });
}
int cumulant_attention_backward(const cumulant::Attention* a) {
  return cumulant::guarded(a->isa, [&] { return cumulant::Call(*a).backward(); });
}
}
