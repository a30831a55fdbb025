// Runs a program: one token, for every row of the batch, through the instructions of a layer.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

extern "C" int cumulant_attention_forward(const cumulant::Attention* a);
extern "C" int cumulant_mixed_chunk_forward(const cumulant::MixedChunk* m);

namespace cumulant {
namespace {

constexpr int64_t GRAIN =
    1 << 16;                  // multiplications of a matrix that a further thread must be worth
constexpr int64_t BLOCK = 8;  // rows of a matrix that are taken together

class Run {
  const Program& p;
  const Kernels& k;
  int& status;  // of attention that failed
  std::vector<float> rows;
  Scratch vectors;  // of products with matrices of 8 and 4 bits
  Scratch bias_memory;

 public:
  Run(const Program& program, int& attention_status)
      : p(program), k(kernels(p.isa, F32)), status(attention_status), rows(size_t(p.B * p.width)) {}

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
      } else if (s.operation == MIXED) {
        ok = attend_chunks(s);
      } else if (s.operation == ELITA && !p.separate && !has_weights(s)) {
        status = NO_WEIGHT;
        ok = false;
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

  // Whether ELiTA's logits are numbers below infinity, and those of queries above -infinity.
  bool has_weights(const Instruction& s) const {
    for (int64_t b = 0; b < p.B; b++) {
      const float* const row = &rows[size_t(b * p.width)];
      for (int64_t h = 0; h < s.n; h++)
        if (!(row[s.source + h] < INFINITY && row[s.third + h] < INFINITY &&
              std::isfinite(row[s.second + h])))
          return false;
    }
    return true;
  }

  bool attend_softmax(const Instruction& s) {
    const int64_t work = p.B * s.n * s.k * p.pasts[s.past].length / GRAIN;
    const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, work)));
    return parallel(threads, p.B * s.groups, 1, [&](int64_t task, void*) {
      k.instruct(p, s, rows.data(), nullptr, task, task + 1);
    });
  }

  // Mixed chunks of one head. Each row's open group is at a place of its own.
  bool attend_chunks(const Instruction& s) {
    MixedChunk m = *s.mixed;
    const auto array = [&](int64_t vector, int64_t size) {
      return Array{&rows[size_t(vector)], p.width, size, size};
    };
    m.B = m.N = p.B;
    m.quad_query = array(s.source, m.K), m.lin_query = array(s.source + m.K, m.K);
    m.quad_key = array(s.source + 2 * m.K, m.K), m.lin_key = array(s.source + 3 * m.K, m.K);
    m.value = array(s.second, m.V), m.out = array(s.target, m.V);
    m.threads = int(
        std::max<int64_t>(1, std::min<int64_t>(p.threads, p.B * m.V * (m.K + m.size / 2) / GRAIN)));
    m.isa = p.isa;
    std::vector<int64_t> index, bounds{0};
    for (int64_t b = 0; b < p.B; b++) {
      const int64_t fill = p.position[b] % m.size;
      for (int64_t slot = 0; slot < fill; slot++) index.push_back(-1 - slot);
      index.push_back(b);
      bounds.push_back(int64_t(index.size()));
    }
    m.index = index.data(), m.bounds = bounds.data();
    m.biases = s.buckets ? 1 : 0;
    if (m.biases && !(m.bias = biases(s, m.size))) return false;
    const void* const* const before = p.before + s.state;
    void* const* const after = p.after + s.state;
    m.numerator = before[0], m.open_quad_key = before[1], m.open_lin_key = before[2],
    m.open_value = before[3];
    m.final_numerator = after[0], m.final_quad_key = after[1], m.final_lin_key = after[2],
    m.final_value = after[3];
    return (status = cumulant_mixed_chunk_forward(&m)) == DONE;
  }

  // The bias [size, size], of which only the rows of the blocks are written that queries are in.
  const float* biases(const Instruction& s, int64_t size) {
    std::vector<float> by_distance(static_cast<size_t>(size));
    for (int64_t d = 0; d < size; d++) {
      k.read_numbers(s.weight, s.buckets[d], int(s.type), 1, &by_distance[size_t(d)]);
      by_distance[size_t(d)] *= float(s.scalar);
    }
    float* const bias =
        static_cast<float*>(bias_memory.reserve(sizeof(float) * size_t(size * size)));
    for (int64_t b = 0; bias && b < p.B; b++) {
      const int64_t query = p.position[b] % size;
      for (int64_t i = query / CHUNK * CHUNK; i <= query; i++)
        for (int64_t j = 0; j <= i; j++) bias[i * size + j] = by_distance[size_t(i - j)];
    }
    return bias;
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
    if (s.fourth >= 0) {
      a.log_decay = array(s.fourth, 1);
      for (int64_t i = 0; i < a.B * a.G; i++) {
        float& decay = rows[size_t(i / a.G * p.width + s.fourth + i % a.G)];
        if (decay <= 0) continue;
        if (!p.separate) return (status = GROWING) == DONE;          // above 0, or NaN
        decay = 0, rows[size_t(i / a.G * p.width + s.third)] = NAN;  // of the first value
      }
    }
    a.numerator = const_cast<void*>(p.before[s.state]);
    a.final_numerator = p.after[s.state];
    std::vector<float> denominators(size_t(a.B * a.H));
    if (a.normalize) {
      a.denominator = const_cast<void*>(p.before[s.state + 1]);
      a.final_denominator = p.after[s.state + 1];
      a.denominators = denominators.data();
    }
    return (status = cumulant_attention_forward(&a)) == DONE;
  }
};

}  // namespace
}  // namespace cumulant

extern "C" int cumulant_program(const cumulant::Program* p) {
  int status = cumulant::DONE;
  const int ended = cumulant::guarded(p->isa, [&] { return cumulant::Run(*p, status).run(); });
  return status == cumulant::DONE ? ended : status;
}
