// Which instruction set's kernels run: decided once, at the first use.
#if defined(PEFT_KERNELS_X86_64)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"

namespace peft_kernels::cpu {

namespace portable {
extern const Kernels kTable;
}
#if defined(PEFT_KERNELS_X86_64)  // CMakeLists.txt builds these objects
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_vnni {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}
#endif

namespace {

#if defined(PEFT_KERNELS_X86_64)
// __builtin_cpu_supports, but for a name that clang 14 does not know.
bool has_f16c() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// Each set this processor runs, best last.
struct Available {
  std::vector<const Kernels*> tables;
  std::string names;

  void add(const Kernels* table) {
    tables.push_back(table);
    names += (names.empty() ? "" : ",") + std::string(table->name);
  }
  Available() {
    add(&portable::kTable);
#if defined(PEFT_KERNELS_X86_64)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) add(&avx2::kTable);
    if (avx512) add(&avx512::kTable);
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni) add(&avx512_vnni::kTable);
    if (vnni && __builtin_cpu_supports("avx512bf16")) add(&avx512_bf16::kTable);
#endif
  }
};

const Available& available() {
  static const Available sets;
  return sets;
}

const Kernels& choose() {
  const char* forced = std::getenv("PEFT_KERNELS_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return *available().tables.back();
  const Kernels* table = kernels_named(forced);
  if (table == nullptr) {
    throw std::invalid_argument("PEFT_KERNELS_CPU_CAPABILITY must be one of " + available().names +
                                " on this machine, got " + forced + "; unset it to use the best");
  }
  return *table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* capabilities() { return available().names.c_str(); }

const Kernels* kernels_named(const char* name) {
  for (const Kernels* table : available().tables) {
    if (std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

}  // namespace peft_kernels::cpu
