// Lists of tiles: which splats meet which tiles, those of a tile front to back.
// Splats in memory order: the box of each, a register of coordinates at a time, and what has one
// into a stable radix sort by the bits of its depth. Then in depth order: of the tiles of a box,
// a register at a time, those that the ellipse reaches, and how many each tile has. Last a counting
// sort: each splat goes to the ends of its tiles' lists. Threads take blocks of splats, and their
// counts, of digits or of tiles, meet in the order of the blocks. docs/splats.md
#include "rays.h"
#include "../math/intersect_tiles.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

namespace rayfuse {
namespace {

// A block of things.
struct Range {
  int64_t begin, end;

  // The i-th of so many parts of n.
  static Range part(int64_t n, int64_t i, int64_t parts) {
    return {n * i / parts, n * (i + 1) / parts};
  }
};

// ---- boxes

// In tiles: none where `high` is not above `low` in both.
struct Box {
  int32_t low[2], high[2];

  bool exists() const { return high[0] > low[0] && high[1] > low[1]; }
};

template <class A>
RAYFUSE_KERNEL void find_boxes(const Range& block, const Splats<A>& splats, Box* boxes) {
  using Integers = lane_index<A>;
  constexpr int K = kLanes<A>;
  vec<A> count;
  for (int i = 0; i < K; ++i) count[i] = static_cast<A>(i % 2 ? splats.Y : splats.X);
  for (int64_t i = 2 * block.begin; i < 2 * block.end; i += K) {
    const int64_t n = std::min<int64_t>(2 * block.end - i, K);
    const vec<A> mean = n < K ? load(splats.means2d + i, n) : load(splats.means2d + i);
    const vec<A> radius = n < K ? load(splats.radii + i, n) : load(splats.radii + i);
    const Reach<vec<A>, A> reach(mean, radius, splats.size, count);
    const Integers low = __builtin_convertvector(reach.low, Integers);
    Integers high = __builtin_convertvector(reach.high, Integers);
    // one more where that rounded down
    high -= __builtin_convertvector(high, vec<A>) < reach.high;
    high = reach.found ? high : low;
    for (int64_t k = 0; k < n; ++k) {
      Box& box = boxes[(i + k) / 2];
      box.low[k % 2] = static_cast<int32_t>(low[k]);
      box.high[k % 2] = static_cast<int32_t>(high[k]);
    }
  }
}

// ---- order

// A splat and its depth, as bits that sort as it does.
template <class A>
struct Entry {
  using Key = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

  Key key;
  int32_t splat;

  Entry() = default;
  Entry(A depth, int64_t p) : splat(static_cast<int32_t>(p)) {
    constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
    // the sum makes one zero of both
    const Key bits = std::bit_cast<Key>(depth + A(0));
    key = bits & kSign ? ~bits : bits | kSign;
  }
};

// The splats of a block that have a box, in their order; how many they are.
template <class A>
RAYFUSE_KERNEL int64_t collect(const Range& block, const Splats<A>& splats, const Box* boxes,
                               Entry<A>* entries) {
  int64_t n = 0;
  for (int64_t p = block.begin; p < block.end; ++p) {
    if (boxes[p].exists() && splats.exists(p)) entries[n++] = {splats.depths[p], p};
  }
  return n;
}

constexpr int kDigitBits = 11;
constexpr int64_t kDigits = 1 << kDigitBits;

template <class A>
int64_t digit_of(const Entry<A>& entry, int shift) {
  return entry.key >> shift & (kDigits - 1);
}

template <class A>
RAYFUSE_KERNEL void count_digits(const Range& block, int shift, const Entry<A>* entries,
                                 int64_t* counts) {  // [kDigits]
  for (int64_t k = block.begin; k < block.end; ++k) ++counts[digit_of(entries[k], shift)];
}

template <class A>
RAYFUSE_KERNEL void place_by_digit(const Range& block, int shift, const Entry<A>* from,
                                   int64_t* places, Entry<A>* to) {
  for (int64_t k = block.begin; k < block.end; ++k) {
    to[places[digit_of(from[k], shift)]++] = from[k];
  }
}

// ---- lists

// How lanes lie in rows of so many tiles, up to all lanes in one row.
template <class A>
class Layouts {
 public:
  struct Layout {
    A column[kLanes<A>], row[kLanes<A>];
    int32_t columns[kLanes<A>], rows[kLanes<A>];
  };

  Layouts() {
    for (int across = 1; across <= kLanes<A>; ++across) {
      Layout& layout = of_width_[across - 1];
      for (int i = 0; i < kLanes<A>; ++i) {
        layout.column[i] = static_cast<A>(layout.columns[i] = i % across);
        layout.row[i] = static_cast<A>(layout.rows[i] = i / across);
      }
    }
  }
  const Layout& across(int width) const { return of_width_[width - 1]; }

 private:
  Layout of_width_[kLanes<A>];
};

// Calls keep(tile) for those of a box that the ellipse of splat p reaches; `first` is its first.
template <class A, class F>
void for_each_reached(const Splats<A>& splats, int64_t p, const Box& box, int32_t first,
                      const Layouts<A>& layouts, const F& keep) {
  const Ellipse<A> ellipse(splats, p);
  const auto [left, top] = box.low;
  const int32_t width = box.high[0] - left, height = box.high[1] - top;
  const int32_t across = std::min<int32_t>(width, kLanes<A>), down = kLanes<A> / across;
  const auto& layout = layouts.across(across);
  const vec<A> columns = load(layout.column), rows = load(layout.row);
  int32_t further[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) further[i] = layout.rows[i] * splats.X + layout.columns[i];
  for (int32_t row = 0; row < height; row += down) {
    const vec<A> y = (rows + static_cast<A>(top + row)) * splats.size + splats.center - ellipse.y;
    for (int32_t column = 0; column < width; column += across) {
      const vec<A> x =
          (columns + static_cast<A>(left + column)) * splats.size + splats.center - ellipse.x;
      const vec<A> sigma = ellipse.least_sigma(x, y, splats.size - 1);
      const int lanes = std::min(down, height - row) * std::min(across, width - column);
      uint32_t reached = lanes_up_to(sigma, broadcast(ellipse.most)) & ((1u << lanes) - 1);
      const int32_t here = first + row * splats.X + column;
      for (; reached; reached &= reached - 1) keep(here + further[__builtin_ctz(reached)]);
    }
  }
}

// In depth order what belongs to a splat is anywhere in memory.
constexpr int64_t kAhead = 16;

template <class A>
void prefetch(const Splats<A>& splats, const Box* boxes, int64_t p) {
  __builtin_prefetch(boxes + p);
  if (!splats.conics) return;
  __builtin_prefetch(splats.means2d + 2 * p);
  __builtin_prefetch(splats.conics + 3 * p);
  __builtin_prefetch(splats.conics + 3 * p + 2);
  __builtin_prefetch(splats.most + p);
}

// For each splat of a block how many tiles it has and which, one splat after the other; and how
// many splats each tile has.
template <class A>
RAYFUSE_KERNEL void find_tiles(const Range& block, const Splats<A>& splats, const Box* boxes,
                               const Entry<A>* entries, std::vector<int32_t>& found,
                               int64_t* counts,       // [images, Y, X]
                               int32_t* per_splat) {  // [P]
  const Layouts<A> layouts;
  int64_t n = 0;
  for (int64_t k = block.begin; k < block.end; ++k) {
    const int64_t p = entries[k].splat;
    if (k + kAhead < block.end) prefetch(splats, boxes, entries[k + kAhead].splat);
    const Box box = boxes[p];
    const int32_t width = box.high[0] - box.low[0], height = box.high[1] - box.low[1];
    const int64_t most = n + 1 + int64_t{width} * height;
    if (most > static_cast<int64_t>(found.size())) found.resize(2 * most);
    const int32_t first =
        static_cast<int32_t>((splats.image_of(p) * splats.Y + box.low[1]) * splats.X + box.low[0]);
    int32_t* const tiles = &found[n + 1];
    int32_t own = 0;
    const auto keep = [&](int32_t tile) {
      tiles[own++] = tile;
      ++counts[tile];
    };
    if (splats.conics) {
      for_each_reached(splats, p, box, first, layouts, keep);
    } else {
      for (int32_t row = 0; row < height; ++row) {
        for (int32_t column = 0; column < width; ++column) keep(first + row * splats.X + column);
      }
    }
    found[n] = per_splat[p] = own;
    n += 1 + own;
  }
}

// Each splat of a block to the ends of the lists of its tiles.
template <class A>
RAYFUSE_KERNEL void fill_lists(const Range& block, const Entry<A>* entries, const int32_t* found,
                               int64_t* places, int64_t* ids) {
  for (int64_t k = block.begin; k < block.end; ++k) {
    const int32_t p = entries[k].splat;
    for (int32_t own = *found++; own > 0; --own) ids[places[*found++]++] = p;
  }
}

// ---- counting, by blocks

// How many of each bin every block has, and where they go if those of a bin follow each other in
// the order of the blocks.
class Counts {
 public:
  std::vector<int64_t> starts;  // of the bins
  int64_t most = 0;             // of one bin

  Counts(int64_t blocks, int64_t bins) : starts(bins), blocks_(blocks), counts_(blocks * bins) {}

  int64_t* of(int64_t block) { return counts_.data() + block * starts.size(); }

  // To be called once all is counted; returns how many that is.
  int64_t add_up() {
    for (int64_t b = 0; b < blocks_; ++b) {
      int64_t* const count = of(b);
      for (size_t i = 0; i < starts.size(); ++i) {
        starts[i] += count[i];
        count[i] = starts[i] - count[i];
      }
    }
    int64_t total = 0;
    for (int64_t& start : starts) {
      most = std::max(most, start);
      total += std::exchange(start, total);
    }
    return total;
  }
  // Then, once for each block: where the first of each of its bins goes.
  int64_t* places(int64_t block) {
    int64_t* const before = of(block);
    for (size_t i = 0; i < starts.size(); ++i) before[i] += starts[i];
    return before;
  }

 private:
  const int64_t blocks_;
  std::vector<int64_t> counts_;  // [blocks, bins]
};

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "../splats.h"

namespace rayfuse {
namespace {

// n things in blocks, of which each counts so many bins: that must not cost more than the things.
class Blocks {
 public:
  const int64_t count;

  Blocks(int64_t n, int64_t bins)
      : count(std::clamp<int64_t>(n / std::max<int64_t>(bins, kLeast), 1, kMost)), n_(n) {}

  Range operator[](int64_t b) const { return Range::part(n_, b, count); }

  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b);
    });
  }

 private:
  static constexpr int64_t kLeast = 1 << 13, kMost = 64;

  const int64_t n_;
};

// The splats that have a box, front to back.
template <class A>
class FrontToBack {
 public:
  int64_t n = 0;

  FrontToBack(const Splats<A>& splats, Box* boxes)
      : entries_(std::make_unique_for_overwrite<Entry<A>[]>(splats.P)),
        other_(std::make_unique_for_overwrite<Entry<A>[]>(splats.P)) {
    const Blocks blocks(splats.P, kDigits);
    std::vector<Range> ranges(blocks.count);
    blocks.for_each([&](int64_t b) {
      const Range block = blocks[b];
      find_boxes(block, splats, boxes);
      const int64_t found = collect(block, splats, boxes, &entries_[block.begin]);
      ranges[b] = {block.begin, block.begin + found};
    });
    for (int shift = 0; shift < 8 * static_cast<int>(sizeof(Entry<A>::key)); shift += kDigitBits) {
      Counts counts(blocks.count, kDigits);
      blocks.for_each(
          [&](int64_t b) { count_digits(ranges[b], shift, entries_.get(), counts.of(b)); });
      n = counts.add_up();
      // the first time blocks have gaps between them
      if (shift > 0 && counts.most == n) continue;
      blocks.for_each([&](int64_t b) {
        place_by_digit(ranges[b], shift, entries_.get(), counts.places(b), other_.get());
      });
      std::swap(entries_, other_);
      for (int64_t b = 0; b < blocks.count; ++b) ranges[b] = Range::part(n, b, blocks.count);
    }
  }

  const Entry<A>* entries() const { return entries_.get(); }

 private:
  std::unique_ptr<Entry<A>[]> entries_, other_;
};

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& means2d, const Tensor& radii,
                                       const Tensor& depths, const MaybeTensor& conics,
                                       const MaybeTensor& most, const MaybeTensor& image_ids,
                                       int64_t images, int64_t tile_size, int64_t tile_width,
                                       int64_t tile_height, double pixel_center) {
  const SplatsCall call{means2d, radii,     depths,     conics,      most,        image_ids,
                        images,  tile_size, tile_width, tile_height, pixel_center};
  Tensor per_splat = call.per_splat(), ids;
  const Tensor offsets = call.offsets();
  if (per_splat.numel()) torch::stable::zero_(per_splat);
  dispatch(means2d, [&](auto type) {
    using A = accumulator<decltype(type)>;
    const auto splats = call.splats<A>();
    const auto boxes = std::make_unique_for_overwrite<Box[]>(splats.P);
    const FrontToBack<A> order(splats, boxes.get());
    const Blocks blocks(order.n, splats.tiles());
    Counts counts(blocks.count, splats.tiles());
    std::vector<std::vector<int32_t>> found(blocks.count);
    auto* const counted = mutable_data<int32_t>(per_splat);
    blocks.for_each([&](int64_t b) {
      find_tiles(blocks[b], splats, boxes.get(), order.entries(), found[b], counts.of(b), counted);
    });
    ids = call.ids(counts.add_up());
    std::copy(counts.starts.begin(), counts.starts.end(), mutable_data<int64_t>(offsets));
    auto* const out = mutable_data<int64_t>(ids);
    blocks.for_each([&](int64_t b) {
      fill_lists(blocks[b], order.entries(), found[b].data(), counts.places(b), out);
    });
  });
  return {per_splat, ids, offsets};
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("intersect_tiles", TORCH_BOX(&fwd)); }

}  // namespace rayfuse
