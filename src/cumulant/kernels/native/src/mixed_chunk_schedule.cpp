// Mixed chunk attention: shares a call out over threads, as attention_schedule.cpp does. Parts of
// sequences are whole groups.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>

namespace cumulant {
namespace {

class MixedCall {
  const MixedChunk& m;
  const Kernels& k;
  const size_t real;
  const int64_t rows, numbers;  // of sums
  std::vector<char> partial, biases;
  struct Task {
    Kernels::MixedKernel* kernel;
    MixedSegment segment;
  };
  std::vector<Task> tasks;

 public:
  explicit MixedCall(const MixedChunk& call)
      : m(call),
        k(kernels(call.isa, call.type)),
        real(call.type == F64 ? 8 : 4),
        rows(call.N * call.G),
        numbers(call.L * call.V) {}

  bool forward() {
    use_large_pages(m.out.data, size_t(m.B * m.H * m.T * m.V) * bytes_of(m.type));
    const int64_t split = columns(), P = parts(rows * split), inner = P - 1;
    const bool total = m.summed && !m.is_causal;
    reserve(total ? rows * P : rows * inner);
    each_row([&](MixedSegment s) {
      for (int64_t p = 0; m.summed && p < (total ? P : inner); p++) {
        cut(s, p, P);
        add_columns(k.mixed_sum_keys, s, nullptr, own(index(s) * (total ? P : inner) + p), split);
      }
    });
    if (!run()) return false;
    each_row([&](MixedSegment s) {
      const int64_t first = index(s) * (total ? P : inner);
      for (int64_t p = total ? 1 : 0; m.summed && p < (total ? P : inner); p++)
        add(own(first + (total ? 0 : p)), own(first + p),
            total ? own(first)
            : p   ? own(first + p - 1)
                  : before(s));
      for (int64_t p = 0; p < P; p++) {
        cut(s, p, P);
        const char* start = total ? own(first) : p ? own(first + p - 1) : before(s);
        add_columns(steps(s) ? k.mixed_step : k.mixed_forward, s, m.summed ? start : nullptr,
                    p < inner ? nullptr : after(s), split);
      }
    });
    return run();
  }

  bool backward() {
    const bool total = m.summed && !m.is_causal;
    const int64_t P = parts(2 * rows), inner = P - 1, sums = total ? P : inner;
    reserve(2 * rows * sums);
    const int64_t heads = m.biases > 1 ? m.H / m.G : 1, square = m.size * m.size;
    biases.assign(m.biases ? size_t(rows * P * heads * square) * real : 0, 0);
    const auto past = [&](const MixedSegment& s, int64_t p) {
      return own(2 * index(s) * sums + p);
    };
    const auto ahead = [&](const MixedSegment& s, int64_t p) {
      return own((2 * index(s) + 1) * sums + p);
    };
    each_row([&](MixedSegment s) {
      for (int64_t p = 0; m.summed && p < sums; p++) {
        cut(s, p, P);
        push(k.mixed_sum_keys, s, nullptr, past(s, p));
        if (!total) cut(s, p + 1, P);
        push(k.mixed_sum_queries, s, nullptr, ahead(s, p));
      }
    });
    if (!run()) return false;
    each_row([&](MixedSegment s) {
      if (total) {
        for (int64_t p = 1; p < P; p++)
          add(past(s, 0), past(s, 0), past(s, p)), add(ahead(s, 0), ahead(s, 0), ahead(s, p));
      } else if (m.summed) {
        for (int64_t p = 0; p < inner; p++)
          add(past(s, p), past(s, p), p ? past(s, p - 1) : before(s));
        for (int64_t p = inner; p-- > 0;)
          add(ahead(s, p), ahead(s, p), p + 1 < inner ? ahead(s, p + 1) : upstream(s));
      }
      for (int64_t p = 0; p < P; p++) {
        cut(s, p, P);
        const char* start = !m.summed   ? nullptr
                            : total     ? ahead(s, 0)
                            : p < inner ? ahead(s, p)
                                        : upstream(s);
        push(k.mixed_key_backward, s, start, p ? nullptr : downstream(s));
        start = !m.summed ? nullptr : total ? past(s, 0) : p ? past(s, p - 1) : before(s);
        s.dbias =
            m.biases ? biases.data() + size_t((index(s) * P + p) * heads * square) * real : nullptr;
        push(k.mixed_query_backward, s, start, nullptr);
        s.dbias = nullptr;
      }
    });
    return run();
  }

  // The gradient of the bias [biases, size, size], by key and query: all parts' together.
  void sum_biases(void* to) const {
    if (!m.biases) return;
    const int64_t heads = m.biases > 1 ? m.H / m.G : 1, width = heads * m.size * m.size,
                  each = int64_t(biases.size() / real) / std::max<int64_t>(rows, 1);
    for (int64_t i = 0; i < int64_t(biases.size() / real); i++) {
      const int64_t row = i / std::max<int64_t>(each, 1), group = m.biases > 1 ? row % m.G : 0,
                    at = group * width + i % width;
      if (m.type == F64)
        static_cast<double*>(to)[at] += reinterpret_cast<const double*>(biases.data())[i];
      else
        static_cast<float*>(to)[at] += reinterpret_cast<const float*>(biases.data())[i];
    }
  }

 private:
  static int64_t at_least_one(int64_t x) { return std::max<int64_t>(x, 1); }
  int64_t index(const MixedSegment& s) const { return s.row * m.G + s.group; }
  const char* offset(const void* x, const MixedSegment& s) const {
    return x ? static_cast<const char*>(x) + size_t(index(s) * numbers) * real : nullptr;
  }
  const char* before(const MixedSegment& s) const { return offset(m.numerator, s); }
  const char* upstream(const MixedSegment& s) const { return offset(m.dfinal_numerator, s); }
  char* after(const MixedSegment& s) const {
    return const_cast<char*>(offset(m.final_numerator, s));
  }
  char* downstream(const MixedSegment& s) const {
    return const_cast<char*>(offset(m.dnumerator, s));
  }
  void reserve(int64_t count) {
    partial.resize(size_t(std::max<int64_t>(count, 0) * numbers) * real);
  }
  char* own(int64_t i) { return partial.data() + size_t(i * numbers) * real; }

  template <class Visit> void each_row(Visit visit) const {
    for (int64_t n = 0; n < m.N; n++)
      for (int64_t g = 0; g < m.G; g++)
        visit(MixedSegment{n, g, 0, 0, 0, m.V, nullptr, nullptr, nullptr});
  }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t n = 0; n < m.N; n++) most = std::max(most, m.bounds[n + 1] - m.bounds[n]);
    return most;
  }
  int64_t parts(int64_t work) const {
    const int64_t wanted = (m.threads + work - 1) / at_least_one(work);
    return at_least_one(std::min(wanted, longest() / at_least_one(std::max(m.span, m.size))));
  }
  int64_t columns() const {
    const int64_t most = at_least_one(m.V / 64),
                  wanted = (m.threads + rows - 1) / at_least_one(rows);
    return std::min(most, at_least_one(wanted));
  }
  // Whether the row is one token onto a state, and its group stays open.
  bool steps(const MixedSegment& s) const {
    const int64_t begin = m.bounds[s.row], end = m.bounds[s.row + 1];
    if (!m.is_causal || m.T > 1 || m.H == 0 || !m.numerator || !m.final_numerator) return false;
    return begin < end && end - begin < m.size && m.index[end - 1] >= 0;
  }
  void cut(MixedSegment& s, int64_t p, int64_t count) const {
    const int64_t n = m.bounds[s.row + 1] - m.bounds[s.row], groups = (n + m.size - 1) / m.size;
    s.begin = std::min(n, groups * p / count * m.size);
    s.end = std::min(n, groups * (p + 1) / count * m.size);
  }
  void push(Kernels::MixedKernel* kernel, MixedSegment s, const void* start, void* stop) {
    s.start = start, s.stop = stop;
    tasks.push_back({kernel, s});
  }
  void add_columns(Kernels::MixedKernel* kernel, MixedSegment s, const void* start, void* stop,
                   int64_t split) {
    const int64_t width = ((m.V + split - 1) / split + 15) / 16 * 16;
    for (s.from = 0; s.from < m.V; s.from += width) {
      s.to = std::min(m.V, s.from + width);
      push(kernel, s, start, stop);
    }
  }
  bool run() {
    const bool ok = parallel(m.threads, int64_t(tasks.size()), size_t(k.mixed_scratch(m)),
                             [&](int64_t i, void* scratch) {
                               tasks[size_t(i)].kernel(m, tasks[size_t(i)].segment, scratch);
                             });
    tasks.clear();
    return ok;
  }
  // to = x + y, where y may be missing.
  void add(char* to, const char* x, const char* y) const {
    if (!y) return;
    for (int64_t i = 0; i < numbers; i++)
      if (m.type == F64)
        reinterpret_cast<double*>(to)[i] =
            reinterpret_cast<const double*>(x)[i] + reinterpret_cast<const double*>(y)[i];
      else
        reinterpret_cast<float*>(to)[i] =
            reinterpret_cast<const float*>(x)[i] + reinterpret_cast<const float*>(y)[i];
  }
};

}  // namespace
}  // namespace cumulant

extern "C" {
int cumulant_mixed_chunk_forward(const cumulant::MixedChunk* m) {
  return cumulant::guarded(m->isa, [&] { return cumulant::MixedCall(*m).forward(); });
}
// Adds the gradient of the bias, [biases, size, size] by key and query, to `dbias`.
int cumulant_mixed_chunk_backward(const cumulant::MixedChunk* m, void* dbias) {
  return cumulant::guarded(m->isa, [&] {
    cumulant::MixedCall call(*m);
    if (!call.backward()) return false;
    call.sum_biases(dbias);
    return true;
  });
}
}
