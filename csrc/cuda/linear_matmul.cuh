// y of up to 128 tokens on tensor cores. A CTA of four warps has kTokens tokens and 32 outputs for each of its
// kRowWarps rows of warps; the other warps split the sum: each kind has its own chunks of the inputs, and the parts are
// added in order. x comes by cp.async through a ring of shared memory, half a chunk of all tokens at a time.
#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/linear_tile.cuh"

namespace peft_kernels::cuda {

template <int kTokens_, int kRowWarps_>
struct MatmulTile {
  static constexpr int kTokens = kTokens_, kRowWarps = kRowWarps_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kParts = kWarps / kRowWarps;
  static constexpr int kOutputs = 32 * kRowWarps;
  static constexpr int kStageBytes = kTokens * 256;
  static constexpr int kStages = kTokens <= 16 ? 2 : 3;  // with a table of pairs beside them, two fit
  static constexpr int kCtas = kTokens == 16 ? 3 : 2;    // of a multiprocessor
  static constexpr int kAhead = kTokens <= 16 ? 2 : 1;   // halves of chunks of W under way
  static constexpr bool kTable = kTokens <= 16;          // else x keeps the load/store unit busy
};

template <class T, class Tile, bool kNested>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    linear_matmul_kernel(const __grid_constant__ Linear p, Opaque opaque) {
  constexpr int kTokenTiles = Tile::kTokens / 8, kRows = 4;  // rows g, g + 8, g + 16, g + 24 of a warp's 32
  using Sums = Parts<Tile::kTokens, Tile::kOutputs, Tile::kParts>;
  constexpr int kRingBytes = Tile::kParts * Tile::kStages * Tile::kStageBytes;
  static_assert(sizeof(float) * Sums::kFloats <= kRingBytes);
  __shared__ __align__(128) unsigned char shared[kRingBytes + (Tile::kTable ? PairTable::kBytes : 0)];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int row_warp = warp % Tile::kRowWarps, part = warp / Tile::kRowWarps;
  const int blocks = static_cast<int>(p.in_features / kBlock);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Tile::kTokens;
  const int64_t first_output = static_cast<int64_t>(blockIdx.y) * Tile::kOutputs;
  const int64_t first_row = first_output + 32 * row_warp;
  // Parts have chunks in turns; all have as many, the last of which may lie beyond K.
  const int chunks = (blocks + kChunkBlocks * Tile::kParts - 1) / (kChunkBlocks * Tile::kParts);

  constexpr int kBlockStep = kChunkBlocks * Tile::kParts;

  // ---- x: this thread copies 16 bytes, inputs 8 `piece` of the 32, of block `copied_block` and of every
  // kStep-th token. In shared memory: [token][block][piece ^ swizzle], which neither copies nor reads conflict in.
  constexpr int kStep = 2 * Tile::kRowWarps, kCopies = Tile::kTokens / kStep;
  const int copier = threadIdx.x % (32 * Tile::kRowWarps);
  const int piece = copier & 3, copied_block = (copier >> 2) & 3, copied_token = copier >> 4;
  uint32_t x_row[kCopies];  // in 16 bytes; rows beyond M, which nobody stores, are the last one
#pragma unroll
  for (int i = 0; i < kCopies; ++i)
    x_row[i] = static_cast<uint32_t>(min(first_token + copied_token + i * kStep, p.tokens - 1) * (p.x_stride / 8));
  const auto swizzle = [](int token, int block) { return (block >> 1) * 2 + (token & 1); };
  const uint32_t ring = shared_address(shared) + part * Tile::kStages * Tile::kStageBytes;
  const uint32_t copy_to =
      ring + copied_token * 256 + copied_block * 64 + (piece ^ swizzle(copied_token, copied_block)) * 16;
  int next_block = part * kChunkBlocks + copied_block;  // of the next chunk to copy
  const char* next_x = static_cast<const char*>(p.x.data) + next_block * 128 + piece * 16;
  const auto stage = [&](int half, uint32_t to) {  // zeros beyond K
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_async_16(to + i * kStep * 256, keep(next_x) + half * 64 + x_row[i] * uint64_t{16}, next_block < blocks);
    copy_async_commit();
    if (half == 1) {
      next_block += kBlockStep;
      next_x += kBlockStep * 128;
    }
  };
  const auto barrier = [] {
    if constexpr (Tile::kRowWarps == 1) {
      __syncwarp();  // a warp has a ring of its own
    } else {
      __syncthreads();
    }
  };

  // ---- W: half of each row's block at a time, kAhead halves ahead
  int64_t rows[kRows];
  const uint4* codes[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = min(first_row + 8 * r + g, p.out_features - 1);
    codes[r] = reinterpret_cast<const uint4*>(p.weight.packed + rows[r] * (p.in_features / 2));
  }
  const Scales<kRows, kNested> scales(p.weight, rows, p.in_features);
  int block = part * kChunkBlocks + t, inside = min(block, blocks - 1);
  constexpr int kAhead = Tile::kAhead;
  uint4 words[kAhead][kRows];
  typename Scales<kRows, kNested>::Stored next_absmax[kRows];
  const auto load = [&](uint4(&to)[kRows], int from, int half) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r] = load_stream(codes[r] + 2 * from + half);
  };

  stage(0, copy_to);
  stage(1, copy_to + Tile::kStageBytes);
#pragma unroll
  for (int half = 0; half < kAhead; ++half) load(words[half], inside, half);
  scales.load(next_absmax, inside);
  uint32_t copy = 0;
  if constexpr (Tile::kTable) {
    PairTable& pairs = *reinterpret_cast<PairTable*>(shared + kRingBytes);
    pairs.fill(threadIdx.x, Tile::kThreads);
    copy = pairs.copy_of(lane);
    if constexpr (Tile::kRowWarps == 1) __syncthreads();  // else the loop's first barrier will do
  }
  float sum[2][kTokenTiles][4] = {};
  add_low_rank(sum, p, first_row, first_token, part, Tile::kParts);

  const uint32_t read_from = ring + g * 256 + t * 64 + swizzle(g, t) * 16;
  // Of three stages, whose turns are not those of halves: the one to read, and the one that has been read.
  uint32_t read = read_from, write = copy_to + 2 * Tile::kStageBytes;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float absmax[kRows];
    scales.decode(absmax, next_absmax, inside, block < blocks);
    block += kBlockStep;
    const int next_inside = min(block, blocks - 1);
    const TileDecoder<T, Tile::kTable> decoder[2] = {{absmax[0], absmax[1], copy}, {absmax[2], absmax[3], copy}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy_async_wait<1>();
      barrier();  // this half has come for all; with three stages, all are done with the half before
      if constexpr (Tile::kStages == 3) {
        stage(half, write);
        write = read + (copy_to - read_from);
      }
      uint4 later[kRows];
      load(later, half + kAhead < 2 ? inside : next_inside, (half + kAhead) % 2);
      if (half == 2 - kAhead) scales.load(next_absmax, next_inside);
      const uint4(&now)[kRows] = words[half % kAhead];
      const uint32_t from = Tile::kStages == 3 ? read : read_from + half * Tile::kStageBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[2][2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          decoder[r].decode(component(now[2 * r], i), component(now[2 * r + 1], i), a[r], opaque);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const uint4 values = load_shared_16((from ^ (i * 16)) + j * 8 * 256);
          multiply<T>(sum[0][j], a[0], values);
          multiply<T>(sum[1][j], a[1], values);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) words[half % kAhead][r] = later[r];
      if constexpr (Tile::kStages == 2) {
        barrier();
        stage(half, copy_to + half * Tile::kStageBytes);
      } else {
        read = read == read_from + 2 * Tile::kStageBytes ? read_from : read + Tile::kStageBytes;
      }
    }
    inside = next_inside;
  }
  copy_async_wait<0>();
  __syncthreads();  // the sums lie where x was
  float* parts = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < 2; ++r) Sums::put(parts, part, 32 * row_warp + 16 * r, sum[r]);
  if constexpr (Tile::kParts == 1) {
    __syncwarp();  // a warp finishes the outputs whose sums it has
  } else {
    __syncthreads();
  }
  Sums::template finish<T, Tile::kThreads>(parts, p, first_token, first_output);
}

}  // namespace peft_kernels::cuda
