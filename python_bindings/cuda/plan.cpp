// What select() says about a product on the current device: peft_kernels_cuda::plan, which `pk.explain` asks.
#include "cuda/select.h"
#include "gpu.h"

namespace peft_kernels::bindings {
namespace {

int64_t plan(bool by_input, int64_t tokens, int64_t in_features, int64_t out_features, int64_t blocksize,
             ScalarType dtype) {
  cuda::Device device;
  OnGpu::succeeded("asking the GPU for its properties", cuda::describe_device(&device));
  const cuda::Product product{
      by_input, tokens, in_features, out_features, blocksize_log2("blocksize", blocksize), dtype_of("dtype", dtype)};
  return static_cast<int64_t>(cuda::select(product, device).method);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_cuda, CompositeExplicitAutograd, m) { m.impl("plan", TORCH_BOX(&plan)); }

}  // namespace peft_kernels::bindings
