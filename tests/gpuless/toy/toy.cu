// A library like ours in small, for the emulator's own tests: kernels that take a struct, and their launcher.
#include "toy.h"

namespace toy {
namespace {

// out[i] = scale * x[i] + y[i]; the last thread of a CTA reads what the first wrote, through shared memory.
__global__ void __launch_bounds__(256) add_kernel(const __grid_constant__ Add p) {
  extern __shared__ float room[];
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t row = blockIdx.y + int64_t{gridDim.y} * blockIdx.z;
  if (row >= p.rows) return;
  room[threadIdx.x] = i < p.count ? fmaf(p.scale, p.x[row * p.count + i], p.y[row * p.count + i]) : 0.0f;
  __syncthreads();
  const int other = blockDim.x - 1 - threadIdx.x;
  if (i - threadIdx.x + other < p.count) p.out[row * p.count + i - threadIdx.x + other] = room[other];
}

__global__ void copy_kernel(const float* x, float* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = x[i];
}

}  // namespace

const char* add(const Add& p, const Launch& launch, void* stream) {
  const dim3 grid((p.count + launch.threads - 1) / launch.threads, launch.rows_y, launch.rows_z);
  if (launch.allowed >= 0)
    cudaFuncSetAttribute(add_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.allowed);
  if (cudaPeekAtLastError() == cudaSuccess)
    add_kernel<<<grid, launch.threads, launch.shared, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* copy(const float* x, float* out, int64_t count, void* stream) {
  const int ctas = count > 0 ? 1 : 0;
  copy_kernel<<<ctas, 32, 0, static_cast<cudaStream_t>(stream)>>>(x, out, count);
  const cudaError_t error = count < 0 ? cudaPeekAtLastError() : cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int device_arch(int* multiprocessors) {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return 10 * major + minor;
}

}  // namespace toy
