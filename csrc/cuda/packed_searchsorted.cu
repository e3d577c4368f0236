// The edges on either side of queries, both of packed rays: with p the number of the ray's edges
// without the last that are not above a query, ids_left = max(p - 1, 0) and ids_right = p, counted
// from its first edge. A warp owns a ray's queries, a block those of one that has many; each thread
// bisects the edges for its own. Source: nerfacc's `searchsorted`, docs/interlevel.md.
#include "ray_search.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_searchsorted_fwd_kernel(int64_t R, int64_t Q, int64_t P, bool from_ray,
                                   const T* __restrict__ edges,                // [Q]
                                   const int64_t* __restrict__ edge_offsets,   // [R+1]
                                   const T* __restrict__ queries,              // [P]
                                   const int64_t* __restrict__ query_offsets,  // [R+1]
                                   int64_t* __restrict__ ids_left,             // [P]
                                   int64_t* __restrict__ ids_right) {          // [P]
  for_each_stray_sample(query_offsets, R, P, [&](int64_t k) { ids_left[k] = ids_right[k] = -1; });
  for_each_packed_ray(
      query_offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, const PackedRay& ray) {
        const PackedRay own = packed_ray(edge_offsets, ray.index, Q);
        const int64_t count = own.end - own.begin, begin = from_ray ? 0 : own.begin;
        for (int64_t k = ray.begin + team.rank; k < ray.end; k += kThreads) {
          const int64_t p =
              count_up_to(edges + own.begin, max(count - 1, int64_t{0}), widen(queries[k]));
          ids_left[k] = count ? begin + max(p - 1, int64_t{0}) : -1;
          ids_right[k] = count ? begin + p : -1;
        }
      });
}

}  // namespace
}  // namespace rayfuse

#include "launch.h"
#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& edges, const Tensor& edge_offsets,
                               const Tensor& queries, const Tensor& query_offsets, bool from_ray) {
  const Device device(edges);
  const int64_t R = query_offsets.numel() - 1, P = queries.numel();
  const auto ids = [&] { return empty(edges, {P}, aoti_torch_dtype_int64()); };
  const Tensor left = ids(), right = ids();
  if (P == 0) return {left, right};
  dispatch(edges, [&](auto type) {
    using T = decltype(type);
    // one block at least, for queries of no ray
    launch({std::max<int64_t>(packed_blocks(R), 1), kBlock, 0, device.stream()},
           packed_searchsorted_fwd_kernel<T>, R, edges.numel(), P, from_ray, data<T>(edges),
           data<int64_t>(edge_offsets), data<T>(queries), data<int64_t>(query_offsets),
           mutable_data<int64_t>(left), mutable_data<int64_t>(right));
  });
  return {left, right};
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("packed_searchsorted", TORCH_BOX(&fwd)); }

}  // namespace rayfuse
