// Activations and their slopes against the same formulas in double, under every instruction set; the same bits on all.
#include <cmath>
#include <limits>

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr Activation kAll[] = {Activation::kIdentity, Activation::kRelu, Activation::kLeakyRelu, Activation::kGelu,
                               Activation::kGeluTanh, Activation::kSilu, Activation::kTanh};

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

struct Exact {
  double value, slope;
  double value_units, slope_units;  // allowed errors, in units of 2^-23 of the size of the value or its terms
};
Exact exact(Activation activation, double z) {
  switch (activation) {
    case Activation::kIdentity:
      return {z, 1, 0, 0};
    case Activation::kRelu:
      return {z > 0 ? z : 0, z > 0 ? 1.0 : 0, 0, 0};
    case Activation::kLeakyRelu:
      return {z > 0 ? z : z * static_cast<double>(0.01f), z > 0 ? 1 : static_cast<double>(0.01f), 1, 0};
    case Activation::kTanh: {
      const double t = std::tanh(z);
      return {t, 1 / (std::cosh(z) * std::cosh(z)), 4, 6};
    }
    case Activation::kSilu: {
      const double s = sigmoid(z);
      return {z * s, s + z * s * sigmoid(-z), 4, 8};
    }
    case Activation::kGeluTanh: {
      const double c = 2 * std::sqrt(2 / kPi), u = c * (z + 0.044715 * z * z * z), s = sigmoid(u);
      // Rounding u costs |u| / 2^24 in the exponent; there are four roundings in it.
      const double exponent = 2 * std::fabs(u) * sigmoid(-u);
      return {z * s, s + z * s * sigmoid(-u) * c * (1 + 3 * 0.044715 * z * z), 4 + exponent, 8 + 4 * std::fabs(u)};
    }
    case Activation::kGelu: {
      const double cdf = 0.5 * std::erfc(-z / std::sqrt(2.0));
      const double exponent = z < 0 ? z * z / 2 : 0;  // likewise, of z^2 / 2
      return {z * cdf, cdf + z * std::exp(-z * z / 2) / std::sqrt(2 * kPi), 6 + exponent, 8 + z * z / 2};
    }
  }
  return {};
}
// What the slope is a sum of, by magnitude: where its terms cancel, they bound the error.
double slope_size(Activation activation, double z) {
  if (activation == Activation::kGelu) {
    return 0.5 * std::erfc(-z / std::sqrt(2.0)) + std::fabs(z) * std::exp(-z * z / 2) / std::sqrt(2 * kPi);
  }
  if (activation == Activation::kSilu) return sigmoid(z) * (1 + std::fabs(z) * sigmoid(-z));
  if (activation == Activation::kGeluTanh) {
    const double c = 2 * std::sqrt(2 / kPi), u = c * (z + 0.044715 * z * z * z);
    return sigmoid(u) * (1 + std::fabs(z) * sigmoid(-u) * c * (1 + 3 * 0.044715 * z * z));
  }
  return std::fabs(exact(activation, z).slope);
}

void check(const Kernels& table, Activation activation, const std::vector<float>& points) {
  std::vector<float> value = points, slope(points.size()), alone = points;
  const int64_t count = static_cast<int64_t>(points.size());
  table.activate(activation, value.data(), slope.data(), count);
  table.activate(activation, alone.data(), nullptr, count);
  std::vector<float> first = points, first_slope(points.size());
  kernels_named("portable")->activate(activation, first.data(), first_slope.data(), count);
  for (size_t i = 0; i < points.size(); ++i) {
    const double z = points[i];
    const Exact e = exact(activation, z);
    const double least = 0x1p-119;  // results below 13 e^(-13^2 / 2) are 0, as exponents are clamped
    const double value_error = e.value_units * 0x1p-23 * std::fabs(e.value) + least;
    const double slope_error = e.slope_units * 0x1p-23 * slope_size(activation, z) + least;
    CHECK(std::fabs(value[i] - e.value) <= value_error, "%s: f%d(%g) = %.9g, expected %.9g +- %g", table.name,
          static_cast<int>(activation), z, value[i], e.value, value_error);
    CHECK(std::fabs(slope[i] - e.slope) <= slope_error, "%s: f%d'(%g) = %.9g, expected %.9g +- %g", table.name,
          static_cast<int>(activation), z, slope[i], e.slope, slope_error);
    CHECK(value[i] == alone[i], "%s: f%d(%g) differs without its slope", table.name, static_cast<int>(activation), z);
    CHECK(value[i] == first[i] && slope[i] == first_slope[i], "%s: f%d(%g) differs from portable", table.name,
          static_cast<int>(activation), z);
  }
}

void check_special(const Kernels& table, Activation activation) {
  const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
  float z[4] = {std::nanf(""), infinity, largest, -largest}, slope[4];
  table.activate(activation, z, slope, 4);
  CHECK(std::isnan(z[0]), "%s: f%d(NaN) = %g", table.name, static_cast<int>(activation), z[0]);
  const bool saturates = activation == Activation::kTanh;
  CHECK(z[1] == (saturates ? 1.0f : infinity), "%s: f%d(inf) = %g", table.name, static_cast<int>(activation), z[1]);
  CHECK(z[2] == (saturates ? 1.0f : largest), "%s: f%d(max) = %g", table.name, static_cast<int>(activation), z[2]);
  const float below = activation == Activation::kIdentity    ? -largest
                      : activation == Activation::kLeakyRelu ? -largest * 0.01f
                      : saturates                            ? -1.0f
                                                             : 0.0f;
  CHECK(z[3] == below, "%s: f%d(-max) = %g", table.name, static_cast<int>(activation), z[3]);
  for (int i = 2; i < 4; ++i) {
    CHECK(std::isfinite(slope[i]) && std::fabs(slope[i]) <= 1.0f, "%s: f%d'(+-max) = %g", table.name,
          static_cast<int>(activation), slope[i]);
  }
}

}  // namespace

int main() {
  std::vector<float> points;
  for (int i = -4000; i <= 4000; ++i) points.push_back(static_cast<float>(i) * 0.005f);
  for (float size = 0x1p-40f; size < 200.0f; size *= 1.037f) points.insert(points.end(), {size, -size});
  for (const Kernels* table : all_kernels()) {
    for (const Activation activation : kAll) {
      check(*table, activation, points);
      check_special(*table, activation);
    }
  }
  return 0;
}
