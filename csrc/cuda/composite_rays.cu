// Compositing: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and accumulation, with
// w given or from densities. A few threads own a ray, a block a long one, a thread a run of its
// samples; a warp reads its rays as one piece. Forward: one pass over memory. Backward: one, and t
// and w once more where a ray does not fit on chip; all heads are in a weight's gradient g_i =
// d_features . (f_i - background) + d_accumulation + d_depth (s_i - depth) / sum_i w_i, d_f_i = w_i
// d_features; for densities then the way back of ray_weights. docs/compositing.md
#include "compositing.h"

namespace rayfuse {
namespace {

// The rays of a crew, and the one of a team among them.
template <int threads, class T>
struct DenseRays {
  using A = accumulator<T>;
  static constexpr int kThreads = threads;
  // arrays of times on chip
  static constexpr int kTimes = 1;
  static constexpr bool kOneTile = threads < kBlock;
  static constexpr int kRooms = 1;
  static constexpr int64_t lead = 0;

  const Crew<threads> crew = {};
  const T* const t;       // [R, S+1]
  T* const d_t;           // [R, S+1] or null
  const int64_t samples;  // S
  const int64_t first, index;
  const int count;
  const bool exists;
  // in memory the crew's first sample and edge, and where the team's first is among the crew's
  const int64_t begin, edges;
  const int own, others;

  __device__ DenseRays(int64_t R, int64_t S, const T* t, T* d_t)
      : t(t),
        d_t(d_t),
        samples(S),
        first((int64_t{blockIdx.x} * (blockDim.x / crew.kSize) + crew.index) * crew.kTeams),
        index(first + crew.team_index),
        count(static_cast<int>(min(R - first, int64_t{crew.kTeams}))),
        exists(index < R),
        begin(first * S),
        edges(first * (S + 1)),
        own(crew.team_index * static_cast<int>(S)),
        others((count - 1) * static_cast<int>(S)) {}

  __device__ A start(int64_t k) const { return widen(t[index * (samples + 1) + k]); }
  __device__ A end(int64_t k) const { return start(k + 1); }
  __device__ int longest_of(const Piece& piece) const { return piece.count; }
  // each ray has one more edge than samples
  __device__ int edges_of(const Piece& piece) const { return piece.all + count; }

  __device__ Samples<A> read(const Piece& piece, const Options&, A* room) const {
    const A* const here = crew.read(t + edges + piece.first, room, edges_of(piece));
    return {here + crew.team_index, here + crew.team_index + 1, nullptr};
  }
  __device__ void* kept(int64_t sample) const { return d_t ? d_t + edges + sample : nullptr; }
  __device__ T* d_starts(const Piece&) const { return nullptr; }
  __device__ T* d_ends(const Piece&) const { return nullptr; }

  // Where a sample ends the next one starts: in the tile to the right, `next`. All come here after
  // a barrier; the edges have been read.
  __device__ void write(const Piece& piece, const Options&, A* room, const A* d_starts,
                        const A* d_ends, A& next) const {
    if (!d_t) return;
    T* const to = d_t + edges + piece.first;
    A* const here = on_chip(room, to);
    A* const own_edges = here + crew.team_index;
    const int last = piece.own + piece.count - 1;
    for (int k = piece.begin; k < piece.end; ++k) {
      own_edges[k + 1] = d_ends[k] + (k < last ? d_starts[k + 1] : next);
    }
    const A first_start = exists && piece.count > 0 ? d_starts[piece.own] : A(0);
    if (exists && crew.team.rank == 0) own_edges[piece.own] = first_start;
    next = first_start;
    crew.sync();
    // the first edge of a tile is the last one of the tile to the left
    const int front = piece.first > 0;
    crew.write(to + front, here + front, edges_of(piece) - front);
  }
};

template <int kThreads, class T, class F>
__global__ void __launch_bounds__(kBlock, kBlocks<T, 4>)
    composite_rays_fwd_kernel(Options options, int64_t R, int64_t S,
                              const T* __restrict__ t,  // [R, S+1]
                              Inputs<T, F> in, Outputs<accumulator<T>> out) {
  const DenseRays<kThreads, T> rays(R, S, t, nullptr);
  if (rays.first >= R) return;
  composite(options, rays, in, out,
            room_of<accumulator<T>>(rays.crew, options, kFwdArrays + rays.kTimes));
}

template <int kThreads, class T, class F>
__global__ void __launch_bounds__(kBlock, kBlocks<T, 3>)
    composite_rays_bwd_kernel(Options options, int64_t R, int64_t S, Incoming<accumulator<T>> d_out,
                              const T* __restrict__ t,  // [R, S+1]
                              Inputs<T, F> in,
                              T* d_t,  // [R, S+1] or null
                              Gradients<T, F> d) {
  const DenseRays<kThreads, T> rays(R, S, t, d_t);
  if (rays.first >= R) return;
  composite_back(options, rays, d_out, in, d,
                 room_of<accumulator<T>>(rays.crew, options, kBwdArrays + rays.kTimes));
}

// How a kernel with so many arrays on chip goes over R rays of S samples.
template <class T, class F>
struct DensePlan {
  using A = accumulator<T>;
  Options options;
  Teams teams;
  Grid grid;

  DensePlan(Options of_call, int arrays, int64_t R, int64_t S, cudaStream_t stream)
      : options(of_call), teams(S, std::numeric_limits<int64_t>::max()) {
    constexpr int kLeft = (kSharedBytes - 2048) / sizeof(A);  // for what a team has beside
    const int rays = teams.threads < kWarp ? kWarp / teams.threads : 1;
    const auto fit = [&](int64_t tile) {
      return options.template fit<T, F>(static_cast<int>(tile), rays * static_cast<int>(tile + 1),
                                        arrays);
    };
    int values = 0, crews = 1;
    if (teams.threads == kBlock) {
      // an odd number of samples for each thread, so that its banks differ from its neighbours'
      int each = 15;
      while ((values = fit(std::min<int64_t>(each * kBlock, S))) > kLeft) each -= 2;
    } else {
      values = fit(std::max<int64_t>(S, 1));
      // smaller blocks share a multiprocessor better
      crews = std::min(kBlock / kWarp / 2, kLeft / values);
    }
    const int64_t each = int64_t{crews} * rays;
    grid = {(R + each - 1) / each, crews * std::max(teams.threads, kWarp),
            crews * values * sizeof(A), stream};
  }
};

}  // namespace
}  // namespace rayfuse

#include "compositing_registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t, const Tensor& w, MaybeTensor f,
                                       MaybeTensor background, int64_t depth_kind, bool density,
                                       bool last_sample) {
  const Device device(t);
  const Options options = options_of(f, background, depth_kind, density, last_sample);
  auto sizes = leading_sizes(w, 1);
  Tensor depth = empty(t, sizes, accumulator_dtype(t));
  Tensor accumulation = empty(t, sizes, accumulator_dtype(t));
  sizes.push_back(options.C);
  Tensor features = empty(t, sizes, accumulator_dtype(t));
  const int64_t R = depth.numel(), S = w.size(-1);
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const DensePlan<T, F> plan(options, kFwdArrays + 1, R, S, device.stream());
    launch(plan.grid,
           plan.teams.pick(composite_rays_fwd_kernel<kFew, T, F>,
                           composite_rays_fwd_kernel<kWarp, T, F>,
                           composite_rays_fwd_kernel<kBlock, T, F>),
           plan.options, R, S, data<T>(t),
           Inputs<T, F>{data<T>(w), data<F>(f), data<T>(background)},
           Outputs<A>{mutable_data<A>(features), mutable_data<A>(depth),
                      mutable_data<A>(accumulation)});
  });
  return {features, depth, accumulation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(MaybeTensor d_features, MaybeTensor d_depth,
                                               MaybeTensor d_accumulation, const Tensor& t,
                                               const Tensor& w, MaybeTensor f,
                                               MaybeTensor background, int64_t depth, bool density,
                                               bool last_sample, int64_t needs) {
  const Device device(t);
  const Options options = options_of(f, background, depth, density, last_sample);
  Tensor d_t = empty_gradient(t, needs, 0), d_w = empty_gradient(w, needs, 1);
  Tensor d_f = empty_gradient(f, t, needs, 2),
         d_background = empty_gradient(background, t, needs, 3);
  if (d_t.numel() + d_w.numel() + d_f.numel() + d_background.numel() == 0) {
    return {d_t, d_w, d_f, d_background};
  }
  const int64_t S = w.size(-1), R = t.numel() / (S + 1);
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const DensePlan<T, F> plan(options, kBwdArrays + 1, R, S, device.stream());
    launch(
        plan.grid,
        plan.teams.pick(composite_rays_bwd_kernel<kFew, T, F>,
                        composite_rays_bwd_kernel<kWarp, T, F>,
                        composite_rays_bwd_kernel<kBlock, T, F>),
        plan.options, R, S,
        Incoming<A>{data<A>(d_features), data<A>(d_depth), data<A>(d_accumulation)}, data<T>(t),
        Inputs<T, F>{data<T>(w), data<F>(f), data<T>(background)}, mutable_data<T>(d_t),
        Gradients<T, F>{mutable_data<T>(d_w), mutable_data<F>(d_f), mutable_data<T>(d_background)});
  });
  return {d_t, d_w, d_f, d_background};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("composite_rays", TORCH_BOX(&fwd));
  m.impl("composite_rays_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
