// Which instruction set's kernels run: decided once, at the first use.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api.h"

namespace peft_kernels::cpu {

namespace portable {
const Kernels* table(const char* name);
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels* table(const char* name);
}
namespace avx512 {
const Kernels* table(const char* name);
}
#endif

namespace {

// Each set this processor runs, best last.
struct Available {
  const Kernels* tables[3];
  int count = 0;
  std::string names;

  void add(const Kernels* table) {
    tables[count++] = table;
    names += (names.empty() ? "" : ",") + std::string(table->name);
  }
  Available() {
    add(portable::table("portable"));
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) add(avx2::table("avx2"));
    if (avx512) add(avx512::table("avx512"));
#endif
  }
};

const Available& available() {
  static const Available sets;
  return sets;
}

const Kernels& choose() {
  const char* forced = std::getenv("PEFT_KERNELS_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return *available().tables[available().count - 1];
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
  const Available& sets = available();
  for (int i = 0; i < sets.count; ++i) {
    if (std::strcmp(sets.tables[i]->name, name) == 0) return sets.tables[i];
  }
  return nullptr;
}

}  // namespace peft_kernels::cpu
