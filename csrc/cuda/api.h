// The CUDA backend as the bindings (and the tests) see it: plain structs of pointers into a GPU's memory, and functions
// that launch kernels on a stream of the current device. No torch, no Python, no CUDA header. Callers check arguments
// and allocate results and scratch. Nothing here waits for the device, allocates or keeps state: CUDA graphs can
// capture it. Every function returns null, or CUDA's words for what failed.
#pragma once

#include <cstdint>

#include "common/array.h"
#include "cuda/plan.h"

namespace peft_kernels::cuda {

using Stream = void*;  // a cudaStream_t

// NF4 weight; format in common/nf4.h. Exactly one of `absmax` and `absmax_codes` is set; rows are whole blocks where a
// product says so. The offset is a pointer: its value is on the GPU.
struct NF4Weight {
  const uint8_t* packed = nullptr;
  const float* absmax = nullptr;
  const uint8_t* absmax_codes = nullptr;
  const float* nested_code = nullptr;  // [256]
  const float* nested_absmax = nullptr;
  const float* nested_offset = nullptr;
  int nested_blocksize_log2 = 0;
  int blocksize_log2 = 0;
};

// Counter-based dropout; see common/philox.h. Inactive where `seed` is null.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;  // floor(p * 2^32)
  float scale = 1.0f;      // 1 / (1 - p)
};

// u = D(x) A^T in fp32.
struct Projection {
  int64_t tokens = 0, in_features = 0, rank = 0;
  Array x;  // [tokens, K], rows `x_stride` elements apart
  int64_t x_stride = 0;
  Array a;  // [rank, K]
  Dropout dropout;
  float* u = nullptr;  // [tokens, rank]
};

// z = x W^T + scaling * u B^T,   y = column_scale * z + bias; every result rounded once.
// Rows of W are whole blocks, blocksize 64 or more. In 16 bits W is rounded to the dtype of x.
// x and the packed weight begin at multiples of 16 bytes; `x_stride` is a multiple of 8, and M x_stride below 2^35.
struct Linear {
  int64_t tokens = 0, in_features = 0, out_features = 0, rank = 0;  // M, K, N, r
  Array x;                                                          // [M, K], rows `x_stride` elements apart
  int64_t x_stride = 0;
  NF4Weight weight;          // [N, K]
  const float* u = nullptr;  // [M, r], where rank is not 0
  Array lora_b;              // [N, r]
  float scaling = 1.0f;
  Array column_scale;  // [N]
  Array bias;          // [N]
  MutableArray y, z;   // [M, N]; z where asked for
};

// t = (column_scale * g) W,   dx = input_scale * t + D'(du A).
// Rows of W are whole blocks, blocksize 64 or more. W times column_scale is rounded to the dtype of g, once.
// g and the packed weight begin at multiples of 16 bytes, and `grad_stride` is a multiple of 16 bytes;
// M * grad_stride < 2^35, N * K < 2^37.
struct InputGradient {
  int64_t tokens = 0, in_features = 0, out_features = 0, rank = 0;  // M, K, N, r
  Array grad;                                                       // [M, N], rows `grad_stride` elements apart
  int64_t grad_stride = 0;
  NF4Weight weight;           // [N, K]
  Array column_scale;         // [N]
  const float* du = nullptr;  // [M, r], where rank is not 0
  Array lora_a;               // [r, K]
  Dropout dropout;
  Array input_scale;          // [K]
  float* partials = nullptr;  // [plan.splits, M, K] where that is more than 1
  MutableArray dx;            // [M, K]
};

// norm[n] = || W[n] + scaling * B[n] A ||; W is `weight` or, where it has no codes, `dense` with any strides.
struct DoraNorm {
  int64_t in_features = 0, out_features = 0, rank = 0;  // K, N, r
  NF4Weight weight;
  Array dense;
  int64_t dense_strides[2] = {0, 0};  // of rows, of columns; elements
  Array a;                            // [rank, K]
  Array b;                            // [N, rank]
  double scaling = 1.0;
  double* squares = nullptr;  // scratch [splits, N]
  float* most = nullptr;      // scratch [rank]
  float* norm = nullptr;      // [N]
};

const char* nf4_quantize(Array weight, int64_t count, int blocksize_log2, uint8_t* packed, float* absmax,
                         Stream stream);
const char* nf4_dequantize(const NF4Weight& weight, int64_t count, MutableArray out, Stream stream);
const char* project(const Projection& problem, Stream stream);
const char* linear(const Linear& problem, const Plan& plan, Stream stream);
const char* input_gradient(const InputGradient& problem, const Plan& plan, Stream stream);
const char* dora_norm(const DoraNorm& problem, int64_t splits, Stream stream);

// The current device: what select() asks about it.
const char* describe_device(Device* device);

}  // namespace peft_kernels::cuda
