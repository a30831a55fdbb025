// Runs a program: one token, for every row of the batch, through the instructions of a layer.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cstring>

extern "C" int cumulant_attention_forward(const cumulant::Attention* a);

namespace cumulant {
namespace {

constexpr int64_t GRAIN =
    1 << 16;                  // multiplications of a matrix that a further thread must be worth
constexpr int64_t BLOCK = 8;  // rows of a matrix that are taken together

class Run {
  const Program& p;
  const Kernels& k;
  std::vector<float> rows;
  Scratch vectors;  // of products with matrices of 8 and 4 bits

 public:
  explicit Run(const Program& program)
      : p(program), k(kernels(p.isa, F32)), rows(size_t(p.B * p.width)) {}

  bool run() {
    for (int64_t b = 0; b < p.B; b++)
      std::memcpy(&rows[size_t(b * p.width)], p.input + b * p.inputs,
                  sizeof(float) * size_t(p.inputs));
    bool ok = true;
    for (int64_t i = 0; ok && i < p.count;) {
      const Instruction& s = p.instructions[i];
      int64_t next = i + 1;
      if (s.operation == MATRIX) {
        while (next < p.count && p.instructions[next].operation == MATRIX &&
               p.instructions[next].source == s.source)
          next++;
        ok = multiply(i, next);
      } else if (s.operation == ATTEND) {
        ok = attend(s);
      } else if (s.operation == SOFTMAX) {
        ok = attend_softmax(s);
      } else {
        k.instruct(p, s, rows.data(), nullptr, 0, 0);
      }
      i = next;
    }
    for (int64_t b = 0; b < p.B; b++)
      std::memcpy(p.out + b * p.outputs, &rows[size_t(b * p.width + p.output)],
                  sizeof(float) * size_t(p.outputs));
    return ok;
  }

 private:
  // Matrices of one vector, whose rows are shared out over the threads.
  bool multiply(int64_t begin, int64_t end) {
    int64_t work = 0;
    const void* prepared = nullptr;
    for (int64_t i = begin, bits = 0; i < end; i++) {
      const Instruction& s = p.instructions[i];
      work += s.n * s.k * p.B;
      if (s.bits == 0) continue;
      if (bits != 0 && bits != s.bits) return multiply(begin, i) && multiply(i, end);
      if (bits == 0 && !(prepared = prepare(s))) return false;
      bits = s.bits;
    }
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.threads, work / GRAIN));
    return parallel(int(parts), parts, 1, [&](int64_t part, void*) {
      for (int64_t i = begin; i < end; i++) {
        const Instruction& s = p.instructions[i];
        const int64_t blocks = (s.n + BLOCK - 1) / BLOCK;
        k.instruct(p, s, rows.data(), prepared, blocks * part / parts * BLOCK,
                   std::min(s.n, blocks * (part + 1) / parts * BLOCK));
      }
    });
  }

  // The vectors of all rows, as products with a quantised matrix read them.
  const void* prepare(const Instruction& s) {
    const int64_t bytes = k.vector_bytes(s.k);
    char* const to = static_cast<char*>(vectors.reserve(size_t(p.B * bytes)));
    for (int64_t b = 0; to && b < p.B; b++)
      k.prepare_vector(int(s.bits), &rows[size_t(b * p.width + s.source)], s.k, to + b * bytes);
    return to;
  }

  bool attend_softmax(const Instruction& s) {
    const int64_t work = p.B * s.n * s.k * p.pasts[s.past].length / GRAIN;
    const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, work)));
    return parallel(threads, p.B * s.groups, 1, [&](int64_t task, void*) {
      k.instruct(p, s, rows.data(), nullptr, task, task + 1);
    });
  }

  bool attend(const Instruction& s) {
    Attention a = *s.attention;
    const auto array = [&](int64_t vector, int64_t size) {
      return Array{&rows[size_t(vector)], p.width, size, size};
    };
    a.B = a.N = p.B;
    a.query = array(s.source, a.K), a.key = array(s.second, a.K), a.value = array(s.third, a.V),
    a.out = array(s.target, a.V);
    a.threads =
        int(std::max<int64_t>(1, std::min<int64_t>(p.threads, a.B * a.H * a.F * a.V / GRAIN)));
    a.isa = p.isa;
    if (s.fourth >= 0) a.log_decay = array(s.fourth, 1);
    a.numerator = const_cast<void*>(p.before[s.state]);
    a.final_numerator = p.after[s.state];
    std::vector<float> denominators(size_t(a.B * a.H));
    if (a.normalize) {
      a.denominator = const_cast<void*>(p.before[s.state + 1]);
      a.final_denominator = p.after[s.state + 1];
      a.denominators = denominators.data();
    }
    return cumulant_attention_forward(&a) == DONE;
  }
};

}  // namespace
}  // namespace cumulant

extern "C" int cumulant_decode(const cumulant::Quantized* q) {
  using namespace cumulant;
  return guarded(q->isa, [&] {
    const int64_t parts = std::max(1, q->threads);
    return parallel(q->threads, parts, 1, [&](int64_t part, void*) {
      kernels(q->isa, F32).decode(*q, q->n * part / parts, q->n * (part + 1) / parts);
    });
  });
}

extern "C" int cumulant_program(const cumulant::Program* p) {
  return cumulant::guarded(p->isa, [&] { return cumulant::Run(*p).run(); });
}
