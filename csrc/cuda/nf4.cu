// The NF4 codec: bit for bit what csrc/cpu/kernels/nf4-inl.h computes. Both kernels are bound by memory; every byte
// moves once, 16 at a time where pointers and the end of the array allow it.
#include <type_traits>

#include "cuda/api.h"
#include "cuda/device/nf4.cuh"
#include "cuda/launch.h"

namespace peft_kernels::cuda {
namespace {

constexpr int kWarps = 4;               // of a CTA
constexpr int kChunk = 1024;            // weights: 32 of a thread
constexpr int kTile = kWarps * kChunk;  // the largest blocksize

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements that a thread loads or stores at once

// ---- Dequantise ----------------------------------------------------------------------------------------------------

// The 2 * bytes weights of the low bytes of `word`; `code` is the code of this lane's number modulo 16. A shuffle reads
// five bits of its index, so that a nibble is shifted down and never masked.
template <int kCount>
PEFT_KERNELS_DEVICE void decode_by_shuffle(uint32_t word, float code, float absmax, float (&out)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k] = __shfl_sync(kAllLanes, code, word >> (4 * (k ^ 1))) * absmax;
}

PEFT_KERNELS_DEVICE uint4 pack_vector(const float (&v)[4], float) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
template <class T>
PEFT_KERNELS_DEVICE uint4 pack_vector(const float (&v)[8], T) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// Weights first .. first + size, or up to `count`, byte by byte: wherever pointers are.
template <class T>
PEFT_KERNELS_DEVICE void dequantize_bytes(const NF4Weight& w, int64_t first, int size, int64_t count, T* out) {
  for (int i = 2 * (threadIdx.x & 31); i < size; i += 64) {
    const int64_t element = first + i;
    if (element >= count) return;
    const float absmax = load_absmax(w, element >> w.blocksize_log2);
    const int byte = __ldg(w.packed + (element >> 1));
    out[element] = from_float<T>(kCodes.value[byte >> 4] * absmax);
    if (element + 1 < count) out[element + 1] = from_float<T>(kCodes.value[byte & 15] * absmax);
  }
}

// A warp loads 512 bytes of codes, 16 a lane, and hands them around in shared memory, so that what it stores at once,
// 16 bytes a lane, is contiguous as well. Lane i loads absmax i of a chunk.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    dequantize_kernel(const __grid_constant__ NF4Weight w, int64_t count, T* __restrict__ out) {
  constexpr int kChunks = 2;  // of a warp
  constexpr int kStep = 32 * kVector<T>;
  __shared__ uint4 staged[kWarps][kChunks][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * (kChunks * kChunk);
  if (first + kChunks * kChunk > count || !aligned_to(w.packed, 16) || !aligned_to(out, 16)) {
    dequantize_bytes(w, first, kChunks * kChunk, count, out);
    return;
  }
  const float code = kCodes.value[lane & 15];
  const int blocks = kChunk >> w.blocksize_log2;  // of a chunk; 0 where it is a part of one
  uint4 packed[kChunks];
  float absmax[kChunks];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    packed[chunk] = load_stream(w.packed + ((first + chunk * kChunk) >> 1) + 16 * lane);
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t block = (first + chunk * kChunk) >> w.blocksize_log2;
    absmax[chunk] = load_absmax(w, lane < blocks ? block + lane : block);
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) staged[warp][chunk][lane] = packed[chunk];
  __syncwarp();
  const int block_of_lane = (kVector<T> * lane) >> w.blocksize_log2;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    using Codes = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;  // as many as make 16 bytes
    const Codes* codes = reinterpret_cast<const Codes*>(staged[warp][chunk]);
    uint4* to = reinterpret_cast<uint4*>(out + first + chunk * kChunk) + lane;
#pragma unroll
    for (int step = 0; step < kChunk / kStep; ++step) {
      // Lanes of a step are in one block, or as many blocks: nothing carries from the one shift to the other.
      const int block = block_of_lane + ((step * kStep) >> w.blocksize_log2);
      float v[kVector<T>];
      decode_by_shuffle(codes[32 * step + lane], code, __shfl_sync(kAllLanes, absmax[chunk], block), v);
      to[32 * step] = pack_vector(v, T{});
    }
  }
}

template <class T>
void launch_dequantize(const NF4Weight& weight, int64_t count, void* out, cudaStream_t stream) {
  dequantize_kernel<T><<<ceil_div(count, 2 * kTile), kWarps * 32, 0, stream>>>(weight, count, static_cast<T*>(out));
}

// ---- Quantise ------------------------------------------------------------------------------------------------------

constexpr float kLeastDivisor = 1e-38f;

struct Midpoints {
  float value[16];
};
constexpr Midpoints midpoints() {
  Midpoints m{};
  for (int i = 0; i < 15; ++i) m.value[i] = (kNF4Code[i] + kNF4Code[i + 1]) / 2;
  m.value[15] = 1.0f;  // never looked up
  return m;
}
__device__ const Midpoints kMidpoints = midpoints();

// NaN if one of them is.
PEFT_KERNELS_DEVICE float larger(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// The index of the code nearest to t, plus kIndexOffset; NaN gives 15. A cubic is never off by more than one: rounded,
// it is the number of midpoints below t or one less, and the midpoint of that number, which lane i keeps of i, decides.
// Rounded by the addition of 1.5 * 2^23, it is in the low bits of a float, where the shuffle takes it from.
constexpr uint32_t kIndexOffset = 0x4B400000u;
PEFT_KERNELS_DEVICE uint32_t nearest(float t, float midpoint_of_lane) {
  t = fminf(t, 1.0f);  // of NaN and 1: 1
  const float guess = fmaf(fmaf(t * t, -5.2f, 11.75f), t, 12582912.0f + 7.0f);
  const uint32_t index = __float_as_uint(guess);
  return index + (t > __shfl_sync(kAllLanes, midpoint_of_lane, index));
}

// The blocks of a tile, one at a time by a warp, element by element: for a tile that is not whole, or pointers that are
// not aligned.
template <class T>
PEFT_KERNELS_DEVICE void quantize_elements(const T* weight, int64_t tile, int64_t count, int blocksize_log2,
                                           uint8_t* packed, float* absmax) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, blocksize = 1 << blocksize_log2;
  const float midpoint = kMidpoints.value[lane & 15];
  for (int64_t first = tile + warp * blocksize; first < tile + kTile && first < count; first += kWarps * blocksize) {
    const int size = static_cast<int>(first + blocksize <= count ? blocksize : count - first);
    float most = 0.0f;
#pragma unroll 4
    for (int i = lane; i < size; i += 32) most = larger(most, fabsf(to_float(weight[first + i])));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, step));
    const bool partial = size < blocksize;
    const float divisor = larger(most, kLeastDivisor), reciprocal = __frcp_rn(divisor);
    if (lane == 0) absmax[first >> blocksize_log2] = partial ? divisor : most;
    for (int i = 2 * lane; i - 2 * lane < size; i += 64) {  // all lanes as often
      uint32_t index[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float v = i + k < size ? to_float(weight[first + i + k]) : 0.0f;
        const float t = partial ? __fdiv_rn(v, divisor) : v * reciprocal;
        index[k] = nearest(i + k < size ? t : 0.0f, midpoint) - kIndexOffset;
      }
      if (i < size) packed[(first + i) >> 1] = static_cast<uint8_t>(index[0] << 4 | index[1]);
    }
  }
}

// A CTA has a tile of 4096 elements, a warp a fourth of it, in vectors of 16 bytes a lane.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    quantize_kernel(const T* __restrict__ weight, int64_t count, int blocksize_log2, uint8_t* __restrict__ packed,
                    float* __restrict__ absmax) {
  constexpr int kV = kVector<T>, kVectors = 32 / kV, kStep = 32 * kV;
  using Codes = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;  // those of a vector
  __shared__ float most_of_warp[kWarps];
  const int64_t tile = int64_t{blockIdx.x} * kTile;
  if (tile + kTile > count || !aligned_to(weight, 16) || !aligned_to(packed, sizeof(Codes))) {
    quantize_elements(weight, tile, count, blocksize_log2, packed, absmax);
    return;
  }
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, blocksize = 1 << blocksize_log2;
  const int in_tile = warp * kChunk + kV * lane;  // of this lane's first vector
  uint4 vector[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) vector[j] = load_stream(weight + tile + in_tile + j * kStep);

  const auto value = [&](int j, int k) {  // element k of vector j
    const uint32_t words[4] = {vector[j].x, vector[j].y, vector[j].z, vector[j].w};
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[k]);
    } else {
      const float2 pair = unpack<T>(words[k / 2]);
      return k % 2 == 0 ? pair.x : pair.y;
    }
  };
  float most[kVectors];  // max|w| of the block of each vector
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    most[j] = 0.0f;
#pragma unroll
    for (int k = 0; k < kV; ++k) most[j] = larger(most[j], fabsf(value(j, k)));
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {  // over the lanes of a block
    if (kV * step >= blocksize) break;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) most[j] = larger(most[j], __shfl_xor_sync(kAllLanes, most[j], step));
  }
#pragma unroll
  for (int step = 1; step < kVectors; step *= 2) {  // over its vectors
    if (kStep * step >= blocksize) break;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if ((j & step) == 0) most[j] = most[j + step] = larger(most[j], most[j + step]);
    }
  }
  if (blocksize > kChunk) {  // over its warps
    if (lane == 0) most_of_warp[warp] = most[0];
    __syncthreads();
    float all = larger(most_of_warp[warp], most_of_warp[warp ^ 1]);
    if (blocksize == kTile) all = larger(all, larger(most_of_warp[warp ^ 2], most_of_warp[warp ^ 3]));
#pragma unroll
    for (int j = 0; j < kVectors; ++j) most[j] = all;
  }

  const float midpoint = kMidpoints.value[lane & 15];
  Codes* to = reinterpret_cast<Codes*>(packed + ((tile + in_tile) >> 1));
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int element = in_tile + j * kStep;
    if ((element & (blocksize - 1)) == 0) absmax[(tile + element) >> blocksize_log2] = most[j];
    const float reciprocal = __frcp_rn(larger(most[j], kLeastDivisor));
    uint32_t codes = 0;
#pragma unroll
    for (int i = kV - 1; i >= 0; --i) codes = codes * 16 + nearest(value(j, i ^ 1) * reciprocal, midpoint);
    constexpr uint32_t kOffsets = kIndexOffset * (1 + 16 + 256);  // what they add up to
    to[32 * j] = static_cast<Codes>(codes - kOffsets);
  }
}

template <class T>
void launch_quantize(const void* weight, int64_t count, int blocksize_log2, uint8_t* packed, float* absmax,
                     cudaStream_t stream) {
  quantize_kernel<T><<<ceil_div(count, kTile), kWarps * 32, 0, stream>>>(static_cast<const T*>(weight), count,
                                                                         blocksize_log2, packed, absmax);
}

}  // namespace

const char* nf4_dequantize(const NF4Weight& weight, int64_t count, MutableArray out, Stream stream) {
  if (count == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (out.dtype) {
    case DType::kBFloat16:
      launch_dequantize<BFloat16>(weight, count, out.data, on);
      break;
    case DType::kFloat16:
      launch_dequantize<Float16>(weight, count, out.data, on);
      break;
    default:
      launch_dequantize<float>(weight, count, out.data, on);
  }
  return launched();
}

const char* nf4_quantize(Array weight, int64_t count, int blocksize_log2, uint8_t* packed, float* absmax,
                         Stream stream) {
  if (count == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (weight.dtype) {
    case DType::kBFloat16:
      launch_quantize<BFloat16>(weight.data, count, blocksize_log2, packed, absmax, on);
      break;
    case DType::kFloat16:
      launch_quantize<Float16>(weight.data, count, blocksize_log2, packed, absmax, on);
      break;
    default:
      launch_quantize<float>(weight.data, count, blocksize_log2, packed, absmax, on);
  }
  return launched();
}

}  // namespace peft_kernels::cuda
