// Shares the tokens of a pointwise operation out over threads, and adds up what they find of the
// weights' gradients.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>

namespace cumulant {
namespace {

constexpr int64_t TOKENS =
    256;  // whose gradients are added up in single precision, before their sums are in double

bool run(const Pointwise& p) {
  const Kernels& k = kernels(p.isa, F32);
  const bool numbers = p.operation == SWIGLU_FORWARD || p.operation == SWIGLU_BACKWARD;
  const int64_t count = p.B * p.T * (numbers ? p.n : 1), step = numbers ? 1 << 14 : TOKENS;
  const int64_t blocks = (count + step - 1) / step,
                parts = std::max<int64_t>(1, std::min<int64_t>(p.threads, blocks));
  const size_t weights = p.dweight ? size_t(p.taps * p.n) : 0;
  std::vector<double> sums(size_t(parts) * weights);
  const bool ok =
      parallel(p.threads, parts, weights * sizeof(float) + 1, [&](int64_t part, void* scratch) {
        float* const own = static_cast<float*>(scratch);
        double* const to = sums.data() + size_t(part) * weights;
        for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; block++) {
          std::fill(own, own + weights, 0.0f);
          k.pointwise(p, block * step, std::min(count, (block + 1) * step), own);
          for (size_t i = 0; i < weights; i++) to[i] += own[i];
        }
      });
  for (size_t i = 0; i < weights; i++) {
    double sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += sums[size_t(part) * weights + i];
    p.dweight[i] = float(sum);
  }
  return ok;
}

}  // namespace
}  // namespace cumulant

extern "C" int cumulant_pointwise(const cumulant::Pointwise* p) {
  return cumulant::guarded(p->isa, [&] { return cumulant::run(*p); });
}
