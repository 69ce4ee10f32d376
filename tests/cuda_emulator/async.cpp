// What the hardware does beside the program: copies and products that are over some time later, and
// the barriers that tell of it.
//
// An operation waits in a list from its issue on. The scheduler does some of them in any round, in
// any order but for products of a warpgroup, at odds drawn per block; what is left of them when all
// threads wait, one by one; and the wait for an operation does it at the latest. Until then its
// destination is NaN: shared memory from the issue to the copy, accumulators from the issue to the
// end of the wait.
#include "async.h"

#pragma GCC visibility push(hidden)
namespace fusedres {
namespace emulator {

void AsyncFree::operator()(Async* async) const { delete async; }

Async& async_of(const Thread& thread) {
  Machine& m = machine();
  Block& block = *thread.block;
  if (!block.async) {
    constexpr uint32_t kShares[] = {0, 1, 4, 8};
    Async* const async = new Async;
    block.async.reset(async);
    async->block = &block;
    async->share = kShares[m.random.below(4)];
    async->copiers.resize(m.block_threads);
    async->groups.resize(m.block_threads / kGroup);
    for (size_t i = 0; i < async->groups.size(); ++i) async->groups[i].first = i * kGroup;
  }
  return *block.async;
}

Thread* at(const char* what, Site site, bool hopper) {
  const Machine& m = machine();
  Thread* const thread = current(what);
  const bool has =
      hopper ? m.capability_major == 9 && m.capability_minor == 0 : m.capability_major >= 8;
  if (!has) {
    fail("executes %s at %s:%d, which the device of compute capability %d.%d lacks", what,
         site.file, site.line, m.capability_major, m.capability_minor);
  }
  return thread;
}

void check_readable(const void* p, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  void* const bad = __asan_region_is_poisoned(const_cast<void*>(p), bytes);
  if (bad) (void)*static_cast<volatile unsigned char*>(bad);
#else
  (void)*static_cast<const volatile unsigned char*>(p);
  (void)*(static_cast<const volatile unsigned char*>(p) + bytes - 1);
#endif
}

uint32_t shared_range(const void* p, size_t bytes, size_t alignment, const char* what, Site site) {
  const auto start = reinterpret_cast<uintptr_t>(shared_memory_of_block());
  const auto address = reinterpret_cast<uintptr_t>(p);
  const size_t size = machine().shared_bytes;
  if (address < start || address - start > size || size - (address - start) < bytes) {
    fail("%s at %s:%d of %zu bytes at %p, not within the block's shared memory", what, site.file,
         site.line, bytes, p);
  }
  if ((address - start) % alignment) {
    fail("misaligned: %s at %s:%d at shared address %zu, which must be a multiple of %zu", what,
         site.file, site.line, static_cast<size_t>(address - start), alignment);
  }
  return static_cast<uint32_t>(address - start);
}

namespace {

constexpr uint64_t kBarrierMark = 0x7265697272616266u, kMapMark = 0x70616d726f736e74u;
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that a barrier can expect

// --- Barriers -----------------------------------------------------------------------------------

void advance(const Async& async, Phased* barrier) {
  if (barrier->missing > 0 || barrier->bytes != 0) return;
  ++barrier->phase;
  barrier->missing = barrier->count;
  Machine& m = machine();
  // They look again when they run: by then the next phase may be over too.
  for (int i = 0; i < m.block_threads; ++i) {
    Thread& thread = m.threads[async.block->first + i];
    if (thread.state == State::kAtBarrier && thread.wanted == barrier) set_ready(&thread);
  }
}

Phased& found(Async& async, const Barrier* barrier, const char* what, Site site) {
  const uint32_t address = shared_range(barrier, sizeof *barrier, sizeof *barrier, what, site);
  const auto place = async.barriers.find(address);
  if (place == async.barriers.end()) {
    fail("%s at %s:%d of a barrier that is not initialised, at shared address %u", what, site.file,
         site.line, address);
  }
  if (*barrier != kBarrierMark) {
    fail("%s at %s:%d of a barrier that something has overwritten, at shared address %u", what,
         site.file, site.line, address);
  }
  return place->second;
}

// --- Doing what is pending ----------------------------------------------------------------------

void do_copy(Async* async, Copier* copier, size_t i) {
  const Copy copy = copier->copies[i];
  memcpy(copy.to, copy.from, 16);
  copier->copies[i] = copier->copies.back();
  copier->copies.pop_back();
  --async->copies;
  if (!copier->copies.empty()) return;
  const int last = async->copying.back();
  async->copying[copier->place] = last;
  async->copiers[last].place = copier->place;
  async->copying.pop_back();
}

// The bytes of the box's row that lie in the matrix: where in the row, where in the matrix.
struct Inside {
  int64_t first, bytes;
  const unsigned char* from;
};

Inside inside_of(const TensorMap& map, int64_t row, int64_t column) {
  const int64_t begin = std::max<int64_t>(column, 0), end = std::min(column + 64, map.columns);
  if (row < 0 || row >= map.rows || begin >= end) return {0, 0, nullptr};
  return {(begin - column) * 2, (end - begin) * 2, map.matrix + row * map.stride + begin * 2};
}

void do_box(Async* async, size_t i) {
  const Box box = async->boxes[i];
  async->boxes.erase(async->boxes.begin() + i);
  unsigned char* const shared = async->block->shared.get();
  for (uint32_t r = 0; r < box.map.box_rows; ++r) {
    unsigned char line[kRowBytes] = {};
    const Inside inside = inside_of(box.map, int64_t{box.row} + r, box.column);
    if (inside.bytes > 0) memcpy(line + inside.first, inside.from, inside.bytes);
    for (uint32_t byte = 0; byte < kRowBytes; byte += 16) {
      const uint32_t address = box.to + r * kRowBytes + byte;
      memcpy(shared + (address ^ (address >> 3 & 0x70u)), line + byte, 16);
    }
  }
  Phased* const barrier = box.barrier;
  barrier->bytes -= static_cast<int64_t>(box.map.box_rows) * kRowBytes;
  barrier->copied = barrier->phase + 1;
  barrier->copy_site = box.site;
  advance(*async, barrier);
}

// A copy to shared memory must not come before one that is still to come.
void check_no_box(const Async& async, uint32_t to, uint32_t bytes, const char* what, Site site) {
  for (const Box& box : async.boxes) {
    if (box.to >= to + bytes || to >= box.to + box.map.box_rows * kRowBytes) continue;
    fail("%s at %s:%d to where the copy of %s:%d is still to come", what, site.file, site.line,
         box.site.file, box.site.line);
  }
}

struct PartArgs {
  int id, threads;
};

bool wait_for_part(const Warp& warp) {
  Machine& m = machine();
  const Thread& first = lane_of(warp, 0);
  const Site site = first.site;
  const PartArgs args = args_of<PartArgs>(warp, 0);
  for (int lane = 1; lane < kWarp; ++lane) {
    const PartArgs& other = args_of<PartArgs>(warp, lane);
    if (other.id != args.id || other.threads != args.threads) {
      fail("part_barrier at %s:%d with other operands than another lane of its warp", site.file,
           site.line);
    }
  }
  Part& part = async_of(first).parts[args.id];
  if (part.waiting > 0 && part.threads != args.threads) {
    fail("part_barrier %d at %s:%d of %d threads, but others wait there for %d", args.id, site.file,
         site.line, args.threads, part.threads);
  }
  part.threads = args.threads;
  part.waiting += kWarp;
  for (int i = 0; i < kWarp; ++i) {
    Thread& thread = lane_of(warp, i);
    thread.state = State::kAtPartBarrier;
    thread.wanted = &part;
  }
  if (part.waiting < part.threads) return false;
  part.waiting = 0;
  for (int i = 0; i < m.block_threads; ++i) {
    Thread& thread = m.threads[first.block->first + i];
    if (thread.state == State::kAtPartBarrier && thread.wanted == &part) set_ready(&thread);
  }
  return false;  // all are ready already
}

}  // namespace

// --- What the scheduler asks --------------------------------------------------------------------

size_t operations_of_round() {
  Machine& m = machine();
  size_t sum = 0;
  for (const Block& block : m.blocks) {
    const size_t pending = block.async ? block.async->pending() : 0;
    if (pending > 0) sum += m.random.below(pending * block.async->share / 4 + 1);
  }
  return sum;
}

bool do_operation() {
  Machine& m = machine();
  size_t sum = 0;
  for (const Block& block : m.blocks) sum += block.async ? block.async->pending() : 0;
  if (sum == 0) return false;
  size_t i = m.random.below(sum);
  for (const Block& block : m.blocks) {
    Async* const async = block.async.get();
    const size_t pending = async ? async->pending() : 0;
    if (i >= pending) {
      i -= pending;
      continue;
    }
    if (i < async->copies) {
      Copier& copier = async->copiers[async->copying[m.random.below(async->copying.size())]];
      do_copy(async, &copier, m.random.below(copier.copies.size()));
      return true;
    }
    i -= async->copies;
    if (i < async->boxes.size()) {
      do_box(async, i);
      return true;
    }
    i -= async->boxes.size();
    for (Warpgroup& group : async->groups) {
      const size_t products = group.whole() - group.done;
      if (i < products) {
        do_product(async, &group);
        return true;
      }
      i -= products;
    }
  }
  return false;
}

void check_leaving(const Thread& thread) {
  const Async& async = *thread.block->async;
  const size_t group = thread.number / kGroup;
  if (group < async.groups.size()) {
    const Member& member = async.groups[group].warps[thread.number % kGroup / kWarp];
    if (!member.issues.empty()) {
      const Site site = member.issues.front().site;
      fail("leaves while the product of %s:%d is in flight", site.file, site.line);
    }
  }
  if (thread.block->done + 1 < machine().block_threads) return;
  if (!async.boxes.empty()) {
    const Site site = async.boxes.front().site;
    fail("leaves while the copy of %s:%d is in flight", site.file, site.line);
  }
  for (const auto& [address, barrier] : async.barriers) {
    if (barrier.copied <= barrier.seen) continue;
    fail("leaves while the copy of %s:%d is in flight: none has waited for it",
         barrier.copy_site.file, barrier.copy_site.line);
  }
  for (const Warpgroup& warps : async.groups) {
    if (warps.events.empty()) continue;
    const Event& event = warps.events.front();
    fail("leaves, but not all warps of a warpgroup have been at %s of %s:%d", event.what,
         event.site.file, event.site.line);
  }
}

std::string wait_of(const Thread& thread) {
  char text[400];
  int size = snprintf(text, sizeof text, "at %s:%d ", thread.site.file, thread.site.line);
  char* const rest = text + size;
  const size_t room = sizeof text - size;
  if (thread.state == State::kAtBarrier) {
    const Phased& barrier = *static_cast<const Phased*>(thread.wanted);
    const long long bytes = std::abs(barrier.bytes);
    snprintf(rest, room,
             "for parity %u of the barrier at shared address %u: in phase %llu, %u of %u arrivals "
             "are missing, and %lld bytes are %s",
             thread.parity, barrier.address, static_cast<unsigned long long>(barrier.phase),
             barrier.missing, barrier.count, bytes, barrier.bytes < 0 ? "too many" : "missing");
  } else if (thread.state == State::kAtPartBarrier) {
    const Part& part = *static_cast<const Part*>(thread.wanted);
    const int id = static_cast<int>(&part - thread.block->async->parts);
    snprintf(rest, room, "at part_barrier %d, with %d of %d threads there", id, part.waiting,
             part.threads);
  } else {
    snprintf(rest, room, "for products that not all warps of the warpgroup have issued");
  }
  return text;
}

// --- What kernels call --------------------------------------------------------------------------

uint32_t shared_address(const void* p, Site site) {
  return shared_range(p, 0, 1, "shared_address", site);
}

void copy_async(void* shared, const void* global, Site site) {
  Thread* const thread = at("copy_async", site, false);
  const uint32_t to = shared_range(shared, 16, 16, "copy_async", site);
  if (reinterpret_cast<uintptr_t>(global) % 16) {
    fail("misaligned: copy_async at %s:%d from %p", site.file, site.line, global);
  }
  check_readable(global, 16);
  Async& async = async_of(*thread);
  check_not_read(async, to, 16, "copy_async", site);
  memset(shared, 0xff, 16);
  Copier& copier = async.copiers[thread->number];
  if (copier.copies.empty()) {
    copier.place = async.copying.size();
    async.copying.push_back(thread->number);
  }
  copier.copies.push_back({static_cast<unsigned char*>(shared), global, copier.groups});
  ++async.copies;
}

void copy_commit() {
  Thread* const thread = current("copy_commit");
  ++async_of(*thread).copiers[thread->number].groups;
}

void copy_wait(int left) {
  Thread* const thread = current("copy_wait");
  Async& async = async_of(*thread);
  Copier& copier = async.copiers[thread->number];
  for (size_t i = copier.copies.size(); i-- > 0;) {
    if (copier.copies[i].group + left < copier.groups) do_copy(&async, &copier, i);
  }
}

// What the driver's cuTensorMapEncodeTiled refuses.
cudaError_t describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns,
                     int64_t stride, int box_rows) {
  constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStride = int64_t{1} << 40;
  const bool fits = rows >= 1 && rows <= kMaxSize && columns >= 1 && columns <= kMaxSize &&
                    stride >= 0 && stride < kMaxStride / 2 && stride * 2 % 16 == 0 &&
                    box_rows >= 1 && box_rows <= 256;
  if (!fits || matrix == nullptr || reinterpret_cast<uintptr_t>(matrix) % 16 ||
      reinterpret_cast<uintptr_t>(map) % alignof(TensorMap)) {
    return cudaErrorInvalidValue;
  }
  *map = {static_cast<const unsigned char*>(matrix), rows,     columns, stride * 2,
          static_cast<uint64_t>(box_rows),           kMapMark, {}};
  return cudaSuccess;
}

void barrier_init(Barrier* barrier, unsigned count, Site site) {
  Thread* const thread = at("barrier_init", site, true);
  const uint32_t address =
      shared_range(barrier, sizeof *barrier, sizeof *barrier, "barrier_init", site);
  if (count < 1 || count > kMaxBytes) {
    fail("barrier_init at %s:%d of %u arrivals", site.file, site.line, count);
  }
  Async& async = async_of(*thread);
  if (async.barriers.count(address)) {
    fail("barrier_init at %s:%d of a barrier that is initialised, at shared address %u", site.file,
         site.line, address);
  }
  Phased& phased = async.barriers[address];
  phased.address = address;
  phased.count = phased.missing = count;
  phased.by = thread;
  *barrier = kBarrierMark;
}

void barrier_init_fence(Site site) {
  Thread* const thread = at("barrier_init_fence", site, true);
  for (auto& [address, barrier] : async_of(*thread).barriers)
    barrier.fenced |= barrier.by == thread;
}

void barrier_arrive(Barrier* barrier, bool expects, unsigned bytes, Site site) {
  const char* const what = expects ? "barrier_arrive_expect" : "barrier_arrive";
  Thread* const thread = at(what, site, true);
  Async& async = async_of(*thread);
  Phased& phased = found(async, barrier, what, site);
  if (phased.missing == 0) {
    fail("%s at %s:%d of a barrier where all %u have arrived, at shared address %u", what,
         site.file, site.line, phased.count, phased.address);
  }
  if (bytes > kMaxBytes || phased.bytes + bytes > kMaxBytes) {
    fail("%s at %s:%d of more bytes than a barrier can expect", what, site.file, site.line);
  }
  phased.bytes += bytes;
  --phased.missing;
  advance(async, &phased);
  // Others may be faster, whom the phase lets go on: what this thread should have done before.
  if (machine().random.below(2)) to_host(thread);
}

void barrier_wait(Barrier* barrier, unsigned parity, Site site) {
  Thread* const thread = at("barrier_wait", site, true);
  Phased& phased = found(async_of(*thread), barrier, "barrier_wait", site);
  if (parity > 1) fail("barrier_wait at %s:%d for parity %u", site.file, site.line, parity);
  while (phased.phase % 2 == parity) {
    thread->site = site;
    thread->wanted = &phased;
    thread->parity = parity;
    set_waiting(thread, State::kAtBarrier);
    to_host(thread);
  }
  phased.seen = phased.phase;
}

void copy_box(const TensorMap* map, Barrier* barrier, void* shared, int row, int column,
              Site site) {
  Async& async = async_of(*at("copy_box", site, true));
  if (reinterpret_cast<uintptr_t>(map) % alignof(TensorMap) || map->mark != kMapMark) {
    fail("copy_box at %s:%d with a map that describe() has not written", site.file, site.line);
  }
  const size_t bytes = map->box_rows * kRowBytes;
  const uint32_t to = shared_range(shared, bytes, kPatternBytes, "copy_box", site);
  Phased& phased = found(async, barrier, "copy_box", site);
  if (!phased.fenced) {
    fail("copy_box at %s:%d, but no barrier_init_fence() after barrier_init()", site.file,
         site.line);
  }
  for (uint64_t r = 0; r < map->box_rows; ++r) {
    const Inside inside = inside_of(*map, int64_t{row} + static_cast<int64_t>(r), column);
    if (inside.bytes > 0) check_readable(inside.from, inside.bytes);
  }
  check_no_box(async, to, bytes, "copy_box", site);
  check_not_read(async, to, bytes, "copy_box", site);
  memset(shared, 0xff, bytes);
  async.boxes.push_back({*map, &phased, to, row, column, site});
}

void part_barrier(int id, int threads, Site site) {
  const int block_threads = machine().block_threads;
  if (id < 1 || id > 15 || threads < kWarp || threads % kWarp || threads > block_threads) {
    fail("part_barrier %d at %s:%d of %d threads in a block of %d", id, site.file, site.line,
         threads, block_threads);
  }
  together("part_barrier", PartArgs{id, threads}, site, wait_for_part);
}

}  // namespace emulator
}  // namespace fusedres
#pragma GCC visibility pop
