// What crosses the C boundary: plain structs, mirrored field by field in `library.py`. Strides are
// in elements.
#pragma once

#include <stdint.h>

namespace cumulant {

enum Type { F32, F64, BF16, F16 };
enum Activation { IDENTITY, ELU, RELU };

// [B, heads, T, D]; the elements of a row lie one after another. Absent: data is null.
struct Array {
  void* data;
  int64_t batch, head, row;
};

// One call of linear or Taylor attention, forwards or backwards. Reals that are not inputs, or
// their gradients (sums, denominators, outputs and the gradients at them), are float, or double
// where the inputs are.
struct Attention {
  int64_t B, N, H, G, T, S, K, V, F;  // N sequences: B, or those packed into one row
  int64_t chunk;                      // tokens a chunk, at most CHUNK
  int64_t span;  // the fewest tokens that a thread may take when a sequence is shared out
  int32_t type, order, constant_term, activation, normalize, is_causal, threads, isa;
  int32_t decay_type;  // F32 or F64
  double scale;
  Array query, key, value, out;
  Array log_decay;                            // [B, G, S], of rows of one number; or absent
  const uint8_t* key_mask;                    // [B, S]
  const int64_t* offsets;                     // [N + 1] where packed
  void *numerator, *denominator;              // [N, G, F, V], [N, G, F]: the state that came in
  void *final_numerator, *final_denominator;  // and goes out
  void* denominators;                         // [B, H, T]
  // backwards
  Array dout, dquery, dkey, dvalue;
  void *dfinal_numerator, *dfinal_denominator, *dnumerator, *ddenominator;
  double* dlog_decay;  // [B, G, S], or null
};

// The addresses of a call of Attention forwards, of which all else is that of an earlier call.
struct Addresses {
  void *query, *key, *value, *log_decay, *numerator, *denominator;
  void *out, *denominators, *final_numerator, *final_denominator;
};

// The addresses of a call of its gradients, and the strides of the one that they come from, which
// differ from call to call. Absent: null.
struct GradientAddresses {
  Addresses forward;
  void *dquery, *dkey, *dvalue, *dlog_decay, *dnumerator, *ddenominator;
  void *dfinal_numerator, *dfinal_denominator;
  Array dout;
};

// One call of ELiTA's attention. Logits are float or double (`logits`), odds float (double where
// the values are: `gates`); what the recurrences carry is always double.
struct Elita {
  int64_t B, H, G, T, V;
  int64_t span;
  int32_t type, logits, gates, threads, isa;
  Array value, out;
  const void *key_logit, *query_logit, *self_logit;  // [B, G, T], [B, H, T], [B, H, T]
  const uint8_t* first;                              // [T]: 1 where a sequence begins
  void *key_odds,
      *own_odds;  // [B, G, T], [B, H, T]: of the gates, a / (1 - a); forwards, null: not kept
  double* means;  // [B, G, T / 16 + 2, V]: before each block of 16 tokens; forwards, null: not kept
  const double *log_weight, *mean;        // [B, G], [B, G, V]: the state that came in
  double *final_log_weight, *final_mean;  // and goes out
  // backwards
  Array dout, dvalue;
  void *dkey_logit, *dself_logit;
  const double *dfinal_log_weight, *dfinal_mean;
  double *dlog_weight, *dmean;
};

// Tokens begin .. end - 1 of one row and head; the state before them (backwards: the gradients
// after them) and after. Both are [2 + V] numbers: m, how many sequences begin here, and u; or the
// gradient of m, the product of all decays and the gradient of u. `passing`: nothing else is
// wanted, and of gradients not that of m.
struct ElitaSegment {
  int64_t batch, group, begin, end;
  const double* start;
  double* stop;
  bool passing;
};

// One call of mixed chunk attention. A sequence is a list of slots, in groups of `size`: `index`
// tells which token of the batch (row * T + place) each holds, or, as -1 - slot, which slot of the
// open group that came in: those are keys alone.
enum GateActivation { RELU2, LAPLACE };
struct MixedChunk {
  int64_t B, N, H, G, T, K, L, V, size;  // K: quadratic queries and keys, L: linear ones
  int64_t span;
  int32_t type, activation, is_causal, summed, biases, threads,
      isa;  // biases: 0, 1 for all heads, or H
  Array quad_query, quad_key, lin_query, lin_key, value, out;
  const int64_t *index, *bounds;                          // [slots], [N + 1]
  const void *open_quad_key, *open_lin_key, *open_value;  // [N, G, size, .] reals
  const void *bias,
      *bias_transposed;   // [biases, size, size]: by query and key; by key and query, or null
  const void* numerator;  // [N, G, L, V]: the sums that came in
  void *final_numerator, *final_quad_key, *final_lin_key, *final_value;  // the state that goes out
  // backwards
  Array dout, dquad_query, dquad_key, dlin_query, dlin_key, dvalue;
  const void *dfinal_numerator, *dfinal_quad_key, *dfinal_lin_key, *dfinal_value;
  void *dnumerator, *dopen_quad_key, *dopen_lin_key, *dopen_value;
};

// What stands beside attention in a layer, number by number, in fp32: SWIGLU silu(x) second;
// RMSNORM x / rms(x) weight; CONVOLVE depthwise over time; ROTATE_PAIRS pairs by angles. Gradients
// enter as dout and leave as dx, dsecond, dweight, dtail.
enum PointwiseOperation {
  SWIGLU_FORWARD,
  SWIGLU_BACKWARD,
  RMSNORM_FORWARD,
  RMSNORM_BACKWARD,
  CONVOLVE_FORWARD,
  CONVOLVE_BACKWARD,
  ROTATE_PAIRS
};
struct Pointwise {
  int32_t operation, threads, isa, back;  // ROTATE_PAIRS: back, by the angles' negatives
  int64_t B, T, H, n,
      taps;  // [B, T, n] (of H heads, ROTATE_PAIRS); CONVOLVE: taps, the newest token's included
  Array x, out, dout, dx;               // rows [B, H, T]
  const float *second, *weight, *tail;  // [B, T, n]; [n] or [taps, n]; [B, taps - 1, n]
  float *dsecond, *dweight, *dtail;
  float* factors;              // [B, T]: RMSNORM's 1 / rms
  const int64_t* offset;       // [T]: each token's place in its packed sequence
  const float *cosine, *sine;  // [B or 1, T, n / 2]
  int64_t angles;              // between rows of the batch in these
  double epsilon;
};

// One token through a whole layer: instructions on vectors of floats, which lie one after another
// in a row for each sequence of the batch. Vectors are named by where they begin in that row.
enum Operation {
  NORM,
  MATRIX,
  CONVOLUTION,
  SHIFT,
  ROTARY,
  ATTEND,
  GATE,
  ACTIVATE,
  DECAY,
  SOFTMAX,
  COPIES,
  SINUSOID,
  MIXED,
  POSITION_LOGITS,
  ELITA,
  OUTER
};
enum NormKind { RMS, LAYER, SCALE };
enum ActivationKind { SWIGLU, GELU, PRODUCT, SILU, CLAMP };
enum ShiftKind { LAST_PART, FIRST_PART };
enum DecayKind { FIXED, GATED, MAMBA2 };
struct Instruction {
  int32_t operation, kind;
  int64_t source, second, third, fourth,
      target;    // vectors: read, read, read, read, written (or read and written)
  int64_t n, k;  // NORM, ROTARY, GATE: n heads of k numbers; MATRIX [n, k]; CONVOLUTION: n taps, k
                 // channels; DECAY: n heads; SOFTMAX: n query heads of k numbers; SHIFT: n numbers
                 // that stay and k from before; COPIES: n of k numbers; SINUSOID: n numbers;
                 // POSITION_LOGITS: n heads of k sines; ELITA: n heads of k numbers; OUTER: n of
                 // k numbers
  const void *weight, *bias;  // of `type`, but for the codes of a MATRIX of `bits`; may be null
  const float* scales;        // may be null
  const void* amplitudes;     // POSITION_LOGITS: of `type`, [n, k], as weight and bias are
  double scalar;  // epsilon; base of ROTARY, SINUSOID; GATED, SOFTMAX, MIXED, POSITION_LOGITS: a
                  // factor; CLAMP: a limit
  int64_t state;  // the first of its states, [B, ...] each
  int64_t add;    // MATRIX: to what is there; POSITION_LOGITS: to the source
  int64_t bits;   // MATRIX: 0 for numbers; 8 or 4, see quantized.hpp
  int64_t type;   // of weight and bias; others than F32 are widened to `fourth`
  int64_t groups, past;        // SOFTMAX: key/value heads; which of the program's pasts
  int64_t rotated;             // ROTARY: the first numbers of each head
  const Attention* attention;  // ATTEND, but for its arrays; `fourth`: log decays, or -1
  // MIXED, but for its arrays and bias: `source` has quadratic query, linear query, quadratic key,
  // linear key; `second` the value. The bias of a distance is the weight of its bucket.
  const MixedChunk* mixed;
  const int64_t* buckets;  // [size], or null
};
// Keys and values of earlier tokens, two states [B, groups, capacity, k]. The token's own are
// written behind those that `after` takes over.
struct Past {
  int64_t length, capacity;       // tokens in `before`; for how many it has room
  int64_t dropped, new_capacity;  // oldest tokens that `after` leaves out; for how many it has room
  int64_t seen;                   // at most so many of the newest are attended to
  const int64_t* first;           // [B]: the tokens before these are masked; may be null
  const int64_t* lengths;  // [B]: tokens before that of each row, at most `length`; null: `length`
};
struct Program {
  int64_t B, width, count;  // rows, numbers in each, instructions
  int64_t inputs, output, outputs;
  int32_t threads, isa;
  int64_t type;  // of what the states of CONVOLUTION, SHIFT and SOFTMAX hold
  const Instruction* instructions;
  const int64_t* position;  // [B]
  const float* input;       // [B, inputs], put at the row's start
  float* out;               // [B, outputs], from `output` on
  const void* const* before;
  void* const* after;  // may be the same memory
  const Past* pasts;
  int64_t separate;  // 1: a decay or logit that is no number is no error, but makes its row NaN
  // Rows of sequences, the tokens of each one after another: which row of the states they change
  // in turn, in place. Null: row b has the states b. MIXED does not take them.
  const int64_t* slots;   // [B]
  const int64_t* wanted;  // [wanted_count], ascending: the rows of `out`; null: all
  int64_t wanted_count;
  int64_t tail;  // from this instruction on only the wanted rows are computed
};
// The row of the states that row b of the batch has.
inline int64_t slot_of(const Program& p, int64_t b) { return p.slots ? p.slots[b] : b; }

// The weights out [n, k] of a matrix of 8 or 4 bits; see quantized.hpp.
struct Quantized {
  int64_t n, k;
  int32_t bits, threads, isa;
  const uint8_t* codes;
  const float* scales;
  float* out;
};

// out = x Wᵀ + bias for a matrix W [n, k] of 8 or 4 bits and many tokens.
struct QuantizedProduct {
  int64_t T, n, k;
  int32_t bits, threads, isa;
  const uint8_t* codes;
  const float *scales, *bias, *x;  // bias may be null; x [T, k]
  float* out;                      // [T, n]
};

constexpr int CHUNK = 64;  // rows of scratch matrices are this long
constexpr int MAX_ORDER = 8;

// Part of a sequence of one key/value head, as one thread walks it: whole chunks or groups.
struct Segment {
  int64_t sequence, group;  // group: the key/value head
  int64_t row;              // of the states: sequence * G + group
  int64_t begin, end;       // tokens of the sequence
  int64_t from, to;         // columns of the values
  // Sums [F, V] and [F] before these tokens (backwards in time: after them), zero where null; and
  // where to leave them.
  const void *start, *start_denominator;
  void *stop, *stop_denominator;
  // Attention with decays, backwards. `terms`: for every token of the sequence, what its query
  // (key_backward: its key) adds to gradients of decays. `anchors`: [.., F (V + 1)], the sums
  // (key_backward: their gradients) before every `anchor_chunks`-th chunk but the first.
  double* terms;
  void* anchors;
  int64_t anchor_chunks;
  // Mixed chunk attention: where to add the gradient of the bias, [1 or H / G, size, size] by key
  // and query.
  void* dbias;
};

// The kernels of one instruction set for one type of reals. `scratch` tells how many reals of
// scratch, aligned to 64 bytes, the others need. `forward` and `query_backward` run along a
// sequence, `key_backward` against it; not causal, their sums stay as they are.
struct Kernels {
  typedef void Kernel(const Attention&, const Segment&, void* scratch);
  int64_t (*scratch)(const Attention&);
  int64_t (*multiply)(
      int64_t rounds);  // independent multiply-adds in registers alone: how many operations
  int64_t (*elita_scratch)(const Elita&);  // bytes
  typedef void MixedKernel(const MixedChunk&, const Segment&, void* scratch);
  int64_t (*mixed_scratch)(const MixedChunk&);  // bytes
  MixedKernel *mixed_forward, *mixed_step, *mixed_sum_keys, *mixed_sum_queries,
      *mixed_query_backward, *mixed_key_backward;
  void (*elita_forward)(const Elita&, const ElitaSegment&, void* scratch);
  void (*elita_backward)(const Elita&, const ElitaSegment&, void* scratch);
  // Tokens begin .. end - 1 of B T (SWIGLU: numbers); `dweight` is where to add the weights'
  // gradients.
  void (*pointwise)(const Pointwise&, int64_t begin, int64_t end, float* dweight);
  // One instruction: outputs begin .. end - 1 of a MATRIX for all rows, others for the rows begin
  // .. end - 1. `vectors`: for matrices of 8 and 4 bits, their rows' vectors as `prepare_vector`
  // leaves them, `vector_bytes` each.
  void (*instruct)(const Program&, const Instruction&, float* rows, const void* vectors,
                   int64_t begin, int64_t end);
  // SOFTMAX: one key/value head of the rows begin .. end - 1.
  void (*attend_softmax)(const Program&, const Instruction&, float* rows, int64_t group,
                         int64_t begin, int64_t end);
  int64_t (*vector_bytes)(int64_t k);
  void (*prepare_vector)(int bits, const float* x, int64_t k, void* to);
  // Products with a block of tokens, of singles: tiles of `tile_tokens` tokens are prepared,
  // `tile_bytes` each and about `near` bytes in all, and panels of `panel_rows` rows take them.
  int64_t tile_tokens, panel_rows, near;
  int64_t (*tile_bytes)(int64_t k);
  int64_t (*product_scratch)(int64_t k);  // bytes
  void (*prepare_tile)(const QuantizedProduct&, int64_t first, void* to, void* scratch);
  void (*multiply_panel)(const QuantizedProduct&, int64_t row, int64_t first, int64_t tokens,
                         const void* tiles, void* scratch);
  void (*decode)(const Quantized&, int64_t begin, int64_t end);  // rows begin .. end - 1
  // Numbers begin .. begin + n - 1 of a type, as floats.
  void (*read_numbers)(const void* from, int64_t begin, int type, int n, float* to);
  Kernel *forward, *sum_keys, *sum_queries, *query_backward, *key_backward, *step;
};

}  // namespace cumulant
