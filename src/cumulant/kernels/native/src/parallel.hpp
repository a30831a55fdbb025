// Tasks shared out over threads. The threads are those of the OpenMP runtime that torch already
// uses, handed to us as the address of its entry point, so that the process has one pool and
// torch's number of threads holds; without one, our own.
#pragma once

#include "memory.hpp"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace cumulant {

typedef void (*OpenMP)(void (*)(void*), void*, unsigned threads, unsigned flags);  // GOMP_parallel
inline OpenMP& openmp() {
  static OpenMP entry = nullptr;
  return entry;
}

// Runs body(task, scratch) for tasks 0 .. count - 1, each on the next free thread. False: no memory
// for the scratch.
template <class Body> bool parallel(int threads, int64_t count, size_t scratch, const Body& body) {
  struct Team {
    const Body& body;
    int64_t count;
    size_t scratch;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    void work() {
      static thread_local Scratch memory;
      void* const own = memory.reserve(scratch);
      if (!own) failed = true;
      for (int64_t task; own && (task = next.fetch_add(1)) < count;) body(task, own);
      memory.settle();
    }
  } team{body, count, scratch};
  if (threads > count) threads = int(count);
  void (*const entry)(void*) = [](void* x) { static_cast<Team*>(x)->work(); };
  if (threads <= 1) {
    team.work();
  } else if (openmp()) {
    openmp()(entry, &team, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(entry, &team);
    team.work();
    for (auto& thread : others) thread.join();
  }
  return !team.failed;
}

}  // namespace cumulant
