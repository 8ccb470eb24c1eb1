// What peft_kernels/core/library.py and plan.py ask the library about itself, through ctypes.
#include <exception>

#include "cpu/api.h"

extern "C" __attribute__((visibility("default"))) const char* peft_kernels_cpu_capabilities() {
  return peft_kernels::cpu::capabilities();
}

// The instruction set in use, or null where PEFT_KERNELS_CPU_CAPABILITY names one that this machine lacks.
extern "C" __attribute__((visibility("default"))) const char* peft_kernels_cpu_capability() {
  try {
    return peft_kernels::cpu::kernels().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

// How `tokens` rows are multiplied with an NF4 weight; `dtype` counts as in cpu::DType. Null as above.
extern "C" __attribute__((visibility("default"))) const char* peft_kernels_cpu_plan(bool by_input, int64_t tokens,
                                                                                    int64_t in_features,
                                                                                    int64_t blocksize_log2,
                                                                                    int32_t dtype) {
  using namespace peft_kernels::cpu;
  try {
    const Method method =
        kernels().plan({by_input, tokens, in_features, static_cast<int>(blocksize_log2), static_cast<DType>(dtype)});
    switch (method) {
      case Method::kGemv:
        return "look-up GEMV";
      case Method::kFp32Panels:
        return "fp32 panels";
      case Method::kBf16Panels:
        return "bf16 panels";
    }
  } catch (const std::exception&) {
  }
  return nullptr;
}

// Architectures that this library has CUDA C++ kernels for, comma-separated: "80,90a"; empty for none.
extern "C" __attribute__((visibility("default"))) const char* peft_kernels_cuda_architectures() {
#ifdef PEFT_KERNELS_CUDA
  return PEFT_KERNELS_CUDA;
#else
  return "";
#endif
}
