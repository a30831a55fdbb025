// Which kernels run: the instruction sets compiled in, and whether this machine has them.
#pragma once

#include "abi.hpp"

#include <exception>
#ifdef CUMULANT_X86
#include <cpuid.h>
#endif

namespace cumulant {

#define DECLARE(isa)                     \
  namespace isa {                        \
  extern const Kernels singles, doubles; \
  }
DECLARE(baseline)
#ifdef CUMULANT_X86
DECLARE(avx2)
DECLARE(avx512)
namespace avx512 {
extern const Kernels vnni_singles;
}
#endif

enum Isa { BASELINE, AVX2, AVX512, AVX512_VNNI };

#ifdef CUMULANT_X86
// Whether the processor has all of these features and the system saves their registers (asked here,
// as not every compiler's runtime library answers __builtin_cpu_supports).
inline bool supported_x86(int isa) {
  constexpr unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28, F16C = 1u << 29,
                     AVX2_BIT = 1u << 5;
  constexpr unsigned AVX512_BITS = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  constexpr unsigned VNNI_BIT = 1u << 11;
  unsigned a, b, c, d, low, high;
  const unsigned basic = FMA | OSXSAVE | AVX | F16C,
                 extended = AVX2_BIT | (isa == AVX2 ? 0 : AVX512_BITS);
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & basic) != basic) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & extended) != extended) return false;
  if (isa == AVX512_VNNI && !(c & VNNI_BIT)) return false;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const unsigned saved = isa == AVX2 ? 0x6 : 0xe6;
  return (low & saved) == saved;
}
#endif

inline bool supported(int isa) {
#ifdef CUMULANT_X86
  static const bool known[] = {true, supported_x86(AVX2), supported_x86(AVX512),
                               supported_x86(AVX512_VNNI)};  // asking is slow on virtual machines
  if (isa >= BASELINE && isa <= AVX512_VNNI) return known[isa];
#endif
  return isa == BASELINE;
}

inline const Kernels& kernels(int isa, int type) {
#ifdef CUMULANT_X86
  if (isa == AVX2) return type == F64 ? avx2::doubles : avx2::singles;
  if (isa == AVX512) return type == F64 ? avx512::doubles : avx512::singles;
  if (isa == AVX512_VNNI) return type == F64 ? avx512::doubles : avx512::vnni_singles;
#endif
  return type == F64 ? baseline::doubles : baseline::singles;
}

// GROWING: by a log decay > 0; NO_WEIGHT: a logit is NaN or infinite
enum Status { DONE, NO_MEMORY, NO_SUCH_INSTRUCTIONS, GROWING, NO_WEIGHT };

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
