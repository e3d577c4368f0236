// The edges on either side of queries, both of packed rays: with p the number of the ray's edges
// without the last that are not above a query, ids_left = max(p - 1, 0) and ids_right = p, counted
// from its first edge. One thread owns a ray: a copy of its edges, 16 of which are compared with a
// query at once. Source: nerfacc's `searchsorted`, docs/interlevel.md.
#include "packed.h"
#include "sorted.h"

namespace rayfuse {
namespace {

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void search(int64_t first, int64_t last, bool from_ray,
                           const T* edges,                // [Q]
                           const int64_t* edge_offsets,   // [R+1]
                           const T* queries,              // [P]
                           const int64_t* query_offsets,  // [R+1]
                           int64_t* ids_left,             // [P]
                           int64_t* ids_right) {          // [P]
  using A = accumulator<T>;
  Search<T> found;
  for (int64_t r = first; r < last; ++r) {
    const int64_t edge = edge_offsets[r], count = edge_offsets[r + 1] - edge;
    const int64_t query = query_offsets[r], n = query_offsets[r + 1] - query;
    int64_t *const left = ids_left + query, *const right = ids_right + query;
    if (count == 0) {
      std::fill_n(left, n, -1), std::fill_n(right, n, -1);
      continue;
    }
    if (n == 0) continue;
    A* const x = found.numbers(n);
    for_each_register<A, false>(n,
                                [&](int64_t k) { store(x + k, load_at(queries + query, k, n)); });
    const int64_t begin = from_ray ? 0 : edge;
    found.among(edges + edge, count - 1, n, [=](int64_t i, int64_t p) {
      left[i] = begin + std::max<int64_t>(p - 1, 0), right[i] = begin + p;
    });
  }
}

}  // namespace
}  // namespace rayfuse

#include "packed_pairs.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& edges, const Tensor& edge_offsets,
                               const Tensor& queries, const Tensor& query_offsets, bool from_ray) {
  const char* const op = "packed_searchsorted";
  const PackedRays of_edges(op, edge_offsets, edges.numel(), "edge_offsets");
  const PackedRays of_queries(op, query_offsets, queries.numel(), "query_offsets");
  const auto ids = [&] { return empty(edges, {queries.numel()}, aoti_torch_dtype_int64()); };
  const Tensor left = ids(), right = ids();
  dispatch(edges, [&](auto type) {
    using T = decltype(type);
    const T *edges_ptr = data<T>(edges), *queries_ptr = data<T>(queries);
    int64_t *left_ptr = mutable_data<int64_t>(left), *right_ptr = mutable_data<int64_t>(right);
    for_each_piece(of_edges, of_queries, [=](int64_t first, int64_t last) {
      search(first, last, from_ray, edges_ptr, of_edges.offsets, queries_ptr, of_queries.offsets,
             left_ptr, right_ptr);
    });
  });
  return {left, right};
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("packed_searchsorted", TORCH_BOX(&fwd)); }

}  // namespace rayfuse
