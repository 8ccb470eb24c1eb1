// 16-bit float conversions, over every 16-bit pattern and around every rounding boundary.
#include <bit>

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu::testing;

namespace {

// Every value of the format, its midpoints to the next value, and the floats beside both must round to nearest even.
template <class ToFloat, class FromFloat>
void check_format(const char* name, uint16_t infinity, ToFloat to_float, FromFloat from_float) {
  for (uint32_t h = 0; h < infinity; ++h) {
    const float value = to_float(static_cast<uint16_t>(h));
    CHECK(from_float(value) == h, "%s %04x", name, h);
    CHECK(from_float(-value) == (h | 0x8000u), "%s -%04x", name, h);
    if (h + 1 == infinity) continue;
    const float next = to_float(static_cast<uint16_t>(h + 1));
    const float middle = static_cast<float>((static_cast<double>(value) + static_cast<double>(next)) / 2);
    const uint32_t even = h & 1 ? h + 1 : h;
    CHECK(from_float(middle) == even, "%s midpoint after %04x", name, h);
    CHECK(from_float(std::nextafter(middle, 0.0f)) == h, "%s below midpoint after %04x", name, h);
    CHECK(from_float(std::nextafter(middle, INFINITY)) == h + 1, "%s above midpoint after %04x", name, h);
  }
  CHECK(from_float(INFINITY) == infinity && from_float(-INFINITY) == (infinity | 0x8000u), "%s infinity", name);
  CHECK(from_float(3.4e38f) == infinity, "%s overflow", name);
  CHECK(std::isnan(to_float(from_float(std::nanf("")))), "%s NaN", name);
}

}  // namespace

int main() {
  check_format("half", 0x7c00, [](uint16_t h) { return half_to_float(h); }, [](float f) { return float_to_half(f); });
  check_format("bf16", 0x7f80, [](uint16_t h) { return bf16_to_float(h); }, [](float f) { return float_to_bf16(f); });
  return 0;
}
