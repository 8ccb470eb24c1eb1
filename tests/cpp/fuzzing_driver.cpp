// Runs a fuzzer on random bytes of a fixed seed, where libFuzzer is not: `fuzz_linear [inputs [seed]]`.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
  const long inputs = count > 1 ? std::atol(arguments[1]) : 700, first = count > 2 ? std::atol(arguments[2]) : 0;
  for (long i = 0; i < inputs; ++i) {
    std::mt19937 random(static_cast<uint32_t>(first + i));  // the seed of a failure is printed last
    std::fprintf(stderr, "\rseed %ld", first + i);
    std::vector<uint8_t> bytes(random() % 96);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::fprintf(stderr, "\r%ld inputs\n", inputs);
  return 0;
}
