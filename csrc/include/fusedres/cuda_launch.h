// Where a CUDA launcher runs and what it reports. Only builds with CUDA include this file.
#pragma once

#include <cuda_runtime_api.h>

namespace fusedres {

struct CudaTarget {
  int device;
  cudaStream_t stream;
};

// The last kernel that a launcher started or failed to start, for error messages.
struct LaunchConfig {
  const char* kernel = "no kernel";
  unsigned blocks = 0, threads = 0;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks are resident at once
};

// Null when a driver and a device can be used, else the reason, as static text.
const char* cuda_driver_problem();

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

}  // namespace fusedres
