// Runs kernels on the CPU, one thread at a time, in an order that the seed decides.
//
// Each thread of a block is a fiber: a stack of its own, left where the thread waits and entered
// again when what it waits for has come. Blocks run one after another in shuffled order, those of a
// cooperative launch all at once. In each round every warp is either held back or not, at odds
// drawn per launch, and the threads that may run do so in shuffled order; so a warp can fall behind
// another by as much as the program's barriers allow, which is where a missing one shows.
//
// What no program may do ends the process with a message: no test has to look for it.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "engine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef FUSEDRES_EMULATOR_ASSEMBLY
// Pushes the registers that a callee must keep, leaves the stack's end in *from, goes on at `to`.
extern "C" __attribute__((visibility("hidden"))) void fusedres_switch_stack(void** from, void* to);
asm(R"(
.text
.globl fusedres_switch_stack
.hidden fusedres_switch_stack
.type fusedres_switch_stack, @function
fusedres_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedres_switch_stack, . - fusedres_switch_stack
)");
#endif

namespace fusedres {
namespace emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kSharedAlignment = 1024;    // as device.h asks for
constexpr size_t kSharedUnasked = 48 << 10;  // more needs cudaFuncSetAttribute
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;  // frames are larger, and reports are written from here
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

#ifdef FUSEDRES_EMULATOR_ASSEMBLY
void make_context(Context* context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where entry would return to: the end for whoever walks the stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  *context = top;
}

void switch_context(Context* from, Context* to) { fusedres_switch_stack(from, *to); }
#else
void make_context(Context* context, unsigned char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#endif

uint3 thread_index, block_index;
dim3 block_extent, grid_extent;
thread_local cudaError_t last_error = cudaSuccess;
thread_local bool launching = false;

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The linker's name, or nothing for a kernel that has none.
const char* symbol_of(const void* kernel) {
  Dl_info info;
  const bool found = dladdr(kernel, &info) && info.dli_sname && info.dli_saddr == kernel;
  return found ? info.dli_sname : nullptr;
}

std::string readable_name(const void* kernel) {
  const char* symbol = symbol_of(kernel);
  if (symbol == nullptr) return "(unnamed)";
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(symbol, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : symbol;
}

[[noreturn]] void die(const Block* block, const Thread* thread, const char* format, va_list args) {
  const Machine& m = machine();
  fprintf(stderr, "CUDA emulator: ");
  if (m.kernel) fprintf(stderr, "kernel %s, ", readable_name(m.kernel).c_str());
  if (block)
    fprintf(stderr, "block (%u, %u, %u), ", block->index.x, block->index.y, block->index.z);
  if (thread) {
    const uint3& index = thread->index;
    fprintf(stderr, "thread (%u, %u, %u): ", index.x, index.y, index.z);
  }
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_print_stack_trace();
#endif
  fflush(stderr);
  std::abort();
}

// --- Switching ----------------------------------------------------------------------------------

void to_thread(Thread* thread) {
  Machine& m = machine();
  m.current = thread;
  thread_index = thread->index;
  block_index = thread->block->index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&m.host_fake_stack, thread->stack, kStackBytes);
#endif
  switch_context(&m.host, &thread->context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(m.host_fake_stack, nullptr, nullptr);
#endif
  m.current = nullptr;
}

void leave(Thread* thread) {
  Machine& m = machine();
  Block& block = *thread->block;
  if (block.waiting > 0) {
    fail("leaves while %d threads of the block wait at %s:%d", block.waiting, block.site.file,
         block.site.line);
  }
  if (m.at_grid_barrier > 0) {
    fail("leaves while other blocks wait at %s:%d", m.grid_site.file, m.grid_site.line);
  }
  if (block.async) check_leaving(*thread);
  ++block.done;
  ++m.done;
  set_waiting(thread, State::kDone);
}

// What a fiber does for as long as the process lives: one thread of one block after another.
void fiber() noexcept {
  Machine& m = machine();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &m.host_stack, &m.host_stack_bytes);
#endif
  for (;;) {
    try {
      m.body(m.closure);
    } catch (...) {
      fail("throws an exception");
    }
    leave(m.current);
    to_host(m.current);
  }
}

void add_stack(Thread* thread) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {  // an overflow must fault
    fail("no memory for a thread's stack");
  }
  thread->stack = static_cast<unsigned char*>(memory) + page;
  make_context(&thread->context, thread->stack, fiber);
}

// --- Scheduling ---------------------------------------------------------------------------------

// What the thread waits for, unless for lanes of its warp.
std::string described_wait(const Thread& thread) {
  const Block& block = *thread.block;
  switch (thread.state) {
    case State::kAtBlockBarrier:
      return "for the block at " + std::string(block.site.file) + ":" +
             std::to_string(block.site.line);
    case State::kAtGridBarrier:
      return "for the grid at " + std::string(block.site.file) + ":" +
             std::to_string(block.site.line);
    case State::kAtPartBarrier:
    case State::kAtBarrier:
    case State::kAtProducts:
      return wait_of(thread);
    default:
      return "";
  }
}

[[noreturn]] void report_deadlock() {
  Machine& m = machine();
  for (const Block& block : m.blocks) {
    std::map<std::string, std::pair<int, const Thread*>> waits;  // threads, the first of them
    for (int i = block.first; i < block.first + m.block_threads; ++i) {
      const std::string wait = described_wait(m.threads[i]);
      if (!wait.empty() && ++waits[wait].first == 1) waits[wait].second = &m.threads[i];
    }
    for (const auto& [wait, threads] : waits) {
      const uint3 &at = block.index, &thread = threads.second->index;
      fprintf(stderr,
              "CUDA emulator: block (%u, %u, %u): %d threads, the first (%u, %u, %u), wait %s\n",
              at.x, at.y, at.z, threads.first, thread.x, thread.y, thread.z, wait.c_str());
    }
  }
  for (int i = 0; i < m.threads_resident; ++i) {
    const Thread& thread = m.threads[i];
    if (thread.state != State::kAtWarp) continue;
    unsigned missing = thread.mask;
    for (int k = 0; k < thread.warp->count; ++k) {
      const Thread& other = m.threads[thread.warp->first + k];
      if (other.state == State::kAtWarp && other.op == thread.op && other.mask == thread.mask) {
        missing &= ~(1u << k);
      }
    }
    fail_waiting(&thread,
                 "waits at %s:%d for lanes 0x%08x of mask 0x%08x, which never arrive: they have "
                 "left, wait elsewhere or do not exist",
                 thread.site.file, thread.site.line, missing, thread.mask);
  }
  fail("deadlock");
}

void run_resident_blocks() {
  Machine& m = machine();
  while (m.done < m.threads_resident) {
    m.round.clear();
    for (int held_back = 1; held_back >= 0 && m.round.empty(); --held_back) {
      for (const Warp& warp : m.warps) {
        if (warp.ready == 0 || (held_back && m.random.below(8) >= warp.share)) continue;
        for (int i = warp.first; i < warp.first + warp.count; ++i) {
          if (m.threads[i].state == State::kReady) m.round.push_back(&m.threads[i]);
        }
      }
    }
    if (m.round.empty()) {  // all wait: perhaps for what happens beside the program
      if (!do_operation()) report_deadlock();
      continue;
    }
    m.round.resize(m.round.size() + operations_of_round());
    m.random.shuffle(&m.round);
    for (Thread* thread : m.round) {
      if (thread) {
        to_thread(thread);
      } else {
        do_operation();
      }
    }
  }
}

uint3 unfolded(uint64_t number, dim3 extent) {
  const uint64_t row = number / extent.x;
  return {static_cast<unsigned>(number % extent.x), static_cast<unsigned>(row % extent.y),
          static_cast<unsigned>(row / extent.y)};
}

// Room for as many blocks at once, with what is the same for every block of the launch.
void make_resident(int blocks) {
  Machine& m = machine();
  m.threads_resident = blocks * m.block_threads;
  while (static_cast<int>(m.threads.size()) < m.threads_resident) {
    m.threads.emplace_back();
    add_stack(&m.threads.back());
  }
  m.blocks.clear();
  m.warps.clear();
  for (int b = 0; b < blocks; ++b) {
    Block& block = m.blocks.emplace_back();
    block.first = b * m.block_threads;
    for (int i = 0; i < m.block_threads; ++i) {
      if (i % kWarp == 0) {
        Warp& warp = m.warps.emplace_back();
        warp.first = block.first + i;
        warp.count = std::min(kWarp, m.block_threads - i);
      }
      Thread& thread = m.threads[block.first + i];
      thread.number = i;
      thread.index = unfolded(i, block_extent);
      thread.block = &block;
      thread.warp = &m.warps.back();
    }
  }
}

void start_blocks() {
  Machine& m = machine();
  m.done = m.at_grid_barrier = 0;
  for (int i = 0; i < m.threads_resident; ++i) m.threads[i].state = State::kReady;
  constexpr uint32_t kShares[] = {1, 4, 7};
  for (Warp& warp : m.warps) {
    warp.ready = warp.count;
    warp.together = 0;
    warp.share = kShares[m.random.below(3)];
  }
  for (Block& block : m.blocks) {
    block.done = block.waiting = 0;
    block.async.reset();
    if (m.shared_bytes == 0) continue;
    // Exactly what was asked for, that the sanitizer sees its end; all NaN before it is written.
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedAlignment, m.shared_bytes) != 0) {
      fail("no memory for a block's shared memory");
    }
    block.shared.reset(static_cast<unsigned char*>(memory));
    memset(block.shared.get(), 0xff, m.shared_bytes);
  }
}

size_t shared_limit(const void* kernel) {
  const Machine& m = machine();
  const auto asked = m.shared_asked.find(kernel);
  const size_t limit = asked == m.shared_asked.end() ? 0 : asked->second;
  return std::min(m.max_shared_bytes, std::max(kSharedUnasked, limit));
}

// Called at a barrier of either kind.
void arrive(Thread* thread, State barrier, Site site) {
  Block& block = *thread->block;
  if (block.done > 0) {
    fail("waits at %s:%d, but %d threads of the block have left", site.file, site.line, block.done);
  }
  if (block.waiting == 0) {
    block.barrier = barrier;
    block.site = site;
  } else if (block.barrier != barrier || !same(block.site, site)) {
    fail("waits at %s:%d, but other threads of the block wait at %s:%d", site.file, site.line,
         block.site.file, block.site.line);
  }
  ++block.waiting;
  set_waiting(thread, barrier);
}

void release(int first, int count) {
  Machine& m = machine();
  for (int i = first; i < first + count; ++i) set_ready(&m.threads[i]);
}

}  // namespace

// --- For all parts of the engine ----------------------------------------------------------------

Machine& machine() {
  static Machine* const instance = new Machine;  // outlives every destructor that might launch
  return *instance;
}

Thread* current(const char* what) {
  Thread* const thread = machine().current;
  if (thread == nullptr) fail("%s outside of a kernel", what);
  return thread;
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

void set_waiting(Thread* thread, State state) {
  thread->state = state;
  --thread->warp->ready;
}

void set_ready(Thread* thread) {
  thread->state = State::kReady;
  ++thread->warp->ready;
}

void to_host(Thread* thread) {
  Machine& m = machine();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&thread->fake_stack, m.host_stack, m.host_stack_bytes);
#endif
  switch_context(&thread->context, &m.host);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(thread->fake_stack, &m.host_stack, &m.host_stack_bytes);
#endif
}

void fail_waiting(const Thread* thread, const char* format, ...) {
  va_list args;
  va_start(args, format);
  die(thread->block, thread, format, args);
}

// --- What kernels call --------------------------------------------------------------------------

void fail(const char* format, ...) {
  const Thread* thread = machine().current;
  va_list args;
  va_start(args, format);
  die(thread ? thread->block : nullptr, thread, format, args);
}

int lane() { return current("a warp operation")->number % kWarp; }

unsigned char* shared_memory_of_block() {
  // To a kernel that asked for none: an address where every access faults.
  constexpr size_t kBytes = 1 << 20;
  static unsigned char* const none = static_cast<unsigned char*>(
      mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  unsigned char* const shared = current("shared memory")->block->shared.get();
  return shared ? shared : none;
}

void wait_for_block(Site site) {
  Machine& m = machine();
  Thread* const thread = current("__syncthreads()");
  arrive(thread, State::kAtBlockBarrier, site);
  Block& block = *thread->block;
  if (block.waiting == m.block_threads) {
    block.waiting = 0;
    release(block.first, m.block_threads);
  }
  to_host(thread);
}

void wait_for_grid(Site site) {
  Machine& m = machine();
  Thread* const thread = current("grid_barrier()");
  if (!m.cooperative) {
    fail("grid_barrier() at %s:%d, but the launch is not cooperative", site.file, site.line);
  }
  if (m.done > 0) {
    fail("waits for the grid at %s:%d, but %d threads have left", site.file, site.line, m.done);
  }
  if (m.at_grid_barrier == 0) {
    m.grid_site = site;
  } else if (!same(m.grid_site, site)) {
    fail("waits for the grid at %s:%d, but other threads do at %s:%d", site.file, site.line,
         m.grid_site.file, m.grid_site.line);
  }
  arrive(thread, State::kAtGridBarrier, site);
  if (++m.at_grid_barrier == m.threads_resident) {
    m.at_grid_barrier = 0;
    for (Block& block : m.blocks) block.waiting = 0;
    release(0, m.threads_resident);
  }
  to_host(thread);
}

uint64_t meet_warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  Machine& m = machine();
  Thread* const thread = current("a warp operation");
  const Warp& warp = *thread->warp;
  const int lane = thread->number % kWarp;
  if (!(mask >> lane & 1)) {
    fail("calls a warp operation at %s:%d with mask 0x%08x, in which it is not", site.file,
         site.line, mask);
  }
  thread->op = op;
  thread->mask = mask;
  thread->value = value;
  thread->source = source;
  thread->site = site;
  set_waiting(thread, State::kAtWarp);

  unsigned arrived = 0;
  uint64_t ballot = 0;
  for (int i = 0; i < warp.count; ++i) {
    const Thread& other = m.threads[warp.first + i];
    if (other.state != State::kAtWarp || other.op != op || other.mask != mask) continue;
    arrived |= mask & (1u << i);
    ballot |= (other.value & 1) << i;
  }
  if (arrived != mask) {
    to_host(thread);
    return thread->result;
  }
  const bool votes = op == WarpOp::kBallot || op == WarpOp::kAny || op == WarpOp::kAll;
  for (int i = 0; i < warp.count; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& other = m.threads[warp.first + i];
    // The value of a lane that takes no part is anything: as floating point, NaN.
    const bool takes_part = mask >> other.source & 1;
    other.result = votes ? ballot : takes_part ? m.threads[warp.first + other.source].value : ~0ull;
    set_ready(&other);
  }
  return thread->result;  // the last to arrive has nobody to wait for
}

// --- Launches -----------------------------------------------------------------------------------

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
                void (*body)(const void*), const void* closure) {
  Machine& m = machine();
  if (launching) fail("launches a kernel");
  const std::lock_guard<std::mutex> lock(m.mutex);

  if (kernel == nullptr) return noted(cudaErrorInvalidDeviceFunction);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  constexpr unsigned kMaxX = (1u << 31) - 1, kMaxYZ = 65535;
  if (grid.x > kMaxX || grid.y > kMaxYZ || grid.z > kMaxYZ || blocks == 0 || block.z > 64 ||
      block.x > kMaxThreads || block.y > kMaxThreads || threads == 0 || threads > kMaxThreads ||
      shared_bytes > shared_limit(kernel)) {
    return noted(cudaErrorInvalidConfiguration);
  }
  const uint64_t fits = uint64_t(m.multiprocessors) * m.blocks_per_multiprocessor;
  if (cooperative && blocks > fits) return noted(cudaErrorCooperativeLaunchTooLarge);

  const char* symbol = symbol_of(kernel);
  m.launched += m.launched.empty() ? "" : "\n";
  m.launched += symbol ? symbol : "(unnamed)";

  launching = true;
  m.kernel = kernel;
  m.body = body;
  m.closure = closure;
  m.shared_bytes = shared_bytes;
  m.cooperative = cooperative;
  m.block_threads = static_cast<int>(threads);
  block_extent = block;
  grid_extent = grid;
  make_resident(cooperative ? static_cast<int>(blocks) : 1);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  m.random.shuffle(&order);
  for (uint64_t i = 0; i < blocks; i += m.blocks.size()) {
    for (size_t b = 0; b < m.blocks.size(); ++b) m.blocks[b].index = unfolded(order[i + b], grid);
    start_blocks();
    run_resident_blocks();
  }
  m.blocks.clear();  // and with them their shared memory
  m.kernel = nullptr;
  launching = false;
  return cudaSuccess;
}

}  // namespace emulator
}  // namespace fusedres

const uint3& threadIdx = fusedres::emulator::thread_index;
const uint3& blockIdx = fusedres::emulator::block_index;
const dim3& blockDim = fusedres::emulator::block_extent;
const dim3& gridDim = fusedres::emulator::grid_extent;

// --- For tests ----------------------------------------------------------------------------------

extern "C" {

// Seeds the order of everything and sets what the one device is said to have.
void emulator_configure(uint64_t seed, int multiprocessors, int blocks_per_multiprocessor,
                        size_t max_shared_bytes) {
  auto& m = fusedres::emulator::machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.random.state = seed;
  m.multiprocessors = multiprocessors;
  m.blocks_per_multiprocessor = blocks_per_multiprocessor;
  m.max_shared_bytes = max_shared_bytes;
}

// The compute capability that the device is said to have: 9.0 unless told.
void emulator_set_capability(int major, int minor) {
  auto& m = fusedres::emulator::machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.capability_major = major;
  m.capability_minor = minor;
}

// The linker's names of the kernels launched since the last clear, one per line; valid until the
// next launch.
const char* emulator_launched() { return fusedres::emulator::machine().launched.c_str(); }
void emulator_clear_launched() { fusedres::emulator::machine().launched.clear(); }
}

// --- The runtime API ----------------------------------------------------------------------------

namespace {

struct Error {
  cudaError_t code;
  const char *name, *text;
};
#define FUSEDRES_ERROR(code, text) {code, #code, text}
constexpr Error kErrors[] = {
    FUSEDRES_ERROR(cudaSuccess, "no error"),
    FUSEDRES_ERROR(cudaErrorInvalidValue, "invalid argument"),
    FUSEDRES_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    FUSEDRES_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    FUSEDRES_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    FUSEDRES_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    FUSEDRES_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    FUSEDRES_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    FUSEDRES_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    FUSEDRES_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    FUSEDRES_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    FUSEDRES_ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    FUSEDRES_ERROR(cudaErrorNotSupported, "operation not supported"),
    FUSEDRES_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef FUSEDRES_ERROR

const Error* find_error(cudaError_t code) {
  for (const Error& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

}  // namespace

using fusedres::emulator::machine;
using fusedres::emulator::noted;

const char* cudaGetErrorName(cudaError_t code) {
  const Error* error = find_error(code);
  return error ? error->name : "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t code) {
  const Error* error = find_error(code);
  return error ? error->text : "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  return std::exchange(fusedres::emulator::last_error, cudaSuccess);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return noted(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using fusedres::emulator::kSharedUnasked;
  if (device != 0) return noted(cudaErrorInvalidDevice);
  const auto& m = machine();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = fusedres::emulator::kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(std::min(kSharedUnasked, m.max_shared_bytes));
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = fusedres::emulator::kWarp;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = m.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = m.capability_major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = m.capability_minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(m.max_shared_bytes + 1024) * m.blocks_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(m.max_shared_bytes);
      return cudaSuccess;
  }
  return noted(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  auto& m = machine();
  if (kernel == nullptr) return noted(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > m.max_shared_bytes) {
    return noted(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.shared_asked[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes) {
  auto& m = machine();
  if (kernel == nullptr) return noted(cudaErrorInvalidDeviceFunction);
  if (threads <= 0) return noted(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(m.mutex);
  const bool fits = threads <= fusedres::emulator::kMaxThreads &&
                    shared_bytes <= fusedres::emulator::shared_limit(kernel);
  *blocks = fits ? m.blocks_per_multiprocessor : 0;
  return cudaSuccess;
}
