// dora_norm: how rows are read, and the two launches.
#include "cuda/dora_kernels.cuh"

#include <algorithm>
#include <cmath>

#include "cuda/launch.h"

namespace peft_kernels::cuda {
namespace {

template <class Weight>
void launch_squares(const DoraNorm& p, int64_t splits, cudaStream_t stream) {
  const int columns = static_cast<int>(ceil_div(ceil_div(p.in_features, splits), kNormColumns)) * kNormColumns;
  const float high = static_cast<float>(p.scaling);
  const NormScaling scaling{high, static_cast<float>(p.scaling - static_cast<double>(high))};
  const int64_t ranks = p.rank <= kNormResident ? (p.rank + 7) / 8 * 8 : kNormRanks;  // in eights: store_b
  const size_t b_bytes = ranks * kNormRows * sizeof(float);
  const auto ctas = static_cast<unsigned>(p.rank + ceil_div(p.out_features, kNormRows) * splits);
  row_squares_kernel<Weight><<<ctas, kNormThreads, b_bytes, stream>>>(p, columns, scaling);
}

template <class T>
bool rows_are_vectors(const DoraNorm& p) {
  constexpr int64_t kVector = 16 / sizeof(T);
  return p.dense_strides[1] == 1 && p.in_features % kVector == 0 && p.dense_strides[0] % kVector == 0 &&
         reinterpret_cast<uintptr_t>(p.dense.data) % 16 == 0;
}

template <class T>
void launch_dense(const DoraNorm& p, int64_t splits, cudaStream_t stream) {
  return rows_are_vectors<T>(p) ? launch_squares<NormDense<T>>(p, splits, stream)
                                : launch_squares<NormElements>(p, splits, stream);
}

}  // namespace

const char* dora_norm(const DoraNorm& problem, int64_t splits, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (problem.weight.packed != nullptr) {
    const bool words = problem.in_features % 32 == 0 && reinterpret_cast<uintptr_t>(problem.weight.packed) % 16 == 0;
    words ? launch_squares<NormNF4>(problem, splits, on) : launch_squares<NormElements>(problem, splits, on);
  } else if (problem.dense.dtype == DType::kBFloat16) {
    launch_dense<BFloat16>(problem, splits, on);
  } else if (problem.dense.dtype == DType::kFloat16) {
    launch_dense<Float16>(problem, splits, on);
  } else {
    launch_dense<float>(problem, splits, on);
  }
  if (const char* error = launched()) return error;
  const double terms = static_cast<double>(problem.rank + 1);
  const double rounding = std::min(terms + 1.0, 3.0 * std::sqrt(terms)) * 0x1p-24;
  finish_norms_kernel<<<ceil_div(problem.out_features, kFinishRows), kFinishRows * 32, 0, on>>>(problem, splits,
                                                                                                rounding);
  return launched();
}

}  // namespace peft_kernels::cuda
