// States of scans beyond sums: products, and the chains that their gradients run through.
#pragma once

#include "rays.h"

namespace rayfuse {

// y -> add + scale y, of samples in the order of the scan.
template <class A>
struct Chain {
  A scale, add;

  __device__ static Chain none() { return {A(1), A(0)}; }
  __device__ A operator()(A y) const { return add + scale * y; }
  __device__ Chain join(const Chain& next) const { return {next.scale * scale, next(add)}; }
  __device__ Chain shuffle(int lane) const {
    return {__shfl_sync(kAllLanes, scale, lane), __shfl_sync(kAllLanes, add, lane)};
  }
  __device__ Chain shuffle_up(int places) const {
    return {__shfl_up_sync(kAllLanes, scale, places), __shfl_up_sync(kAllLanes, add, places)};
  }
  __device__ Chain shuffle_down(int places) const {
    return {__shfl_down_sync(kAllLanes, scale, places), __shfl_down_sync(kAllLanes, add, places)};
  }
};

// A product over a team.
template <class A>
struct Product {
  A value;

  __device__ static Product none() { return {A(1)}; }
  __device__ Product join(const Product& next) const { return {value * next.value}; }
  __device__ Product shuffle(int lane) const { return {__shfl_sync(kAllLanes, value, lane)}; }
  __device__ Product shuffle_up(int places) const {
    return {__shfl_up_sync(kAllLanes, value, places)};
  }
  __device__ Product shuffle_down(int places) const {
    return {__shfl_down_sync(kAllLanes, value, places)};
  }
};

}  // namespace rayfuse
