// Loops on several threads. Every loop of the core is one of these, since an exception must not leave an OpenMP thread.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace alds {

struct Nothing {};  // the Scratch of a loop that needs none

// Calls body(i, scratch) for every i of 0 .. count - 1, in the order in which threads become free.
// Each thread has a Scratch of its own, empty at first and kept from one call to the next.
// Waits for all calls, then rethrows the first exception that one of them threw.
template <typename Scratch, typename Body>
void parallel_for(int64_t count, int threads, Body&& body) {
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1) nowait  // the region's end is a barrier
    for (int64_t i = 0; i < count; ++i) {
      try {
        body(i, scratch);
      } catch (...) {
#pragma omp critical
        if (!failure) failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// The same over tasks, the ones of the largest `cost` first: calls body(task, scratch). Sorts the tasks.
template <typename Scratch, typename Task, typename Body>
void parallel_tasks(std::vector<Task>& tasks, int threads, Body&& body) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  parallel_for<Scratch>(tasks.size(), threads, [&](int64_t i, Scratch& scratch) { body(tasks[i], scratch); });
}

}  // namespace alds
