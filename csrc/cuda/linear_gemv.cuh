// y of a few tokens: bound by reading W. A CTA has 16 outputs; its 8 warps have every eighth chunk of the inputs each,
// and add their sums up in order. x comes from L1, without a detour: at one token a warp's request is one line.
#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/linear_tile.cuh"

namespace peft_kernels::cuda {

constexpr int kGemvWarps = 8, kGemvTokens = 8;

__device__ const uint4 kZeroBlock[8] = {};  // x of blocks beyond K: an infinity there would not vanish times absmax 0

template <class T, bool kNested>
__global__ void __launch_bounds__(32 * kGemvWarps) linear_gemv_kernel(const __grid_constant__ Linear p, Opaque opaque) {
  using Sums = Parts<kGemvTokens, kTileRows, kGemvWarps>;
  constexpr int kSumBytes = sizeof(float) * Sums::kFloats;
  static_assert(kSumBytes <= PairTable::kBytes);
  __shared__ __align__(16) unsigned char shared[PairTable::kBytes];  // the sums take the table's place

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int blocks = static_cast<int>(p.in_features / kBlock);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows, last = p.out_features - 1;
  const int64_t rows[2] = {min(first + g, last), min(first + g + 8, last)};
  const uint4* codes_top = reinterpret_cast<const uint4*>(p.weight.packed + rows[0] * (p.in_features / 2));
  const uint4* codes_bottom = reinterpret_cast<const uint4*>(p.weight.packed + rows[1] * (p.in_features / 2));
  const Scales<2, kNested> scales(p.weight, rows, p.in_features);
  // Columns of the products of tokens that are not there are never stored.
  const uint4* x = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x.data) +
                                                  min(static_cast<int64_t>(g), p.tokens - 1) * p.x_stride);

  struct Chunk {
    uint4 top[2], bottom[2];
    typename Scales<2, kNested>::Stored absmax[2];
  } now, next;
  const auto load = [&](Chunk& chunk, int block) {
    const int inside = min(block, blocks - 1);
    chunk.top[0] = load_stream(codes_top + 2 * inside);
    chunk.top[1] = load_stream(codes_top + 2 * inside + 1);
    chunk.bottom[0] = load_stream(codes_bottom + 2 * inside);
    chunk.bottom[1] = load_stream(codes_bottom + 2 * inside + 1);
    scales.load(chunk.absmax, inside);
  };
  int block = warp * kChunkBlocks + t;
  load(now, block);  // under way while the table is filled
  PairTable& pairs = *reinterpret_cast<PairTable*>(shared);
  pairs.fill(threadIdx.x, 32 * kGemvWarps);
  const uint32_t copy = pairs.copy_of(lane);
  __syncthreads();
  float sum[1][1][4] = {};
  add_low_rank(sum, p, first, 0, warp, kGemvWarps);
  // With `whole` all lanes' blocks are inside the row.
  const auto add_chunk = [&](auto whole) {
    const bool inside = whole || block < blocks;
    const int this_block = inside ? block : blocks - 1;
    load(next, block + kGemvWarps * kChunkBlocks);
    float absmax[2];
    scales.decode(absmax, now.absmax, this_block, inside);
    const TileDecoder<T, true> decoder(absmax[0], absmax[1], copy);
    const uint4* values = inside ? keep(x + 8 * this_block) : kZeroBlock;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t a[2][4];
      decoder.decode(component(now.top[i / 4], i % 4), component(now.bottom[i / 4], i % 4), a, opaque);
      multiply<T>(sum[0][0], a, __ldg(values + i));
    }
    now = next;
    block += kGemvWarps * kChunkBlocks;
  };
  int begin = warp * kChunkBlocks;
  for (; begin + kChunkBlocks <= blocks; begin += kGemvWarps * kChunkBlocks) add_chunk(std::true_type{});
  if (begin < blocks) add_chunk(std::false_type{});
  __syncthreads();
  float* parts = reinterpret_cast<float*>(shared);
  Sums::put(parts, warp, 0, sum[0]);
  __syncthreads();
  Sums::finish<T, 32 * kGemvWarps>(parts, p, 0, first);
}

}  // namespace peft_kernels::cuda
