// Matrices of 8 and 4 bits: shares their decoding and their products out over threads.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>

namespace cumulant {
namespace {

// A block of tokens at a time: their tiles are prepared, then every panel of rows takes them all.
bool multiply(const QuantizedProduct& q) {
  const Kernels& k = kernels(q.isa, F32);
  static thread_local Scratch memory;
  const int64_t tile = k.tile_bytes(q.k), tokens = k.tile_tokens, rows = k.panel_rows;
  const size_t scratch = size_t(k.product_scratch(q.k));
  const int64_t tiles = std::min((q.T + tokens - 1) / tokens, std::max<int64_t>(1, k.near / tile));
  char* const prepared =
      static_cast<char*>(memory.reserve(size_t(std::max<int64_t>(1, tiles * tile))));
  bool ok = prepared != nullptr;
  for (int64_t first = 0; ok && first < q.T; first += tiles * tokens) {
    const int64_t count = std::min(q.T - first, tiles * tokens);
    ok = parallel(q.threads, (count + tokens - 1) / tokens, scratch,
                  [&](int64_t i, void* own) {
                    k.prepare_tile(q, first + i * tokens, prepared + i * tile, own);
                  }) &&
         parallel(q.threads, (q.n + rows - 1) / rows, scratch, [&](int64_t i, void* own) {
           k.multiply_panel(q, i * rows, first, count, prepared, own);
         });
  }
  memory.settle();
  return ok;
}

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

extern "C" int cumulant_quantized_product(const cumulant::QuantizedProduct* q) {
  using namespace cumulant;
  return guarded(q->isa, [&] { return multiply(*q); });
}
