// What every launcher does around its <<<>>>.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels::cuda {

// Null, or CUDA's words for why the last launch failed.
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace peft_kernels::cuda
