// What the fuzzers of the C++ API share: problems decoded from bytes, in buffers of exactly their size on the heap (so
// that AddressSanitizer sees the first byte beyond), and what must hold for their results:
//
//   - every element is written, and has the same bits, whatever was in memory before and however the work is divided;
//   - for tame inputs, every instruction set agrees with the portable one up to rounding: n roundings of fp32, relative
//     to the same result of the magnitudes of the inputs (Higham, "Accuracy and Stability of Numerical Algorithms",
//     section 3.1), once for each of the two.
//
// A fuzzer is one function, LLVMFuzzerTestOneInput. libFuzzer calls it with bytes that reach new code;
// fuzzing_driver.cpp with random ones.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>

#include "testing.h"

namespace peft_kernels::cpu::fuzzing {

// Decisions, read from the fuzzer's bytes; zeros when they are used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t next() { return at_ < size_ ? data_[at_++] : uint8_t{0}; }
  bool flag() { return next() % 2 != 0; }
  int64_t below(int64_t n) { return (next() + 256 * next()) % n; }
  // Sizes around those at which vectors, blocks and tiles end.
  int64_t size(int64_t most) {
    constexpr int64_t kEdges[] = {1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257};
    const int64_t chosen = flag() ? kEdges[below(20)] : 1 + below(most);
    return chosen > most ? 1 + chosen % most : chosen;
  }
  DType dtype() { return static_cast<DType>(next() % 3); }
  uint32_t seed() { return next() + 256u * next() + 65536u * next(); }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// `count` elements of which the last is the last of a heap block. They begin at any multiple of their size.
class Buffer {
 public:
  Buffer(size_t element, int64_t count, int64_t offset = 0)
      : element_(element),
        count_(static_cast<size_t>(count)),
        begin_(static_cast<size_t>(offset) * element),
        memory_(new uint8_t[begin_ + count_ * element]) {}
  uint8_t* data() const { return memory_.get() + begin_; }
  size_t bytes() const { return count_ * element_; }

 private:
  size_t element_, count_, begin_;
  std::unique_ptr<uint8_t[]> memory_;
};

// Wild inputs have any bits; tame ones are normally distributed.
struct Contents {
  bool wild;
  testing::Random random;

  explicit Contents(Bytes& bytes) : wild(bytes.next() % 4 == 0), random(bytes.seed()) {}
  uint8_t byte() { return static_cast<uint8_t>(random.below(256)); }
  bool special() { return wild && random.below(8) == 0; }
};

// An input and its magnitudes; absent if so decided.
class Input {
 public:
  Input() = default;
  Input(Bytes& bytes, Contents& contents, DType dtype, int64_t count) : dtype_(dtype), count_(count), present_(true) {
    const int64_t offset = bytes.below(4);
    for (Buffer& buffer : buffers_) buffer = Buffer(size_of(dtype), count, offset);
    for (int64_t i = 0; i < count; ++i) {
      const float value = contents.random.normal();
      for (size_t absolute = 0; absolute < 2; ++absolute) set(absolute, i, absolute ? std::fabs(value) : value);
      if (contents.special()) {
        for (size_t b = 0; b < size_of(dtype); ++b) {
          buffers_[0].data()[static_cast<size_t>(i) * size_of(dtype) + b] = contents.byte();
        }
      }
    }
  }
  static Input maybe(Bytes& bytes, Contents& contents, DType dtype, int64_t count) {
    return bytes.flag() ? Input(bytes, contents, dtype, count) : Input();
  }
  Array array(bool absolute = false) const {
    return present_ ? Array{buffers_[absolute].data(), dtype_} : Array{nullptr, dtype_};
  }
  const float* floats(bool absolute = false) const { return static_cast<const float*>(array(absolute).data); }
  bool present() const { return present_; }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }

 private:
  void set(size_t which, int64_t i, float value) {
    uint8_t* at = buffers_[which].data() + static_cast<size_t>(i) * size_of(dtype_);
    const uint16_t half = dtype_ == DType::kBFloat16 ? float_to_bf16(value) : float_to_half(value);
    std::memcpy(at, dtype_ == DType::kFloat32 ? static_cast<const void*>(&value) : &half, size_of(dtype_));
  }

  DType dtype_ = DType::kFloat32;
  int64_t count_ = 0;
  bool present_ = false;
  Buffer buffers_[2] = {Buffer(4, 0), Buffer(4, 0)};
};

// An NF4 weight of any bytes, and one that is at least as large as its magnitude, element by element.
class NF4Input {
 public:
  NF4Input(Bytes& bytes, Contents& contents, int64_t count)
      : blocksize_log2_(5 + static_cast<int>(bytes.below(8))),
        nested_blocksize_log2_(5 + static_cast<int>(bytes.below(8))),
        nested_(bytes.flag()),
        packed_{Buffer(1, (count + 1) / 2), Buffer(1, (count + 1) / 2)},
        codes_(1, blocks(count, blocksize_log2_)) {
    for (size_t i = 0; i < packed_[0].bytes(); ++i) {
      const uint8_t byte = contents.byte();
      packed_[0].data()[i] = byte;
      packed_[1].data()[i] = static_cast<uint8_t>(upper(byte >> 4) << 4 | upper(byte & 15));
    }
    const int64_t scales = blocks(count, blocksize_log2_);
    for (int64_t i = 0; i < scales; ++i) codes_.data()[i] = contents.byte();
    if (nested_) {
      nested_code_ = Input(bytes, contents, DType::kFloat32, 256);
      nested_absmax_ = Input(bytes, contents, DType::kFloat32, blocks(scales, nested_blocksize_log2_));
    } else {
      absmax_ = Input(bytes, contents, DType::kFloat32, scales);
    }
  }
  NF4Weight weight(bool absolute = false) const {
    NF4Weight w;
    w.packed = packed_[absolute].data();
    w.blocksize_log2 = blocksize_log2_;
    w.absmax = absmax_.floats(absolute);
    if (nested_) {
      w.absmax_codes = codes_.data();
      w.nested_code = nested_code_.floats(absolute);
      w.nested_absmax = nested_absmax_.floats(absolute);
      w.nested_offset = 0.25f;
      w.nested_blocksize_log2 = nested_blocksize_log2_;
    }
    return w;
  }

 private:
  static int64_t blocks(int64_t count, int log2) { return (count + (int64_t{1} << log2) - 1) >> log2; }
  static int upper(int code) { return code < 8 ? 15 - code : code; }  // kNF4Code[15 - c] >= -kNF4Code[c]

  int blocksize_log2_, nested_blocksize_log2_;
  bool nested_;
  Buffer packed_[2], codes_;
  Input absmax_, nested_code_, nested_absmax_;
};

// An output, full of `poison` until it is written; absent where it is not asked for.
class Result {
 public:
  Result(DType dtype, int64_t count, uint8_t poison) : dtype_(dtype), count_(count), buffer_(size_of(dtype), count) {
    std::memset(buffer_.data(), poison, buffer_.bytes());
  }
  MutableArray array() const { return {buffer_.data(), dtype_}; }
  MutableArray array_if(bool asked) const { return asked ? array() : MutableArray{nullptr, dtype_}; }
  float* floats() const { return reinterpret_cast<float*>(buffer_.data()); }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  double operator[](int64_t i) const {
    const uint8_t* at = buffer_.data() + static_cast<size_t>(i) * size_of(dtype_);
    uint32_t word = 0;
    std::memcpy(&word, at, size_of(dtype_));
    if (dtype_ == DType::kFloat32) return __builtin_bit_cast(float, word);
    const auto half = static_cast<uint16_t>(word);
    return dtype_ == DType::kBFloat16 ? bf16_to_float(half) : half_to_float(half);
  }
  bool operator==(const Result& other) const {
    return std::memcmp(buffer_.data(), other.buffer_.data(), buffer_.bytes()) == 0;
  }

 private:
  DType dtype_;
  int64_t count_;
  Buffer buffer_;
};
using Results = std::vector<Result>;

// Pools of one thread that divide the work otherwise: all at once; or in tasks of one, the last first.
inline ThreadPool at_once() {
  return {1, [](int64_t tasks, void* context, void (*body)(void*, int64_t, int64_t)) { body(context, 0, tasks); }};
}
inline ThreadPool backwards() {
  return {3, [](int64_t tasks, void* context, void (*body)(void*, int64_t, int64_t)) {
            for (int64_t task = tasks; task-- > 0;) body(context, task, task + 1);
          }};
}

// How a problem is run: by which kernels, on inputs or their magnitudes, over which poison, on which pool.
struct Run {
  const Kernels& kernels;
  bool absolute;
  uint8_t poison;
  ThreadPool pool;
};

// How far two results of one problem may be apart, relative to that of the magnitudes.
struct Tolerance {
  int64_t roundings;      // of fp32 on the way to a result; none: the same bits
  double operands = 0.0;  // of factors that are rounded to 16 bits
};

inline void check_same(const char* what, const Kernels& kernels, const Results& one, const Results& two) {
  for (size_t r = 0; r < one.size(); ++r) {
    for (int64_t i = 0; i < one[r].count() && !(one[r] == two[r]); ++i) {
      const double a = one[r][i], b = two[r][i];
      CHECK((std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)),
            "%s: %s: result %zu[%lld] is %g and %g", kernels.name, what, r, static_cast<long long>(i), a, b);
    }
  }
}

inline void check_close(const Kernels& kernels, const Results& got, const Results& portable, const Results& magnitude,
                        const Tolerance& tolerance) {
  for (size_t r = 0; r < got.size(); ++r) {
    const DType dtype = got[r].dtype();
    const double unit = dtype == DType::kFloat32 ? 0x1p-24 : (dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11);
    const double least = dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-126;
    for (int64_t i = 0; i < got[r].count(); ++i) {
      const double a = got[r][i], b = portable[r][i], size = magnitude[r][i];
      if (!std::isfinite(size)) continue;  // sums may overflow in any order, or in none
      const double relative = static_cast<double>(tolerance.roundings) * 0x1p-23 + tolerance.operands;
      const double allowed = 2 * (relative * size / (1 - unit) + unit * (std::fabs(b) + relative * size) + least);
      CHECK(std::fabs(a - b) <= allowed, "%s: result %zu[%lld] is %g, portable %g, allowed %g", kernels.name, r,
            static_cast<long long>(i), a, b, allowed);
    }
  }
}

// All that must hold for a problem.
inline void judge(bool wild, const Tolerance& tolerance, const std::function<Results(const Run&)>& run) {
  const std::vector<const Kernels*> tables = testing::all_kernels();
  const bool bits = tolerance.roundings == 0;
  Results portable, magnitude;
  for (const Kernels* table : tables) {
    Results one = run({*table, false, 0xa5, at_once()});
    check_same("an element depends on what was in memory, or on the division of the work", *table, one,
               run({*table, false, 0x3c, backwards()}));
    if (table == tables.front()) {
      portable = std::move(one);
      if (!wild && !bits) magnitude = run({*table, true, 0xa5, at_once()});
    } else if (bits) {
      check_same("not the portable set's bits", *table, one, portable);
    } else if (!wild) {
      check_close(*table, one, portable, magnitude, tolerance);
    }
  }
}

inline Dropout dropout_of(Bytes& bytes) {
  if (!bytes.flag()) return {};
  const uint64_t seed = static_cast<uint64_t>(bytes.seed()) << (bytes.flag() ? 40 : 0);
  const double p = static_cast<double>(1 + bytes.below(255)) / 256.0;
  return {seed, static_cast<uint32_t>(p * 0x1p32), static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace peft_kernels::cpu::fuzzing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
