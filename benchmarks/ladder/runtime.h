// What ladder.cu needs of the CUDA runtime beside launches: memory, copies, times. Where the CPU
// plays the GPU (tests/cuda_emulator), device memory is plain memory, and nothing is timed.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/launch.h"

#ifndef __CUDACC__
extern "C" void emulator_configure(uint64_t seed, int multiprocessors,
                                   int blocks_per_multiprocessor, size_t max_shared_bytes);
#endif

namespace fusedres {

// Ends the program where a call failed.
inline void expect(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "ladder: %s: %s (%s)\n", what, cudaGetErrorString(status),
          cudaGetErrorName(status));
  exit(1);
}

inline int attribute(cudaDeviceAttr which) {
  int value = 0;
  expect(cudaDeviceGetAttribute(&value, which, 0), "attribute of the device");
  return value;
}

inline double median(std::vector<float> x) {
  std::sort(x.begin(), x.end());
  return (x[(x.size() - 1) / 2] + x[x.size() / 2]) / 2.0;
}

#ifdef __CUDACC__

constexpr bool kTimes = true;

inline void* allocate(size_t bytes) {
  void* p = nullptr;
  expect(cudaMalloc(&p, bytes), "memory of the device");
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void to_device(void* to, const void* from, size_t bytes) {
  expect(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
inline void to_host(void* to, const void* from, size_t bytes) {
  expect(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}
inline void copy_on_device(void* to, const void* from, size_t bytes) {
  expect(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr), "copy");
}
inline void fill(void* p, int byte, size_t bytes) { expect(cudaMemset(p, byte, bytes), "fill"); }
inline void finish(const char* what) { expect(cudaDeviceSynchronize(), what); }
inline void order_threads(uint64_t) {}

inline std::string device_name() {
  cudaDeviceProp properties;
  expect(cudaGetDeviceProperties(&properties, 0), "properties of the device");
  return properties.name;
}

inline size_t cache_bytes() { return static_cast<size_t>(attribute(cudaDevAttrL2CacheSize)); }

// Median milliseconds of f(i), i = 0, 1, .., by events around each, after a few to warm up. All are
// queued before the first is waited for, so that the host's time is in none.
template <class F>
double time_runs(int runs, const F& f) {
  constexpr int kWarm = 3;
  std::vector<cudaEvent_t> events(2 * runs);
  for (cudaEvent_t& event : events) expect(cudaEventCreate(&event), "event");
  for (int i = 0; i < kWarm + runs; ++i) {
    cudaEvent_t* const pair = i < kWarm ? nullptr : &events[2 * (i - kWarm)];
    if (pair) expect(cudaEventRecord(pair[0], nullptr), "event");
    f(i);
    if (pair) expect(cudaEventRecord(pair[1], nullptr), "event");
  }
  finish("timed runs");
  std::vector<float> ms(runs);
  for (int i = 0; i < runs; ++i) {
    expect(cudaEventElapsedTime(&ms[i], events[2 * i], events[2 * i + 1]), "event");
  }
  for (const cudaEvent_t event : events) cudaEventDestroy(event);
  return median(ms);
}

#else

constexpr bool kTimes = false;

inline void* allocate(size_t bytes) {
  return aligned_alloc(16, (bytes + 15) / 16 * 16);  // sizes here are multiples of 16
}
inline void release(void* p) { free(p); }
inline void to_device(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void to_host(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void copy_on_device(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void fill(void* p, int byte, size_t bytes) { memset(p, byte, bytes); }
inline void finish(const char*) {}
inline void order_threads(uint64_t seed) { emulator_configure(seed, 3, 1, 227 << 10); }
inline std::string device_name() { return "emulated"; }
inline size_t cache_bytes() { return 0; }
template <class F>
double time_runs(int, const F&) {
  return 0;
}

#endif

// Memory of the device.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : p_(allocate(bytes)), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept : p_(other.p_), bytes_(other.bytes_) { other.p_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(p_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(p_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* p_;
  size_t bytes_;
};

template <class T>
Buffer on_device(const std::vector<T>& x) {
  Buffer out(x.size() * sizeof(T));
  to_device(out.as<void>(), x.data(), out.bytes());
  return out;
}

}  // namespace fusedres
