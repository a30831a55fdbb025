// Products of small matrices that lie in cache: C += op(A) B.
//
// B's rows (n values) are vectors; A is read one number at a time and multiplies a whole row. A
// tile of C, up to ACCUMULATORS vectors, stays in registers while k runs, which is what lets the
// multipliers work at their full rate.
#pragma once

#include "simd.hpp"

namespace cumulant {
namespace CUMULANT_ISA {

// How A lies: its element (m, k) at A[m * lda + k], or at A[k * lda + m].
enum Layout { BY_ROW, BY_COLUMN };
// Which k count for row m: all, k <= m, or k >= m (what lies outside is zero, and skipped by whole
// tiles).
enum Range { ALL, UP_TO, FROM };

template <class R> struct Matrix {
  R* data;
  int64_t stride;  // between rows
  INLINE R* row(int64_t i) const { return data + i * stride; }
};

// Rows that will be read or written next, fetched into the second cache by and by while tiles are
// multiplied.
class Ahead {
  struct Block {
    const char* data;
    int64_t stride;
    int rows, bytes;
    bool written;
  };
  static constexpr int MOST = 16, LINE = 64, AT_ONCE = 16 * LINE;
  Block blocks[MOST];
  int count = 0, at = 0;

 public:
  void clear() { count = at = 0; }
  void add(const void* data, int64_t stride, int rows, int bytes, bool written) {
    if (count < MOST && rows > 0)
      blocks[count++] = {(const char*)data, stride, rows, bytes, written};
  }
  INLINE void fetch() {
    for (int left = AT_ONCE; left > 0 && at < count;) {
      Block& b = blocks[at];
      for (int i = 0; i < b.bytes; i += LINE) {
        if (b.written)
          __builtin_prefetch(b.data + i, 1, 2);
        else
          __builtin_prefetch(b.data + i, 0, 2);
      }
      left -= b.bytes;
      b.data += b.stride;
      if (--b.rows == 0) at++;
    }
  }
};

// Sums that decay before they are added to. What rounding takes off is put aside, `residuals`
// numbers further on, for the next time: near their limit, sums of singles would be rounded in the
// same direction thousands of times. For the same reason little is lost by a product with what is
// lost.
template <class R> struct Keep {
  R kept, lost;       // they add up to 1
  int64_t residuals;  // 0: none are kept
  bool is_strong() const { return lost > R(0.5); }
  template <class X> INLINE X plus(X old, X more) const {
    return is_strong() ? old * kept + more : old + (more - old * lost);
  }
  INLINE void add(R* to, Vec<R> more) const {
    const Vec<R> old = load(to), change = (more + load(to + residuals)) - old * lost;
    const Vec<R> sum = old + change;
    store(to, is_strong() ? old * kept + more : sum);
    store(to + residuals, is_strong() ? Vec<R>{} : (old - sum) + change);
  }
  void add(R* to, R more) const {
    const R old = *to, change = (more + to[residuals]) - old * lost, sum = old + change;
    *to = is_strong() ? old * kept + more : sum;
    to[residuals] = is_strong() ? R(0) : (old - sum) + change;
  }
};

// C (+)= op(A) B. `keep`, unless null: how what it is added to decays before. That is C, or lies
// `base` numbers further on.
template <class R, int M, int N, Layout LAYOUT>
INLINE void tile(int begin, int end, const R* A, int64_t lda, const R* B, int64_t ldb, R* C,
                 int64_t ldc, bool add, const Keep<R>* keep, int64_t base) {
  // From zero, also where C is added to: among many small terms a large sum would lose their last
  // digits, all the same way.
  Vec<R> c[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) c[m][n] = Vec<R>{};
  for (int64_t k = begin; k < end; k++) {
    Vec<R> b[N];
    for (int n = 0; n < N; n++) b[n] = load(B + k * ldb + n * LANES<R>);
    for (int m = 0; m < M; m++) {
      const R a = LAYOUT == BY_ROW ? A[m * lda + k] : A[k * lda + m];
      for (int n = 0; n < N; n++) c[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      R* const to = C + m * ldc + n * LANES<R>;
      if (!keep || !add)
        store(to, add ? load(to + base) + c[m][n] : c[m][n]);
      else if (keep->residuals)
        keep->add(to, c[m][n]);
      else
        store(to, keep->plus(load(to + base), c[m][n]));
    }
}

// A panel of N vectors: whole tiles of M rows, then what is left in tiles of fewer.
template <class R, int M, int N, Layout LAYOUT>
void panel(int from, int rows, int k, Matrix<const R> A, Matrix<const R> B, Matrix<R> C, bool add,
           Range range, Ahead& ahead, const Keep<R>* keep, int64_t base) {
  int m = from;
  for (; m + M <= rows; m += M) {
    const int begin = range == FROM ? smaller(m, k) : 0,
              end = range == UP_TO ? smaller(k, m + M) : k;
    const R* a = LAYOUT == BY_ROW ? A.row(m) : A.data + m;
    ahead.fetch();
    tile<R, M, N, LAYOUT>(begin, end, a, A.stride, B.data, B.stride, C.row(m), C.stride, add, keep,
                          base);
  }
  if constexpr (M > 1) {
    if (m < rows)
      panel<R, (M > 8 ? M / 2 : M - 1), N, LAYOUT>(m, rows, k, A, B, C, add, range, ahead, keep,
                                                   base);
  }
}

// C [m, n] (+)= op(A) B with B [k, n]; n is rounded up to whole vectors, which must be there to
// read and write.
template <Layout LAYOUT, class R>
void product(Ahead& ahead, int m, int n, int k, Matrix<const R> A, Matrix<const R> B, Matrix<R> C,
             bool add = true, Range range = ALL, const Keep<R>* keep = nullptr, int64_t base = 0) {
  constexpr int W = LANES<R>, ROWS = ACCUMULATORS / PANEL;
  int from = 0;
  for (; from + PANEL * W <= padded<R>(n); from += PANEL * W)
    panel<R, ROWS, PANEL, LAYOUT>(0, m, k, A, {B.data + from, B.stride}, {C.data + from, C.stride},
                                  add, range, ahead, keep, base);
  const int left = (padded<R>(n) - from) / W;
  B.data += from;
  C.data += from;
  if (PANEL > 3 && left == 3)
    panel<R, ACCUMULATORS / 3, 3, LAYOUT>(0, m, k, A, B, C, add, range, ahead, keep, base);
  if (PANEL > 2 && left == 2)
    panel<R, ACCUMULATORS / 2, 2, LAYOUT>(0, m, k, A, B, C, add, range, ahead, keep, base);
  if (left == 1)
    panel<R, (PANEL > 2 ? 12 : 8), 1, LAYOUT>(0, m, k, A, B, C, add, range, ahead, keep, base);
}

}  // namespace CUMULANT_ISA
}  // namespace cumulant
