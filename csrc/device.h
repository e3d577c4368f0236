// Before a function of csrc/math that CUDA's kernels call as well.
#pragma once

#if defined(__device__)
#define RAYFUSE_DEVICE __device__
#else
#define RAYFUSE_DEVICE
#endif
