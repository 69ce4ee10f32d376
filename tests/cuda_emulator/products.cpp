// Products of tensor cores: of warps, at once, and of warpgroups, some time later.
#include "async.h"

// For the inner loops, whose bounds are checked before.
#define FUSEDRES_UNCHECKED __attribute__((no_sanitize("address", "undefined")))

#pragma GCC visibility push(hidden)
namespace fusedres {
namespace emulator {
namespace {

// --- Numbers ------------------------------------------------------------------------------------

// By table: without instructions for it, a conversion of float16 is a call of the library.
const float* numbers(bool bfloat16) {
  static const auto make = [](auto zero) {
    using T = decltype(zero);
    std::vector<float> table(1 << 16);
    for (unsigned i = 0; i < table.size(); ++i) table[i] = to_acc(T{static_cast<uint16_t>(i)});
    return table;
  };
  static const std::vector<float> tables[2] = {make(Float16{}), make(BFloat16{})};
  return tables[bfloat16].data();
}

// d [16, columns] += a [16, 16] @ b [16, columns]; the terms of a sum in the order of k.
FUSEDRES_UNCHECKED void add_product(const float* a, const float* b, float* d, int columns) {
  typedef float Eight __attribute__((vector_size(32)));
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < columns; column += 8) {
      Eight sum, term;
      memcpy(&sum, d + row * columns + column, sizeof sum);
      for (int k = 0; k < 16; ++k) {
        memcpy(&term, b + k * columns + column, sizeof term);
        sum += a[row * 16 + k] * term;
      }
      memcpy(d + row * columns + column, &sum, sizeof sum);
    }
  }
}

// A lane's four words of A [16, 16].
FUSEDRES_UNCHECKED void put_fragment(const uint32_t* words, int lane, const float* table,
                                     float* a) {
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
    a[row * 16 + k] = table[words[i] & 0xffffu];
    a[row * 16 + k + 1] = table[words[i] >> 16];
  }
}

// Where a lane's d[i] lies in D [16, columns].
int place_of(int lane, int i, int columns) {
  const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
  return row * columns + column;
}

// --- Products in flight -------------------------------------------------------------------------

// A product's descriptor of B (PTX: matrix descriptor), taken apart.
struct Tile {
  uint32_t start, leading, stride;  // in bytes
  uint32_t base, swizzle;

  explicit Tile(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7),
        swizzle(bits >> 62) {}

  // Before the swizzle.
  uint32_t address(bool n_major, uint32_t n, uint32_t k) const {
    if (n_major) return start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * kRowBytes;
    return start + n / 8 * stride + n % 8 * kRowBytes + k * 2;
  }
};

FUSEDRES_UNCHECKED void read_tile(const Product& product, const unsigned char* shared, float* b) {
  const Tile tile(product.b);
  const float* const table = numbers(product.bfloat16);
  for (int n = 0; n < product.columns; ++n) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = tile.address(product.n_major, n, k);
      uint16_t bits;
      memcpy(&bits, shared + (address ^ (address >> 3 & 0x70u)), sizeof bits);
      b[k * product.columns + n] = table[bits];
    }
  }
}

bool is_gone([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  return __asan_region_is_poisoned(const_cast<void*>(p), bytes) != nullptr;
#else
  return false;
#endif
}

void check_fragments(const Async& async, const Warpgroup& group, int w, const Issue& issue) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const bool gone = is_gone(issue.a[lane], sizeof issue.issued[lane]);
    if (!gone && memcmp(issue.a[lane], issue.issued[lane], sizeof issue.issued[lane]) == 0)
      continue;
    const int thread = async.block->first + group.first + w * kWarp + lane;
    fail_waiting(&machine().threads[thread],
                 "changes or drops a fragment of the product of %s:%d before it has waited for it",
                 issue.site.file, issue.site.line);
  }
}

bool all_nan(const float* d, int size) {
  const auto bytes = reinterpret_cast<const unsigned char*>(d);
  return std::all_of(bytes, bytes + size * sizeof *d, [](unsigned char x) { return x == 0xff; });
}

void check_untouched(const Thread& thread, const float* d, int size, Site site) {
  if (!is_gone(d, size * sizeof *d) && all_nan(d, size)) return;
  fail_waiting(
      &thread,
      "changes or drops an accumulator of the product of %s:%d before it has waited for it",
      site.file, site.line);
}

// What the warp waits for is over: its accumulators get their values. All of its products up to
// `wanted` have been issued by the other warps too.
void finish_wait(Async* async, Warpgroup* group, int w) {
  Member& member = group->warps[w];
  const int first = async->block->first + group->first + w * kWarp;
  while (group->done < member.wanted) do_product(async, group);
  Site site = {};
  for (; member.waited < member.wanted; ++member.waited) {
    check_fragments(*async, *group, w, member.issues.front());
    site = member.issues.front().site;
    member.issues.pop_front();
  }
  for (auto it = member.accumulators.begin(); it != member.accumulators.end();) {
    if (it->last >= member.waited) {
      ++it;
      continue;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      float* const d = it->d[lane];
      check_untouched(machine().threads[first + lane], d, it->columns / 2, site);
      for (int i = 0; i < it->columns / 2; ++i) d[i] = it->values[place_of(lane, i, it->columns)];
    }
    it = member.accumulators.erase(it);
  }
}

// --- Warpgroups ---------------------------------------------------------------------------------

struct Place {
  Async* async;
  Warpgroup* group;
  int w;  // of the warp in it

  Member& member() const { return group->warps[w]; }
};

Place place_of(const Warp& warp, const char* what, Site site) {
  const Thread& thread = lane_of(warp, 0);
  Async& async = async_of(thread);
  const size_t group = thread.number / kGroup;
  if (group >= async.groups.size()) {
    fail("executes %s at %s:%d in a warpgroup that is not whole", what, site.file, site.line);
  }
  return {&async, &async.groups[group], thread.number % kGroup / kWarp};
}

// Warps may come here one after another, but not to different events.
void check_alike(const Place& place, const Event& event) {
  Warpgroup& group = *place.group;
  const uint64_t number = place.member().events++ - group.past;
  if (number == group.events.size()) {
    group.events.push_back(event);
  } else {
    const Event& other = group.events[number];
    if (strcmp(other.what, event.what) != 0 || !same(other.site, event.site)) {
      fail("executes %s at %s:%d, but another warp of its warpgroup %s at %s:%d", event.what,
           event.site.file, event.site.line, other.what, other.site.file, other.site.line);
    }
    if (other.operand != event.operand || other.flags != event.flags) {
      fail("executes %s at %s:%d with other operands than another warp of its warpgroup",
           event.what, event.site.file, event.site.line);
    }
  }
  uint64_t least = place.member().events;
  for (const Member& member : group.warps) least = std::min(least, member.events);
  for (; group.past < least; ++group.past) group.events.pop_front();
}

struct WgmmaArgs {
  float* d;
  const uint32_t* a;
  Product product;
};

void check_tile(const Product& product, Site site) {
  const Tile tile(product.b);
  if (tile.base != 0 || tile.swizzle != 1) {
    fail("wgmma at %s:%d: descriptor 0x%016llx has base offset %u and swizzle %u, not 0 and 1",
         site.file, site.line, static_cast<unsigned long long>(product.b), tile.base, tile.swizzle);
  }
  const bool one_pattern = !product.n_major || product.columns == 64;
  const uint32_t within = tile.start % kPatternBytes;  // K-major tiles may begin at a later k
  if (tile.stride % kPatternBytes || (!one_pattern && tile.leading % kPatternBytes) ||
      within > (product.n_major ? 0 : kRowBytes - 32)) {
    fail(
        "misaligned: wgmma at %s:%d of a tile at shared address %u with strides %u and %u, which "
        "must be multiples of 1024",
        site.file, site.line, tile.start, tile.leading, tile.stride);
  }
  const uint32_t last = tile.address(product.n_major, product.columns - 1, 15);
  if ((last | (kRowBytes - 1)) >= machine().shared_bytes) {
    fail("wgmma at %s:%d of a tile that ends at shared address %u, beyond the block's", site.file,
         site.line, last | (kRowBytes - 1));
  }
}

// The accumulators at the lanes' d, which become NaN.
Accumulators* taken(const Warp& warp, Member* member, bool keep, int columns, Site site) {
  const size_t bytes = columns / 2 * sizeof(float);
  for (Accumulators& held : member->accumulators) {
    if (held.d[0] != args_of<WgmmaArgs>(warp, 0).d) continue;
    if (held.columns != columns) {
      fail("wgmma at %s:%d to accumulators that a product of another size has", site.file,
           site.line);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      check_untouched(lane_of(warp, lane), held.d[lane], columns / 2, site);
    }
    return &held;
  }
  Accumulators& fresh = member->accumulators.emplace_back();
  fresh.columns = columns;
  fresh.values.resize(16 * columns);
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const d = fresh.d[lane] = args_of<WgmmaArgs>(warp, lane).d;
    for (int i = 0; keep && i < columns / 2; ++i) fresh.values[place_of(lane, i, columns)] = d[i];
    memset(d, 0xff, bytes);
  }
  return &fresh;
}

bool issue_product(const Warp& warp) {
  const Site site = lane_of(warp, 0).site;
  const Place place = place_of(warp, "wgmma", site);
  Member& member = place.member();
  const Product product = args_of<WgmmaArgs>(warp, 0).product;
  for (int lane = 1; lane < kWarp; ++lane) {
    const Product& other = args_of<WgmmaArgs>(warp, lane).product;
    if (other.b != product.b || other.accumulate != product.accumulate) {
      fail("executes wgmma at %s:%d with other operands than another lane of its warp", site.file,
           site.line);
    }
  }
  if (!member.fenced) {
    fail("executes wgmma at %s:%d without wgmma_fence() since the last wgmma_wait()", site.file,
         site.line);
  }
  check_tile(product, site);
  const int flags = product.columns << 3 | product.accumulate << 2 | product.n_major << 1 |
                    static_cast<int>(product.bfloat16);
  check_alike(place, {"wgmma", site, product.b, flags});

  Warpgroup& group = *place.group;
  Issue& issue = member.issues.emplace_back();
  issue.product = product;
  issue.site = site;
  for (int lane = 0; lane < kWarp; ++lane) {
    issue.a[lane] = args_of<WgmmaArgs>(warp, lane).a;
    memcpy(issue.issued[lane], issue.a[lane], sizeof issue.issued[lane]);
  }
  issue.accumulators = taken(warp, &member, product.accumulate, product.columns, site);
  issue.accumulators->last = member.issued;
  if (member.issued++ == group.done + group.products.size()) group.products.push_back(product);
  for (int w = 0; w < 4; ++w) {
    Member& other = group.warps[w];
    if (!other.parked || other.wanted > group.whole()) continue;
    other.parked = false;
    finish_wait(place.async, &group, w);
    const Block& block = *place.async->block;
    set_warp_ready(*machine().threads[block.first + group.first + w * kWarp].warp);
  }
  return true;
}

struct WaitArgs {
  int left;
};

bool wait_for_products(const Warp& warp) {
  const Site site = lane_of(warp, 0).site;
  const Place place = place_of(warp, "wgmma_wait", site);
  Member& member = place.member();
  const size_t left = args_of<WaitArgs>(warp, 0).left;
  check_alike(place, {"wgmma_wait", site, left, 0});
  member.fenced = false;
  while (member.groups.size() > left) {
    member.wanted = member.groups.front();
    member.groups.pop_front();
  }
  if (member.wanted <= place.group->whole()) {
    finish_wait(place.async, place.group, place.w);
    return true;
  }
  member.parked = true;
  for (int i = 0; i < kWarp; ++i) lane_of(warp, i).state = State::kAtProducts;
  return false;
}

struct MatrixArgs {
  uint32_t* words;
  const unsigned char* row;
};

template <bool kTransposed>
bool read_matrices(const Warp& warp) {
  uint16_t matrices[4][8][8];
  for (int i = 0; i < kWarp; ++i) {
    memcpy(matrices[i / 8][i % 8], args_of<MatrixArgs>(warp, i).row, sizeof matrices[0][0]);
  }
  for (int i = 0; i < kWarp; ++i) {
    const int row = i / 4, column = i % 4 * 2;
    for (int w = 0; w < 4; ++w) {
      const auto& matrix = matrices[w];
      const uint32_t low = kTransposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = kTransposed ? matrix[column + 1][row] : matrix[row][column + 1];
      args_of<MatrixArgs>(warp, i).words[w] = low | high << 16;
    }
  }
  return true;
}

struct MultiplyArgs {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <bool kBFloat16>
bool multiply_warp(const Warp& warp) {
  const float* const table = numbers(kBFloat16);
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const MultiplyArgs& args = args_of<MultiplyArgs>(warp, lane);
    put_fragment(args.a, lane, table, a);
    for (int i = 0; i < 4; ++i) {
      b[(lane % 4 * 2 + i / 2 * 8 + i % 2) * 8 + lane / 4] =
          table[args.b[i / 2] >> (i % 2 * 16) & 0xffffu];
      d[place_of(lane, i, 8)] = args.d[i];
    }
  }
  add_product(a, b, d, 8);
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const out = args_of<MultiplyArgs>(warp, lane).d;
    for (int i = 0; i < 4; ++i) out[i] = d[place_of(lane, i, 8)];
  }
  return true;
}

}  // namespace

// --- What async.cpp asks ------------------------------------------------------------------------

void do_product(Async* async, Warpgroup* group) {
  static std::vector<float> b(16 * 256);
  const Product product = group->products.front();
  group->products.pop_front();
  const uint64_t number = group->done++;
  read_tile(product, async->block->shared.get(), b.data());
  for (int w = 0; w < 4; ++w) {
    const Issue& issue = group->warps[w].issues[number - group->warps[w].waited];
    check_fragments(*async, *group, w, issue);
    float a[16 * 16];
    for (int lane = 0; lane < kWarp; ++lane) {
      put_fragment(issue.a[lane], lane, numbers(product.bfloat16), a);
    }
    std::vector<float>& values = issue.accumulators->values;
    if (!product.accumulate) std::fill(values.begin(), values.end(), 0.0f);
    add_product(a, b.data(), values.data(), product.columns);
  }
}

void check_not_read(const Async& async, uint32_t to, uint32_t bytes, const char* what, Site site) {
  const auto meets = [&](uint32_t start, uint32_t size) {
    return start < to + bytes && to < start + size;
  };
  for (const Warpgroup& group : async.groups) {
    uint64_t waited = 0;
    for (const Member& member : group.warps) waited = std::max(waited, member.waited);
    for (const Member& member : group.warps) {
      for (size_t i = waited - member.waited; i < member.issues.size(); ++i) {
        const Issue& issue = member.issues[i];
        const Tile tile(issue.product.b);
        const uint32_t start = tile.start & ~(kRowBytes - 1);
        bool read = false;
        for (int n = 0; n < issue.product.columns; n += issue.product.n_major ? 64 : 8) {
          read |= issue.product.n_major
                      ? meets(start + n / 64 * tile.leading, tile.stride + kPatternBytes)
                      : meets(start + n / 8 * tile.stride, kPatternBytes);
        }
        if (!read) continue;
        fail("%s at %s:%d to the tile of the product of %s:%d, which none has waited for", what,
             site.file, site.line, issue.site.file, issue.site.line);
      }
    }
  }
}

// --- What kernels call --------------------------------------------------------------------------

void load_matrices(uint32_t* words, const void* row, bool transposed, Site site) {
  const char* const what = transposed ? "load_matrices_transposed" : "load_matrices";
  at(what, site, false);
  shared_range(row, 16, 16, what, site);
  check_readable(row, 16);
  const MatrixArgs args = {words, static_cast<const unsigned char*>(row)};
  together(what, args, site, transposed ? read_matrices<true> : read_matrices<false>);
}

void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site) {
  const char* const what = bfloat16 ? "multiply<BFloat16>" : "multiply<Float16>";
  at(what, site, false);
  const MultiplyArgs args = {d, a, {b0, b1}};
  together(what, args, site, bfloat16 ? multiply_warp<true> : multiply_warp<false>);
}

void move_registers(bool take, int count, Site site) {
  const char* const what = take ? "take_registers" : "give_registers";
  at(what, site, true);
  together(what, std::make_pair(what, count), site, [](const Warp& warp) {
    const auto [what, count] = args_of<std::pair<const char*, int>>(warp, 0);
    const Site site = lane_of(warp, 0).site;
    check_alike(place_of(warp, what, site), {what, site, static_cast<uint64_t>(count), 0});
    return true;
  });
}

void wgmma_fence(Site site) {
  at("wgmma_fence", site, true);
  together("wgmma_fence", 0, site, [](const Warp& warp) {
    const Site site = lane_of(warp, 0).site;
    const Place place = place_of(warp, "wgmma_fence", site);
    check_alike(place, {"wgmma_fence", site, 0, 0});
    place.member().fenced = true;
    return true;
  });
}

void wgmma_commit(Site site) {
  at("wgmma_commit", site, true);
  together("wgmma_commit", 0, site, [](const Warp& warp) {
    const Site site = lane_of(warp, 0).site;
    const Place place = place_of(warp, "wgmma_commit", site);
    check_alike(place, {"wgmma_commit", site, 0, 0});
    place.member().groups.push_back(place.member().issued);
    return true;
  });
}

void wgmma_wait(int left, Site site) {
  at("wgmma_wait", site, true);
  together("wgmma_wait", WaitArgs{left}, site, wait_for_products);
}

void wgmma(float* d, int size, const uint32_t* a, uint64_t b, bool accumulate, bool n_major,
           bool bfloat16, Site site) {
  at("wgmma", site, true);
  const Product product = {b, size * 2, accumulate, n_major, bfloat16};
  together("wgmma", WgmmaArgs{d, a, product}, site, issue_product);
}

}  // namespace emulator
}  // namespace fusedres
#pragma GCC visibility pop
