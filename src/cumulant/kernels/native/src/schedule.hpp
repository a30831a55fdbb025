// Shares a call of linear, Taylor or mixed chunk attention out over threads.
//
// Sequences of every key/value head run beside each other. When those are fewer than the threads,
// the columns of the values are shared out too (outputs only), and then the sequences are cut into
// parts. A part cannot begin before it has the sums of all earlier parts. So a first run forms each
// part's own sums, the calling thread adds them up, and a second run walks all parts at once.
#pragma once

#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>

namespace cumulant {

// The sums [features, V] and [features] of one row, or of all rows [rows, ...]; null where absent.
struct Sums {
  char *numerator, *denominator;
  Sums(const void* S = nullptr, const void* Z = nullptr)
      : numerator(static_cast<char*>(const_cast<void*>(S))),
        denominator(static_cast<char*>(const_cast<void*>(Z))) {}
};

template <class Call> class Schedule {
 public:
  virtual ~Schedule() = default;

 protected:
  typedef void Kernel(const Call&, const Segment&, void* scratch);
  const Call& call;
  const Kernels& k;
  const size_t real;                           // bytes of a real
  const int64_t rows, features, chunk, least;  // of a row; tokens of a chunk, and least of a part
  const int64_t* const bounds;                 // [N + 1] of the sequences' tokens, or null
  const bool normalize;                        // whether sums have denominators

  Schedule(const Call& c, int64_t features_, int64_t chunk_, int64_t least_, const int64_t* bounds_,
           bool normalize_)
      : call(c),
        k(kernels(c.isa, c.type)),
        real(c.type == F64 ? 8 : 4),
        rows(c.N * c.G),
        features(features_),
        chunk(chunk_),
        least(std::max<int64_t>(least_, 1)),
        bounds(bounds_),
        normalize(normalize_) {}

  // ---- rows and their parts ----

  template <class Visit> void each_row(Visit visit) const {
    for (int64_t n = 0; n < call.N; n++)
      for (int64_t g = 0; g < call.G; g++) {
        Segment s{};
        s.sequence = n, s.group = g, s.row = n * call.G + g, s.to = call.V;
        visit(s);
      }
  }
  // How many parts sequences of `whole` tokens are cut into, so that `work` times as many tasks
  // occupy the threads.
  int64_t count_parts(int64_t work, int64_t whole) const {
    const int64_t wanted = (call.threads + work - 1) / std::max<int64_t>(work, 1);
    return std::max<int64_t>(1, std::min({wanted, whole / least, (whole + chunk - 1) / chunk}));
  }
  // The p-th of `parts` parts of a sequence (of `whole` tokens, where none are packed): whole
  // chunks.
  void cut(Segment& s, int64_t whole, int64_t p, int64_t parts) const {
    const int64_t n = bounds ? bounds[s.sequence + 1] - bounds[s.sequence] : whole;
    const int64_t chunks = (n + chunk - 1) / chunk;
    s.begin = std::min(n, chunks * p / parts * chunk);
    s.end = std::min(n, chunks * (p + 1) / parts * chunk);
  }

  // ---- sums ----

  Sums at(Sums all, int64_t row) const {
    return {all.numerator ? all.numerator + size_t(row * features * call.V) * real : nullptr,
            all.denominator ? all.denominator + size_t(row * features) * real : nullptr};
  }
  // Memory for `count` sums of our own, and the i-th of them.
  void reserve(int64_t count) { partial.resize(size_t(count * features * (call.V + 1)) * real); }
  Sums own(int64_t i) {
    char* p = partial.data() + size_t(i * features * (call.V + 1)) * real;
    return {p, normalize ? p + size_t(features * call.V) * real : nullptr};
  }
  // to = x + kept y, where any may be missing; to may be one of them.
  void total(Sums to, Sums x, Sums y, double kept = 1) const {
    const auto join = call.type == F64 ? add_numbers<double> : add_numbers<float>;
    join(to.numerator, x.numerator, y.numerator, features * call.V, kept);
    join(to.denominator, x.denominator, y.denominator, features, kept);
  }
  // What the tokens of a segment leave of sums before it.
  virtual double decay(const Segment&) const { return 1; }
  double decay(Segment s, int64_t whole, int64_t p, int64_t parts) const {
    cut(s, whole, p, parts);
    return decay(s);
  }

  // ---- tasks ----

  void add(Kernel* kernel, Segment s, Sums start, Sums stop) {
    s.start = start.numerator, s.start_denominator = start.denominator;
    s.stop = stop.numerator, s.stop_denominator = stop.denominator;
    tasks.push_back({kernel, s});
  }
  // The same over all columns, in `split` ranges of them.
  void add_columns(Kernel* kernel, Segment s, Sums start, Sums stop, int64_t split) {
    const int64_t width = std::max<int64_t>(16, ((call.V + split - 1) / split + 15) / 16 * 16);
    for (s.from = 0; s.from < std::max<int64_t>(call.V, 1); s.from += width) {
      s.to = std::min(call.V, s.from + width);
      add(kernel, s, start, stop);
    }
  }
  // Runs the tasks; false, now and from then on, where there was no memory for scratch.
  bool run(size_t scratch) {
    if (enough_memory && !tasks.empty())
      enough_memory =
          parallel(call.threads, int64_t(tasks.size()), scratch, [&](int64_t i, void* memory) {
            tasks[size_t(i)].kernel(call, tasks[size_t(i)].segment, memory);
          });
    tasks.clear();
    return enough_memory;
  }

  // ---- passes ----

  // Causal outputs: `forward(segment)` is the kernel of a row. The last part writes the final sums.
  template <class Forward>
  bool forward_causal(size_t scratch, Kernel* sum_keys, Forward forward, int64_t split,
                      int64_t whole, Sums initial, Sums final) {
    const int64_t P = count_parts(rows * split, whole), inner = P - 1;
    reserve(rows * inner);
    each_row([&](Segment s) {
      for (int64_t p = 0; p < inner; p++) {
        cut(s, whole, p, P);
        add_columns(sum_keys, s, {}, own(s.row * inner + p), split);
      }
    });
    run(scratch);
    each_row([&](Segment s) {
      for (int64_t p = 0; p < P; p++) {
        // own(p - 1) becomes the sums of all parts before p.
        const Sums start = p ? own(s.row * inner + p - 1) : at(initial, s.row);
        if (p)
          total(start, start, p > 1 ? own(s.row * inner + p - 2) : at(initial, s.row),
                decay(s, whole, p - 1, P));
        cut(s, whole, p, P);
        add_columns(forward(s), s, start, p < inner ? Sums{} : at(final, s.row), split);
      }
    });
    return run(scratch);
  }

  // Causal gradients. Queries need the sums of the keys before them, and keys the gradients of the
  // sums from the queries after them. So both are formed for each part, and added up in opposite
  // directions; then both kernels of all parts run at once, as they share nothing.
  // `prepare(queries, keys, p, P)` completes the segments of both kernels.
  template <class Prepare>
  bool backward_causal(size_t scratch, Kernel* sum_keys, Kernel* sum_queries, Kernel* key_backward,
                       Kernel* query_backward, Prepare prepare, int64_t P, int64_t whole,
                       Sums initial, Sums dfinal, Sums dinitial) {
    const int64_t inner = P - 1;
    reserve(2 * rows * inner);
    // Of part p: the sums of its keys, later of all keys up to it.
    const auto past = [&](int64_t row, int64_t p) { return own(2 * row * inner + p); };
    // Of part p + 1: the gradient from its queries, later from all queries from it on.
    const auto ahead = [&](int64_t row, int64_t p) { return own((2 * row + 1) * inner + p); };
    each_row([&](Segment s) {
      for (int64_t p = 0; p < inner; p++) {
        cut(s, whole, p, P);
        add(sum_keys, s, {}, past(s.row, p));
        cut(s, whole, p + 1, P);
        add(sum_queries, s, {}, ahead(s.row, p));
      }
    });
    run(scratch);
    each_row([&](Segment s) {
      const Sums before = at(initial, s.row), after = at(dfinal, s.row);
      for (int64_t p = 0; p < inner; p++)
        total(past(s.row, p), past(s.row, p), p ? past(s.row, p - 1) : before,
              decay(s, whole, p, P));
      for (int64_t p = inner; p-- > 0;)
        total(ahead(s.row, p), ahead(s.row, p), p + 1 < inner ? ahead(s.row, p + 1) : after,
              decay(s, whole, p + 1, P));
      for (int64_t p = 0; p < P; p++) {
        cut(s, whole, p, P);
        // The first part is the last one backwards: it leaves the gradient of the initial sums.
        Segment keys = s, queries = s;
        prepare(queries, keys, p, P);
        add(key_backward, keys, p < inner ? ahead(s.row, p) : after,
            p ? Sums{} : at(dinitial, s.row));
        add(query_backward, queries, p ? past(s.row, p - 1) : before, {});
      }
    });
    return run(scratch);
  }

 private:
  struct Task {
    Kernel* kernel;
    Segment segment;
  };
  std::vector<Task> tasks;
  std::vector<char> partial;
  bool enough_memory = true;

  template <class R>
  static void add_numbers(char* to, const char* x, const char* y, int64_t n, double kept) {
    R* t = reinterpret_cast<R*>(to);
    const R *p = reinterpret_cast<const R*>(x), *q = reinterpret_cast<const R*>(y);
    if (to == x && !y) return;
    for (int64_t i = 0; t && i < n; i++) t[i] = R((p ? p[i] : R(0)) + (q ? kept * q[i] : R(0)));
  }
};

}  // namespace cumulant
