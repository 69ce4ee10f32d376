// Every launcher of the CPU on odd sizes, in both layouts and every dtype, on several threads: what
// ThreadSanitizer watches. A run on one thread must give the same bits.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fusedres/add_relu.h"
#include "fusedres/batch_norm.h"
#include "fusedres/bn_act.h"
#include "fusedres/bn_relu_maxpool.h"
#include "fusedres/conv_bn.h"

namespace fusedres {
namespace {

constexpr int kThreads = 4;
int64_t calls = 0, differences = 0;

// Named memory: inputs with values from -2 to 2, outputs with a pattern that shows.
class Memory {
 public:
  Memory(DType dtype, const Shape& shape) : dtype_(dtype), shape_(shape) {}

  // Per element of an activation; the accumulation type of vectors is float, of double double.
  int64_t element() const {
    return dtype_ == DType::kFloat64 ? 8 : dtype_ == DType::kFloat32 ? 4 : 2;
  }
  int64_t accumulator() const { return dtype_ == DType::kFloat64 ? 8 : 4; }

  void* full(const std::string& name) { return values(name, shape_.numel(), dtype_); }
  void* values(const std::string& name, int64_t count) { return values(name, count, dtype_); }
  void* vector(const std::string& name, int64_t rows = 1) {
    const DType wide = dtype_ == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    return values(name, rows * shape_.c, wide);
  }
  void* output(const std::string& name, int64_t bytes) {
    std::vector<double>& buffer = outputs_[name];
    buffer.resize(bytes / 8 + 1);
    memset(buffer.data(), 0x7e, buffer.size() * sizeof(double));
    return buffer.data();
  }
  void* full_output(const std::string& name) { return output(name, shape_.numel() * element()); }
  void* vector_output(const std::string& name, int64_t rows = 1) {
    return output(name, rows * shape_.c * accumulator());
  }
  void* workspace(int64_t sums) {
    workspace_.resize(partial_rows(shape_) * sums * shape_.c + 1);
    return workspace_.data();
  }
  const std::map<std::string, std::vector<double>>& outputs() const { return outputs_; }

 private:
  void* values(const std::string& name, int64_t count, DType dtype) {
    std::vector<double>& buffer = inputs_[name];
    if (!buffer.empty()) return buffer.data();
    buffer.resize(count + 1);
    for (int64_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      const float value = static_cast<float>(static_cast<int64_t>(state_ >> 60) - 8) / 4;
      if (dtype == DType::kFloat64) {
        buffer[i] = value;
      } else if (dtype == DType::kFloat32) {
        reinterpret_cast<float*>(buffer.data())[i] = value;
      } else {  // bfloat16: the upper half of a float
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        reinterpret_cast<uint16_t*>(buffer.data())[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
    return buffer.data();
  }

  DType dtype_;
  Shape shape_;
  uint64_t state_ = 1;
  std::map<std::string, std::vector<double>> inputs_, outputs_;
  std::vector<double> workspace_;
};

// Runs launch(memory, threads) on one thread and on several.
template <class Launch>
void check(const char* what, DType dtype, const Shape& shape, const Launch& launch) {
  Memory alone(dtype, shape), together(dtype, shape);
  launch(alone, 1);
  launch(together, kThreads);
  ++calls;
  if (alone.outputs() == together.outputs()) return;
  for (const auto& [name, buffer] : alone.outputs()) {  // NaN is not itself
    const auto& other = together.outputs().at(name);
    if (memcmp(buffer.data(), other.data(), buffer.size() * sizeof(double)) == 0) continue;
    ++differences;
    printf("%s: %s depends on the number of threads (dtype %d, layout %d, %ld x %ld x %ld x %ld)\n",
           what, name.c_str(), static_cast<int>(dtype), static_cast<int>(shape.layout),
           static_cast<long>(shape.n), static_cast<long>(shape.c), static_cast<long>(shape.h),
           static_cast<long>(shape.w));
  }
}

void add_relu(DType dtype, const Shape& shape) {
  const int64_t numel = shape.numel();
  check("add_relu_fwd", dtype, shape, [=](Memory& m, int threads) {
    launch_add_relu_fwd({dtype, numel, m.full("x"), m.full("residual"), m.full_output("out")},
                        threads);
  });
  check("add_relu_bwd", dtype, shape, [=](Memory& m, int threads) {
    launch_add_relu_bwd({dtype, numel, m.full("grad"), m.full("out"), m.full_output("dx")},
                        threads);
  });
}

void batch_norm(DType dtype, const Shape& shape) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check("batch_norm_fwd", dtype, shape, [=](Memory& m, int threads) {
    BatchNormFwdParams p = {};
    p.dtype = dtype;
    p.shape = shape;
    p.training = true;
    p.momentum = 0.25;
    p.eps = 0.125;
    p.y = m.full("y");
    p.weight = {wide, m.vector("weight")};
    p.running_mean = {wide, m.vector_output("running_mean")};
    p.running_var = {wide, m.vector_output("running_var")};
    p.mean = m.vector_output("mean");
    p.var = m.vector_output("var");
    p.rstd = m.vector_output("rstd");
    p.scale = m.vector_output("scale");
    p.shift = m.vector_output("shift");
    p.workspace = m.workspace(3);  // a count and two sums
    launch_batch_norm_fwd(p, threads);
  });
  for (const bool training : {true, false}) {
    check("batch_norm_bwd", dtype, shape, [=](Memory& m, int threads) {
      BatchNormBwdParams p = {};
      p.dtype = dtype;
      p.shape = shape;
      p.training = training;
      p.g = m.full("g");
      p.y = m.full("y");
      p.mean = m.vector("mean");
      p.scale = m.vector("scale");
      p.rstd = m.vector("rstd");
      p.sums = m.vector("sums", 2);
      p.dy = m.full_output("dy");
      p.workspace = m.vector_output("workspace", 2);
      launch_batch_norm_bwd(p, threads);
    });
  }
}

void bn_act(DType dtype, const Shape& shape) {
  for (const int kind : {0, 1, 2}) {  // no residual, a tensor, a normalised one
    check("bn_act_fwd", dtype, shape, [=](Memory& m, int threads) {
      BnActFwdParams p = {};
      p.dtype = dtype;
      p.shape = shape;
      p.relu = kind != 1;
      p.y = m.full("y");
      p.mean = m.vector("mean");
      p.scale = m.vector("scale");
      p.bias = m.vector("bias");
      if (kind > 0) p.residual = m.full("residual");
      if (kind > 1) {
        p.res_mean = m.vector("res_mean");
        p.res_scale = m.vector("res_scale");
        p.res_bias = m.vector("res_bias");
      }
      p.a = m.full_output("a");
      launch_bn_act_fwd(p, threads);
    });
  }
  for (int bits = 0; bits < 8; ++bits) {
    const bool mask = bits & 1, extra = bits & 2, residual = bits & 4;
    check("bn_act_bwd", dtype, shape, [=](Memory& m, int threads) {
      BnActBwdParams p = {};
      p.dtype = dtype;
      p.shape = shape;
      p.grad = m.full("grad");
      if (extra) p.grad_extra = m.full("grad_extra");
      if (mask) p.a = m.full("a");
      p.y = m.full("y");
      p.mean = m.vector("mean");
      if (residual) {
        p.res_y = m.full("res_y");
        p.res_mean = m.vector("res_mean");
        p.res_sums = m.vector_output("res_sums", 2);
      }
      p.g = m.full_output("g");
      p.sums = m.vector_output("sums", 2);
      p.workspace = m.workspace(residual ? 3 : 2);
      launch_bn_act_bwd(p, threads);
    });
  }
}

void bn_relu_maxpool(DType dtype, const Shape& shape) {
  const PoolWindow windows[] = {{3, 2, 1}, {2, 3, 1}, {5, 1, 2}};
  for (const PoolWindow& window : windows) {
    const int64_t pooled = shape.n * shape.c * window.pooled(shape.h) * window.pooled(shape.w);
    if (pooled == 0) continue;
    check("bn_relu_maxpool_fwd", dtype, shape, [=](Memory& m, int threads) {
      launch_bn_relu_maxpool_fwd(
          {dtype, shape, window, m.full("y"), m.vector("mean"), m.vector("scale"), m.vector("bias"),
           m.output("p", pooled * m.element())},
          threads);
    });
    check("bn_relu_maxpool_bwd", dtype, shape, [=](Memory& m, int threads) {
      BnReluMaxpoolBwdParams p = {};
      p.dtype = dtype;
      p.shape = shape;
      p.window = window;
      p.grad = m.values("grad", pooled);
      p.y = m.full("y");
      p.mean = m.vector("mean");
      p.scale = m.vector("scale");
      p.bias = m.vector("bias");
      p.g = m.full_output("g");
      p.sums = m.vector_output("sums", 2);
      p.winners = static_cast<uint8_t*>(m.output("winners", pooled));
      p.workspace = m.workspace(2);
      launch_bn_relu_maxpool_bwd(p, threads);
    });
  }
}

// Above one slice of pixels and one block of filters: kernels, strides and zeros on one side.
void wgrad(DType dtype, bool prologue) {
  const Shape input = {3, 64, 31, 29, Layout::kNHWC};
  const ConvWindow windows[] = {{1, 1, 1, 1, 0, 0, 1, 1}, {3, 3, 2, 1, 1, 1, 1, 1}};
  for (const ConvWindow& window : windows) {
    const Shape output = {3, 136, (31 + 2 * window.top - window.height) / window.stride_h + 1,
                          (29 + 2 * window.left - window.width) / window.stride_w + 1,
                          Layout::kNHWC};
    const int64_t size = output.c * input.c * window.taps();
    check("conv_bn_wgrad", dtype, input, [=](Memory& m, int threads) {
      ConvBnWgradParams p = {};
      p.dtype = dtype;
      p.input = input;
      p.output = output;
      p.window = window;
      p.relu = true;
      p.dy = m.values("dy", output.numel());
      p.x = m.full("x");
      if (prologue) {
        p.mean = m.vector("mean");
        p.scale = m.vector("scale");
        p.bias = m.vector("bias");
      }
      p.dw = static_cast<float*>(m.output("dw", size * 4));
      p.stride_k = input.c * window.taps();
      p.stride_c = window.taps();
      p.stride_r = window.width;
      p.stride_s = 1;
      p.workspace = m.output("workspace", conv_bn_wgrad_workspace(p));
      launch_conv_bn_wgrad(p, threads);
    });
  }
}

// More pixels than there are blocks for, and channels in two tiles: every kind of input.
void pointwise(const Shape& input, int64_t filters) {
  constexpr DType kType = DType::kFloat32;
  const Shape output = {input.n, filters, input.h, input.w, Layout::kNHWC};
  for (const int kind : {0, 1, 2, 3}) {  // a tensor; deferred, without a residual and with both
    check("conv_bn_fwd", kType, input, [=](Memory& m, int threads) {
      const auto vector = [&](const char* name) { return m.output(name, filters * 4); };
      ConvBnFwdParams p = {};
      p.input.dtype = p.output.dtype = kType;
      p.input.shape = input;
      p.input.relu = true;
      p.input.y = m.full("x");
      if (kind > 0) {
        p.input.mean = m.vector("mean");
        p.input.scale = m.vector("scale");
        p.input.bias = m.vector("bias");
      }
      if (kind > 1) {
        p.input.residual = m.full("residual");
        p.input.a = m.full_output("a");
      }
      if (kind > 2) {
        p.input.res_mean = m.vector("res_mean");
        p.input.res_scale = m.vector("res_scale");
        p.input.res_bias = m.vector("res_bias");
      }
      p.weight = {kType, m.values("weight", filters * input.c)};
      p.output.shape = output;
      p.output.training = true;
      p.output.eps = 0.125;
      p.output.y = p.y = m.output("y", output.numel() * 4);
      p.output.mean = vector("y_mean");
      p.output.var = vector("y_var");
      p.output.rstd = vector("y_rstd");
      p.output.scale = vector("y_scale");
      p.output.shift = vector("y_shift");
      p.workspace = m.output("workspace", conv_bn_fwd_workspace(p));
      launch_conv_bn_fwd(p, threads);
    });
    check("conv_bn_dgrad", kType, input, [=](Memory& m, int threads) {
      const auto vector = [&](const char* name) { return m.values(name, filters); };
      ConvBnDgradParams p = {};
      p.input.dtype = p.output.dtype = kType;
      p.output.shape = output;
      p.output.training = true;
      p.output.g = m.values("g", output.numel());
      p.output.y = m.values("y", output.numel());
      p.output.mean = vector("y_mean");
      p.output.scale = vector("y_scale");
      p.output.rstd = vector("y_rstd");
      p.output.sums = m.values("y_sums", 2 * filters);
      p.output.dy = m.output("dy", output.numel() * 4);
      p.weight = {kType, m.values("weight", filters * input.c)};
      p.input.shape = input;
      p.input.grad = p.input.g = m.full_output("da");
      if (kind != 1) p.input.grad_extra = m.full("grad_a");
      if (kind > 0) {
        p.input.y = m.full("x");
        p.input.mean = m.vector("mean");
        p.input.sums = m.vector_output("sums", 2);
      }
      if (kind == 1) {
        p.input.scale = m.vector("scale");
        p.input.bias = m.vector("bias");
        p.step_h = p.step_w = 2;
        p.sampled =
            m.values("sampled", input.n * input.c * ((input.h + 1) / 2) * ((input.w + 1) / 2));
      }
      if (kind > 1) p.input.a = m.full("a");
      if (kind > 2) {
        p.input.res_y = m.full("res_y");
        p.input.res_mean = m.vector("res_mean");
        p.input.res_sums = m.vector_output("res_sums", 2);
      }
      p.workspace = m.output("workspace", conv_bn_dgrad_workspace(p));
      launch_conv_bn_dgrad(p, threads);
    });
  }
}

int run() {
  pointwise({2, 32, 93, 91, Layout::kNHWC}, 64);
  pointwise({3, 1056, 5, 7, Layout::kNHWC}, 32);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const bool prologue : {false, true}) wgrad(dtype, prologue);
  }
  // Above the size from which work is shared out: an odd number of pixels, channels in two tiles,
  // maps of one pixel, more images than threads.
  const int64_t sizes[][4] = {{3, 5, 64, 65}, {1, 1030, 5, 7}, {700, 65, 1, 1}, {9, 24, 13, 11}};
  for (const auto& [n, c, h, w] : sizes) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
      for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
        const Shape shape = {n, c, h, w, layout};
        add_relu(dtype, shape);
        batch_norm(dtype, shape);
        bn_act(dtype, shape);
        bn_relu_maxpool(dtype, shape);
      }
    }
  }
  printf("finished: %ld calls, %ld differences\n", static_cast<long>(calls),
         static_cast<long>(differences));
  return differences == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fusedres

int main() { return fusedres::run(); }
