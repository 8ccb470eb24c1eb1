// Philox4x32-10 against the known answers of its authors, and the vectorised masks against it.
#include "common/philox.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

void check_known_answer(PhiloxWords counter, uint32_t key0, uint32_t key1, PhiloxWords expected) {
  const PhiloxWords got = philox4x32(counter, key0, key1);
  for (int w = 0; w < 4; ++w) CHECK(got.word[w] == expected.word[w], "word %d is %08x", w, got.word[w]);
}

}  // namespace

int main() {
  check_known_answer({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_known_answer({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_known_answer({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
                     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});

  Dropout dropout{0x9e3779b97f4a7c15u, static_cast<uint32_t>(0.3 * 0x1p32), 1.5f};
  for (const Kernels* table : all_kernels()) {
    for (const int64_t count : {0, 1, 3, 5, 63, 64, 65, 1000, 10007}) {
      const std::vector<float> x = Random(1).normals(count);
      Output out(DType::kFloat32, count);
      table->philox_dropout({x.data(), DType::kFloat32}, count, dropout, out.array(), threads<3>());
      for (int64_t e = 0; e < count; ++e) {
        const PhiloxWords words =
            philox4x32({{static_cast<uint32_t>(e / 4), 0, 0, 0}}, static_cast<uint32_t>(dropout.seed),
                       static_cast<uint32_t>(dropout.seed >> 32));
        const float expected = words.word[e % 4] >= dropout.threshold ? x[static_cast<size_t>(e)] * 1.5f : 0.0f;
        CHECK(static_cast<float>(out[e]) == expected, "%s: element %lld", table->name, static_cast<long long>(e));
      }
    }
  }
  return 0;
}
