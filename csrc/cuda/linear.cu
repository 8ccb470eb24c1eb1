#include "cuda/launch.h"
#include "cuda/linear_gemv.cuh"
#include "cuda/linear_gemv_fp32.cuh"
#include "cuda/linear_matmul.cuh"

namespace peft_kernels::cuda {

template <class T, bool kNested>
static const char* launch(const Linear& p, const Plan& plan, cudaStream_t stream) {
  const auto matmul = [&](auto tile) {
    using Tile = decltype(tile);
    const dim3 grid(ceil_div(p.tokens, Tile::kTokens), ceil_div(p.out_features, Tile::kOutputs));
    linear_matmul_kernel<T, Tile, kNested><<<grid, Tile::kThreads, 0, stream>>>(p, Opaque{});
  };
  if (plan.method == Method::kGemv) {
    linear_gemv_kernel<T, kNested><<<ceil_div(p.out_features, kTileRows), 32 * kGemvWarps, 0, stream>>>(p, Opaque{});
  } else if (plan.block_tokens == 8) {
    matmul(MatmulTile<8, 1>{});
  } else if (plan.block_tokens == 16) {
    matmul(MatmulTile<16, 2>{});
  } else if (plan.block_tokens == 32) {
    matmul(MatmulTile<32, 2>{});
  } else {
    matmul(MatmulTile<64, 4>{});
  }
  return launched();
}

template <bool kNested>
static const char* launch_fp32(const Linear& p, cudaStream_t stream) {
  const unsigned grid = ceil_div(p.out_features, GemvFp32::kOutputs);
  if (p.tokens == 1) {
    linear_gemv_fp32_kernel<1, kNested><<<grid, GemvFp32::kThreads, 0, stream>>>(p);
  } else {
    linear_gemv_fp32_kernel<4, kNested><<<grid, GemvFp32::kThreads, 0, stream>>>(p);
  }
  return launched();
}

const char* linear(const Linear& p, const Plan& plan, Stream stream) {
  if (p.tokens == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const bool nested = p.weight.absmax == nullptr;
  switch (p.x.dtype) {
    case DType::kBFloat16:
      return nested ? launch<BFloat16, true>(p, plan, on) : launch<BFloat16, false>(p, plan, on);
    case DType::kFloat16:
      return nested ? launch<Float16, true>(p, plan, on) : launch<Float16, false>(p, plan, on);
    default:
      return nested ? launch_fp32<true>(p, on) : launch_fp32<false>(p, on);
  }
}

}  // namespace peft_kernels::cuda
