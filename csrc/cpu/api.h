// The CPU backend as the bindings (and the C++ tests) see it: plain structs of pointers and sizes, and one table of
// functions per instruction set. No torch, no Python. Callers check arguments; kernels trust them.
#pragma once

#include <cstdint>

#include "common/array.h"

namespace peft_kernels::cpu {

using peft_kernels::Array;
using peft_kernels::DType;
using peft_kernels::MutableArray;

// The caller's thread pool. Runs body(context, begin, end) over disjoint ranges that cover [0, tasks), and nothing else
// on their threads until it returns (scratch belongs to the thread: scratch.h).
struct ThreadPool {
  int threads;  // how finely to divide work; never what is computed
  void (*parallel_for)(int64_t tasks, void* context, void (*body)(void* context, int64_t begin, int64_t end));
};

// NF4 weight; format in common/nf4.h. Exactly one of `absmax` and `absmax_codes` is set. Blocksizes are powers of two.
struct NF4Weight {
  const uint8_t* packed = nullptr;
  const float* absmax = nullptr;
  const uint8_t* absmax_codes = nullptr;
  const float* nested_code = nullptr;  // [256]
  const float* nested_absmax = nullptr;
  float nested_offset = 0.0f;
  int nested_blocksize_log2 = 0;
  int blocksize_log2 = 0;
};

// Counter-based dropout; see common/philox.h. Inactive when threshold is 0.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // floor(p * 2^32)
  float scale = 1.0f;      // 1 / (1 - p)
};

// The low-rank branch scaling * D(x) A^T B^T.
struct LowRank {
  int64_t rank = 0;  // 0: absent
  Array a;           // [rank, K]
  Array b;           // [N, rank]
  float scaling = 1.0f;
  Dropout dropout;
};

// y = column_scale * ((x * input_scale) W^T + scaling * u B^T) + bias,   u = D(x) A^T
// The product with W is computed from `nf4`, or for a dense W given in `base` (a vendor GEMM made it).
struct AdaptedLinear {
  int64_t tokens = 0, in_features = 0, out_features = 0;  // M, K, N
  Array x;                                                // [M, K]
  NF4Weight nf4;                                          // [N, K], where base is absent
  Array base;                                             // [M, N] = (x * input_scale) W^T; may be y itself
  LowRank lowrank;
  Array column_scale;  // [N]
  Array input_scale;   // [K]
  Array bias;          // [N]
  MutableArray y;      // [M, N]
  float* u = nullptr;  // [M, rank]
  MutableArray z;      // [M, N] value before column_scale, where asked for
};

// Gradients of the above for g = dL/dy; the outputs that are absent are not computed. ScaleColumns does the others.
//   dz = column_scale * g             du = scaling * dz B            dB = scaling * dz^T u
//   dx = input_scale * (dz W) + D'(du A)                             dA = du^T D(x)
//   d input_scale = sum_m x * (dz W)
struct AdaptedLinearBackward {
  int64_t tokens = 0, in_features = 0, out_features = 0;  // M, K, N
  Array grad;                                             // [M, N]
  Array x;                                                // [M, K]
  NF4Weight nf4;                                          // [N, K], where base is absent
  Array base;                                             // [M, K] = dz W (a vendor GEMM made it); may be dx itself
  LowRank lowrank;
  Array column_scale, input_scale;
  const float* u = nullptr;  // [M, rank]
  MutableArray dx, dlora_a, dlora_b, dinput_scale;
};

// All that scales or sums the columns of an array v [M, N], in one pass over it; outputs that are absent are not
// computed. For y = column_scale * z + bias and v = dL/dy: dz, d bias and d column_scale. With v = dz W and z = x: the
// gradients of x * input_scale.
struct ScaleColumns {
  int64_t rows = 0, columns = 0;  // M, N
  Array v;                        // [M, N]
  Array scale;                    // [N], for `scaled`
  Array z;                        // [M, N], for `dots`; dtype of v
  MutableArray scaled;            // [M, N] = scale * v, dtype of v; may be v itself
  MutableArray sums;              // [N] = sum_m v
  MutableArray dots;              // [N] = sum_m v * z
};

// y = x W^T + bias, where x is rounded to int8 first.
struct NF4LinearInt8 {
  int64_t tokens = 0, in_features = 0, out_features = 0;  // M, K, N
  Array x;                                                // [M, K]
  NF4Weight nf4;                                          // [N, K]
  Array bias;                                             // [N]
  MutableArray y;                                         // [M, N]
};

// norm[n] = || W[n] + scaling * B[n] A ||, over the inputs of output feature n.
struct DoraNorm {
  int64_t in_features = 0, out_features = 0, rank = 0;  // K, N, r
  NF4Weight nf4;                                        // [N, K], where dense is absent
  Array dense;                                          // [N, K]
  Array a;                                              // [rank, K]
  Array b;                                              // [N, rank]
  double scaling = 1.0;
  float* norm = nullptr;  // [N]
};

// Activations of the bottleneck adapter, counted as in peft_kernels/ops/adapter/schema.py.
enum class Activation : int32_t { kIdentity, kRelu, kLeakyRelu, kGelu, kGeluTanh, kSilu, kTanh };

// What both directions of the bottleneck adapter take.
struct AdapterOperands {
  int64_t tokens = 0, in_features = 0, rank = 0, out_features = 0;  // M, d, r, N
  Array hidden;                                                     // [M, d]
  Array down_weight, down_bias;                                     // [r, d], [r]
  Array up_weight, up_bias;                                         // [N, r], [N]
  Activation activation = Activation::kIdentity;
  float scaling = 1.0f;  // where scale is absent
  Array scale;           // [N] or [1]
  bool scale_per_channel = false;
  Array gate;  // [M]
  Dropout dropout;
};

// down = f(hidden W_d^T + b_d)    up = scale * (down W_u^T + b_u)    out = D(up) * gate + residual
struct BottleneckAdapter : AdapterOperands {
  Array residual;         // [M, N]
  MutableArray out;       // [M, N]
  MutableArray down, up;  // [M, r], [M, N], where asked for
};

// Gradients of the above for g = dL/dout and, where given, grad_down = dL/ddown; absent outputs are not computed.
//   e = D'(g)    q = (scale * e) W_u      dgate = sum_n (scale * e) * (down W_u^T + b_u) = down . q + (scale * e) . b_u
//   dz = f'(z) * (gate * q + grad_down)   dhidden = dz W_d (+ g where the residual is hidden)
//   dW_d = dz^T hidden, db_d = sum_m dz   dW_u = scale * (gate * e)^T down, db_u = scale * sum_m gate * e
//   dscale = sum_m (gate * e) * (down W_u^T + b_u), summed over n too where scale is [1]
struct BottleneckAdapterBackward : AdapterOperands {
  Array grad;       // [M, N]
  Array grad_down;  // [M, r]
  bool residual_is_hidden = false;
  MutableArray dhidden, ddown_weight, ddown_bias, dup_weight, dup_bias, dscale, dgate;
};

// One product with a frozen NF4 weight W [N, K]: x W^T, or for the input gradient dz W.
struct NF4Product {
  bool by_input = false;  // the input gradient
  int64_t tokens = 0, in_features = 0;
  int blocksize_log2 = 0;
  DType dtype = DType::kFloat32;  // of x, or of the gradient
};
enum class Method : int32_t {
  kGemv,        // each code is looked up straight into an fp32 sum
  kFp32Panels,  // blocks of W are decoded in fp32, for a block of tokens
  kBf16Panels,  // the same in bf16: W is rounded to bf16, products are summed in fp32
};

struct Kernels {
  const char* name;  // of the instruction set
  Method (*plan)(const NF4Product& product);
  void (*nf4_quantize)(Array weight, int64_t count, int blocksize_log2, uint8_t* packed, float* absmax,
                       ThreadPool pool);
  void (*nf4_dequantize)(const NF4Weight& weight, int64_t count, MutableArray out, ThreadPool pool);
  void (*philox_dropout)(Array x, int64_t count, const Dropout& dropout, MutableArray out, ThreadPool pool);
  void (*adapted_linear)(const AdaptedLinear& problem, ThreadPool pool);
  void (*adapted_linear_backward)(const AdaptedLinearBackward& problem, ThreadPool pool);
  void (*scale_columns)(const ScaleColumns& problem, ThreadPool pool);
  void (*nf4_linear_int8)(const NF4LinearInt8& problem, ThreadPool pool);
  void (*dora_norm)(const DoraNorm& problem, ThreadPool pool);
  void (*activate)(Activation activation, float* z, float* slope, int64_t count);  // slope: f'(z), or null
  void (*bottleneck_adapter)(const BottleneckAdapter& problem, ThreadPool pool);
  void (*bottleneck_adapter_backward)(const BottleneckAdapterBackward& problem, ThreadPool pool);
};

// The table in use: the best that this processor runs, or the one that PEFT_KERNELS_CPU_CAPABILITY names if it is not
// above it. Chosen once, at the first call; an unknown or unavailable name throws std::invalid_argument.
const Kernels& kernels();

// The names of all tables that this processor runs, comma-separated, best last: "portable,avx2,avx512".
const char* capabilities();

// One table by name for the tests; null where the processor cannot run it.
const Kernels* kernels_named(const char* name);

}  // namespace peft_kernels::cpu
