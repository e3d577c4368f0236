// Tile compositing: per pixel alpha_i = min(o_i e^-sigma_i, max_alpha) for the splats i of its
// tile's list, w_i = alpha_i T_i with T_{i+1} = T_i (1 - alpha_i); image = sum_i w_i c_i + T bg,
// alpha = sum_i w_i, depth = sum_i w_i z_i / alpha, median = z_i of the last i with T_i > 1/2.
// A block owns a tile, a thread a pixel; kBatch splats at a time are in shared memory. Forward: a
// block for every kChannels channels. Backward: once forward for T before each step, once back
// with u_i, what lies behind splat i: d_alpha_i = T_i (<c_i, g> - u_i), u_{i-1} = u_i + alpha_i
// (<c_i, g> - u_i); a tile's sums of a splat are added up by a second kernel. docs/splats.md
#include "launch.h"
#include "tile.h"

namespace rayfuse {
namespace {

constexpr int kWarps = kBlock / kWarp;
// Splats of a batch that threads remember at a time, on the way back.
template <class A>
constexpr int kStep = 32 / sizeof(A);

// Of the splats of a batch, a block's channels; 0 where there are fewer.
template <int kChannels, class T>
struct Channels {
  using A = accumulator<T>;

  A value[kBatch][kChannels];

  __device__ void load(const Scene<T>& scene, int64_t first, int count, int64_t channel) {
    const int64_t C = scene.channels();
    for (int i = threadIdx.x; i < kBatch * kChannels; i += blockDim.x) {
      const int k = i / kChannels;
      const int64_t c = channel + i % kChannels;
      value[k][i % kChannels] =
          k < count && c < C ? channel_of(scene, splat_at(scene, first + k), c) : A(0);
    }
  }
};

// Blocks that the registers of an SM must suffice for.
template <int kChannels, class T>
constexpr int kBlocks = (kChannels > 4 ? 8 : 16) / sizeof(accumulator<T>);

template <int kChannels, class T>
__global__ void __launch_bounds__(kBlock, kBlocks<kChannels, T>)
    composite_tiles_fwd_kernel(Scene<T> scene,
                               accumulator<T>* __restrict__ image,     // [I, H, W, D]
                               accumulator<T>* __restrict__ opacity,   // [I, H, W]
                               accumulator<T>* __restrict__ depth,     // [I, H, W]
                               accumulator<T>* __restrict__ median) {  // [I, H, W]
  using A = accumulator<T>;
  __shared__ Batch<T> batch;
  __shared__ Channels<kChannels, T> channels;
  const int64_t C = scene.channels();
  const unsigned chunks = max(static_cast<unsigned>((C + kChannels - 1) / kChannels), 1u);
  const unsigned t = blockIdx.x / chunks;
  const int64_t first_channel = int64_t{blockIdx.x % chunks} * kChannels;
  const List list(scene, t);
  const Pixel<T> pixel(scene, t);
  Passing<A> passing{1, !pixel.exists};
  A sum[kChannels] = {}, met = 0;
  // the place in the list of the median; a list is shorter than 2^31
  int halfway = -1;
  const int n = static_cast<int>(list.n);
  for (int first = 0; first < n; first += kBatch) {
    if (__syncthreads_and(passing.ended)) break;
    batch.load(scene, list.begin + first, n - first);
    channels.load(scene, list.begin + first, n - first, first_channel);
    __syncthreads();
    for (int k = 0; k < kBatch && !passing.ended; ++k) {
      const A alpha = batch.alpha(scene, k, pixel), before = passing.transmittance;
      if (alpha == 0) continue;
      const A weight = passing.meet(alpha, scene.ending) * before;
      if (passing.ended) break;
      met += weight;
      if (before > A(0.5)) halfway = first + k;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] += weight * channels.value[k][c];
    }
  }
  if (!pixel.exists) return;
  const A* const background = scene.background_at(pixel.image, pixel.index);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int64_t d = first_channel + c;
    if (d < scene.D) {
      const A behind = background ? passing.transmittance * background[d] : A(0);
      image[pixel.index * scene.D + d] = sum[c] + behind;
    } else if (d < C) {
      depth[pixel.index] = met > 0 ? sum[c] / met : A(0);
    }
  }
  if (first_channel > 0) return;
  opacity[pixel.index] = met;
  if (!scene.depths) depth[pixel.index] = 0;
  median[pixel.index] =
      scene.depths && halfway >= 0 ? scene.depths[splat_at(scene, list.begin + halfway)] : A(0);
}

// Adds up n values over a warp, halving how many each lane has of them: less than one shuffle and a
// half for a value, where adding up each would take five. x[0] is the sum of the value that is
// returned, -1 in lanes that are not asked for theirs.
template <int n, int lanes = kWarp / 2, class A>
__device__ int warp_sums(A* x) {
  if constexpr (lanes == 0) {
    return 0;
  } else {
    constexpr int half = (n + 1) / 2;
    const bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool pair = i + half < n;
      const A other = pair ? x[i + half] : x[i];
      const A theirs = __shfl_xor_sync(kAllLanes, upper ? x[i] : other, lanes);
      x[i] = (upper ? other : x[i]) + theirs;
    }
    const int value = warp_sums<half, lanes / 2>(x);
    return !upper ? value : 0 <= value && value + half < n ? value + half : -1;
  }
}

// Sums over the block, of a step's splats: every warp leaves its own here of those that it met.
template <class A, int kChannels>
struct Exchange {
  static constexpr int kFirstChannel = kMoments + 2;
  static constexpr int kSums = kFirstChannel + kChannels;

  A sum[kWarps][kStep<A>][kSums];
  unsigned met[kWarps];

  // Values first .. first + n of splat k.
  template <int n>
  __device__ void put(int k, int first, A (&x)[n]) {
    const int value = warp_sums<n>(x);
    if (value >= 0) sum[threadIdx.x / kWarp][k][first + value] = x[0];
  }
  // The first moments and channels of the splats to rows of `width`, channels from `at` on.
  __device__ void write(A* rows, int splats, int64_t width, int moments, int64_t at, int64_t count,
                        unsigned met_here) {
    if (threadIdx.x % kWarp == 0) met[threadIdx.x / kWarp] = met_here;
    __syncthreads();
    const int warps = blockDim.x / kWarp, found = min(splats, kStep<A>) * kSums;
    for (int i = threadIdx.x; i < found; i += blockDim.x) {
      const int k = i / kSums, value = i % kSums, channel = value - kFirstChannel;
      if (channel < 0 ? value >= moments : channel >= count) continue;
      A total = 0;
      for (int w = 0; w < warps; ++w) total += met[w] >> k & 1 ? sum[w][k][value] : A(0);
      rows[k * width + (channel < 0 ? value : at + channel)] = total;
    }
    __syncthreads();
  }
};

// What a thread remembers of a step's splats. In registers they would be as many again as all else,
// and loops over them unrolled.
template <class A>
struct Memory {
  A alpha[kBlock], weight[kBlock], shade[kBlock];
};

template <int kChannels, class T>
__global__ void __launch_bounds__(kBlock, kBlocks<kChannels, T>)
    composite_tiles_bwd_kernel(Scene<T> scene, Incoming<accumulator<T>> d,
                               accumulator<T>* kept,            // [M / step + tiles, threads]
                               accumulator<T>* partial,         // [M, sums]
                               accumulator<T>* of_tiles,        // [tiles, D] or null
                               accumulator<T>* d_background) {  // [I, H, W, D] or null
  using A = accumulator<T>;
  __shared__ Batch<T> batch;
  __shared__ Channels<kChannels, T> channels;
  using Exchange = Exchange<A, kChannels>;
  __shared__ Exchange exchange;
  __shared__ Memory<A> memory[kStep<A>];
  const int64_t C = scene.channels(), D = scene.D, width = scene.sums();
  const int moments = static_cast<int>(scene.moments());
  const unsigned t = blockIdx.x;
  const List list(scene, t);
  const Pixel<T> pixel(scene, t);
  kept += (list.begin / kStep<A> + t) * blockDim.x + threadIdx.x;
  partial += list.begin * width;
  const bool far = scene.depths && d.depth;

  Passing<A> passing{1, !pixel.exists};
  A met = 0, distance = 0;
  const int n = static_cast<int>(list.n);
  // places in the list: that of the median, and where the pixel has ended
  int halfway = -1, end = pixel.exists ? n : 0, first = 0;
  for (; first < n; first += kBatch) {
    if (__syncthreads_and(passing.ended)) break;
    batch.load(scene, list.begin + first, n - first);
    __syncthreads();
    for (int place = first; place < min(first + kBatch, n) && !passing.ended; ++place) {
      if (place % kStep<A> == 0)
        kept[int64_t{place / kStep<A>} * blockDim.x] = passing.transmittance;
      const A alpha = batch.alpha(scene, place - first, pixel), before = passing.transmittance;
      if (alpha == 0) continue;
      const A weight = passing.meet(alpha, scene.ending) * before;
      if (passing.ended) {
        end = place;
        break;
      }
      met += weight;
      if (far) distance += weight * scene.depths[batch.id[place - first]];
      if (before > A(0.5)) halfway = place;
    }
  }
  for (int64_t i = first * width + threadIdx.x; i < list.listed * width; i += blockDim.x) {
    partial[i] = 0;
  }

  const A* const d_image = d.image && pixel.exists ? d.image + pixel.index * D : nullptr;
  const A* const background = scene.background_at(pixel.image, pixel.index);
  // u of the last splat
  A behind = d.opacity && pixel.exists ? -d.opacity[pixel.index] : A(0), d_distance = 0;
  if (far && pixel.exists && met > 0) {
    d_distance = d.depth[pixel.index] / met;
    behind += d_distance * (distance / met);
  }
  const A d_median = d.median && pixel.exists ? d.median[pixel.index] : A(0);
  for (int64_t c = 0; d_image && background && c < D; ++c) behind += background[c] * d_image[c];
  if (d_background && d_image) {
    for (int64_t c = 0; c < D; ++c) {
      d_background[pixel.index * D + c] = passing.transmittance * d_image[c];
    }
  }
  // of channels that are looked at together
  A d_channel[kChannels];
  const auto go_to = [&](int64_t channel) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int64_t c = channel + i;
      d_channel[i] = c < D ? (d_image ? d_image[c] : A(0)) : c == D ? d_distance : A(0);
    }
  };
  for (int64_t c = 0; of_tiles && c < D; c += kChannels) {
    __syncthreads();
    go_to(c);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) d_channel[i] *= passing.transmittance;
    exchange.put(0, Exchange::kFirstChannel, d_channel);
    exchange.write(of_tiles + t * D, 1, 0, 0, c, D - c, 1);
  }
  go_to(0);
  const bool several = C > kChannels;

  while ((first -= kBatch) >= 0) {
    const int here = min(n - first, kBatch);
    __syncthreads();
    batch.load(scene, list.begin + first, here);
    channels.load(scene, list.begin + first, here, 0);
    __syncthreads();
    const auto look_at = [&](int64_t channel) {
      __syncthreads();
      channels.load(scene, list.begin + first, here, channel);
      go_to(channel);
      __syncthreads();
    };
    for (int step = (here - 1) / kStep<A> * kStep<A>; step >= 0; step -= kStep<A>) {
      const int place = first + step;
      const auto shade_of = [&](int k) {
        A shade = 0;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          shade = fma(channels.value[step + k][i], d_channel[i], shade);
        }
        return shade;
      };
      if (several) look_at(0);
      A light = place < end ? kept[int64_t{place / kStep<A>} * blockDim.x] : A(0);
      // those that this warp met
      unsigned any = 0;
      for (int k = 0; k < kStep<A>; ++k) {
        const A alpha = place + k < end ? batch.alpha(scene, step + k, pixel) : A(0);
        if (!__any_sync(kAllLanes, alpha > 0)) continue;
        any |= 1u << k;
        memory[k].alpha[threadIdx.x] = alpha;
        memory[k].weight[threadIdx.x] = alpha * light;
        memory[k].shade[threadIdx.x] = shade_of(k);
        light *= 1 - alpha;
      }
      for (int64_t c = kChannels; c < C; c += kChannels) {
        look_at(c);
        for (unsigned left = any; left; left &= left - 1) {
          const int k = __ffs(left) - 1;
          memory[k].shade[threadIdx.x] += shade_of(k);
        }
      }
      for (unsigned left = any; left;) {
        const int k = kWarp - 1 - __clz(left);
        left ^= 1u << k;
        const Splat<A> splat = batch.splat[step + k];
        const A alpha = memory[k].alpha[threadIdx.x], weight = memory[k].weight[threadIdx.x];
        const A dx = splat.x - pixel.x, dy = splat.y - pixel.y;
        const A excess = memory[k].shade[threadIdx.x] - behind;
        behind += alpha > 0 ? alpha * excess : A(0);
        const A h = weight > 0 && alpha < scene.max_alpha ? weight * excess : A(0);
        A moment[] = {h, h * dx, h * dx * dx, h * dy, h * dx * dy, h * dy * dy};
        exchange.put(k, 0, moment);
        if (!scene.absolute) continue;
        A absolute[] = {std::abs(h * (2 * splat.half_a * dx + splat.b * dy)),
                        std::abs(h * (splat.b * dx + 2 * splat.half_c * dy))};
        exchange.put(k, kMoments, absolute);
      }
      int64_t c = 0;
      do {
        if (several) go_to(c);
        for (unsigned left = any; left; left &= left - 1) {
          const int k = __ffs(left) - 1;
          A own[kChannels];
#pragma unroll
          for (int i = 0; i < kChannels; ++i) {
            own[i] = memory[k].weight[threadIdx.x] * d_channel[i];
            if (d.median && c + i == D && halfway == place + k) own[i] += d_median;
          }
          exchange.put(k, Exchange::kFirstChannel, own);
        }
        exchange.write(partial + place * width, here - step, width, c == 0 ? moments : 0,
                       moments + c, C - c, any);
        c += kChannels;
      } while (c < C);
    }
  }
}

// The first place in sorted ids of one that is not less than p.
__device__ inline int64_t lower_bound(const int64_t* ids, int64_t M, int64_t p) {
  int64_t begin = 0, end = M;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < p) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// A warp owns a splat, and adds up what its tiles have of it in the order of the tiles.
template <class T>
__global__ void __launch_bounds__(kBlock)
    composite_tiles_bwd_splats_kernel(Scene<T> scene,
                                      const int64_t* __restrict__ sorted,          // [M]
                                      const int64_t* __restrict__ places,          // [M]
                                      const accumulator<T>* __restrict__ partial,  // [M, width]
                                      Outgoing<T> out) {
  using A = accumulator<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t p = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (p >= scene.P) return;
  const int64_t D = scene.D, moments = scene.moments(), width = scene.sums();
  const int64_t begin = lower_bound(sorted, scene.M, p), end = lower_bound(sorted, scene.M, p + 1);
  for (int64_t first = 0; first < width; first += kWarp) {
    const int64_t v = first + lane;
    A sum = 0;
    for (int64_t k = begin; v < width && k < end; ++k) sum += partial[places[k] * width + v];
    if (first == 0) {
      A moment[kMoments];
#pragma unroll
      for (int i = 0; i < kMoments; ++i) moment[i] = __shfl_sync(kAllLanes, sum, i);
      if (lane == 0) {
        out.write(scene, p, begin < end, moment[0], moment[1], moment[2], moment[3], moment[4],
                  moment[5]);
      }
    }
    if (v >= kMoments && v < moments) out.absolute[2 * p + v - kMoments] = sum;
    const int64_t c = v - moments;
    if (c >= 0 && c < D && out.colors) out.colors[p * D + c] = narrow<T>(sum);
    if (c == D && v < width && out.depths) out.depths[p] = sum;
  }
}

// A thread owns a channel of the background of an image.
template <class T>
__global__ void __launch_bounds__(kBlock) composite_tiles_bwd_background_kernel(
    Scene<T> scene,
    const accumulator<T>* __restrict__ of_tiles,  // [tiles, D]
    accumulator<T>* __restrict__ d_background) {  // [I, D]
  using A = accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x, D = scene.D;
  if (i >= scene.I * D) return;
  const int64_t tiles = scene.Y * scene.X;
  A sum = 0;
  for (int64_t t = 0; t < tiles; ++t) sum += of_tiles[(i / D * tiles + t) * D + i % D];
  d_background[i] = sum;
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "torch_ops.h"
#include "../tiles.h"

namespace rayfuse {
namespace {

void zero(Tensor x) {
  if (x.numel()) torch::stable::zero_(x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& means2d, const Tensor& conics, const Tensor& colors, const Tensor& opacities,
    const Tensor& tile_offsets, const Tensor& flatten_ids, const MaybeTensor& depths,
    const MaybeTensor& background, const MaybeTensor& masks, const MaybeTensor& absgrad,
    int64_t image_width, int64_t image_height, int64_t tile_size, double max_alpha,
    double min_alpha, double min_transmittance, double pixel_center, bool stop_at_min) {
  const Device device(means2d);
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       depths,       background, masks,     absgrad,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const TileOutputs out(call);
  dispatch(colors, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto scene = call.scene<T>();
    const auto start = [&]<int kChannels>(std::integral_constant<int, kChannels>) {
      const int64_t chunks = std::max<int64_t>((scene.channels() + kChannels - 1) / kChannels, 1);
      launch({scene.tiles() * chunks, threads_of(tile_size), 0, device.stream()},
             composite_tiles_fwd_kernel<kChannels, T>, scene, mutable_data<A>(out.image),
             mutable_data<A>(out.alpha), mutable_data<A>(out.depth), mutable_data<A>(out.median));
    };
    if (scene.channels() <= 4) {
      start(std::integral_constant<int, 4>());
    } else {
      start(std::integral_constant<int, 32>());
    }
  });
  return out.tensors();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const MaybeTensor& d_image, const MaybeTensor& d_alpha, const MaybeTensor& d_depth,
    const MaybeTensor& d_median, const Tensor& means2d, const Tensor& conics, const Tensor& colors,
    const Tensor& opacities, const Tensor& tile_offsets, const Tensor& flatten_ids,
    const MaybeTensor& depths, const MaybeTensor& background, const MaybeTensor& masks,
    const MaybeTensor& absgrad, int64_t image_width, int64_t image_height, int64_t tile_size,
    double max_alpha, double min_alpha, double min_transmittance, double pixel_center,
    bool stop_at_min, int64_t needs) {
  const Device device(means2d);
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       depths,       background, masks,     absgrad,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const TileGradients d(call, needs);
  if (d.background.numel() && !d_image) zero(d.background);
  const auto [sorted, places] = sort(flatten_ids);
  dispatch(colors, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto scene = call.scene<T>(needs);
    const Incoming<A> d_outputs{data<A>(d_image), data<A>(d_alpha), data<A>(d_depth),
                                data<A>(d_median)};
    const int64_t tiles = scene.tiles(), ID = scene.I * scene.D;
    const int threads = threads_of(tile_size);
    const Tensor kept = empty(means2d, {scene.M / kStep<A> + tiles, threads}, dtype_of(means2d));
    const Tensor sums = empty(means2d, {scene.M, scene.sums()}, dtype_of(means2d));
    A* const partial = mutable_data<A>(sums);
    A* const of_tiles = mutable_data<A>(d.background_of_tiles);
    A* const d_background = mutable_data<A>(d.background);
    launch({tiles, threads, 0, device.stream()},
           scene.channels() <= 4 ? composite_tiles_bwd_kernel<4, T>
                                 : composite_tiles_bwd_kernel<16, T>,
           scene, d_outputs, mutable_data<A>(kept), partial, of_tiles,
           of_tiles ? nullptr : d_background);
    launch({(scene.P + kWarps - 1) / kWarps, kBlock, 0, device.stream()},
           composite_tiles_bwd_splats_kernel<T>, scene, data<int64_t>(sorted),
           data<int64_t>(places), partial, d.outgoing<T>());
    if (of_tiles) {
      launch({(ID + kBlock - 1) / kBlock, kBlock, 0, device.stream()},
             composite_tiles_bwd_background_kernel<T>, scene, of_tiles, d_background);
    }
  });
  return d.tensors();
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("composite_tiles", TORCH_BOX(&fwd));
  m.impl("composite_tiles_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
