// What every launcher ends with.
#pragma once

#include <cuda_runtime_api.h>

namespace peft_kernels::cuda {

// Null, or CUDA's words for what a launch failed with.
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peft_kernels::cuda
