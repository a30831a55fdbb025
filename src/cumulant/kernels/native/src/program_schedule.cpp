// Runs a program: one token, for every row of the batch, through the instructions of a layer. Rows
// with the same states are tokens of one sequence, one after another.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

extern "C" int cumulant_mixed_chunk_forward(const cumulant::MixedChunk* m);

namespace cumulant {
namespace {

constexpr int64_t GRAIN =
    1 << 16;                  // multiplications of a matrix that a further thread must be worth
constexpr int64_t BLOCK = 8;  // rows of a matrix that are taken together

class Run {
  Program p;
  const Kernels& k;
  int& status;  // of attention that failed
  std::vector<float> rows;
  std::vector<int64_t> begins;  // of the sequences' rows, and where the last one ends
  Scratch vectors;              // of products with matrices of 8 and 4 bits
  Scratch bias_memory;

 public:
  Run(const Program& program, int& attention_status)
      : p(program), k(kernels(p.isa, F32)), status(attention_status), rows(size_t(p.B * p.width)) {
    for (int64_t b = 0; b < p.B; b++)
      if (!p.slots || b == 0 || p.slots[b] != p.slots[b - 1]) begins.push_back(b);
    begins.push_back(p.B);
  }

  bool run() {
    for (int64_t b = 0; b < p.B; b++)
      std::memcpy(&rows[size_t(b * p.width)], p.input + b * p.inputs,
                  sizeof(float) * size_t(p.inputs));
    bool ok = true;
    for (int64_t i = 0; ok && i < p.count && p.B > 0;) {
      if (i == p.tail) drop_unwanted();
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
        ok = for_rows(s);
      }
      i = next;
    }
    drop_unwanted();
    for (int64_t b = 0; b < p.B; b++)
      std::memcpy(p.out + b * p.outputs, &rows[size_t(b * p.width + p.output)],
                  sizeof(float) * size_t(p.outputs));
    return ok;
  }

 private:
  int64_t sequences() const { return int64_t(begins.size()) - 1; }
  int threads_for(int64_t work) const {
    return int(std::max<int64_t>(1, std::min<int64_t>(p.threads, work / GRAIN)));
  }

  // Keeps the rows whose output is wanted; no instruction behind needs a state or a position.
  void drop_unwanted() {
    if (!p.wanted) return;
    for (int64_t i = 0; i < p.wanted_count; i++)
      if (p.wanted[i] != i)
        std::memcpy(&rows[size_t(i * p.width)], &rows[size_t(p.wanted[i] * p.width)],
                    sizeof(float) * size_t(p.width));
    p.B = p.wanted_count, p.wanted = nullptr;
  }

  // An instruction of each row; the rows of a sequence in their order.
  bool for_rows(const Instruction& s) {
    constexpr int64_t COST = 8;  // of a number, in multiplications
    const bool ordered = s.operation == CONVOLUTION || s.operation == SHIFT || s.operation == ELITA;
    const int64_t count = ordered ? sequences() : p.B,
                  work = p.B * std::max<int64_t>(s.n, 1) * std::max<int64_t>(s.k, 1) * COST;
    const int64_t parts = std::min<int64_t>(threads_for(work), std::max<int64_t>(count, 1));
    return parallel(int(parts), parts, 1, [&](int64_t part, void*) {
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      k.instruct(p, s, rows.data(), nullptr, ordered ? begins[size_t(begin)] : begin,
                 ordered ? begins[size_t(end)] : end);
    });
  }

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
    const int64_t parts = threads_for(work);
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
    const int64_t work = p.B * s.n * s.k * p.pasts[s.past].length;
    return parallel(threads_for(work), sequences() * s.groups, 1, [&](int64_t task, void*) {
      const size_t sequence = size_t(task / s.groups);
      k.attend_softmax(p, s, rows.data(), task % s.groups, begins[sequence], begins[sequence + 1]);
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
    a.numerator = const_cast<void*>(p.before[s.state]);  // by which scratch has room for sums
    std::vector<float> denominators(size_t(a.normalize ? a.B * a.H : 0));
    if (a.normalize) a.denominators = denominators.data();
    const size_t scratch = size_t(k.scratch(a)) * sizeof(float);
    return parallel(threads_for(a.B * a.H * a.F * a.V), sequences() * a.G, scratch,
                    [&](int64_t task, void* memory) {
                      const size_t sequence = size_t(task / a.G);
                      for (int64_t b = begins[sequence]; b < begins[sequence + 1]; b++)
                        attend_token(s, a, b, task % a.G, memory);
                    });
  }

  // A token onto the state of one key/value head.
  void attend_token(const Instruction& s, const Attention& a, int64_t b, int64_t group,
                    void* memory) const {
    const int64_t head = slot_of(p, b) * a.G + group, features = head * a.F;
    Segment token{};
    token.sequence = b, token.group = group, token.row = b * a.G + group;
    token.to = a.V;
    token.start = static_cast<const float*>(p.before[s.state]) + features * a.V;
    token.stop = static_cast<float*>(p.after[s.state]) + features * a.V;
    if (a.normalize) {
      token.start_denominator = static_cast<const float*>(p.before[s.state + 1]) + features;
      token.stop_denominator = static_cast<float*>(p.after[s.state + 1]) + features;
    }
    k.step(a, token, memory);
  }
};

}  // namespace
}  // namespace cumulant

extern "C" int cumulant_program(const cumulant::Program* p) {
  int status = cumulant::DONE;
  const int ended = cumulant::guarded(p->isa, [&] { return cumulant::Run(*p, status).run(); });
  return status == cumulant::DONE ? ended : status;
}
