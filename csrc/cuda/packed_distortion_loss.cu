// Distortion loss of packed rays: L = sum_j w_j (spread_j + 1/3 w_j dt_j) with dt_j the width of
// sample j, spread_j = sum_{k<=j} gap_k left_k, gap_k = 2 (m_k - m_{k-1}) between midpoints, 0 for
// the first one, and left_k, right_k the weight on either side of sample k.
// A warp owns a ray, a block a long one, a thread kItems samples of each tile. Forward: one pass
// over memory. Backward: one, or two where a ray has several tiles:
// d_w_j = spread_j + sum_{k>j} gap_k (w_k + right_k) + 2/3 w_j dt_j,
// d_m_j = 2 w_j (left_j - right_j), d_dt_j = 1/3 w_j^2. Derivation: docs/distortion.md.
#include "packed_tiles.h"

namespace rayfuse {
namespace {

template <class T>
struct Samples {
  const T *t_starts, *t_ends, *w;  // [P]
};

// kItems samples of each thread of a team, from `first` on; those outside of the ray weigh nothing.
template <class T, int kThreads>
struct Tile {
  using A = accumulator<T>;
  static constexpr int kSize = kThreads * kItems;

  const Team<kThreads>& team;
  const PackedRay& ray;
  const int64_t first;
  A w[kItems], gap[kItems], width[kItems], left[kItems], spread[kItems];

  __device__ Tile(const Team<kThreads>& team, const PackedRay& ray, const Samples<T>& all,
                  int64_t first)
      : team(team), ray(ray), first(first) {
    A start[kItems] = {}, end[kItems] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      w[i] = gap[i] = width[i] = 0;
      // all lanes read, so that the warp's requests stay whole
      if (!reaches(i)) continue;
      const int64_t k = min(max(place(i), ray.begin), ray.end - 1);
      start[i] = widen(all.t_starts[k]);
      end[i] = widen(all.t_ends[k]);
      const A w_k = widen(all.w[k]);
      w[i] = ray.has(place(i)) ? w_k : A(0);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!reaches(i)) break;
      const int64_t k = place(i);
      // the first lane's is what the last one has of the row before
      const auto before = [&](const A(&x)[kItems]) {
        const A sent = i > 0 && team.lane == kWarp - 1 ? x[i - 1] : x[i];
        return __shfl_sync(kAllLanes, sent, (team.lane + kWarp - 1) % kWarp);
      };
      A start_before = before(start), end_before = before(end);
      if (!ray.has(k)) continue;
      if (team.lane == 0 && k > ray.begin && (i == 0 || kThreads > kWarp)) {
        start_before = widen(all.t_starts[k - 1]);
        end_before = widen(all.t_ends[k - 1]);
      }
      // before the first sample any finite gap will do: no weight lies there
      gap[i] = (start[i] - start_before) + (end[i] - end_before);
      width[i] = end[i] - start[i];
    }
  }

  // Whether the ray has samples in a row of the team's: most are shorter than a tile.
  __device__ bool reaches(int i) const { return first + i * kThreads < ray.end; }
  __device__ int64_t place(int i) const { return first + i * kThreads + team.rank; }

  // Fills left and spread.
  __device__ void scan_from_left(Running<A, false>& weight, Running<A, false>& spreads) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!reaches(i)) break;
      left[i] = weight.add(team, w[i]);
      const A step = gap[i] * left[i];
      spread[i] = spreads.add(team, step) + step;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_distortion_loss_fwd_kernel(int64_t R, int64_t P,
                                      const T* __restrict__ t_starts,       // [P]
                                      const T* __restrict__ t_ends,         // [P]
                                      const T* __restrict__ w,              // [P]
                                      const int64_t* __restrict__ offsets,  // [R+1]
                                      accumulator<T>* __restrict__ loss) {  // [R]
  using A = accumulator<T>;
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    Running<A, false> weight, spread;
    A own = 0;
    using Tile = Tile<T, kThreads>;
    for (int64_t first = first_tile(ray.begin); first < ray.end; first += Tile::kSize) {
      Tile tile(team, ray, {t_starts, t_ends, w}, first);
      tile.scan_from_left(weight, spread);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!tile.reaches(i)) break;
        own += tile.w[i] * (tile.spread[i] + A(1) / 3 * (tile.w[i] * tile.width[i]));
      }
    }
    const A total = team.template scan<false>(Sum<A>{own}).total.value;
    if (team.rank == 0) loss[ray.index] = total;
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock, 3 * kResidentBlocks<T> / 4)
    packed_distortion_loss_bwd_kernel(int64_t R, int64_t P,
                                      const accumulator<T>* __restrict__ d_loss,  // [R]
                                      const T* __restrict__ t_starts,             // [P]
                                      const T* __restrict__ t_ends,               // [P]
                                      const T* __restrict__ w,                    // [P]
                                      const int64_t* __restrict__ offsets,        // [R+1]
                                      T* d_t_starts,                              // [P] or null
                                      T* d_t_ends,                                // [P] or null
                                      T* d_w) {                                   // [P] or null
  using A = accumulator<T>;
  const auto store = [&](int64_t k, A d_start, A d_end, A d_weight) {
    if (d_t_starts) d_t_starts[k] = narrow<T>(d_start);
    if (d_t_ends) d_t_ends[k] = narrow<T>(d_end);
    if (d_w) d_w[k] = narrow<T>(d_weight);
  };
  // what lies left of each tile is kept where its gradients will be
  T* const kept = d_w ? d_w : d_t_starts ? d_t_starts : d_t_ends;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) { store(k, 0, 0, 0); });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    if (ray.begin == ray.end) return;
    using Tile = Tile<T, kThreads>;
    const Samples<T> all{t_starts, t_ends, w};
    Running<A, false> weight, spread;
    int64_t first = first_tile(ray.begin);
    for (; first + Tile::kSize < ray.end; first += Tile::kSize) {
      if (team.rank == 0 && first > ray.begin) {
        memcpy(kept + first, &weight.sum, sizeof(A));
        memcpy(kept + first + sizeof(A) / sizeof(T), &spread.sum, sizeof(A));
      }
      Tile(team, ray, all, first).scan_from_left(weight, spread);
    }
    sync(team);

    const A scale = d_loss[ray.index];
    Running<A, true> weight_right, spread_right;
    for (; first + Tile::kSize > ray.begin; first -= Tile::kSize) {
      if (first + Tile::kSize < ray.end) {
        weight = spread = {};
        if (first > ray.begin) {
          memcpy(&weight.sum, kept + first, sizeof(A));
          memcpy(&spread.sum, kept + first + sizeof(A) / sizeof(T), sizeof(A));
        }
        sync(team);
      }
      Tile tile(team, ray, all, first);
      tile.scan_from_left(weight, spread);
#pragma unroll
      for (int i = kItems - 1; i >= 0; --i) {
        if (!tile.reaches(i)) continue;
        const A w_i = tile.w[i], right = weight_right.add(team, w_i);
        const A beyond = spread_right.add(team, tile.gap[i] * (w_i + right));
        const A balance = tile.left[i] - right, third = A(1) / 3 * w_i;
        const A within = A(2) / 3 * (w_i * tile.width[i]);
        if (ray.has(tile.place(i))) {
          store(tile.place(i), scale * (w_i * (balance - third)), scale * (w_i * (balance + third)),
                scale * (tile.spread[i] + beyond + within));
        }
      }
    }
  });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t_starts, const Tensor& t_ends, const Tensor& w, const Tensor& offsets) {
  const Device device(t_starts);
  const int64_t R = offsets.numel() - 1, P = w.numel();
  Tensor loss = empty(w, {R}, accumulator_dtype(t_starts));
  dispatch(t_starts, [&](auto type) {
    using T = decltype(type);
    launch({packed_blocks(R), kBlock, 0, device.stream()}, packed_distortion_loss_fwd_kernel<T>, R,
           P, data<T>(t_starts), data<T>(t_ends), data<T>(w), data<int64_t>(offsets),
           mutable_data<accumulator<T>>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& t_starts,
                                       const Tensor& t_ends, const Tensor& w, const Tensor& offsets,
                                       int64_t needs) {
  const Device device(t_starts);
  const int64_t R = offsets.numel() - 1, P = w.numel();
  Tensor d_t_starts = empty_gradient(t_starts, needs, 0);
  Tensor d_t_ends = empty_gradient(t_ends, needs, 1), d_w = empty_gradient(w, needs, 2);
  if (P == 0 || needs == 0) return {d_t_starts, d_t_ends, d_w};
  dispatch(t_starts, [&](auto type) {
    using T = decltype(type);
    launch(packed_grid(R, device.stream()), packed_distortion_loss_bwd_kernel<T>, R, P,
           data<accumulator<T>>(d_loss), data<T>(t_starts), data<T>(t_ends), data<T>(w),
           data<int64_t>(offsets), mutable_data<T>(d_t_starts), mutable_data<T>(d_t_ends),
           mutable_data<T>(d_w));
  });
  return {d_t_starts, d_t_ends, d_w};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_distortion_loss", TORCH_BOX(&fwd));
  m.impl("packed_distortion_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
