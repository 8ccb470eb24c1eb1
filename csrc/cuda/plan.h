// A product with an NF4 weight, and how it is computed: what select.h decides, and what kernels are launched by.
#pragma once

#include <cstdint>

#include "common/array.h"

namespace peft_kernels::cuda {

inline constexpr int64_t kMostCtasY = 65535;  // of a grid, in y and in z

struct Device {
  int arch = 0;  // 90 for sm_90; 0 where the library has no kernels for it
  int multiprocessors = 0;
};

// x W^T, or with `by_input` dz W.
struct Product {
  bool by_input = false;
  int64_t tokens = 0, in_features = 0, out_features = 0;  // M, K, N
  int blocksize_log2 = 0;
  DType dtype = DType::kFloat32;  // of x, or of dz
};

// Numbered as in peft_kernels/ops/linear/regimes.py.
enum class Method : int32_t {
  kElsewhere,  // not a kernel of this backend: Triton's, or panels and a vendor GEMM
  kGemv,       // linear only
  kMatmul,
};

struct Plan {
  Method method = Method::kElsewhere;
  int block_tokens = 0;  // tokens of a CTA
  int splits = 1;        // of the sum, into partial results that are added up in order
};

}  // namespace peft_kernels::cuda
