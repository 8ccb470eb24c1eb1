// The little that the C++ tests share: checks that say where they failed, random data, and a thread pool.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "common/float_convert.h"
#include "cpu/api.h"

namespace peft_kernels::cpu::testing {

#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                            \
      std::fprintf(stderr, "\n");                                                   \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)

// Every table that this processor runs.
inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> tables;
  std::istringstream names(capabilities());
  for (std::string name; std::getline(names, name, ',');) tables.push_back(kernels_named(name.c_str()));
  return tables;
}

// A pool of kThreads threads, each taking an equal share, as torch's does.
template <int kThreads>
ThreadPool threads() {
  return {kThreads, [](int64_t tasks, void* context, void (*body)(void*, int64_t, int64_t)) {
            std::vector<std::thread> running;
            for (int64_t i = 1; i < kThreads; ++i) {
              running.emplace_back(body, context, tasks * i / kThreads, tasks * (i + 1) / kThreads);
            }
            body(context, 0, tasks / kThreads);
            for (std::thread& thread : running) thread.join();
          }};
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  float normal() { return distribution_(engine_); }
  std::vector<float> normals(int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = normal();
    return v;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> distribution_;
};

// An array of any dtype together with its exact values in double.
class Values {
 public:
  Values() = default;
  Values(DType dtype, const std::vector<float>& source) : dtype_(dtype), values_(source.size()) {
    bits16_.resize(dtype == DType::kFloat32 ? 0 : source.size());
    for (size_t i = 0; i < source.size(); ++i) {
      float value = source[i];
      if (dtype == DType::kBFloat16) value = bf16_to_float(bits16_[i] = float_to_bf16(value));
      if (dtype == DType::kFloat16) value = half_to_float(bits16_[i] = float_to_half(value));
      values_[i] = value;
    }
  }
  bool present() const { return !values_.empty(); }
  double operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }
  Array array() const {
    return {!present() ? nullptr : bits16_.empty() ? static_cast<const void*>(values_.data()) : bits16_.data(), dtype_};
  }

 private:
  DType dtype_ = DType::kFloat32;
  std::vector<float> values_;
  std::vector<uint16_t> bits16_;
};

// An output array, NaN wherever a kernel has not written.
class Output {
 public:
  Output(DType dtype, int64_t count) : dtype_(dtype), count_(count) {
    if (dtype == DType::kFloat32) {
      floats_.assign(static_cast<size_t>(count), std::nanf(""));
    } else {
      bits16_.assign(static_cast<size_t>(count), 0x7fff);  // a NaN in both 16-bit formats
    }
  }
  void poison() { *this = Output(dtype_, count_); }
  // Copies `values`, of this array's dtype, into it, and returns it as an input.
  Array hold(const Values& values) {
    const MutableArray here = array();
    const size_t bytes = static_cast<size_t>(count_) * (dtype_ == DType::kFloat32 ? 4 : 2);
    if (bytes != 0) std::memcpy(here.data, values.array().data, bytes);
    return {here.data, here.dtype};
  }
  MutableArray array() {
    return {dtype_ == DType::kFloat32 ? static_cast<void*>(floats_.data()) : bits16_.data(), dtype_};
  }
  double operator[](int64_t i) const {
    const size_t at = static_cast<size_t>(i);
    if (dtype_ == DType::kFloat32) return floats_[at];
    return dtype_ == DType::kBFloat16 ? bf16_to_float(bits16_[at]) : half_to_float(bits16_[at]);
  }
  bool operator==(const Output& other) const { return floats_ == other.floats_ && bits16_ == other.bits16_; }

  // |this - expected| <= bound[i] for every element, where bound grows by one rounding to this array's dtype.
  void check_close(const char* what, const std::vector<double>& expected, const std::vector<double>& bound) const {
    const double unit = dtype_ == DType::kFloat32 ? 0x1p-24 : (dtype_ == DType::kBFloat16 ? 0x1p-8 : 0x1p-11);
    const double least = dtype_ == DType::kFloat16 ? 0x1p-24 : 0x1p-126;  // error where results are subnormal
    for (int64_t i = 0; i < count_; ++i) {
      const size_t at = static_cast<size_t>(i);
      const double allowed = bound[at] + unit * (std::fabs(expected[at]) + bound[at]) + least;
      CHECK(std::fabs((*this)[i] - expected[at]) <= allowed, "%s[%lld] = %g, expected %g +- %g", what,
            static_cast<long long>(i), (*this)[i], expected[at], allowed);
    }
  }

 private:
  DType dtype_;
  int64_t count_;
  std::vector<float> floats_;
  std::vector<uint16_t> bits16_;
};

// A random NF4 weight; `absmax` holds the scales, decoded where they are doubly quantised.
struct NF4Values {
  std::vector<uint8_t> packed, codes;
  std::vector<float> absmax, nested_code, nested_absmax;

  NF4Weight fill(int64_t count, int blocksize_log2, bool nested, int nested_blocksize_log2, Random& random) {
    const int64_t blocks = (count + (int64_t{1} << blocksize_log2) - 1) >> blocksize_log2;
    packed.resize(static_cast<size_t>((count + 1) / 2));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random.below(256));
    absmax.resize(static_cast<size_t>(blocks));
    codes.resize(absmax.size());
    nested_code = random.normals(256);
    nested_absmax = random.normals((blocks >> nested_blocksize_log2) + 1);
    for (size_t i = 0; i < absmax.size(); ++i) {
      codes[i] = static_cast<uint8_t>(random.below(256));
      absmax[i] = nested ? nested_code[codes[i]] * nested_absmax[i >> nested_blocksize_log2] + 0.25f
                         : std::fabs(random.normal());
    }
    NF4Weight nf4;
    nf4.packed = packed.data();
    nf4.blocksize_log2 = blocksize_log2;
    if (nested) {
      nf4.absmax_codes = codes.data();
      nf4.nested_code = nested_code.data();
      nf4.nested_absmax = nested_absmax.data();
      nf4.nested_offset = 0.25f;
      nf4.nested_blocksize_log2 = nested_blocksize_log2;
    } else {
      nf4.absmax = absmax.data();
    }
    return nf4;
  }
};

}  // namespace peft_kernels::cpu::testing
