#include "scratch.h"

#include <cstdlib>
#include <new>

namespace peft_kernels::cpu {
namespace {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* reserve(size_t floats) {
    if (floats > capacity_) {
      constexpr size_t kPage = 4096;
      const size_t bytes = (floats * sizeof(float) + kPage - 1) / kPage * kPage;
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(kPage, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes / sizeof(float);
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t capacity_ = 0;  // floats
};

thread_local Buffer caller_buffer, task_buffer;

}  // namespace

float* caller_scratch(size_t floats) { return caller_buffer.reserve(floats); }
float* task_scratch(size_t floats) { return task_buffer.reserve(floats); }

}  // namespace peft_kernels::cpu
