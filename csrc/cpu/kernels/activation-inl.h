// Activations and their slopes on rows of fp32. Plain C++ without branches, so that compilers make vectors of it for
// every instruction set, and the same arithmetic on all of them: results are the same bits everywhere.
//
// Errors against float64, relative unless said: exp, sigmoid, tanh, silu, gelu_tanh within 4 units of 2^-23; gelu
// within 8 in its left tail, where exp magnifies the rounding of x^2, and 4 elsewhere. tests/cpp/test_activation.cpp
// holds them to it. NaN stays NaN.

struct Activated {
  float value, slope;  // f(z), f'(z)
};

inline float clamp(float x, float low, float high) {  // NaN passes
  x = x < low ? low : x;
  return x > high ? high : x;
}

// e^x = 2^n e^r for x = n ln 2 + r, |r| <= ln 2 / 2. Coefficients: minimax fits of (e^r - 1 - r) / r^2, here and below
// by reweighted least squares in 40 digits.
struct Exponential {
  float power, minus_one;  // 2^n and e^r - 1

  explicit Exponential(float x) {                           // for x in [-87, 88]
    const float shifted = x * 0x1.715476p+0f + 0x1.8p+23f;  // the integer n in its low bits
    const float n = shifted - 0x1.8p+23f;
    const float r = (x - n * 0x1.62e4p-1f) - n * 1.42860682e-6f;  // ln 2 in two parts: the first product is exact
    const float q = (((1.39411201e-3f * r + 8.36318079e-3f) * r + 4.16663736e-2f) * r + 0.166665763f) * r + 0.5f;
    power = __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23);
    minus_one = r + r * r * q;
  }
  float value() const { return power + power * minus_one; }
};
inline float exponential(float x) { return Exponential(clamp(x, -87.0f, 88.0f)).value(); }

// sigma(x) and 1 - sigma(x), each without cancellation; exactly 0 beyond 88.
struct Sigmoid {
  float value, complement;
  explicit Sigmoid(float x) {
    const float e = exponential(-x), s = 1.0f / (1.0f + e);
    value = x < -88.0f ? 0.0f : s;
    complement = x > 88.0f ? 0.0f : e * s;
    complement = x < -88.0f ? 1.0f : complement;
  }
};

inline Activated identity(float z) { return {z, 1.0f}; }
inline Activated relu(float z) { return {z < 0.0f ? 0.0f : z, z <= 0.0f ? 0.0f : 1.0f}; }
inline Activated leaky_relu(float z) { return {z > 0.0f ? z : z * 0.01f, z > 0.0f ? 1.0f : 0.01f}; }

inline Activated silu(float z) {
  const Sigmoid s(z);
  return {z * s.value, s.value + clamp(z, -100.0f, 100.0f) * (s.complement * s.value)};
}

inline Activated hyperbolic_tangent(float z) {
  const float size = __builtin_fabsf(z);
  const Exponential e(clamp(2.0f * size, 0.0f, 87.0f));
  const float t = e.power * e.minus_one + (e.power - 1.0f);  // e^2|z| - 1, without cancellation
  const float u = t + 2.0f;
  return {__builtin_copysignf(t / u, z), (4.0f / u) * ((t + 1.0f) / u)};
}

// z sigma(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3): the same as 0.5 z (1 + tanh u), without its cancellation.
inline Activated gelu_tanh(float z) {
  constexpr float kScale = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  const float x = clamp(z, -12.0f, 12.0f), square = x * x;   // sigma is 0 or 1 beyond
  const Sigmoid s(kScale * (x + kCubic * (square * x)));
  return {z * s.value, s.value + x * (s.complement * s.value) * (kScale * (1.0f + 3.0f * kCubic * square))};
}

// z Phi(z), with Phi(-|z|) = e^(-z^2 / 2) erfcx(|z| / sqrt 2) / 2, erfcx(y) = e^(y^2) erfc(y) as a polynomial in
// t = 1 / (1 + 0.4 y).
inline Activated gelu(float z) {
  const float size = __builtin_fabsf(z);
  const float t = 1.0f / (1.0f + 0.282842712f * size);
  float p = -0.0295943376f;
  p = p * t + 0.198013216f;
  p = p * t - 0.498811483f;
  p = p * t + 0.547435462f;
  p = p * t - 0.284366697f;
  p = p * t + 0.272066236f;
  p = p * t + 0.129679605f;
  p = p * t + 0.214919105f;
  p = p * t + 0.224952027f;
  p = p * t + 0.225706905f;
  float density = exponential(-0.5f * (z * z));
  density = size > 13.0f ? 0.0f : density;
  const float tail = 0.5f * density * (p * t);  // Phi(-|z|)
  const float cdf = z < 0.0f ? tail : 1.0f - tail;
  return {z * cdf, cdf + clamp(z, -13.0f, 13.0f) * (density * 0.398942280f)};
}

// z[i] = f(z[i]), and slope[i] = f'(z[i]) where slope is not null.
template <class F>
void activate_row(const F& f, float* z, float* slope, int64_t count) {
  if (slope == nullptr) {
    for (int64_t i = 0; i < count; ++i) z[i] = f(z[i]).value;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Activated a = f(z[i]);
    z[i] = a.value;
    slope[i] = a.slope;
  }
}
void activate(Activation activation, float* z, float* slope, int64_t count) {
  const auto run = [&](auto f) { activate_row(f, z, slope, count); };
  switch (activation) {
    case Activation::kIdentity:
      return run([](float x) { return identity(x); });
    case Activation::kRelu:
      return run([](float x) { return relu(x); });
    case Activation::kLeakyRelu:
      return run([](float x) { return leaky_relu(x); });
    case Activation::kGelu:
      return run([](float x) { return gelu(x); });
    case Activation::kGeluTanh:
      return run([](float x) { return gelu_tanh(x); });
    case Activation::kSilu:
      return run([](float x) { return silu(x); });
    case Activation::kTanh:
      return run([](float x) { return hyperbolic_tangent(x); });
  }
}
