// Samples at even steps of the cdf of a packed ray, or the edges of intervals around them
// (csrc/math/packed_importance_samples.h). One thread owns a ray: where the cdf is to be is made
// and looked for 16 edges at a time; samples stay in cache where edges are wanted. Source:
// nerfacc's `importance_sampling`, docs/interlevel.md.
#include "packed.h"
#include "sorted.h"

namespace rayfuse {

// a b, rounded before anything is added to it, where the compiler would fuse the two.
template <class V, class W>
V multiply(V a, W b) {
  V product = a * b;
#if defined(__aarch64__)
  asm("" : "+w"(product));
#elif defined(__SSE2__)
  asm("" : "+x"(product));
#endif
  return product;
}

}  // namespace rayfuse

#include "../math/packed_importance_samples.h"

namespace rayfuse {
namespace {

// The edges around n samples.
template <class A>
void enclose(const A* t, int64_t n, A first, A last, A* edges) {
  if (n == 1) {
    edges[0] = first, edges[1] = last;
    return;
  }
  edges[0] = outer_end<true>(t[0], t[1], first);
  for (int64_t i = 1; i < n; ++i) edges[i] = middle(t[i - 1], t[i]);
  edges[n] = outer_end<false>(t[n - 1], t[n - 2], last);
}

// Rays first..last.
template <bool intervals, class T>
RAYFUSE_KERNEL void sample(int64_t first, int64_t last,
                           const T* edges,               // [Q]
                           const T* cdf,                 // [Q]
                           const int64_t* edge_offsets,  // [R+1]
                           const accumulator<T>* bias,   // [R]
                           const int64_t* offsets,       // [R+1]
                           accumulator<T>* out) {        // [P]
  using A = accumulator<T>;
  using lanes_of_integers = typename index_of<A>::integer;
  Search<T> found;
  std::vector<A> samples;
  for (int64_t r = first; r < last; ++r) {
    const int64_t begin = edge_offsets[r], end = edge_offsets[r + 1];
    const int64_t results = offsets[r + 1] - offsets[r], n = results - intervals;
    A* const here = out + offsets[r];
    if (begin == end || n < 1) {
      std::fill_n(here, results, std::numeric_limits<A>::quiet_NaN());
      continue;
    }
    const T *const e = edges + begin, *const c = cdf + begin;
    const int64_t bins = end - begin - 1;
    const EvenSteps<A> steps(widen(c[0]), widen(c[bins]), bias[r], n);
    A* const u = found.numbers(n);
    for_each_register<A, false>(n, [&](int64_t k) {
      const auto numbers = lane_numbers<A>() + static_cast<lanes_of_integers>(k);
      store(u + k, steps.at(__builtin_convertvector(numbers, vec<A>)));
    });
    if (intervals && samples.size() < static_cast<size_t>(n)) samples.resize(n);
    A* const t = intervals ? samples.data() : here;
    found.among(c, bins, n, [=](int64_t i, int64_t p) {
      const auto corner = [=](int64_t k) { return Corner<A>{widen(e[k]), widen(c[k])}; };
      t[i] = position(u[i], corner(std::max<int64_t>(p - 1, 0)), corner(p));
    });
    if (intervals) enclose(t, n, A(widen(e[0])), A(widen(e[bins])), here);
  }
}

}  // namespace
}  // namespace rayfuse

#include "packed_pairs.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& edges, const Tensor& cdf, const Tensor& edge_offsets, const Tensor& bias,
           const Tensor& offsets, int64_t results, bool intervals) {
  const char* const op = "packed_importance_samples";
  const PackedRays of_edges(op, edge_offsets, edges.numel(), "edge_offsets");
  const PackedRays of_results(op, offsets, results);
  Tensor out = empty(edges, {results}, accumulator_dtype(edges));
  dispatch(edges, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *edges_ptr = data<T>(edges), *cdf_ptr = data<T>(cdf);
    const A* bias_ptr = data<A>(bias);
    A* out_ptr = mutable_data<A>(out);
    as_constant(intervals, [&](auto intervals_) {
      for_each_piece(of_edges, of_results, [=](int64_t first, int64_t last) {
        sample<intervals_>(first, last, edges_ptr, cdf_ptr, of_edges.offsets, bias_ptr,
                           of_results.offsets, out_ptr);
      });
    });
  });
  return out;
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("packed_importance_samples", TORCH_BOX(&fwd)); }

}  // namespace rayfuse
