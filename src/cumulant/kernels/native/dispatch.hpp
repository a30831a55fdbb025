// Which kernels run: the instruction sets compiled in, and whether this machine has them.
#pragma once

#include "abi.hpp"

#include <exception>

namespace cumulant {

#define DECLARE(isa) \
  namespace isa {    \
  extern const Kernels singles, doubles; \
  }
DECLARE(baseline)
#ifdef CUMULANT_X86
DECLARE(avx2)
DECLARE(avx512)
#endif

enum Isa { BASELINE, AVX2, AVX512 };

inline bool supported(int isa) {
#ifdef CUMULANT_X86
  if (isa == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == AVX512)
    return supported(AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
  return isa == BASELINE;
}

inline const Kernels& kernels(int isa, int type) {
#ifdef CUMULANT_X86
  if (isa == AVX2) return type == F64 ? avx2::doubles : avx2::singles;
  if (isa == AVX512) return type == F64 ? avx512::doubles : avx512::singles;
#endif
  return type == F64 ? baseline::doubles : baseline::singles;
}

enum Status { DONE, NO_MEMORY, NO_SUCH_INSTRUCTIONS };

// What `run` comes to, as the C functions tell it: no exception leaves them.
template <class Run> int guarded(int isa, Run run) {
  if (!supported(isa)) return NO_SUCH_INSTRUCTIONS;
  try {
    return run() ? DONE : NO_MEMORY;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
}

}  // namespace cumulant
