// Before a function of csrc/math: for CUDA's kernels as well, RAYFUSE_EVERYWHERE; where it calls
// what only they have under nvcc, RAYFUSE_DEVICE.
#pragma once

#if defined(__device__)
#define RAYFUSE_DEVICE __device__
#define RAYFUSE_EVERYWHERE __host__ __device__
#else
#define RAYFUSE_DEVICE
#define RAYFUSE_EVERYWHERE
#endif
