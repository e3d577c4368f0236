// Before a function that runs on the host and in CUDA's kernels.
#pragma once

#if defined(__device__)
#define RAYFUSE_EVERYWHERE __host__ __device__
#else
#define RAYFUSE_EVERYWHERE
#endif
