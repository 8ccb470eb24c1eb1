// The NF4 codec: decode is exact, encode is exact with ties going to the lower code, ragged sizes included.
#include "common/nf4.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

constexpr int64_t kCounts[] = {0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 4095, 4096, 4097, 100003};

// What the format says, one element at a time.
uint8_t expected_code(float value, float absmax, bool partial) {
  const float divisor = absmax < 1e-38f ? 1e-38f : absmax;
  float scaled = partial ? value / divisor : value * (1.0f / divisor);
  scaled = scaled > 1.0f ? 1.0f : (scaled < -1.0f ? -1.0f : scaled);
  uint8_t code = 0;
  while (code < 15 && (kNF4Code[code] + kNF4Code[code + 1]) / 2 < scaled) ++code;
  return code;
}

void check_round_trip(const Kernels& table, int64_t count, int blocksize_log2, Random& random) {
  const int64_t blocksize = int64_t{1} << blocksize_log2;
  std::vector<float> weight = random.normals(count);
  for (int64_t i = 0; i + 16 < count; i += 97) {  // ties: values exactly on a midpoint, in blocks whose absmax is 1
    weight[static_cast<size_t>(i)] = (kNF4Code[i % 15] + kNF4Code[i % 15 + 1]) / 2;
  }
  if (count > 200) std::fill(weight.begin() + 64, weight.begin() + 160, 0.0f);
  std::vector<uint8_t> packed(static_cast<size_t>((count + 1) / 2), 0xee);
  std::vector<float> absmax(static_cast<size_t>((count + blocksize - 1) / blocksize), std::nanf(""));
  table.nf4_quantize({weight.data(), DType::kFloat32}, count, blocksize_log2, packed.data(), absmax.data(),
                     threads<2>());

  NF4Weight nf4;
  nf4.packed = packed.data();
  nf4.absmax = absmax.data();
  nf4.blocksize_log2 = blocksize_log2;
  Output out(DType::kFloat32, count);
  table.nf4_dequantize(nf4, count, out.array(), threads<2>());
  for (int64_t e = 0; e < count; ++e) {
    const int64_t block = e / blocksize;
    float largest = 0.0f;
    for (int64_t i = block * blocksize; i < std::min(count, (block + 1) * blocksize); ++i) {
      largest = std::max(largest, std::fabs(weight[static_cast<size_t>(i)]));
    }
    const bool partial = (block + 1) * blocksize > count;
    if (partial) largest = std::max(largest, 1e-38f);
    const float stored = absmax[static_cast<size_t>(block)];
    CHECK(stored == largest, "%s: absmax %g, expected %g", table.name, static_cast<double>(stored),
          static_cast<double>(largest));
    const uint8_t byte = packed[static_cast<size_t>(e / 2)], code = e & 1 ? byte & 15 : byte >> 4;
    CHECK(code == expected_code(weight[static_cast<size_t>(e)], largest, partial), "%s: element %lld of %lld",
          table.name, static_cast<long long>(e), static_cast<long long>(count));
    CHECK(static_cast<float>(out[e]) == kNF4Code[code] * stored, "%s: element %lld", table.name,
          static_cast<long long>(e));
  }
  if (count & 1) CHECK((packed.back() & 15) == 7, "%s: the unused nibble codes 0", table.name);
}

}  // namespace

int main() {
  Random random(2);
  for (const Kernels* table : all_kernels()) {
    for (const int64_t count : kCounts) {
      for (int log2 = 5; log2 <= 12; ++log2) check_round_trip(*table, count, log2, random);
    }
  }
  return 0;
}
