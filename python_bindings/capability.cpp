// What peft_kernels/core/library.py asks the library about itself, through ctypes.
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
