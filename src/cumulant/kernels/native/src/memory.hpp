// Scratch of a thread, and what large results are told to the system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cumulant {

// Memory of one thread, kept from call to call.
struct Scratch {
  static constexpr size_t MOST_KEPT = 64 << 20;
  void* data = nullptr;
  size_t size = 0;
  void* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = nullptr;
      size = 0;
      if (posix_memalign(&data, 64, bytes)) return data = nullptr;
      size = bytes;
    }
    return data;
  }
  // Gives back what is too much to keep: features of a high order and their sums.
  void settle() {
    if (size <= MOST_KEPT) return;
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~Scratch() { std::free(data); }
};

// Fresh memory comes a page at a time, as it is first written: for large results by 2 MiB instead
// of 4 KiB, which would take as long as the arithmetic.
inline void use_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 2 << 20, begin = (uintptr_t(data) + page - 1) / page * page,
                  end = uintptr_t(data) + bytes;
  if (end > begin + 2 * page)
    madvise(reinterpret_cast<void*>(begin), (end - begin) / page * page, MADV_HUGEPAGE);
#endif
  (void)data, (void)bytes;
}

// Bytes of a number of each `Type`.
inline size_t bytes_of(int type) { return type == 1 ? 8 : type == 0 ? 4 : 2; }

}  // namespace cumulant
