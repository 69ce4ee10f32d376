// fusedres._C: the only file that knows Python.
//
// Every kernel takes a head (dtype, sizes, layout, device, where), its scalars and its pointers, in
// the order of its contract header. Device -1 is the CPU, and `where` the number of threads; else
// it is a CUDA device, and `where` the stream. Pointers arrive as integers (0 is null) and are
// trusted: shapes, dtypes, devices and layouts were checked by the caller. <op>_workspace takes the
// same arguments with a null workspace and tells its size in bytes. The GIL is released while a
// kernel runs; a launch that fails throws with the op's name and its launch configuration.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fusedres/add_relu.h"
#include "fusedres/batch_norm.h"
#include "fusedres/bn_act.h"
#include "fusedres/bn_relu_maxpool.h"
#include "fusedres/conv_bn.h"
#include "fusedres/cpu_levels.h"
#include "fusedres/pack.h"

namespace py = pybind11;

namespace fusedres {
namespace {

using py::literals::operator""_a;

using Address = uintptr_t;
template <size_t kCount>
using Addresses = std::array<Address, kCount>;
using Sizes = std::array<int64_t, 4>;  // N, C, H, W
using Head = std::tuple<int, Sizes, int, int, Address>;
using Numbered = std::tuple<int, Address>;  // dtype code, address: a vector of a dtype of its own

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

DType dtype_of(int code) {
  if (code < 0 || code > 3) {
    throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  }
  return static_cast<DType>(code);
}

Shape shape_of(const Sizes& sizes, int layout) {
  if (layout != 0 && layout != 1) throw std::invalid_argument("unknown layout code");
  for (const int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("a size is negative");
  }
  return {sizes[0], sizes[1], sizes[2], sizes[3], static_cast<Layout>(layout)};
}

DType dtype_of(const Head& head) { return dtype_of(std::get<0>(head)); }
Shape shape_of(const Head& head) { return shape_of(std::get<1>(head), std::get<2>(head)); }
bool on_cpu(const Head& head) { return std::get<3>(head) < 0; }
MutableVector vector_of(const Numbered& v) {
  return {dtype_of(std::get<0>(v)), pointer(std::get<1>(v))};
}

#ifdef FUSEDRES_WITH_CUDA
CudaTarget target_of(const Head& head) {
  return {std::get<3>(head), static_cast<cudaStream_t>(pointer(std::get<4>(head)))};
}

void throw_on_error(const char* op, cudaError_t status, int device, const LaunchConfig& config) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << op << ": " << cudaGetErrorString(status) << " (" << cudaGetErrorName(status)
          << ") on device " << device << ", last launch: " << config.kernel << " with "
          << config.blocks << " blocks of " << config.threads << " threads and "
          << config.shared_bytes << " bytes of shared memory"
          << (config.cooperative ? ", cooperative" : "");
  throw std::runtime_error(message.str());
}
#endif

#ifndef FUSEDRES_WITH_CUDA
[[noreturn]] void throw_without_cuda(const char* op) {
  throw std::runtime_error(std::string(op) + ": the extension was built without CUDA kernels");
}
#endif

// Calls launch(threads) or launch(target, &config), where the head says.
template <class Launch>
void run(const char* op, const Head& head, const Launch& launch) {
  const py::gil_scoped_release no_gil;
  if (on_cpu(head)) {
    launch(static_cast<int>(std::get<4>(head)));
    return;
  }
#ifdef FUSEDRES_WITH_CUDA
  LaunchConfig config;
  throw_on_error(op, launch(target_of(head), &config), std::get<3>(head), config);
#else
  throw_without_cuda(op);
#endif
}

// Bytes of a workspace: `cpu` of them, or what ask(device, &bytes) says.
template <class Ask>
int64_t workspace(const char* op, const Head& head, int64_t cpu, const Ask& ask) {
  if (on_cpu(head)) return cpu;
#ifdef FUSEDRES_WITH_CUDA
  int64_t bytes = 0;
  throw_on_error(op, ask(std::get<3>(head), &bytes), std::get<3>(head), {});
  return bytes;
#else
  (void)ask;
  throw_without_cuda(op);
#endif
}

int64_t partial_bytes(const Head& head, int sums) {
  const Shape shape = shape_of(head);
  return partial_rows(shape) * sums * shape.c * static_cast<int64_t>(sizeof(double));
}

// --- arguments to parameters, in the order of the contract headers -------------------------------

BnActFwdParams bn_act_fwd_params(const Head& head, bool relu, const Addresses<9>& t) {
  return {dtype_of(head), shape_of(head), relu,          pointer(t[0]),
          pointer(t[1]),  pointer(t[2]),  pointer(t[3]), pointer(t[4]),
          pointer(t[5]),  pointer(t[6]),  pointer(t[7]), pointer(t[8])};
}

BnActBwdParams bn_act_bwd_params(const Head& head, const Addresses<13>& t) {
  return {dtype_of(head), shape_of(head), pointer(t[0]),  pointer(t[1]),  pointer(t[2]),
          pointer(t[3]),  pointer(t[4]),  pointer(t[5]),  pointer(t[6]),  pointer(t[7]),
          pointer(t[8]),  pointer(t[9]),  pointer(t[10]), pointer(t[11]), pointer(t[12])};
}

BnReluMaxpoolBwdParams bn_relu_maxpool_bwd_params(const Head& head, const PoolWindow& window,
                                                  const Addresses<9>& t) {
  return {dtype_of(head),
          shape_of(head),
          window,
          pointer(t[0]),
          pointer(t[1]),
          pointer(t[2]),
          pointer(t[3]),
          pointer(t[4]),
          pointer(t[5]),
          pointer(t[6]),
          static_cast<uint8_t*>(pointer(t[7])),
          pointer(t[8])};
}

ConstVector const_vector_of(const Numbered& v) {
  return {dtype_of(std::get<0>(v)), pointer(std::get<1>(v))};
}

BatchNormFwdParams batch_norm_fwd_params(const Head& head, bool training, double momentum,
                                         double eps, const std::array<Numbered, 5>& vectors,
                                         const Addresses<7>& t) {
  return {dtype_of(head),
          shape_of(head),
          training,
          momentum,
          eps,
          pointer(t[0]),
          const_vector_of(vectors[0]),
          const_vector_of(vectors[1]),
          const_vector_of(vectors[2]),
          vector_of(vectors[3]),
          vector_of(vectors[4]),
          pointer(t[1]),
          pointer(t[2]),
          pointer(t[3]),
          pointer(t[4]),
          pointer(t[5]),
          pointer(t[6])};
}

BatchNormBwdParams batch_norm_bwd_params(const Head& head, bool training, const Addresses<9>& t,
                                         const std::array<Numbered, 2>& gradients) {
  return {dtype_of(head),          shape_of(head),         training,      pointer(t[0]),
          pointer(t[1]),           pointer(t[2]),          pointer(t[3]), pointer(t[4]),
          pointer(t[5]),           pointer(t[6]),          pointer(t[7]), pointer(t[8]),
          vector_of(gradients[0]), vector_of(gradients[1])};
}

// --- kernels ------------------------------------------------------------------------------------

void bind_bn_act(py::module_& m) {
  m.def(
      "bn_act_fwd",
      [](const Head& head, bool relu, const Addresses<9>& t) {
        const BnActFwdParams params = bn_act_fwd_params(head, relu, t);
        run("bn_act_fwd", head, [&](auto... how) { return launch_bn_act_fwd(params, how...); });
      },
      "head"_a, "relu"_a, "tensors"_a);
  m.def(
      "bn_act_bwd",
      [](const Head& head, const Addresses<13>& t) {
        const BnActBwdParams params = bn_act_bwd_params(head, t);
        run("bn_act_bwd", head, [&](auto... how) { return launch_bn_act_bwd(params, how...); });
      },
      "head"_a, "tensors"_a);
  m.def(
      "bn_act_bwd_workspace",
      [](const Head& head, const Addresses<13>& t) {
        const BnActBwdParams params = bn_act_bwd_params(head, t);
        const int64_t cpu = partial_bytes(head, params.res_sums == nullptr ? 2 : 3);
        return workspace("bn_act_bwd", head, cpu,
                         [&](auto... how) { return bn_act_bwd_workspace(params, how...); });
      },
      "head"_a, "tensors"_a);
}

void bind_batch_norm(py::module_& m) {
  using Vectors = std::array<Numbered, 5>;
  m.def(
      "batch_norm_fwd",
      [](const Head& head, bool training, double momentum, double eps, const Vectors& vectors,
         const Addresses<7>& t) {
        const BatchNormFwdParams params =
            batch_norm_fwd_params(head, training, momentum, eps, vectors, t);
        run("batch_norm_fwd", head,
            [&](auto... how) { return launch_batch_norm_fwd(params, how...); });
      },
      "head"_a, "training"_a, "momentum"_a, "eps"_a, "vectors"_a, "tensors"_a);
  m.def(
      "batch_norm_fwd_workspace",
      [](const Head& head, bool training, double momentum, double eps, const Vectors& vectors,
         const Addresses<7>& t) {
        const BatchNormFwdParams params =
            batch_norm_fwd_params(head, training, momentum, eps, vectors, t);
        const Shape shape = params.shape;
        const int64_t row = (1 + 2 * shape.c) * static_cast<int64_t>(sizeof(double));
        return workspace("batch_norm_fwd", head, training ? partial_rows(shape) * row : 0,
                         [&](auto... how) { return batch_norm_fwd_workspace(params, how...); });
      },
      "head"_a, "training"_a, "momentum"_a, "eps"_a, "vectors"_a, "tensors"_a);
  m.def(
      "batch_norm_bwd",
      [](const Head& head, bool training, const Addresses<9>& t, const Numbered& dweight,
         const Numbered& dbias) {
        const BatchNormBwdParams params =
            batch_norm_bwd_params(head, training, t, {dweight, dbias});
        run("batch_norm_bwd", head,
            [&](auto... how) { return launch_batch_norm_bwd(params, how...); });
      },
      "head"_a, "training"_a, "tensors"_a, "dweight"_a, "dbias"_a);
#ifdef FUSEDRES_WITH_CUDA
  m.def(
      "batch_norm_act_fwd_cuda",
      [](const Head& head, double momentum, double eps, const Vectors& vectors,
         const Addresses<7>& t, bool relu, const Addresses<9>& act) {
        const BatchNormFwdParams params =
            batch_norm_fwd_params(head, true, momentum, eps, vectors, t);
        const BnActFwdParams act_params = bn_act_fwd_params(head, relu, act);
        const py::gil_scoped_release no_gil;
        LaunchConfig config;
        const CudaTarget target = target_of(head);
        const cudaError_t status = launch_batch_norm_act_fwd(params, act_params, target, &config);
        if (status == cudaErrorCooperativeLaunchTooLarge) {
          cudaGetLastError();  // this context has fewer multiprocessors than the device
          return false;
        }
        throw_on_error("batch_norm_act_fwd", status, target.device, config);
        return true;
      },
      "head"_a, "momentum"_a, "eps"_a, "vectors"_a, "tensors"_a, "relu"_a, "act"_a);
  m.def(
      "batch_norm_act_fwd_cuda_workspace",
      [](const Head& head, double momentum, double eps, const Vectors& vectors,
         const Addresses<7>& t, bool relu, const Addresses<9>& act) {
        const BatchNormFwdParams params =
            batch_norm_fwd_params(head, true, momentum, eps, vectors, t);
        const BnActFwdParams act_params = bn_act_fwd_params(head, relu, act);
        return workspace("batch_norm_act_fwd", head, 0, [&](int device, int64_t* bytes) {
          return batch_norm_act_fwd_workspace(params, act_params, device, bytes);
        });
      },
      "head"_a, "momentum"_a, "eps"_a, "vectors"_a, "tensors"_a, "relu"_a, "act"_a);
#endif
}

void bind_bn_relu_maxpool(py::module_& m) {
  using Window = std::array<int, 3>;  // kernel_size, stride, padding
  m.def(
      "bn_relu_maxpool_fwd",
      [](const Head& head, const Window& w, const Addresses<5>& t) {
        const BnReluMaxpoolFwdParams params = {dtype_of(head), shape_of(head), {w[0], w[1], w[2]},
                                               pointer(t[0]),  pointer(t[1]),  pointer(t[2]),
                                               pointer(t[3]),  pointer(t[4])};
        run("bn_relu_maxpool_fwd", head,
            [&](auto... how) { return launch_bn_relu_maxpool_fwd(params, how...); });
      },
      "head"_a, "window"_a, "tensors"_a);
  m.def(
      "bn_relu_maxpool_bwd",
      [](const Head& head, const Window& w, const Addresses<9>& t) {
        const auto params = bn_relu_maxpool_bwd_params(head, {w[0], w[1], w[2]}, t);
        run("bn_relu_maxpool_bwd", head,
            [&](auto... how) { return launch_bn_relu_maxpool_bwd(params, how...); });
      },
      "head"_a, "window"_a, "tensors"_a);
  m.def(
      "bn_relu_maxpool_bwd_workspace",
      [](const Head& head, const Window& w, const Addresses<9>& t) {
        const auto params = bn_relu_maxpool_bwd_params(head, {w[0], w[1], w[2]}, t);
        return workspace("bn_relu_maxpool_bwd", head, partial_bytes(head, 2), [&](auto... how) {
          return bn_relu_maxpool_bwd_workspace(params, how...);
        });
      },
      "head"_a, "window"_a, "tensors"_a);
}

void bind_add_relu(py::module_& m) {
  m.def(
      "add_relu_fwd",
      [](const Head& head, const Addresses<3>& t) {
        const AddReluFwdParams params = {dtype_of(head), shape_of(head).numel(), pointer(t[0]),
                                         pointer(t[1]), pointer(t[2])};
        run("add_relu_fwd", head, [&](auto... how) { return launch_add_relu_fwd(params, how...); });
      },
      "head"_a, "tensors"_a);
  m.def(
      "add_relu_bwd",
      [](const Head& head, const Addresses<3>& t) {
        const AddReluBwdParams params = {dtype_of(head), shape_of(head).numel(), pointer(t[0]),
                                         pointer(t[1]), pointer(t[2])};
        run("add_relu_bwd", head, [&](auto... how) { return launch_add_relu_bwd(params, how...); });
      },
      "head"_a, "tensors"_a);
}

// The head of a convolution's output, from that of its input.
Head of_output(const Head& head, int64_t filters) {
  Head output = head;
  std::get<1>(output)[1] = filters;
  return output;
}

int cpu_threads(const char* op, const Head& head) {
  if (!on_cpu(head)) throw std::invalid_argument(std::string(op) + ": runs on the CPU");
  return static_cast<int>(std::get<4>(head));
}

#ifdef FUSEDRES_WITH_CUDA
Product product_of(int code) {
  if (code != 0 && code != 1) {
    throw std::invalid_argument("unknown product code " + std::to_string(code));
  }
  return static_cast<Product>(code);
}
#endif

// Two launchers as one: on the CPU launch(threads), else launch(product, target, &config).
template <class Cpu, class Cuda>
auto by_product([[maybe_unused]] int code, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  return [&cpu, &cuda, code](auto... how) {
    if constexpr (sizeof...(how) == 1) {
      cpu(how...);
    } else {
#ifdef FUSEDRES_WITH_CUDA
      return cuda(product_of(code), how...);
#endif
    }
  };
}

void bind_conv_bn_pointwise(py::module_& m) {
  const auto fwd_params = [](const Head& head, int64_t filters, bool relu, const Addresses<9>& act,
                             bool training, double momentum, double eps,
                             const std::array<Numbered, 5>& vectors, const Addresses<7>& t,
                             const Numbered& weight) -> ConvBnFwdParams {
    const Head output = of_output(head, filters);
    return {bn_act_fwd_params(head, relu, act), const_vector_of(weight),
            batch_norm_fwd_params(output, training, momentum, eps, vectors, t), pointer(t[0]),
            pointer(t[6])};
  };
  m.def(
      "conv_bn_fwd",
      [=](const Head& head, int64_t filters, bool relu, const Addresses<9>& act, bool training,
          double momentum, double eps, const std::array<Numbered, 5>& vectors,
          const Addresses<7>& t, const Numbered& weight, int product) {
        const ConvBnFwdParams params =
            fwd_params(head, filters, relu, act, training, momentum, eps, vectors, t, weight);
        const auto on_host = [&](int threads) { launch_conv_bn_fwd(params, threads); };
        const auto on_device = [&](auto... how) { return launch_conv_bn_fwd(params, how...); };
        run("conv_bn_fwd", head, by_product(product, on_host, on_device));
      },
      "head"_a, "filters"_a, "relu"_a, "act"_a, "training"_a, "momentum"_a, "eps"_a, "vectors"_a,
      "tensors"_a, "weight"_a, "product"_a = 0);
  m.def(
      "conv_bn_fwd_workspace",
      [=](const Head& head, int64_t filters, bool training, int) {
        const ConvBnFwdParams params =
            fwd_params(head, filters, false, {}, training, 0, 0, {}, {}, {});
        const int64_t cpu = on_cpu(head) ? conv_bn_fwd_workspace(params) : 0;
        return workspace("conv_bn_fwd", head, cpu,
                         [&](auto... how) { return conv_bn_fwd_workspace(params, how...); });
      },
      "head"_a, "filters"_a, "training"_a, "product"_a = 0);

  const auto dgrad_params = [](const Head& head, int64_t filters, bool training,
                               const Addresses<9>& t, const std::array<Numbered, 2>& gradients,
                               const Numbered& weight, const Addresses<13>& act, Address sampled,
                               const std::array<int64_t, 2>& steps) -> ConvBnDgradParams {
    const Head output = of_output(head, filters);
    return {batch_norm_bwd_params(output, training, t, gradients),
            const_vector_of(weight),
            bn_act_bwd_params(head, act),
            pointer(sampled),
            steps[0],
            steps[1],
            pointer(t[8])};
  };
  m.def(
      "conv_bn_dgrad",
      [=](const Head& head, int64_t filters, bool training, const Addresses<9>& t,
          const std::array<Numbered, 2>& gradients, const Numbered& weight,
          const Addresses<13>& act, Address sampled, const std::array<int64_t, 2>& steps,
          int product) {
        const ConvBnDgradParams params =
            dgrad_params(head, filters, training, t, gradients, weight, act, sampled, steps);
        const auto on_host = [&](int threads) { launch_conv_bn_dgrad(params, threads); };
        const auto on_device = [&](auto... how) { return launch_conv_bn_dgrad(params, how...); };
        run("conv_bn_dgrad", head, by_product(product, on_host, on_device));
      },
      "head"_a, "filters"_a, "training"_a, "tensors"_a, "gradients"_a, "weight"_a, "act"_a,
      "sampled"_a, "steps"_a, "product"_a = 0);
  m.def(
      "conv_bn_dgrad_workspace",
      [=](const Head& head, int64_t filters, const Addresses<13>& act, int) {
        const ConvBnDgradParams params =
            dgrad_params(head, filters, false, {}, {}, {}, act, 0, {1, 1});
        const int64_t cpu = on_cpu(head) ? conv_bn_dgrad_workspace(params) : 0;
        return workspace("conv_bn_dgrad", head, cpu,
                         [&](auto... how) { return conv_bn_dgrad_workspace(params, how...); });
      },
      "head"_a, "filters"_a, "act"_a, "product"_a = 0);
}

void bind_conv_bn_wgrad(py::module_& m) {
  using Window = std::array<int64_t, 8>;
  using Strides = std::array<int64_t, 4>;
  const auto params_of = [](const Head& head, const Sizes& output, const Window& w, bool relu,
                            const Addresses<7>& t, const Strides& s) -> ConvBnWgradParams {
    return {dtype_of(head),
            shape_of(head),
            shape_of(output, std::get<2>(head)),
            {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]},
            relu,
            pointer(t[0]),
            pointer(t[1]),
            pointer(t[2]),
            pointer(t[3]),
            pointer(t[4]),
            static_cast<float*>(pointer(t[5])),
            s[0],
            s[1],
            s[2],
            s[3],
            pointer(t[6])};
  };
  m.def(
      "conv_bn_wgrad",
      [=](const Head& head, const Sizes& output, const Window& window, bool relu,
          const Addresses<7>& t, const Strides& strides) {
        const ConvBnWgradParams params = params_of(head, output, window, relu, t, strides);
        const int threads = cpu_threads("conv_bn_wgrad", head);
        const py::gil_scoped_release no_gil;
        launch_conv_bn_wgrad(params, threads);
      },
      "head"_a, "output"_a, "window"_a, "relu"_a, "tensors"_a, "strides"_a);
  m.def(
      "conv_bn_wgrad_workspace",
      [=](const Head& head, const Sizes& output, const Window& window) {
        return conv_bn_wgrad_workspace(params_of(head, output, window, false, {}, {}));
      },
      "head"_a, "output"_a, "window"_a);
}

#ifdef FUSEDRES_WITH_CUDA
// address, offset, K, C, R*S, channels_last
using Entry = std::tuple<Address, int64_t, int32_t, int32_t, int32_t, bool>;

void pack(int dtype, int device, Address stream, Address buffer, const std::vector<Entry>& list) {
  const py::gil_scoped_release no_gil;
  const CudaTarget target = {device, static_cast<cudaStream_t>(pointer(stream))};
  for (size_t begin = 0; begin < list.size(); begin += PackParams::kMost) {
    PackParams params = {dtype_of(dtype), pointer(buffer), 0, {}};
    for (size_t i = begin; i < list.size() && params.count < PackParams::kMost; ++i) {
      const auto& [source, offset, filters, channels, taps, channels_last] = list[i];
      if (offset < 0 || offset % 8 != 0 || filters < 0 || channels < 0 || taps < 0) {
        throw std::invalid_argument("pack: an entry has an impossible offset or size");
      }
      params.entries[params.count++] = {static_cast<const float*>(pointer(source)),
                                        offset,
                                        filters,
                                        channels,
                                        taps,
                                        channels_last};
    }
    LaunchConfig config;
    throw_on_error("pack", launch_pack(params, target, &config), device, config);
  }
}
#endif

// --- what the build is
// ----------------------------------------------------------------------------

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "gcc " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
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

}  // namespace
}  // namespace fusedres

PYBIND11_MODULE(_C, m) {
  using namespace fusedres;
  m.doc() = "Kernels of fusedres. Internal: fusedres/native/ is the only caller.";
  m.attr("compiler") = kCompiler;
  m.attr("cuda_version") = cuda_version();
  m.attr("cuda_archs") = cuda_archs();
  m.def("cpu_levels", &cpu_levels, "Levels of CPU kernels that run here, the best one last.");
  m.def("cpu_level", &cpu_level, "The one in force.");
  m.def("cpu_has_tiles", &cpu_has_tiles, "Whether it multiplies tiles of bf16.");
  m.def("set_cpu_level", &set_cpu_level, "name"_a, "Takes another one, for tests.");
  m.def("cuda_driver_status", &cuda_driver_status,
        "None when CUDA kernels can run on this machine, else the reason.");
  bind_bn_act(m);
  bind_batch_norm(m);
  bind_bn_relu_maxpool(m);
  bind_add_relu(m);
  bind_conv_bn_pointwise(m);
  bind_conv_bn_wgrad(m);
#ifdef FUSEDRES_WITH_CUDA
  m.attr("cuda_built") = true;
#ifdef FUSEDRES_WITH_SM90A
  m.attr("wgmma_built") = true;
#else
  m.attr("wgmma_built") = false;
#endif
  m.def("pack", &pack, "dtype"_a, "device"_a, "stream"_a, "buffer"_a, "entries"_a);
#else
  m.attr("cuda_built") = false;
  m.attr("wgmma_built") = false;
#endif
}
