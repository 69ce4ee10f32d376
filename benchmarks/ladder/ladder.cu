// Runs the rungs of the ladder: checks each against the CPU, times it, prints a row.
//
//     ladder [--m M --c C --k K] [--rungs NAME,NAME] [--check-only] [--json FILE] [--runs N]
//            [--seed N]
//
// FILE gets a JSON object a line. Without sizes: those of ResNet-50's stages 1 to 3 at batch 256.
// Ends with 1 where a rung is wrong or fails, with 2 where it does not understand its arguments.
//
// The truth is fp64 arithmetic on the same x, w and vectors, with the activation rounded to
// bfloat16 as the contract has it. Where m is large, some hundred rows of y are compared with it,
// among them the first and last tiles; and of all rows, always, weighted sums over 64 of them in
// each column: a wrong element, and two that changed places, show there too.
#include <cmath>
#include <fstream>
#include <memory>
#include <sstream>

#include "ladder.h"
#include "runtime.h"

namespace fusedres {
namespace {

struct NamedRung {
  const char* name;
  Rung* run;
  int least;  // compute capability's first number; 9: 9.0 alone
  bool statistics;
};

constexpr NamedRung kRungs[] = {
    {"naive", run_naive, 7, false},
    {"tiled", run_tiled, 8, false},
    {"tma", run_tma, 9, false},
    {"warp_specialised", run_warp_specialised, 9, false},
    {"library_mma", run_library_mma, 8, false},
    {"library_mma_stats", run_library_mma_stats, 8, true},
    {"library_wgmma", run_library_wgmma, 9, false},
    {"library_wgmma_stats", run_library_wgmma_stats, 9, true},
};

struct Size {
  int64_t m;
  int c, k;
};

// Both 1x1 convolutions of a block, of 56 x 56, 28 x 28 and 14 x 14 pixels.
const std::vector<Size> kResNet50 = {
    {256 * 3136, 64, 256}, {256 * 3136, 256, 64},  {256 * 784, 128, 512},
    {256 * 784, 512, 128}, {256 * 196, 256, 1024}, {256 * 196, 1024, 256},
};

struct Options {
  std::vector<Size> sizes = kResNet50;
  std::string rungs, json;
  bool check_only = false;
  int runs = 20;
  uint64_t seed = 1;
};

// --- inputs and truth ----------------------------------------------------------------------------

// Uniform in [-1, 1), by the seed and the place alone.
double uniform(uint64_t seed, uint64_t at) {
  uint64_t x = (seed << 40) + at;
  for (int i = 0; i < 2; ++i) {
    x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u;
  }
  return static_cast<double>(x >> 11) * 0x1p-52 - 1;
}

struct Inputs {
  std::vector<BFloat16> x, w;
  std::vector<float> mean, scale, bias;

  Inputs(const Size& s, uint64_t seed)
      : x(s.m * s.c), w(static_cast<size_t>(s.k) * s.c), mean(s.c), scale(s.c), bias(s.c) {
    for (int i = 0; i < s.c; ++i) {
      mean[i] = static_cast<float>(uniform(seed * 8, i));
      scale[i] = static_cast<float>(1 + uniform(seed * 8 + 1, i));
      bias[i] = static_cast<float>(uniform(seed * 8 + 2, i));
    }
    for (size_t i = 0; i < w.size(); ++i) {
      w[i] = from_acc<BFloat16>(static_cast<float>(uniform(seed * 8 + 3, i)));
    }
    for (size_t i = 0; i < x.size(); ++i) {
      const double value = mean[i % s.c] + 2 * uniform(seed * 8 + 4, i);
      x[i] = from_acc<BFloat16>(static_cast<float>(value));
    }
  }
};

constexpr int kSumRows = 64;
constexpr double weight_of(int64_t row) { return 1 + row % 3; }

struct Truth {
  std::vector<int64_t> rows;  // that are compared element by element
  std::vector<double> y;      // [rows][k]
  std::vector<double> sums;   // [ceil(m / kSumRows)][k], each over the root of its squared weights
  double scale = 0;           // the largest |y|
};

std::vector<int64_t> rows_to_compare(const Size& s) {
  constexpr int64_t kWork = 1 << 28, kEnds = 160, kBetween = 192;
  std::vector<int64_t> rows;
  const bool all = s.m * s.c * s.k <= kWork || s.m <= 2 * kEnds + kBetween;
  for (int64_t row = 0; row < s.m; ++row) {
    if (all || row < kEnds || row >= s.m - kEnds || row % (s.m / kBetween) == 0) {
      rows.push_back(row);
    }
  }
  return rows;
}

// y [k] = a [c] @ w [k, c]^T
void multiply_row(const std::vector<double>& a, const std::vector<double>& w, double* y, int k) {
  const size_t c = a.size();
  for (int column = 0; column < k; ++column) {
    double sum = 0;
    for (size_t i = 0; i < c; ++i) sum += a[i] * w[column * c + i];
    y[column] = sum;
  }
}

void activate_row(const Inputs& in, const Size& s, int64_t row, std::vector<double>* a) {
  for (int i = 0; i < s.c; ++i) {
    const double x = to_acc(in.x[row * s.c + i]);
    const double value = (x - in.mean[i]) * in.scale[i] + in.bias[i];
    (*a)[i] = to_acc(from_acc<BFloat16>(static_cast<float>(value > 0 ? value : 0)));
  }
}

Truth find_truth(const Inputs& in, const Size& s) {
  Truth truth;
  truth.rows = rows_to_compare(s);
  truth.y.resize(truth.rows.size() * s.k);
  std::vector<double> w(in.w.size()), a(s.c), sum(s.c);
  for (size_t i = 0; i < w.size(); ++i) w[i] = to_acc(in.w[i]);
  for (size_t i = 0; i < truth.rows.size(); ++i) {
    activate_row(in, s, truth.rows[i], &a);
    multiply_row(a, w, &truth.y[i * s.k], s.k);
  }
  for (const double y : truth.y) truth.scale = std::max(truth.scale, std::abs(y));

  const int64_t parts = ceil_div(s.m, kSumRows);
  truth.sums.resize(parts * s.k);
  for (int64_t part = 0; part < parts; ++part) {
    std::fill(sum.begin(), sum.end(), 0.0);
    double squares = 0;
    for (int64_t row = part * kSumRows; row < std::min((part + 1) * kSumRows, s.m); ++row) {
      activate_row(in, s, row, &a);
      for (int i = 0; i < s.c; ++i) sum[i] += weight_of(row) * a[i];
      squares += weight_of(row) * weight_of(row);
    }
    for (double& value : sum) value /= std::sqrt(squares);
    multiply_row(sum, w, &truth.sums[part * s.k], s.k);
  }
  return truth;
}

// --- checks --------------------------------------------------------------------------------------

// An element's own rounding is off by up to 2^-8 of it; beside that there is the order of sums, and
// now and then an activation that rounds to the other side.
constexpr double kTolerance = 0x1.4p-8;

void note(double error, double* worst) {
  if (!(error <= *worst)) *worst = std::isnan(error) ? INFINITY : error;
}

double error_of(const std::vector<BFloat16>& y, const Truth& truth, const Size& s) {
  double worst = 0;
  for (size_t i = 0; i < truth.rows.size(); ++i) {
    for (int k = 0; k < s.k; ++k) {
      const double found = to_acc(y[truth.rows[i] * s.k + k]);
      note(std::abs(found - truth.y[i * s.k + k]) / truth.scale, &worst);
    }
  }
  std::vector<double> sum(s.k);
  for (int64_t first = 0; first < s.m; first += kSumRows) {
    std::fill(sum.begin(), sum.end(), 0.0);
    double squares = 0;
    for (int64_t row = first; row < std::min(first + kSumRows, s.m); ++row) {
      const double weight = weight_of(row);
      for (int k = 0; k < s.k; ++k) sum[k] += weight * to_acc(y[row * s.k + k]);
      squares += weight * weight;
    }
    for (int k = 0; k < s.k; ++k) {
      const double right = truth.sums[first / kSumRows * s.k + k];
      // Over the root of its weights' squares it has the error of an element, were roundings dice;
      // the largest of so many sums is beyond that.
      note(std::abs(sum[k] / std::sqrt(squares) - right) / truth.scale / 2, &worst);
    }
  }
  return worst;
}

// Of mean and standard deviation, against those of y as it was stored.
double error_of_statistics(const std::vector<BFloat16>& y, const std::vector<float>& mean,
                           const std::vector<float>& var, double scale, const Size& s) {
  std::vector<double> sum(s.k), squares(s.k);
  for (int64_t row = 0; row < s.m; ++row) {
    for (int k = 0; k < s.k; ++k) {
      const double value = to_acc(y[row * s.k + k]);
      sum[k] += value;
      squares[k] += value * value;
    }
  }
  double worst = 0;
  for (int k = 0; k < s.k; ++k) {
    const double right = sum[k] / s.m;
    note(std::abs(mean[k] - right) / scale, &worst);
    const double right_var = std::max(squares[k] / s.m - right * right, 0.0);
    note(std::abs(std::sqrt(static_cast<double>(var[k])) - std::sqrt(right_var)) / scale, &worst);
  }
  return worst;
}

// --- rows ----------------------------------------------------------------------------------------

struct Row {
  Size size;
  const char* name;
  double error, ms, gb_s, of_copy, tflops;
  bool right;
};

std::string json_of(const Row& row, const std::string& device, double copy_gb_s) {
  const auto number = [](double x) {
    std::ostringstream out;
    if (std::isfinite(x)) {
      out << x;
    } else {
      out << "null";
    }
    return out.str();
  };
  std::ostringstream out;
  out << "{\"device\": \"" << device << "\", \"m\": " << row.size.m << ", \"c\": " << row.size.c
      << ", \"k\": " << row.size.k << ", \"rung\": \"" << row.name
      << "\", \"right\": " << (row.right ? "true" : "false")
      << ", \"max_error\": " << number(row.error);
  if (row.ms > 0) {
    out << ", \"ms\": " << number(row.ms) << ", \"gb_s\": " << number(row.gb_s)
        << ", \"of_copy\": " << number(row.of_copy) << ", \"copy_gb_s\": " << number(copy_gb_s)
        << ", \"tflops\": " << number(row.tflops);
  }
  out << "}";
  return out.str();
}

// What a copy within the device reaches, read and written.
double measure_copy() {
  constexpr size_t kBytes = size_t{1} << 30;
  const Buffer from(kBytes), to(kBytes);
  fill(from.as<void>(), 1, kBytes);
  const double ms =
      time_runs(10, [&](int) { copy_on_device(to.as<void>(), from.as<void>(), kBytes); });
  return 2.0 * kBytes / ms * 1e-6;
}

bool wanted(const NamedRung& rung, const std::string& names) {
  return names.empty() ||
         ("," + names + ",").find("," + std::string(rung.name) + ",") != std::string::npos;
}

bool device_runs(const NamedRung& rung) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  if (rung.least < 9) return major >= rung.least;
  return major == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

// Copies of x and y that runs take in turn: together they exceed the L2 cache three times, so that
// none finds its input there.
struct Operands {
  std::vector<Buffer> x, y;

  Operands(const Inputs& in, const Size& s, bool times) {
    const size_t x_bytes = in.x.size() * sizeof(BFloat16), y_bytes = s.m * s.k * sizeof(BFloat16);
    const size_t copies = times ? 1 + 3 * cache_bytes() / (x_bytes + y_bytes) : 1;
    for (size_t i = 0; i < copies; ++i) {
      x.push_back(on_device(in.x));
      y.emplace_back(y_bytes);
    }
  }
};

// Whether all is right.
bool climb(const Size& s, const Options& options, double copy_gb_s, std::vector<Row>* rows) {
  const Inputs in(s, options.seed);
  const Truth truth = find_truth(in, s);
  const bool times = kTimes && !options.check_only;
  const Operands operands(in, s, times);
  const Buffer w = on_device(in.w), mean = on_device(in.mean), scale = on_device(in.scale);
  const Buffer bias = on_device(in.bias), y_mean(s.k * 4), y_var(s.k * 4);
  Problem p = {};
  p.m = s.m;
  p.c = s.c;
  p.k = s.k;
  p.w = w.as<BFloat16>();
  p.mean = mean.as<float>();
  p.scale = scale.as<float>();
  p.bias = bias.as<float>();
  p.y_mean = y_mean.as<float>();
  p.y_var = y_var.as<float>();
  int64_t bytes = 0;
  expect(library_workspace(p, &bytes), "workspace of the library's kernels");
  const Buffer workspace(bytes);
  p.workspace = workspace.as<void>();

  printf("\nm %lld, c %d, k %d\n", static_cast<long long>(s.m), s.c, s.k);
  printf("%-20s %10s %9s %8s %8s %8s\n", "rung", "max error", "ms", "GB/s", "of copy", "TFLOP/s");
  bool right = true;
  std::vector<BFloat16> y(s.m * s.k);
  std::vector<float> found_mean(s.k), found_var(s.k);
  for (const NamedRung& rung : kRungs) {
    if (!wanted(rung, options.rungs)) continue;
    if (!device_runs(rung)) {
      printf("%-20s passed over: this device cannot run it\n", rung.name);
      continue;
    }
    const auto run = [&](int i) {
      p.x = operands.x[i % operands.x.size()].as<BFloat16>();
      p.y = operands.y[i % operands.y.size()].as<BFloat16>();
      return rung.run(p);
    };
    for (const Buffer* out : {&operands.y[0], &y_mean, &y_var, &workspace}) {
      fill(out->as<void>(), 0xff, out->bytes());  // NaN: what is left unwritten shows
    }
    const cudaError_t status = run(0);
    if (status == cudaErrorNotSupported) {
      printf("%-20s passed over: no room on the chip, or no code for this device\n", rung.name);
      continue;
    }
    expect(status, rung.name);
    finish(rung.name);
    to_host(y.data(), p.y, y.size() * sizeof(BFloat16));
    Row row = {s, rung.name, error_of(y, truth, s), 0, 0, 0, 0, false};
    if (rung.statistics) {
      to_host(found_mean.data(), p.y_mean, y_mean.bytes());
      to_host(found_var.data(), p.y_var, y_var.bytes());
      note(error_of_statistics(y, found_mean, found_var, truth.scale, s), &row.error);
    }
    row.right = row.error <= kTolerance;
    right = right && row.right;
    printf("%-20s %10.2e", rung.name, row.error);
    if (times && row.right) {
      row.ms = time_runs(options.runs, [&](int i) { expect(run(i), rung.name); });
      const double elements = static_cast<double>(s.m) * (s.c + s.k) + 1.0 * s.k * s.c;
      row.gb_s = (2 * elements + 12.0 * s.c) / row.ms * 1e-6;
      row.of_copy = row.gb_s / copy_gb_s;
      row.tflops = 2.0 * s.m * s.c * s.k / row.ms * 1e-9;
      printf(" %9.4f %8.0f %7.1f%% %8.1f", row.ms, row.gb_s, 100 * row.of_copy, row.tflops);
    }
    printf("%s\n", row.right ? "" : "  WRONG");
    fflush(stdout);
    rows->push_back(row);
  }
  return right;
}

[[noreturn]] void misuse(const std::string& why) {
  fprintf(stderr, "ladder: %s\n", why.c_str());
  exit(2);
}

int64_t number(const std::string& text, int64_t least, int64_t most) {
  char* end = nullptr;
  const long long value = strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || value < least || value > most) {
    misuse("not a number between " + std::to_string(least) + " and " + std::to_string(most) + ": " +
           text);
  }
  return value;
}

Options read_options(int argc, char** argv) {
  Options options;
  Size size = {};
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--check-only") {
      options.check_only = true;
      continue;
    }
    const std::string value = i + 1 < argc ? argv[++i] : "";
    if (name == "--m") {
      size.m = number(value, 1, 0x7fffffff - kLadderRows);
    } else if (name == "--c" || name == "--k") {
      const int channels = static_cast<int>(number(value, 64, 1 << 20));
      if (channels % 64 != 0) misuse(name + " must be a multiple of 64");
      (name == "--c" ? size.c : size.k) = channels;
    } else if (name == "--rungs") {
      options.rungs = value;
      std::istringstream names(value);
      std::string known;
      for (const NamedRung& rung : kRungs) known += std::string(" ") + rung.name;
      for (std::string one; std::getline(names, one, ',');) {
        if ((known + " ").find(" " + one + " ") == std::string::npos) {
          misuse("no rung " + one + "; there are:" + known);
        }
      }
    } else if (name == "--json") {
      options.json = value;
    } else if (name == "--runs") {
      options.runs = static_cast<int>(number(value, 1, 10000));
    } else if (name == "--seed") {
      options.seed = number(value, 0, 1 << 20);
    } else {
      misuse("unknown argument " + name);
    }
  }
  const int given = (size.m > 0) + (size.c > 0) + (size.k > 0);
  if (given == 3) options.sizes = {size};
  if (given == 1 || given == 2) misuse("--m, --c and --k go together");
  return options;
}

}  // namespace

int run_ladder(int argc, char** argv) {
  const Options options = read_options(argc, argv);
  order_threads(options.seed);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    fprintf(stderr, "ladder: no CUDA device\n");
    return 1;
  }
  const std::string device = device_name();
  const double copy_gb_s = kTimes && !options.check_only ? measure_copy() : 0;
  printf("%s", device.c_str());
  if (copy_gb_s > 0) printf(": a copy reads and writes %.0f GB/s", copy_gb_s);
  printf("\n");
  std::vector<Row> rows;
  bool right = true;
  for (const Size& size : options.sizes) {
    right = climb(size, options, copy_gb_s, &rows) && right;
  }
  if (!options.json.empty()) {
    std::ofstream out(options.json);
    for (const Row& row : rows) out << json_of(row, device, copy_gb_s) << "\n";
    if (!out.flush()) {
      fprintf(stderr, "ladder: cannot write %s\n", options.json.c_str());
      return 1;
    }
  }
  return right && !rows.empty() ? 0 : 1;
}

}  // namespace fusedres

int main(int argc, char** argv) { return fusedres::run_ladder(argc, argv); }
