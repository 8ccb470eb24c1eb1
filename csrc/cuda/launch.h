// What every launcher does around its <<<>>>.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels::cuda {

// Null, or CUDA's words for an error. It is said once: CUDA forgets it, and blames no later launch for it.
inline const char* words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// The same of the launch before.
inline const char* launched() { return words(cudaGetLastError()); }

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace peft_kernels::cuda
