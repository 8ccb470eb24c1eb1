// Dropout around flat index 2^34, where the second word of Philox's counter leaves zero. It costs neither memory nor
// time: the arrays are address space of which only the end is touched, and the pool runs only the last tasks.
#include <sys/mman.h>

#include <algorithm>

#include "common/philox.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

constexpr int64_t kInFeatures = 4099, kTokens = (int64_t{1} << 34) / kInFeatures + 3, kCount = kTokens * kInFeatures;
constexpr int64_t kFirstChecked = (int64_t{1} << 34) - 2 * kInFeatures;
constexpr Dropout kDropout{0x9e3779b97f4a7c15u, static_cast<uint32_t>(0.3 * 0x1p32), 2.0f};

bool kept(int64_t element) {
  const PhiloxWords words =
      philox4x32({{static_cast<uint32_t>(element / 4), static_cast<uint32_t>((element / 4) >> 32), 0, 0}},
                 static_cast<uint32_t>(kDropout.seed), static_cast<uint32_t>(kDropout.seed >> 32));
  return words.word[element % 4] >= kDropout.threshold;
}

ThreadPool last_tasks() {
  return {1, [](int64_t tasks, void* context, void (*body)(void*, int64_t, int64_t)) {
            body(context, std::max(tasks - 16, int64_t{0}), tasks);
          }};
}

// bf16 [kCount]; null where the system refuses.
uint16_t* reserve() {
  void* memory = mmap(nullptr, static_cast<size_t>(kCount) * 2, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<uint16_t*>(memory);
}

void check_dropout(const Kernels& table, const uint16_t* x, uint16_t* out) {
  std::fill(out + kFirstChecked, out + kCount, uint16_t{0xffff});
  table.philox_dropout({x, DType::kBFloat16}, kCount, kDropout, {out, DType::kBFloat16}, last_tasks());
  for (int64_t e = kFirstChecked; e < kCount; ++e) {
    CHECK(bf16_to_float(out[e]) == (kept(e) ? 2.0f : 0.0f), "%s: element %lld", table.name, static_cast<long long>(e));
  }
}

// The sums u = D(x) A^T of the last tokens, exact in fp32: x is 1, A small integers. Rows of odd length put the
// boundary inside a vector.
void check_lowrank(const Kernels& table, const uint16_t* x) {
  std::vector<float> a(kInFeatures), b(1, 1.0f), u(kTokens), y(kTokens);
  for (size_t k = 0; k < a.size(); ++k) a[k] = static_cast<float>(k % 64);
  AdaptedLinear p;
  p.tokens = kTokens, p.in_features = kInFeatures, p.out_features = 1;
  p.x = {x, DType::kBFloat16};
  p.base = {y.data(), DType::kFloat32};
  p.lowrank = {1, {a.data(), DType::kFloat32}, {b.data(), DType::kFloat32}, 1.0f, kDropout};
  p.u = u.data();
  p.y = {y.data(), DType::kFloat32};
  table.adapted_linear(p, last_tasks());
  for (int64_t m = kFirstChecked / kInFeatures + 1; m < kTokens; ++m) {
    float expected = 0;
    for (int64_t k = 0; k < kInFeatures; ++k) {
      if (kept(m * kInFeatures + k)) expected += 2 * a[static_cast<size_t>(k)];
    }
    const float got = u[static_cast<size_t>(m)];
    CHECK(got == expected, "%s: token %lld: %g, expected %g", table.name, static_cast<long long>(m),
          static_cast<double>(got), static_cast<double>(expected));
  }
}

}  // namespace

int main() {
  uint16_t *x = reserve(), *out = reserve();
  if (x == nullptr || out == nullptr) {
    std::fprintf(stderr, "skipped: no address space for two arrays of 32 GiB\n");
    return 0;
  }
  std::fill(x + kFirstChecked, x + kCount, float_to_bf16(1.0f));
  for (const Kernels* table : all_kernels()) {
    check_dropout(*table, x, out);
    check_lowrank(*table, x);
  }
  return 0;
}
