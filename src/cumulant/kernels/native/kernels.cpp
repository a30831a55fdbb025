// The kernels of one instruction set: compiled once for each, with its flags and its name as CUMULANT_ISA.
#include "backward.hpp"
#include "forward.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

template <class R> int64_t scratch(const Attention& a) { return Workspace<R>(a, nullptr).used; }

#define KERNELS(R)                                                                                          \
  {                                                                                                         \
    scratch<R>, forward<R>, sum_keys<R>, sum_queries<R>, query_backward<R>, key_backward<R>, step<R>        \
  }
extern const Kernels singles;
extern const Kernels doubles;
const Kernels singles = KERNELS(float);
const Kernels doubles = KERNELS(double);

}  // namespace CUMULANT_ISA
}  // namespace cumulant
