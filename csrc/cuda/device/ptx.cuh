// The instructions that C++ has no name for.
#pragma once

#include "cuda/device/types.cuh"

namespace peft_kernels::cuda {

// d = a (16 x 16) b (16 x 8) + d, products exact, sums in fp32. Lane 4 g + t holds a: rows g, g + 8, columns 2t, 2t + 1
// (a0, a1) and 2t + 8, 2t + 9 (a2, a3); b: column g, rows 2t, 2t + 1 (b0), 2t + 8, 2t + 9 (b1); d: rows g (0, 1) and
// g + 8 (2, 3), columns 2t, 2t + 1. PTX ISA, "Matrix fragments for mma.m16n8k16".
template <class T>
PEFT_KERNELS_DEVICE void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1);
template <>
PEFT_KERNELS_DEVICE void mma<BFloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
PEFT_KERNELS_DEVICE void mma<Float16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with a (16 x 8) and b (8 x 8) in TF32. Lane 4 g + t holds a: rows g (a0), g + 8 (a1), column t; the same
// rows, column t + 4 (a2, a3); b: column g, rows t (b0), t + 4 (b1). PTX ISA, "Matrix fragments for mma.m16n8k8".
PEFT_KERNELS_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

PEFT_KERNELS_DEVICE uint32_t to_tf32(float v) {
  uint32_t d;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(v));
  return d;
}

// Bytes of a and b (0 to 3, 4 to 7) that the nibbles of `selector` name.
PEFT_KERNELS_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

template <int kTable>
PEFT_KERNELS_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// 16 bytes of memory that the kernel only reads, once.
PEFT_KERNELS_DEVICE uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

PEFT_KERNELS_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

PEFT_KERNELS_DEVICE uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

PEFT_KERNELS_DEVICE void load_shared(uint32_t (&v)[1], uint32_t address) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(address) : "memory");
}
PEFT_KERNELS_DEVICE void load_shared(uint32_t (&v)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}

// Copy 16 bytes to shared memory in the background, or with `inside` false write zeros there.
PEFT_KERNELS_DEVICE void copy_async_16(uint32_t shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
PEFT_KERNELS_DEVICE void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
PEFT_KERNELS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending groups of this thread's are under way.
template <int kPending>
PEFT_KERNELS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A value that is kept in registers from here on. A compiler that sees what a pointer or number is made of may add it
// up again wherever it is used, in every turn of a loop.
template <class P>
PEFT_KERNELS_DEVICE P* keep(P* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}
PEFT_KERNELS_DEVICE uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace peft_kernels::cuda
