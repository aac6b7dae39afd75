// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__CUDACC__)
#define CUTLASS_HOST_DEVICE __host__ __device__ inline
#define CUTLASS_DEVICE __device__ inline
#define CUTLASS_GRID_CONSTANT __grid_constant__
// Static, as in the real library: every translation unit keeps a kernel of its own, even of the same type.
#define CUTLASS_GLOBAL __global__ static
#else
#define CUTLASS_HOST_DEVICE inline
#define CUTLASS_DEVICE inline
#endif
