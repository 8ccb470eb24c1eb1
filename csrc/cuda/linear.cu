#include "cuda/launch.h"
#include "cuda/linear_gemv.cuh"
#include "cuda/linear_matmul.cuh"

namespace peft_kernels::cuda {

template <class T, bool kNested>
static const char* launch(const Linear& p, const Plan& plan, cudaStream_t stream) {
  const auto matmul = [&](auto tile) {
    using Tile = decltype(tile);
    const dim3 grid(ceil_div(p.tokens, Tile::kTokens), ceil_div(p.out_features, Tile::kOutputs));
    matmul_kernel<T, Tile, kNested><<<grid, Tile::kThreads, 0, stream>>>(p, Opaque{});
  };
  if (plan.method == Method::kGemv) {
    gemv_kernel<T, kNested><<<ceil_div(p.out_features, kTileRows), 32 * kGemvWarps, 0, stream>>>(p, Opaque{});
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

template <class T>
static const char* launch(const Linear& p, const Plan& plan, cudaStream_t stream) {
  return p.weight.absmax != nullptr ? launch<T, false>(p, plan, stream) : launch<T, true>(p, plan, stream);
}

const char* linear(const Linear& p, const Plan& plan, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return p.x.dtype == DType::kBFloat16 ? launch<BFloat16>(p, plan, on) : launch<Float16>(p, plan, on);
}

}  // namespace peft_kernels::cuda
