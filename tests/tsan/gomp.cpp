// The part of OpenMP's runtime that g++ calls for `parallel for schedule(static)`, on std::thread.
//
// ThreadSanitizer does not see into libgomp: it takes the end of a parallel region for no order at
// all, and reports what every region does. A thread's start and join it does know.
#include <thread>
#include <vector>

namespace {

thread_local int team_size = 1, rank = 0;

void run_as(int size, int number, void (*body)(void*), void* data) {
  const int outer_size = team_size, outer_rank = rank;
  team_size = size;
  rank = number;
  body(data);
  team_size = outer_size;
  rank = outer_rank;
}

}  // namespace

extern "C" {

int omp_get_num_threads() { return team_size; }
int omp_get_thread_num() { return rank; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  const int size = threads == 0 ? 4 : static_cast<int>(threads);
  std::vector<std::thread> others;
  for (int i = 1; i < size; ++i) others.emplace_back(run_as, size, i, body, data);
  run_as(size, 0, body, data);
  for (std::thread& other : others) other.join();
}
}
