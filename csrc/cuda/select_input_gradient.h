// Rows of the chooser (select.h) for dz W, and the tile that its kernel and its plan agree on.
#pragma once

#include <algorithm>

#include "cuda/plan.h"

namespace peft_kernels::cuda {

inline constexpr int kInputGradientColumns = 128;  // of a CTA
inline constexpr int kInputGradientStep = 32;      // rows of W that a warp adds up at a time
inline constexpr int kInputGradientWarps = 8;

// Most tokens for which decoding in the product's loop is predicted to beat panels and a vendor GEMM: fewer where
// tensor cores are fast beside the decoder. The source of each: docs/gpu.md, "How a product with a 4-bit weight is
// computed".
struct InputGradientRow {
  int from_arch;
  int most_tokens;
};
inline constexpr int kInputGradientLeastBlocksizeLog2 = 6;  // two blocks in 128 columns
inline constexpr InputGradientRow kInputGradientRows[] = {{120, 128}, {100, 32}, {90, 64}, {80, 128}};

// The sum over n is split where CTAs are fewer than multiprocessors; at least two steps for each warp.
inline Plan select_input_gradient(const Product& product, const Device& device) {
  const int64_t m = product.tokens, n = product.out_features, k = product.in_features;
  int most_tokens = 0;
  for (const InputGradientRow& row : kInputGradientRows) {
    if (device.arch >= row.from_arch) {
      most_tokens = row.most_tokens;
      break;
    }
  }
  const bool whole_blocks =
      product.blocksize_log2 >= kInputGradientLeastBlocksizeLog2 && k % (int64_t{1} << product.blocksize_log2) == 0;
  if (product.dtype == DType::kFloat32 || !whole_blocks || m > most_tokens) return {};
  const int block = m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;  // tokens of a CTA
  const int64_t columns = (k + kInputGradientColumns - 1) / kInputGradientColumns;
  const int64_t ctas = columns * ((m + block - 1) / block);
  const int64_t wanted = (2 * device.multiprocessors + ctas) / (2 * ctas);  // rounded
  const int64_t possible = n / (2 * kInputGradientWarps * kInputGradientStep);
  return {Method::kMatmul, block, static_cast<int>(std::max<int64_t>(1, std::min(wanted, possible)))};
}

}  // namespace peft_kernels::cuda
