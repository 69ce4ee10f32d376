// What the parts of the engine share: emulator.cpp has the launches, the scheduler and the runtime
// API, async.cpp and products.cpp what the hardware does beside the program.
#pragma once

#include <cstdarg>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulator.h"

// swapcontext asks the kernel for the signal mask at every switch, which takes most of its time.
#if defined(__x86_64__) && !defined(FUSEDRES_EMULATOR_UCONTEXT)
#define FUSEDRES_EMULATOR_ASSEMBLY
#else
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)
namespace fusedres {
namespace emulator {

constexpr int kWarp = 32;

#ifdef FUSEDRES_EMULATOR_ASSEMBLY
using Context = void*;
#else
using Context = ucontext_t;
#endif

enum class State {
  kReady,
  kAtBlockBarrier,
  kAtGridBarrier,
  kAtPartBarrier,
  kAtBarrier,  // in shared memory
  kAtWarp,
  kAtProducts,  // of which other warps have yet to give their part
  kDone,
};

struct Async;       // of a block; async.cpp's
struct AsyncFree {  // which knows what it is
  void operator()(Async* async) const;
};

struct Warp {
  int first, count;  // threads
  int ready;         // of them
  uint32_t share;    // runs in a round with odds of share / 8
  int together = 0;  // lanes that wait in an operation of the whole warp
};

struct Block {
  uint3 index;
  int first;                      // thread
  int done = 0, waiting = 0;      // threads that have left, that are at a barrier
  State barrier = State::kReady;  // which kind, and where
  Site site = {};
  std::unique_ptr<unsigned char, void (*)(void*)> shared = {nullptr, std::free};
  std::unique_ptr<Async, AsyncFree> async;  // from its first use on
};

struct Thread {
  Context context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // the sanitizer's

  State state;
  uint3 index;
  int number;  // in its block
  Block* block;
  Warp* warp;

  Site site;  // of what it waits in
  WarpOp op;
  unsigned mask;
  int source;
  uint64_t value, result;
  const char* what;    // the whole warp does together
  const void* wanted;  // a barrier
  unsigned parity;     // of its phase
};

struct Random {
  uint64_t state = 1;

  uint32_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  uint32_t below(uint64_t n) { return static_cast<uint32_t>((next() * n) >> 32); }

  template <class T>
  void shuffle(std::vector<T>* items) {
    for (size_t n = items->size(); n > 1; --n) std::swap((*items)[n - 1], (*items)[below(n)]);
  }
};

struct Machine {
  std::mutex mutex;  // one launch at a time, from whichever of the host's threads

  // What emulator_configure() and emulator_set_capability() set.
  Random random;
  int multiprocessors = 3, blocks_per_multiprocessor = 1;
  size_t max_shared_bytes = 227 << 10;
  int capability_major = 9, capability_minor = 0;

  std::map<const void*, size_t> shared_asked;  // cudaFuncSetAttribute
  std::string launched;

  // The launch that runs.
  const void* kernel = nullptr;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  size_t shared_bytes = 0;
  bool cooperative = false;
  int block_threads = 0, threads_resident = 0;
  std::deque<Thread> threads;  // kept between launches, as are their stacks
  std::deque<Warp> warps;
  std::deque<Block> blocks;
  std::vector<Thread*> round;         // null: an operation beside the program
  int done = 0, at_grid_barrier = 0;  // threads, of all resident blocks
  Site grid_site = {};

  Thread* current = nullptr;
  Context host;
  void* host_fake_stack = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
};

Machine& machine();
Thread* current(const char* what);
bool same(Site a, Site b);
void set_waiting(Thread* thread, State state);
void set_ready(Thread* thread);
void to_host(Thread* thread);  // until it is ready again

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail_waiting(const Thread* thread,
                                                                     const char* format, ...);

// --- What the scheduler asks of async.cpp -------------------------------------------------------

// How many operations beside the program are to be done in this round.
size_t operations_of_round();
// Does one of those that can be done, any; false where there are none.
bool do_operation();
// A thread may leave, and a block be over, only when nothing of theirs is in flight.
void check_leaving(const Thread& thread);
// What a thread in one of async.cpp's states waits for.
std::string wait_of(const Thread& thread);

}  // namespace emulator
}  // namespace fusedres
#pragma GCC visibility pop
