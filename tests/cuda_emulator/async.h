// What async.cpp and products.cpp share: what a block has in flight, and lanes that act together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>

#include "cuda/hopper.h"
#include "engine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#pragma GCC visibility push(hidden)
namespace fusedres {
namespace emulator {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr uint32_t kRowBytes = 128, kPatternBytes = 1024;

struct Copy {
  unsigned char* to;
  const void* from;
  uint64_t group;
};

struct Copier {  // a thread
  std::vector<Copy> copies;
  uint64_t groups = 0;  // committed
  size_t place;         // in Async::copying, while there are copies
};

// A Barrier.
struct Phased {
  uint32_t address;
  unsigned count, missing;  // threads
  int64_t bytes = 0;        // expected and not yet come; negative where they come before that
  uint64_t phase = 0;
  const Thread* by;  // who initialised it
  bool fenced = false;
  uint64_t copied = 0,
           seen = 0;  // phases up to the last with a copy, and up to the last waited for
  Site copy_site = {};
};

struct Part {  // of a block, that waits for itself
  int threads = 0, waiting = 0;
};

struct Box {
  TensorMap map;
  Phased* barrier;
  uint32_t to;  // shared address
  int row, column;
  Site site;
};

// Accumulators of a warp that products in flight have: d is NaN until they are waited for.
struct Accumulators {
  float* d[kWarp];
  int columns;
  uint64_t last;              // product that has them
  std::vector<float> values;  // [16, columns]
};

struct Product {
  uint64_t b;
  int columns;
  bool accumulate, n_major, bfloat16;
};

// A warp's part of a product.
struct Issue {
  const uint32_t* a[kWarp];
  uint32_t issued[kWarp][4];  // the values at a
  Accumulators* accumulators;
  Product product;
  Site site;
};

struct Member {  // a warp of a warpgroup
  bool fenced = false, parked = false;
  uint64_t issued = 0, waited = 0, wanted = 0;  // products
  std::deque<uint64_t> groups;                  // where each ends that is not waited for
  std::deque<Issue> issues;                     // from `waited` on
  std::list<Accumulators> accumulators;
  uint64_t events = 0;
};

// What all warps of a warpgroup must do alike.
struct Event {
  const char* what;
  Site site;
  uint64_t operand;
  int flags;
};

struct Warpgroup {
  int first;  // thread
  Member warps[4];
  std::deque<Product> products;  // that are not done
  uint64_t done = 0;
  std::deque<Event> events;  // that some warps have yet to come to
  uint64_t past = 0;         // events that all have

  // Products of which each warp has issued its part.
  uint64_t whole() const {
    uint64_t least = warps[0].issued;
    for (const Member& warp : warps) least = std::min(least, warp.issued);
    return least;
  }
};

struct Async {
  Block* block;
  uint32_t share;  // of what is pending, to be done in a round, in eighths
  std::vector<Copier> copiers;
  std::vector<int> copying;  // threads
  size_t copies = 0;
  std::map<uint32_t, Phased> barriers;  // by address
  std::vector<Box> boxes;
  Part parts[16];
  std::vector<Warpgroup> groups;

  size_t pending() const {
    size_t sum = copies + boxes.size();
    for (const Warpgroup& group : groups) sum += group.whole() - group.done;
    return sum;
  }
};

Async& async_of(const Thread& thread);

// The current thread, on a device that has the word.
Thread* at(const char* what, Site site, bool hopper);

// As the sanitizer would report an access of the thread itself, here and now.
void check_readable(const void* p, size_t bytes);

// The shared address of `bytes` bytes from p on.
uint32_t shared_range(const void* p, size_t bytes, size_t alignment, const char* what, Site site);

// Of products.cpp: the next product of the group, of which all warps have issued their part.
void do_product(Async* async, Warpgroup* group);

// A copy to shared memory must not overtake products that still read there and that no warp has
// waited for.
void check_not_read(const Async& async, uint32_t to, uint32_t bytes, const char* what, Site site);

// --- Lanes that do something together -----------------------------------------------------------

inline Thread& lane_of(const Warp& warp, int lane) { return machine().threads[warp.first + lane]; }

template <class Args>
Args& args_of(const Warp& warp, int lane) {
  return *reinterpret_cast<Args*>(lane_of(warp, lane).value);
}

inline void set_warp_ready(const Warp& warp) {
  for (int i = 0; i < kWarp; ++i) set_ready(&lane_of(warp, i));
}

// Waits for all lanes of the warp; the last one then does `act` for all, which says whether they go
// on: else it has left them in another state.
template <class Args>
void together(const char* what, Args args, Site site, bool (*act)(const Warp&)) {
  Thread* const thread = current(what);
  Warp& warp = *thread->warp;
  for (int i = 0; warp.together > 0 && i < warp.count; ++i) {
    const Thread& other = lane_of(warp, i);
    if (other.state != State::kAtWarp || other.op != WarpOp::kTogether) continue;
    if (strcmp(other.what, what) == 0 && same(other.site, site)) break;  // as do the others then
    fail("executes %s at %s:%d, but lane %d of its warp %s at %s:%d", what, site.file, site.line, i,
         other.what, other.site.file, other.site.line);
  }
  thread->op = WarpOp::kTogether;
  thread->mask = ~0u;
  thread->site = site;
  thread->what = what;
  thread->value = reinterpret_cast<uintptr_t>(&args);
  set_waiting(thread, State::kAtWarp);
  if (++warp.together == kWarp) {
    warp.together = 0;
    if (act(warp)) set_warp_ready(warp);
  }
  if (thread->state != State::kReady) to_host(thread);
}

}  // namespace emulator
}  // namespace fusedres
#pragma GCC visibility pop
