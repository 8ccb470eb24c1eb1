"""Parameters that are structs, as nvcc passes them."""

import ctypes

import numpy as np
import pytest
import torch

import gpuless
from gpuless import toolchain
from gpuless.parameters import slots
from gpuless.parser import parse
from gpuless.snippets import module

CUDA = """
#include <cstdint>
#include <cuda_bf16.h>

struct Array { const void* data; int dtype; };
struct Codes { const uint8_t* packed; const float* absmax; int blocksize_log2; };
struct Product {
  int64_t rank, in_features, out_features;
  Array x;            // [K]
  Codes weight;       // [N, K]
  float scale;
  const void* bias;   // [N]
  void* y;            // [N]
};
struct Opaque { uint32_t two16; };
__device__ const float kValues[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// y[n] = sum over k of W[n, k] x[k] + bias[n] + 65536, a thread for each n.
extern "C" __global__ void product(const __grid_constant__ Product p, const Opaque opaque) {
  const int64_t n = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (n >= p.out_features) return;
  float sum = 0;
  for (int64_t k = 0; k < p.in_features; ++k) {
    const int64_t at = n * p.in_features + k;
    const int byte = p.weight.packed[at >> 1], code = (at & 1) ? byte & 15 : byte >> 4;
    const float weight = kValues[code] * p.weight.absmax[at >> p.weight.blocksize_log2];
    sum = fmaf(weight, static_cast<const float*>(p.x.data)[k], sum);
  }
  if (p.bias) sum += __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
  static_cast<float*>(p.y)[n] = sum + opaque.two16;
}

struct Rows { const float* row[4]; int64_t count; float* out; };
extern "C" __global__ void indexed(const __grid_constant__ Rows p, int i) { *p.out = *p.row[i]; }
extern "C" __global__ void escaping(const __grid_constant__ Rows p, const Rows** out) { *out = &p; }
"""


class Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))


class Codes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax")),
        ("blocksize_log2", ctypes.c_int32),
    )


class Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rank", "in_features", "out_features")),
        *(("x", Array), ("weight", Codes), ("scale", ctypes.c_float)),
        *((name, ctypes.c_void_p) for name in ("bias", "y")),
    )


N, K, BLOCK = 40, 128, 64


@pytest.fixture(scope="module", params=[80, 90, 120])
def ptx(request: pytest.FixtureRequest, nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    source = tmp_path_factory.mktemp("cuda") / "product.cu"
    source.write_text(CUDA)
    return toolchain.ptx(source, request.param)


@pytest.fixture
def memory() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(K, generator=generator),
        "packed": torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, generator=generator),
        "absmax": torch.rand(N * K // BLOCK, generator=generator),
        "bias": torch.randn(N, generator=generator).bfloat16(),
        "y": torch.full((N,), torch.nan),
    }


def problem(memory: dict[str, torch.Tensor]) -> Product:
    p = Product(in_features=K, out_features=N)
    p.weight.packed, p.weight.absmax = memory["packed"].data_ptr(), memory["absmax"].data_ptr()
    p.weight.blocksize_log2 = 6
    p.x.data, p.bias, p.y = (memory[name].data_ptr() for name in ("x", "bias", "y"))
    return p


def product(ptx: str, p: Product, memory: object, **options: object) -> gpuless.launch.Result:
    grid = (-(-p.out_features // 32),)
    opaque = (65536).to_bytes(4, "little")
    return gpuless.launch_ptx(
        ptx, grid, [bytes(p), opaque], block=32, name="product", memory=memory, **options
    )


def test_a_struct_of_pointers(ptx: str, memory: dict[str, torch.Tensor]) -> None:
    result = product(ptx, problem(memory), memory, counts=True)
    codes = torch.stack([memory["packed"] >> 4, memory["packed"] & 15], 1).reshape(N, K).long()
    weight = (codes - 8).double()
    weight = weight * memory["absmax"].double().repeat_interleave(BLOCK).reshape(N, K)
    expected = weight @ memory["x"].double() + memory["bias"].double() + 65536
    bound = (K + 2) * 2.0**-24 * (weight.abs() @ memory["x"].double().abs() + 65540)
    assert ((memory["y"] - expected).abs() <= bound).all()
    sizes = {name: tensor.nbytes for name, tensor in memory.items()}
    assert {name: result.bytes_read[name] for name in ("x", "packed", "absmax")} == {
        name: sizes[name] for name in ("x", "packed", "absmax")
    }
    assert result.bytes_written["y"] == sizes["y"]


@pytest.mark.parametrize(
    ("name", "size"), [("x", 512), ("packed", 2560), ("absmax", 320), ("bias", 80), ("y", 160)]
)
def test_every_slot_has_bounds_of_its_own(
    ptx: str, memory: dict[str, torch.Tensor], name: str, size: int
) -> None:
    """All tensors are in one storage, so that what is after the end of one belongs to another."""
    arena = torch.zeros(8192, dtype=torch.uint8)
    start = 0
    for each, tensor in memory.items():
        part = arena[start : start + tensor.nbytes].view(tensor.dtype)
        memory[each] = part.copy_(tensor)
        start += tensor.nbytes
    p = problem(memory)
    product(ptx, p, memory)
    assert memory[name].nbytes == size
    memory[name] = memory[name][:-1]
    message = rf"global out of bounds: \d bytes at {name}\+{size - memory[name].element_size()} \(its"
    with pytest.raises(gpuless.Report, match=message):
        product(ptx, p, memory)


def test_slots_without_names(ptx: str, memory: dict[str, torch.Tensor]) -> None:
    memory["y"] = memory["y"][:-1]
    with pytest.raises(gpuless.Report, match=rf"4 bytes at param_0\+{Product.y.offset}\+156 \(its 156 bytes"):
        product(ptx, problem(memory), [*memory.values()])


def test_one_tensor_in_several_slots(ptx: str, memory: dict[str, torch.Tensor]) -> None:
    p = problem(memory)
    p.out_features = 16  # the bias is read before y is written over it, by the same thread
    p.bias = p.y = memory["y"].data_ptr()
    memory["y"].zero_()
    product(ptx, p, memory)
    assert (memory["y"][:16] > 60000).all()
    assert (memory["y"][16:] == 0).all()


def test_null_and_unknown_pointers(ptx: str, memory: dict[str, torch.Tensor]) -> None:
    p = problem(memory)
    del memory["y"]
    with pytest.raises(gpuless.Report, match="global out of bounds"):
        product(ptx, p, memory)
    p.y = None
    with pytest.raises(gpuless.Report, match="global out of bounds"):
        product(ptx, p, memory)


def test_a_struct_of_another_size_is_refused(ptx: str) -> None:
    with pytest.raises(ValueError, match=f"param_0 must have {ctypes.sizeof(Product)} bytes, got 8"):
        gpuless.launch_ptx(ptx, (1,), [bytes(8)], block=32, name="product")


def test_what_is_not_a_constant_is_refused(ptx: str) -> None:
    with pytest.raises(gpuless.Unsupported, match="address of parameter escaping_param_0"):
        parse(ptx, "escaping")
    with pytest.raises(gpuless.Unsupported, match="Do not index into a struct parameter with a variable"):
        parse(ptx, "indexed")


def test_slots() -> None:
    program = parse(module("", 1).replace(".param .u64 p0", ".param .u64 p0, .param .align 8 .b8 s[20]"))
    assert slots(program) == {"p0": ("p0", 0), "s+0": ("s", 0), "s+8": ("s", 8), "s+16": ("s", 16)}


@pytest.mark.parametrize(
    "address",
    [
        "mov.b64 %rd1, s; add.s64 %rd2, %rd1, 16; ld.param.u64 %rd3, [%rd2+-8];",
        "mov.u64 %rd1, s+16; mov.u64 %rd4, %rd1; sub.s64 %rd2, %rd4, 8; ld.param.u64 %rd3, [%rd2];",
        "mov.b64 %rd1, s; cvta.param.u64 %rd2, %rd1; ld.u64 %rd3, [%rd2+8];",
        "ld.param.v2.u64 {%rd2, %rd3}, [s];",
        "mov.b64 %rd1, s; bra over; over: ld.param.v2.b32 {%r1, %r2}, [%rd1+8]; mov.b64 %rd3, {%r1, %r2};",
    ],
)
def test_ways_to_load_a_slot(address: str) -> None:
    text = module(f"{address} st.global.u32 [%rd3], 7;", 1).replace("p0)", "p0, .param .align 8 .b8 s[24])")
    first, second = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    struct = b"".join(
        pointer.to_bytes(8, "little") for pointer in (first.ctypes.data, second.ctypes.data, 1 << 40)
    )
    gpuless.launch_ptx(text, (1,), [None, struct], memory={"first": first, "second": second})
    assert (first[0], second[0]) == (0, 7)
    text = text.replace("[%rd3], 7", "[%rd3+16], 7")
    with pytest.raises(gpuless.Report, match=r"second\+16"):
        gpuless.launch_ptx(text, (1,), [None, struct], memory={"first": first, "second": second})
