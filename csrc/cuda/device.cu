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
  if (error != cudaSuccess) return words(error);
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe);
  const char* const failure = words(error);
  switch (error) {
    case cudaSuccess:
      device->arch = 10 * major + minor;
      return nullptr;
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
      device->arch = 0;  // the library was built for other architectures: everything is left to Triton
      return nullptr;
    default:
      return failure;
  }
}

}  // namespace peft_kernels::cuda
