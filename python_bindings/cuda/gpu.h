// What the bindings of CUDA kernels have in common: the GPU a tensor is on, its stream, and views of tensors there.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

#include "../tensors.h"
#include "cuda/api.h"

// In libtorch_cuda.so: weak, so that the library loads with a torch built for CPUs too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace peft_kernels::bindings {

// Makes the GPU of a tensor the current one; kernels are launched there, on its current stream.
class OnGpu {
 public:
  explicit OnGpu(const Tensor& t)
#ifndef PEFT_KERNELS_EMULATED_CUDA
      : guard_(t.get_device_index())
#endif
  {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "CUDA kernels need a CUDA build of torch");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    succeeded("asking the GPU for its properties", cuda::describe_device(&device));
  }

  // Whether the library was built for this GPU.
  bool has_kernels() const { return device.arch != 0; }

  static void succeeded(const char* what, const char* error) {
    STD_TORCH_CHECK(error == nullptr, what, " failed: ", error);
  }

  cuda::Stream stream = nullptr;
  cuda::Device device;

 private:
#ifndef PEFT_KERNELS_EMULATED_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A 16-bit or fp32 matrix whose rows start on 16 bytes, their elements side by side: the caller's own, or a copy.
// Kernels count pieces of eight elements in 32 bits.
inline Tensor with_aligned_rows(const Tensor& t) {
  const bool rows = t.size(0) <= 1 || (t.stride(0) % 8 == 0 && t.stride(0) <= (int64_t{1} << 35) / t.size(0));
  if (rows && t.stride(1) == 1 && aligned_16(t.const_data_ptr())) return t;
  const int64_t columns = t.size(1), padded = (columns + 7) / 8 * 8;
  Tensor whole = empty(t, {t.size(0), padded}, t.scalar_type());
  Tensor copy = torch::stable::narrow(whole, 1, 0, columns);
  return torch::stable::copy_(copy, t);
}
inline int64_t row_stride(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

// The CUDA kernels' view of an NF4 weight.
inline cuda::NF4Weight gpu_weight(const NF4Parts& parts) {
  cuda::NF4Weight weight;
  parts.fill(weight);
  if (parts.nested_offset) weight.nested_offset = data_of<float>("nested_offset", *parts.nested_offset);
  return weight;
}

// What the `triton` overload of an op returns: for problems that the CUDA kernels do not take.
template <class... Results, class... Arguments>
std::tuple<Results...> by_triton(const char* op, const Arguments&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, std::max(sizeof...(Arguments), sizeof...(Results))> stack{from(arguments)...};
  explained("the Triton kernels of this op failed",
            [&] { TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "triton", stack.data(), TORCH_ABI_VERSION)); });
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::tuple<Results...>{to<Results>(stack[i])...};
  }(std::index_sequence_for<Results...>{});
}

inline cuda::Dropout gpu_dropout(double p, const OptionalTensor& seed, Place place) {
  if (!check_dropout(p, seed, place)) return {};
  return {data_of<int64_t>("seed", *seed), dropout_threshold(p), dropout_scale(p)};
}

}  // namespace peft_kernels::bindings

// Each op twice: as the overload that use_backend("cuda") calls, and for the CUDA key, which an emulated library
// leaves.
#ifdef PEFT_KERNELS_EMULATED_CUDA
#define PEFT_KERNELS_CUDA_KEY(op)
#else
#define PEFT_KERNELS_CUDA_KEY(op) \
  STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl(#op, TORCH_BOX(&op)); }
#endif
#define PEFT_KERNELS_CUDA_OP(op)                                                                                 \
  STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CompositeExplicitAutograd, m) { m.impl(#op ".cuda", TORCH_BOX(&op)); } \
  PEFT_KERNELS_CUDA_KEY(op)
