// fusedres._C: the only file that knows Python. Pointers arrive as integers (0 is null) and are
// trusted: shapes, dtypes, devices and layouts were checked by the caller. The GIL is released
// while a kernel runs; a CUDA launch that fails throws with the op's name and its launch
// configuration.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "fusedres/add_relu.h"
#include "fusedres/batch_norm.h"
#include "fusedres/bn_act.h"
#include "fusedres/bn_relu_maxpool.h"

namespace py = pybind11;

namespace fusedres {
namespace {

using py::literals::operator""_a;

using Address = uintptr_t;
using Sizes = std::array<int64_t, 4>;  // N, C, H, W

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Shape shape_of(const Sizes& sizes, int layout) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], static_cast<Layout>(layout)};
}

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "gcc " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

#ifdef FUSEDRES_WITH_CUDA
void throw_on_error(const char* op, cudaError_t status, const CudaTarget& target,
                    const LaunchConfig& config) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << op << ": " << cudaGetErrorString(status) << " (" << cudaGetErrorName(status)
          << "), launched on device " << target.device << " with " << config.blocks << " blocks of "
          << config.threads << " threads, " << config.vector << " elements per load";
  throw std::runtime_error(message.str());
}

CudaTarget cuda_target(int device, Address stream) {
  return {device, static_cast<cudaStream_t>(pointer(stream))};
}
#endif

py::object cuda_version() {
#ifdef FUSEDRES_WITH_CUDA
  return py::str(std::to_string(CUDART_VERSION / 1000) + "." +
                 std::to_string(CUDART_VERSION % 1000 / 10));
#else
  return py::none();
#endif
}

py::list cuda_archs() {
  py::list archs;
#ifdef FUSEDRES_WITH_CUDA
  std::istringstream list(FUSEDRES_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ';');) archs.append(arch);
#endif
  return archs;
}

std::optional<std::string> cuda_driver_status() {
#ifdef FUSEDRES_WITH_CUDA
  const char* problem = cuda_driver_problem();
  if (problem == nullptr) return std::nullopt;
  return problem;
#else
  return "built without CUDA";
#endif
}

void bind_cpu(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "partial_rows",
      [](const Sizes& sizes, int layout) { return partial_rows(shape_of(sizes, layout)); },
      "Rows of the workspace of a per-channel reduction.", "sizes"_a, "layout"_a);

  m.def(
      "batch_norm_stats",
      [](int dtype, const Sizes& sizes, int layout, int threads, Address y, Address mean,
         Address var, Address workspace) {
        launch_batch_norm_stats({static_cast<DType>(dtype), shape_of(sizes, layout), threads,
                                 pointer(y), pointer(mean), pointer(var),
                                 pointer<double>(workspace)});
      },
      no_gil, "dtype"_a, "sizes"_a, "layout"_a, "threads"_a, "y"_a, "mean"_a, "var"_a,
      "workspace"_a);

  m.def(
      "batch_norm_bwd",
      [](int dtype, const Sizes& sizes, int layout, int threads, bool training, Address g,
         Address y, Address mean, Address scale, Address rstd, Address sums, Address dy,
         Address workspace) {
        launch_batch_norm_bwd({static_cast<DType>(dtype), shape_of(sizes, layout), threads,
                               training, pointer(g), pointer(y), pointer(mean), pointer(scale),
                               pointer(rstd), pointer(sums), pointer(dy), pointer(workspace)});
      },
      no_gil, "dtype"_a, "sizes"_a, "layout"_a, "threads"_a, "training"_a, "g"_a, "y"_a, "mean"_a,
      "scale"_a, "rstd"_a, "sums"_a, "dy"_a, "workspace"_a);

  m.def(
      "bn_act_fwd",
      [](int dtype, const Sizes& sizes, int layout, int threads, bool relu, Address y, Address mean,
         Address scale, Address bias, Address residual, Address res_mean, Address res_scale,
         Address res_bias, Address a) {
        launch_bn_act_fwd({static_cast<DType>(dtype), shape_of(sizes, layout), threads, relu,
                           pointer(y), pointer(mean), pointer(scale), pointer(bias),
                           pointer(residual), pointer(res_mean), pointer(res_scale),
                           pointer(res_bias), pointer(a)});
      },
      no_gil, "dtype"_a, "sizes"_a, "layout"_a, "threads"_a, "relu"_a, "y"_a, "mean"_a, "scale"_a,
      "bias"_a, "residual"_a, "res_mean"_a, "res_scale"_a, "res_bias"_a, "a"_a);

  m.def(
      "bn_act_bwd",
      [](int dtype, const Sizes& sizes, int layout, int threads, Address grad, Address grad_extra,
         Address a, Address y, Address mean, Address res_y, Address res_mean, Address g,
         Address sums, Address res_sums, Address workspace) {
        launch_bn_act_bwd({static_cast<DType>(dtype), shape_of(sizes, layout), threads,
                           pointer(grad), pointer(grad_extra), pointer(a), pointer(y),
                           pointer(mean), pointer(res_y), pointer(res_mean), pointer(g),
                           pointer(sums), pointer(res_sums), pointer<double>(workspace)});
      },
      no_gil, "dtype"_a, "sizes"_a, "layout"_a, "threads"_a, "grad"_a, "grad_extra"_a, "a"_a, "y"_a,
      "mean"_a, "res_y"_a, "res_mean"_a, "g"_a, "sums"_a, "res_sums"_a, "workspace"_a);

  m.def(
      "bn_relu_maxpool_fwd",
      [](int dtype, const Sizes& sizes, int layout, int threads, int kernel_size, int stride,
         int padding, Address y, Address mean, Address scale, Address bias, Address p) {
        launch_bn_relu_maxpool_fwd({static_cast<DType>(dtype),
                                    shape_of(sizes, layout),
                                    {kernel_size, stride, padding},
                                    threads,
                                    pointer(y),
                                    pointer(mean),
                                    pointer(scale),
                                    pointer(bias),
                                    pointer(p)});
      },
      no_gil, "dtype"_a, "sizes"_a, "layout"_a, "threads"_a, "kernel_size"_a, "stride"_a,
      "padding"_a, "y"_a, "mean"_a, "scale"_a, "bias"_a, "p"_a);

  m.def(
      "bn_relu_maxpool_bwd",
      [](int dtype, const Sizes& sizes, int layout, int threads, int kernel_size, int stride,
         int padding, Address grad, Address y, Address mean, Address scale, Address bias, Address g,
         Address sums, Address winners, Address workspace) {
        launch_bn_relu_maxpool_bwd({static_cast<DType>(dtype),
                                    shape_of(sizes, layout),
                                    {kernel_size, stride, padding},
                                    threads,
                                    pointer(grad),
                                    pointer(y),
                                    pointer(mean),
                                    pointer(scale),
                                    pointer(bias),
                                    pointer(g),
                                    pointer(sums),
                                    pointer<uint8_t>(winners),
                                    pointer<double>(workspace)});
      },
      no_gil, "dtype"_a, "sizes"_a, "layout"_a, "threads"_a, "kernel_size"_a, "stride"_a,
      "padding"_a, "grad"_a, "y"_a, "mean"_a, "scale"_a, "bias"_a, "g"_a, "sums"_a, "winners"_a,
      "workspace"_a);

  m.def(
      "add_relu_fwd",
      [](int dtype, int64_t numel, int threads, Address x, Address residual, Address out) {
        launch_add_relu_fwd(
            {static_cast<DType>(dtype), numel, pointer(x), pointer(residual), pointer(out)},
            threads);
      },
      no_gil, "dtype"_a, "numel"_a, "threads"_a, "x"_a, "residual"_a, "out"_a);

  m.def(
      "add_relu_bwd",
      [](int dtype, int64_t numel, int threads, Address grad, Address out, Address dx) {
        launch_add_relu_bwd(
            {static_cast<DType>(dtype), numel, pointer(grad), pointer(out), pointer(dx)}, threads);
      },
      no_gil, "dtype"_a, "numel"_a, "threads"_a, "grad"_a, "out"_a, "dx"_a);
}

#ifdef FUSEDRES_WITH_CUDA
void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "add_relu_fwd_cuda",
      [](int dtype, int64_t numel, int device, Address stream, Address x, Address residual,
         Address out) {
        const CudaTarget target = cuda_target(device, stream);
        LaunchConfig config;
        const AddReluFwdParams params = {static_cast<DType>(dtype), numel, pointer(x),
                                         pointer(residual), pointer(out)};
        throw_on_error("add_relu_fwd", launch_add_relu_fwd(params, target, &config), target,
                       config);
      },
      no_gil, "dtype"_a, "numel"_a, "device"_a, "stream"_a, "x"_a, "residual"_a, "out"_a);

  m.def(
      "add_relu_bwd_cuda",
      [](int dtype, int64_t numel, int device, Address stream, Address grad, Address out,
         Address dx) {
        const CudaTarget target = cuda_target(device, stream);
        LaunchConfig config;
        const AddReluBwdParams params = {static_cast<DType>(dtype), numel, pointer(grad),
                                         pointer(out), pointer(dx)};
        throw_on_error("add_relu_bwd", launch_add_relu_bwd(params, target, &config), target,
                       config);
      },
      no_gil, "dtype"_a, "numel"_a, "device"_a, "stream"_a, "grad"_a, "out"_a, "dx"_a);
}
#endif

}  // namespace
}  // namespace fusedres

PYBIND11_MODULE(_C, m) {
  using namespace fusedres;
  m.doc() = "Kernels of fusedres. Internal: fusedres/native/ is the only caller.";
  m.attr("compiler") = kCompiler;
  m.attr("cuda_version") = cuda_version();
  m.attr("cuda_archs") = cuda_archs();
  m.def("cuda_driver_status", &cuda_driver_status,
        "None when CUDA kernels can run on this machine, else the reason.");
  bind_cpu(m);
#ifdef FUSEDRES_WITH_CUDA
  m.attr("cuda_built") = true;
  bind_cuda(m);
#else
  m.attr("cuda_built") = false;
#endif
}
