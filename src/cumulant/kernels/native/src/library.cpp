// The C functions beside the operations: what the library is, what the machine can do.
#include "instruction_sets.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <chrono>

namespace cumulant {
namespace {

// Operations a second that `threads` threads reach together, the best of a few short trials.
double multiply_rate(const Kernels& k, int threads) {
  double best = 0;
  for (int trial = 0; trial < 20; trial++) {
    std::atomic<int64_t> operations{0};
    const auto begin = std::chrono::steady_clock::now();
    parallel(threads, threads, 64, [&](int64_t, void*) { operations += k.multiply(200000); });
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    best = std::max(best, double(operations) / time.count());
  }
  return best;
}

}  // namespace
}  // namespace cumulant

extern "C" {
// Counted up by hand with what the kernels do to what the structs point at; struct_layout.cpp tells
// when the structs differ.
int cumulant_abi() { return 9; }
int cumulant_supports(int isa) { return cumulant::supported(isa); }
void cumulant_use_openmp(void* entry) {
  cumulant::openmp() = reinterpret_cast<cumulant::OpenMP>(entry);
}
double cumulant_multiply_rate(int type, int isa, int threads) {
  return cumulant::supported(isa) ? cumulant::multiply_rate(cumulant::kernels(isa, type), threads)
                                  : 0;
}
}
