// Which kernel computes a product with an NF4 weight, in what tiles: the only chooser, a pure function of the problem
// and the device. Host code without CUDA: `pk.explain` asks it too (python_bindings/cuda/plan.cpp).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/array.h"

namespace peft_kernels::cuda {

struct Device {
  int arch = 0;  // 90 for sm_90
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

inline Plan select(const Product&, const Device&) { return {}; }

// Parts of the sum over K of a projection.
inline int64_t projection_splits(int64_t, int64_t, int64_t, const Device&) { return 1; }

// Parts of the sum over K of dora_norm: four CTAs of 64 rows for a multiprocessor, 256 inputs or more for each.
inline int64_t norm_splits(int64_t in_features, int64_t out_features, const Device& device) {
  const int64_t row_blocks = (out_features + 63) / 64;
  const int64_t wanted = (4 * device.multiprocessors + row_blocks - 1) / row_blocks;
  return std::max<int64_t>(1, std::min(wanted, in_features / 256));
}

}  // namespace peft_kernels::cuda
