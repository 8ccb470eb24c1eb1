// What select() asks about the current device.
#include "cuda/api.h"
#include "cuda/launch.h"

namespace peft_kernels::cuda {
namespace {

__global__ void probe() {}

}  // namespace

const char* describe_device(Device* device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  // A library that was built for other architectures has nothing to run here: select() then leaves all to Triton.
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  if (!runs) cudaGetLastError();  // said, and not to be found by the next caller
  device->arch = runs ? 10 * major + minor : 0;
  return nullptr;
}

}  // namespace peft_kernels::cuda
