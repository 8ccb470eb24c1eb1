// Rows of the chooser (select.h) for x W^T.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

namespace peft_kernels::cuda {

// Most tokens of each method in 16 bits, by the first architecture that they are for, the latest first. Predictions: of
// gemv, up to where a warp's request for x, a line of L1 for each token, costs the load/store unit more than the ring
// of matmul; of matmul, `source`.
struct LinearRow {
  int from_arch, most_gemv_tokens, most_matmul_tokens;
  const char* source;
};
inline constexpr LinearRow kLinearRows[] = {
    {120, 2, 128, "bitsandbytes 0.50 fuses up to 256, 128, 64 at three, two, one waves of CTAs"},
    {100, 2, 32, "bitsandbytes 0.50 fuses up to 32, 8, 8 on a B200"},
    {90, 2, 64, "bitsandbytes 0.50 fuses up to 64, 48, 32 on an H100"},
    {80, 2, 128, "bitsandbytes 0.50 fuses up to 128, 64, 64 on an A100, 256, 128, 64 on sm_89"},
};
inline constexpr int kLinearMostFp32Tokens = 4;  // the kernel's; as for Triton's, the alternative is panels

// Tiles of matmul: tokens and outputs of a CTA, and cycles of a multiprocessor's quarter for a weight of a lane, by the
// pipe that is busiest (docs/gpu.md, sm_80; the order is the same on the others).
struct LinearTile {
  int tokens, outputs;
  double cycles;
  const char* source;
};
inline constexpr LinearTile kLinearTiles[] = {
    {64, 128, 8.0, "tensor cores"},
    {32, 64, 5.9, "ALU"},
    {16, 64, 5.1, "load/store unit"},
    {8, 32, 4.6, "load/store unit"},
};

// Of the tiles, that with which the busiest multiprocessor is done first. A small one may win although it decodes W
// several times: by then W is in L2, and multiprocessors would have nothing to do. Sums over K are split among the
// warps of a CTA only: writing and reading two parts of them is more than a twentieth of W's bytes where K < 570 M.
inline Plan select_linear(const Product& product, const Device& device) {
  const int64_t m = product.tokens, blocksize = int64_t{1} << product.blocksize_log2;
  if (device.arch < 80 || blocksize < 64 || product.in_features % blocksize != 0) return {};
  if (product.dtype == DType::kFloat32) return m <= kLinearMostFp32Tokens ? Plan{Method::kGemv, 0, 1} : Plan{};
  const LinearRow* row = kLinearRows;
  while (device.arch < row->from_arch) ++row;
  if (m > row->most_matmul_tokens) return {};
  if (m <= row->most_gemv_tokens) return {Method::kGemv, 0, 1};
  Plan best;
  double least = 0.0;
  for (const LinearTile& tile : kLinearTiles) {
    if (tile.tokens == 8 && m > 8) continue;
    const int64_t across = (product.out_features + tile.outputs - 1) / tile.outputs;  // in y of the grid
    if (across > kMostCtasY) continue;
    const int64_t ctas = (m + tile.tokens - 1) / tile.tokens * across;
    const int64_t turns = (ctas + device.multiprocessors - 1) / device.multiprocessors;
    const double cycles = static_cast<double>(turns) * tile.outputs * tile.cycles;
    if (best.method == Method::kElsewhere || cycles < least) {
      best = {Method::kMatmul, tile.tokens, 1};
      least = cycles;
    }
  }
  return best;
}

}  // namespace peft_kernels::cuda
