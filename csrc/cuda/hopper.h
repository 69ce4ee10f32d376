// The words of Hopper (9.0a) alone: barriers in shared memory, bulk copies of tiles that report to
// them, products by warpgroups of 128 threads, and registers that move between them. Each has a
// twin in tests/cuda_emulator.
//
// Shared memory that a bulk copy or a product reads or writes is reached by another path than that
// of loads and stores ("async proxy"): what ordinary stores wrote there needs fence_async() before.
#pragma once

#include "cuda/launch.h"
#include "cuda/tensor_core.h"

#ifdef __CUDACC__

namespace fusedres {

// --- descriptions of matrices in global memory, for bulk copies ----------------------------------

// A driver's CUtensorMap, which nothing looks into.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Describes a matrix [rows, columns] of 16-bit elements, whose rows lie `stride` elements apart,
// and boxes [box_rows, 64] of it, which a copy leaves in rows of 128 bytes, swizzled; outside of
// the matrix they are zeros. The matrix lies on 16 bytes, as does every row; box_rows <= 256.
#if CUDART_VERSION < \
    12050  // whose toolkits have no such look-up; setup.py builds nothing that asks
inline cudaError_t describe(TensorMap*, DType, const void*, int64_t, int64_t, int64_t, int) {
  return cudaErrorNotSupported;
}
#else
inline cudaError_t describe(TensorMap* map, DType dtype, const void* matrix, int64_t rows,
                            int64_t columns, int64_t stride, int box_rows) {
  using Encode = int (*)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                         const uint32_t*, const uint32_t*, int, int, int, int);
  static std::atomic<void*> known{nullptr};
  if (known == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
    if (status != cudaSuccess) return status;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    known = found;
  }
  // CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, _SWIZZLE_128B, _L2_PROMOTION_L2_256B
  constexpr int kFloat16 = 6, kBFloat16 = 9, kSwizzled = 3, kPromoted = 3;
  const uint64_t sizes[2] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)};
  const uint64_t strides[1] = {static_cast<uint64_t>(stride) * 2};
  const uint32_t box[2] = {64, static_cast<uint32_t>(box_rows)}, steps[2] = {1, 1};
  const int problem = reinterpret_cast<Encode>(known.load())(
      map, dtype == DType::kBFloat16 ? kBFloat16 : kFloat16, 2, const_cast<void*>(matrix), sizes,
      strides, box, steps, 0, kSwizzled, kPromoted, 0);
  return problem == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

// --- barriers in shared memory -------------------------------------------------------------------

// A phase of a barrier is over when `count` threads have arrived and all the bytes that they said
// to expect have come; then the next one begins.
using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// After barrier_init, by the same thread, before the block's barrier: lets bulk copies see it.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and `bytes` more are to come before the phase is over.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity is over: phases count 0, 1, 0, 1... from the first one. The
// one before the first counts as over.
#ifdef FUSEDRES_DEBUG
// A phase that never ends stops the kernel, where it would hang otherwise.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  unsigned over = 0;
  for (int tries = 0; over == 0; ++tries) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    FUSEDRES_DEVICE_CHECK(tries < (1 << 22));
  }
}
#else
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "waiting_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting_%=;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#endif

// --- bulk copies ---------------------------------------------------------------------------------

// Copies the box at (row, column) into shared memory, on 1,024 bytes, and tells the barrier its
// bytes, all of it some time later. By one thread.
__device__ __forceinline__ void copy_box(const TensorMap* map, Barrier* barrier, void* shared,
                                         int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Between this thread's loads and stores of shared memory and what the async proxy does there next.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- parts of a block ----------------------------------------------------------------------------

// A barrier of `threads` threads, whole warps; `id` from 1 to 15.
__device__ __forceinline__ void part_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of a warpgroup take or give registers, to have kCount each, a multiple of 8.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- products by warpgroups ----------------------------------------------------------------------

// Before the first product, and before one that follows other uses of its registers.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last call are a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups but the last kLeft; until then registers and shared memory are the
// products'.
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Tells the compiler that x may have changed here: what is read after wgmma_wait() is not read
// before it.
template <int kSize>
__device__ __forceinline__ void settle(float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// d = a @ b, or where `accumulate` d += a @ b, for a [64, 16] in registers, 16 rows of it a warp as
// multiply() takes it; b [16, N] in shared memory, described by matrix_descriptor, kNMajor: as
// n_major_descriptor has it, else as k_major_descriptor; d [64, N] as N / 8 pieces of multiply()'s.
// Some time before wgmma_wait() of its group returns. T is BFloat16 or Float16, N is 64, 128 or
// 256.
//
// The assembler wants every register by name: `names` of d, then those of a, b and `accumulate`.
// clang-format off
#define FUSEDRES_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                       "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FUSEDRES_D32(i) FUSEDRES_D8(i), FUSEDRES_D8(i + 8), FUSEDRES_D8(i + 16), FUSEDRES_D8(i + 24)
#define FUSEDRES_NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
                          "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FUSEDRES_NAMES_64 FUSEDRES_NAMES_32 \
                          ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48," \
                          "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FUSEDRES_NAMES_128 FUSEDRES_NAMES_64 \
                          ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80," \
                          "%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97," \
                          "%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
                          "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125," \
                          "%126,%127"
#define FUSEDRES_WGMMA(n, type, names, a_names, b_name, flag, major, ...)                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {"   \
               a_names "}, " b_name ", p, 1, 1, " major ";\n}\n"                                  \
               : __VA_ARGS__                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                              \
                 "r"(static_cast<int>(accumulate)), "n"(kNMajor ? 1 : 0))
#define FUSEDRES_WGMMA_64(type)                                                                  \
  FUSEDRES_WGMMA("64", type, FUSEDRES_NAMES_32, "%32,%33,%34,%35", "%36", "%37", "%38",          \
                 FUSEDRES_D32(0))
#define FUSEDRES_WGMMA_128(type)                                                                 \
  FUSEDRES_WGMMA("128", type, FUSEDRES_NAMES_64, "%64,%65,%66,%67", "%68", "%69", "%70",         \
                 FUSEDRES_D32(0), FUSEDRES_D32(32))
#define FUSEDRES_WGMMA_256(type)                                                                 \
  FUSEDRES_WGMMA("256", type, FUSEDRES_NAMES_128, "%128,%129,%130,%131", "%132", "%133", "%134", \
                 FUSEDRES_D32(0), FUSEDRES_D32(32), FUSEDRES_D32(64), FUSEDRES_D32(96))
// clang-format on

template <class T, bool kNMajor, int kSize>
__device__ __forceinline__ void wgmma(float (&d)[kSize], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  static_assert(kSize == 32 || kSize == 64 || kSize == 128);
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  if constexpr (kSize == 32 && kBFloat16) FUSEDRES_WGMMA_64("bf16");
  if constexpr (kSize == 32 && !kBFloat16) FUSEDRES_WGMMA_64("f16");
  if constexpr (kSize == 64 && kBFloat16) FUSEDRES_WGMMA_128("bf16");
  if constexpr (kSize == 64 && !kBFloat16) FUSEDRES_WGMMA_128("f16");
  if constexpr (kSize == 128 && kBFloat16) FUSEDRES_WGMMA_256("bf16");
  if constexpr (kSize == 128 && !kBFloat16) FUSEDRES_WGMMA_256("f16");
}

#undef FUSEDRES_WGMMA_256
#undef FUSEDRES_WGMMA_128
#undef FUSEDRES_WGMMA_64
#undef FUSEDRES_WGMMA
#undef FUSEDRES_NAMES_128
#undef FUSEDRES_NAMES_64
#undef FUSEDRES_NAMES_32
#undef FUSEDRES_D32
#undef FUSEDRES_D8

}  // namespace fusedres

#else
#include "hopper_emulator.h"
#endif
