// Compositing of packed rays: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and
// accumulation, with w given or from densities. A few threads own a ray, a warp or a block a longer
// one, a thread a run of its samples in each tile. Forward: one pass over memory. Backward: one,
// and t and w once more where a ray has several tiles; all heads are in a weight's gradient g_i =
// d_features . (f_i - background) + d_accumulation + d_depth (s_i - depth) / sum_i w_i, d_f_i = w_i
// d_features; for densities then the way back of ray_weights. docs/compositing.md
#include "compositing.h"
#include "packed_crew.h"

namespace rayfuse {
namespace {

template <class T>
struct Times {
  const T *starts, *ends;  // [P]
  T *d_starts, *d_ends;    // [P] or null
};

template <int threads, class T>
struct TimedRays : PackedRays<threads> {
  using Base = PackedRays<threads>;
  using A = accumulator<T>;
  using Base::begin, Base::crew, Base::own;
  // arrays of times on chip
  static constexpr int kTimes = 2;

  const Times<T>& t;

  __device__ TimedRays(const Times<T>& t, int64_t R, const PackedCrew& rays)
      : Base(R, rays), t(t) {}

  __device__ A start(int64_t k) const { return widen(t.starts[begin + own + k]); }
  __device__ A end(int64_t k) const { return widen(t.ends[begin + own + k]); }
  __device__ int longest_of(const Piece& piece) const {
    return Base::kOneTile ? this->longest : piece.count;
  }

  __device__ Samples<A> read(const Piece& piece, const Options& options, A* room) const {
    const A* const starts = crew.read(t.starts + piece.from, room, piece.all);
    A* const ends = room + Base::kRooms * options.chip;
    return {starts, crew.read(t.ends + piece.from, ends, piece.all), nullptr};
  }
  __device__ void* kept(int64_t sample) const {
    T* const to = t.d_starts ? t.d_starts : t.d_ends;
    return to ? to + begin + sample : nullptr;
  }
  __device__ T* d_starts(const Piece& piece) const {
    return t.d_starts ? t.d_starts + piece.from : nullptr;
  }
  __device__ T* d_ends(const Piece& piece) const {
    return t.d_ends ? t.d_ends + piece.from : nullptr;
  }
  __device__ void write(const Piece& piece, const Options&, A*, const A* starts, const A* ends,
                        A&) const {
    if (t.d_starts) crew.write(d_starts(piece), starts, piece.all);
    if (t.d_ends) crew.write(d_ends(piece), ends, piece.all);
  }
};

// Calls visit(rays, room) for the crews of the block.
template <class T, class Visit>
__device__ void for_each_crew(const Options& options, const Times<T>& t, const int64_t* offsets,
                              int64_t R, int64_t P, int arrays, const Visit& visit) {
  for_each_packed_crew(offsets, R, P, options.tile,
                       [&]<int kThreads>(const Team<kThreads>&, const PackedCrew& crew) {
                         const TimedRays<kThreads, T> rays(t, R, crew);
                         visit(rays,
                               room_of<accumulator<T>>(rays.crew, options, arrays + rays.kTimes));
                       });
}

template <class T, class F>
__global__ void __launch_bounds__(kCrewBlock, kBlocks<T, 6>)
    packed_composite_rays_fwd_kernel(Options options, int64_t R, int64_t P, Times<T> t,
                                     const int64_t* __restrict__ offsets,  // [R+1]
                                     Inputs<T, F> in, Outputs<accumulator<T>> out) {
  for_each_crew(options, t, offsets, R, P, kFwdArrays, [&](const auto& rays, accumulator<T>* room) {
    composite(options, rays, in, out, room);
  });
}

template <class T, class F>
__global__ void __launch_bounds__(kCrewBlock, kBlocks<T, 4>)
    packed_composite_rays_bwd_kernel(Options options, int64_t R, int64_t P,
                                     Incoming<accumulator<T>> d_out, Times<T> t,
                                     const int64_t* __restrict__ offsets,  // [R+1]
                                     Inputs<T, F> in, Gradients<T, F> d) {
  for_each_stray_sample(offsets, R, P, [&](int64_t k) {
    const T zero = narrow<T>(0);
    if (t.d_starts) t.d_starts[k] = zero;
    if (t.d_ends) t.d_ends[k] = zero;
    if (d.w) d.w[k] = zero;
    for (int64_t c = 0; d.f && c < options.C; ++c) d.f[k * options.C + c] = narrow<F>(0);
  });
  for_each_crew(options, t, offsets, R, P, kBwdArrays, [&](const auto& rays, accumulator<T>* room) {
    composite_back(options, rays, d_out, in, d, room);
  });
}

}  // namespace
}  // namespace rayfuse

#include "compositing_registration.h"

namespace rayfuse {
namespace {

// Sets what is on chip, with so many arrays of a tile, and says how a kernel goes over the rays.
template <class T, class F>
Grid packed_grid(Options& options, int arrays, int64_t R, cudaStream_t stream) {
  constexpr int kWarps = kCrewBlock / kWarp;
  constexpr int kLeft = (kSharedBytes - 1024) / sizeof(accumulator<T>) / kWarps;
  int items = kMostItems, values;
  const auto fit = [&] { return options.template fit<T, F>(items * kWarp, items * kWarp, arrays); };
  while ((values = fit()) > kLeft) --items;
  return {PackedCrew::blocks(R), kCrewBlock, kWarps * values * sizeof(accumulator<T>), stream};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& w, const Tensor& offsets, MaybeTensor f,
                                       MaybeTensor background, int64_t depth_kind, bool density,
                                       bool last_sample) {
  const Device device(w);
  Options options = options_of(f, background, depth_kind, density, last_sample);
  const int64_t R = offsets.numel() - 1;
  Tensor features = empty(w, {R, options.C}, accumulator_dtype(w));
  Tensor depth = empty(w, {R}, accumulator_dtype(w));
  Tensor accumulation = empty(w, {R}, accumulator_dtype(w));
  if (R == 0) return {features, depth, accumulation};
  dispatch_pair(w, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const Grid grid = packed_grid<T, F>(options, kFwdArrays + 2, R, device.stream());
    launch(grid, packed_composite_rays_fwd_kernel<T, F>, options, R, w.numel(),
           Times<T>{data<T>(t_starts), data<T>(t_ends), nullptr, nullptr}, data<int64_t>(offsets),
           Inputs<T, F>{data<T>(w), data<F>(f), data<T>(background)},
           Outputs<A>{mutable_data<A>(features), mutable_data<A>(depth),
                      mutable_data<A>(accumulation)});
  });
  return {features, depth, accumulation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    MaybeTensor d_features, MaybeTensor d_depth, MaybeTensor d_accumulation, const Tensor& t_starts,
    const Tensor& t_ends, const Tensor& w, const Tensor& offsets, MaybeTensor f,
    MaybeTensor background, int64_t depth, bool density, bool last_sample, int64_t needs) {
  const Device device(w);
  Options options = options_of(f, background, depth, density, last_sample);
  Tensor d_t_starts = empty_gradient(t_starts, needs, 0);
  Tensor d_t_ends = empty_gradient(t_ends, needs, 1), d_w = empty_gradient(w, needs, 2);
  Tensor d_f = empty_gradient(f, w, needs, 3),
         d_background = empty_gradient(background, w, needs, 4);
  const int64_t values =
      d_t_starts.numel() + d_t_ends.numel() + d_w.numel() + d_f.numel() + d_background.numel();
  if (values == 0) return {d_t_starts, d_t_ends, d_w, d_f, d_background};
  dispatch_pair(w, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const int64_t R = offsets.numel() - 1;
    const Grid grid = packed_grid<T, F>(options, kBwdArrays + 2, R, device.stream());
    launch(
        grid, packed_composite_rays_bwd_kernel<T, F>, options, R, w.numel(),
        Incoming<A>{data<A>(d_features), data<A>(d_depth), data<A>(d_accumulation)},
        Times<T>{data<T>(t_starts), data<T>(t_ends), mutable_data<T>(d_t_starts),
                 mutable_data<T>(d_t_ends)},
        data<int64_t>(offsets), Inputs<T, F>{data<T>(w), data<F>(f), data<T>(background)},
        Gradients<T, F>{mutable_data<T>(d_w), mutable_data<F>(d_f), mutable_data<T>(d_background)});
  });
  return {d_t_starts, d_t_ends, d_w, d_f, d_background};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_composite_rays", TORCH_BOX(&fwd));
  m.impl("packed_composite_rays_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
