// dz W, the gradient of the input of a linear with an NF4 weight: nf4_linear_backward_input_sm80.
#include "cuda/input_gradient_kernel.cuh"
#include "cuda/launch.h"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTokens, bool kNested>
const char* launch(const InputGradient& p, int splits, cudaStream_t stream) {
  using S = InputGradientShape<kTokens>;
  const auto kernel = input_gradient_kernel<T, kTokens, kNested>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return words(error);
  const dim3 grid(ceil_div(p.in_features, kInputGradientColumns), static_cast<unsigned>(splits),
                  ceil_div(p.tokens, kTokens));
  kernel<<<grid, S::kThreads, S::kSharedBytes, stream>>>(p, splits);
  if (splits > 1) {
    if (const char* failure = launched()) return failure;
    finish_input_gradient_kernel<T><<<ceil_div(p.tokens * p.in_features, 8 * 128), 128, 0, stream>>>(p, splits);
  }
  return launched();
}

template <class T, bool kNested>
const char* launch(const InputGradient& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.block_tokens) {
    case 8:
      return launch<T, 8, kNested>(p, plan.splits, stream);
    case 16:
      return launch<T, 16, kNested>(p, plan.splits, stream);
    case 32:
      return launch<T, 32, kNested>(p, plan.splits, stream);
    case 64:
      return launch<T, 64, kNested>(p, plan.splits, stream);
    default:
      return "input_gradient must have a plan for 8, 16, 32 or 64 tokens";
  }
}

template <class T>
const char* launch(const InputGradient& p, const Plan& plan, cudaStream_t stream) {
  return p.weight.absmax == nullptr ? launch<T, true>(p, plan, stream) : launch<T, false>(p, plan, stream);
}

}  // namespace

const char* input_gradient(const InputGradient& problem, const Plan& plan, Stream stream) {
  if (problem.tokens == 0 || problem.in_features == 0) return nullptr;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return problem.grad.dtype == DType::kBFloat16 ? launch<BFloat16>(problem, plan, s)
                                                : launch<Float16>(problem, plan, s);
}

}  // namespace peft_kernels::cuda
