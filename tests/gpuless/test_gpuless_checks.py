"""Every kind of report on the smallest kernel that deserves it, beside one that differs by the remedy and is
clean.
"""

import numpy as np
import pytest
import torch

from gpuless import Report, Unsupported
from gpuless.launch import launch
from gpuless.snippets import module, run

OUT = "add.u64 %rd1, %rd50, %rd40;"
SHARED = "mov.u32 %r1, room; shl.b32 %r2, %r90, 2; add.u32 %r3, %r1, %r2;"
ROOM = ".shared .align 16 .b8 room[512];"


def buffer(count: int = 128) -> np.ndarray:
    return torch.zeros(
        count, dtype=torch.uint32
    ).numpy()  # torch aligns to 64 bytes, so that sectors can be counted


def finding(body: str, arguments: list | None = None, **options: object) -> object:
    """The only kind of finding of a kernel."""
    with pytest.raises(Report) as caught:
        run(body, arguments or [buffer()], **options)
    return caught.value.findings[0]


def test_out_of_bounds_names_thread_argument_and_byte() -> None:
    found = finding(f"{OUT} st.global.u32 [%rd1+4], %r90;")
    assert (found.kind, found.thread, found.lanes, found.cta) == ("global out of bounds", 127, 1, (0, 0, 0))
    assert "4 bytes at p0+512 (its 512 bytes" in found.message
    assert "st.global.u32 [%rd1+4], %r90" in str(found)
    run(f"{OUT} st.global.u32 [%rd1], %r90;", [buffer()])


@pytest.mark.parametrize(
    "access", ["ld.global.u32 %r1, [%rd1-4];", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+0];"]
)
def test_loads_out_of_bounds(access: str) -> None:
    body = "mul.wide.u32 %rd2, %r90, 16; add.u64 %rd1, %rd50, %rd2;" if "v4" in access else OUT
    assert finding(body + access.replace("-4", "+-4")).kind == "global out of bounds"


def test_a_pointer_must_stay_in_its_own_argument() -> None:
    """A neighbour's memory is mapped too: the address has to come from that argument."""
    arena = buffer(256)
    body = "st.global.u32 [%rd50+512], %r90;"
    found = finding(body, [arena[:128], arena[128:]])
    assert found.kind == "global out of bounds"
    assert "p0+512 (its 512 bytes are 0 … 511), in memory of p1+0" in found.message


@pytest.mark.parametrize("access", ["ld.global.u32 %r1, [%rd50+512];", "st.global.u32 [%rd50+512], 7;"])
def test_a_pointer_must_stay_in_its_own_view_of_a_storage(access: str) -> None:
    whole = torch.zeros(256, dtype=torch.int32)
    with pytest.raises(Report, match=r"global out of bounds: 4 bytes at p0\+512 \(its 512 bytes are 0"):
        launch(module(access, 2), (1,), [whole[:128], whole[128:]])
    launch(module(access.replace("%rd50+512", "%rd51"), 2), (1,), [whole[:128], whole[128:]])


def test_gaps_between_the_elements_of_a_view_are_out_of_bounds() -> None:
    whole = np.zeros((128, 4), np.uint32)
    found = finding("setp.eq.u32 %p1, %r90, 0; @%p1 st.global.u32 [%rd50+4], %r90;", [whole[:, :1]])
    assert (found.kind, "4 bytes at p0+4" in found.message) == ("global out of bounds", True)
    apart = whole[:, ::3]  # the first and the last of a row: an access of the whole row has a gap inside
    assert finding("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd50];", [apart]).kind == "global out of bounds"
    run("mul.wide.u32 %rd2, %r90, 16; add.u64 %rd1, %rd50, %rd2; st.global.u32 [%rd1], %r90;", [whole[:, :1]])
    assert np.array_equal(whole[:, 0], np.arange(128))


def test_misaligned() -> None:
    found = finding("st.global.v2.u32 [%rd50+4], {%r90, %r90};")
    assert found.kind == "misaligned"
    assert (
        finding(f"{SHARED} st.shared.v2.u32 [%r1+4], {{%r90, %r90}};", declarations=ROOM).kind == "misaligned"
    )


def test_shared_out_of_bounds() -> None:
    found = finding(f"{SHARED} st.shared.u32 [%r3+16], %r90;", declarations=ROOM)
    assert (found.kind, found.thread, found.lanes) == ("shared out of bounds", 124, 4)
    assert "byte 512 of 512" in found.message


def test_null_pointers() -> None:
    assert finding("mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];").kind == "global out of bounds"
    assert (
        finding("mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];", declarations=ROOM).kind == "shared out of bounds"
    )


READ_NEIGHBOUR = "xor.b32 %r4, %r2, 128; add.u32 %r5, %r1, %r4; ld.shared.u32 %r6, [%r5];"


def test_shared_race_read_after_write() -> None:
    found = finding(f"{SHARED} st.shared.u32 [%r3], %r90; {READ_NEIGHBOUR}", declarations=ROOM)
    assert found.kind == "shared race"
    assert "read and write of byte 128 of shared memory (room+128), by warp 1" in found.message
    out = buffer()
    run(
        f"{SHARED} st.shared.u32 [%r3], %r90; bar.sync 0; {READ_NEIGHBOUR} {OUT} st.global.u32 [%rd1], %r6;",
        [out],
        declarations=ROOM,
    )
    assert np.array_equal(out, np.arange(128) ^ 32)


def test_shared_race_write_after_read() -> None:
    body = (
        f"{SHARED} st.shared.u32 [%r3], %r90; bar.sync 0; {READ_NEIGHBOUR} BARRIER st.shared.u32 [%r3], %r6;"
    )
    found = finding(body.replace("BARRIER", ""), declarations=ROOM)
    assert (found.kind, "write of byte 0" in found.message, "warp 1 reads" in found.message) == (
        "shared race",
        True,
        True,
    )
    run(body.replace("BARRIER", "bar.sync 0;"), [buffer()], declarations=ROOM)


@pytest.mark.parametrize("writer", [0, 1])
def test_shared_race_of_a_reader_that_writes_and_another_reader(writer: int) -> None:
    body = f"""
  {SHARED} st.shared.u32 [%r3], %r90; bar.sync 0;
  setp.lt.u32 %p1, %r90, 64; @%p1 ld.shared.u32 %r4, [%r1];
  setp.eq.u32 %p2, %r90, {32 * writer}; BARRIER @%p2 st.shared.u32 [%r1], %r4;
"""
    found = finding(body.replace("BARRIER", ""), declarations=ROOM)
    assert f"which warp {1 - writer} reads" in found.message
    run(body.replace("BARRIER", "bar.sync 0;"), [buffer()], declarations=ROOM)


def test_shared_race_of_two_writes() -> None:
    neighbour = "xor.b32 %r4, %r2, 128; add.u32 %r5, %r1, %r4;"
    body = f"{SHARED} st.shared.u32 [%r3], %r90; {neighbour} st.shared.u32 [%r5], %r90;"
    assert finding(body, declarations=ROOM).kind == "shared race"


def test_two_threads_write_different_values_at_once() -> None:
    assert finding("mov.u32 %r1, room; st.shared.u32 [%r1], %r90;", declarations=ROOM).kind == "shared race"
    assert finding("st.global.u32 [%rd50], %r90;").kind == "global race"
    run("mov.u32 %r1, room; st.shared.u32 [%r1], 7; st.global.u32 [%rd50], 7;", [buffer()], declarations=ROOM)


def test_registers_of_a_later_cta_hold_nothing_of_an_earlier_one() -> None:
    out = buffer(128 * 129)  # more CTAs than run at once, and twice
    body = """
  mad.lo.u32 %r2, %r91, 128, %r90; mul.wide.u32 %rd2, %r2, 4; add.u64 %rd3, %rd50, %rd2;
  setp.lt.u32 %p1, %r91, 64; @%p1 mov.u32 %r1, 3; st.global.u32 [%rd3], %r1;
"""
    for _ in range(2):
        run(body, [out], grid=129)
        assert (out[: 128 * 64] == 3).all()
        assert np.isnan(out[128 * 64 :].view(np.float32)).all()


def test_uninitialised() -> None:
    assert finding(f"{SHARED} ld.shared.u32 %r4, [%r3];", declarations=ROOM).kind == "uninitialised"


COPY = f"{SHARED} {OUT} cp.async.ca.shared.global [%r3], [%rd1], 4; cp.async.commit_group;"


def test_async_copy_must_be_waited_for() -> None:
    source = np.arange(128, dtype=np.uint32)
    out = buffer()
    store = "add.u64 %rd2, %rd51, %rd40; st.global.u32 [%rd2], %r6;"
    own = "ld.shared.u32 %r6, [%r3];"
    found = finding(f"{COPY} {own} cp.async.wait_group 0;", [source], declarations=ROOM)
    assert found.kind == "cp.async"
    assert "before the cp.async into it, of thread 0, was waited for" in found.message
    assert "never waited for" in finding(COPY, [source], declarations=ROOM).message
    run(f"{COPY} cp.async.wait_group 0; {own} {store}", [source, out], declarations=ROOM)
    assert np.array_equal(out, source)


def test_async_copy_of_others_needs_a_barrier_after_the_wait() -> None:
    source = np.arange(128, dtype=np.uint32)
    lane = "xor.b32 %r4, %r2, 4; add.u32 %r5, %r1, %r4; ld.shared.u32 %r6, [%r5];"
    found = finding(f"{COPY} cp.async.wait_all; {lane}", [source], declarations=ROOM)
    assert (found.kind, "others see it only after a barrier" in found.message) == ("cp.async", True)
    run(f"{COPY} cp.async.wait_all; bar.warp.sync 0xffffffff; {lane}", [source], declarations=ROOM)
    assert (
        finding(f"{COPY} bar.sync 0; cp.async.wait_all; {lane}", [source], declarations=ROOM).kind
        == "cp.async"
    )


def test_async_copy_groups_and_zero_fill() -> None:
    source, out = np.arange(1, 129, dtype=np.uint32), buffer()
    body = f"""
  {SHARED} {OUT}
  setp.lt.u32 %p1, %r90, 64; selp.u32 %r7, 4, 0, %p1; selp.u64 %rd3, %rd1, 0, %p1;
  cp.async.ca.shared.global [%r3], [%rd3], 4, %r7; cp.async.commit_group;
  cp.async.ca.shared.global [%r3+512], [%rd1], 4; cp.async.commit_group;
  cp.async.wait_group 1;
  ld.shared.u32 %r6, [%r3];
  LATER
  cp.async.wait_group 0;
  add.u64 %rd2, %rd51, %rd40; st.global.u32 [%rd2], %r6;
"""
    room = ".shared .align 16 .b8 room[1024];"
    run(body.replace("LATER", ""), [source, out], declarations=room)
    assert np.array_equal(out, np.where(np.arange(128) < 64, source, 0))
    found = finding(body.replace("LATER", "ld.shared.u32 %r6, [%r3+512];"), [source, out], declarations=room)
    assert found.kind == "cp.async"


def test_cross_cta_races() -> None:
    found = finding("mov.u32 %r1, 7; st.global.u32 [%rd50], %r1;", grid=2)
    assert (found.kind, "write and write" in found.message) == ("cross-CTA race", True)
    found = finding("ld.global.u32 %r1, [%rd50]; add.u32 %r1, %r1, 1; st.global.u32 [%rd50], %r1;", grid=2)
    assert (found.kind, "write and read" in found.message) == ("cross-CTA race", True)
    one = "setp.eq.u32 %p1, %r91, 0; @%p1 st.global.u32 [%rd50], 7; @!%p1 ld.global.u32 %r1, [%rd50];"
    found = finding(one, grid=2)
    assert "read and write of p0+0" in found.message
    assert found.cta == (1, 0, 0)
    for cta in (0, 1):  # both read; one of them writes
        own = f"ld.global.u32 %r1, [%rd50]; setp.eq.u32 %p1, %r91, {cta}; @%p1 st.global.u32 [%rd50], %r1;"
        assert "write and read of p0+0" in finding(own, grid=2).message
    later = "setp.eq.u32 %p1, %r91, 300; @!%p1 ld.global.u32 %r1, [%rd50]; @%p1 st.global.u32 [%rd50], 7;"
    found = finding(later, grid=301)  # the reader and the writer are not in the same chunk of CTAs
    assert (found.kind, found.cta) == ("cross-CTA race", (300, 0, 0))


def test_atomics_are_no_race_among_themselves() -> None:
    total = buffer(1)
    run("red.global.add.u32 [%rd50], 1;", [total], grid=3)
    assert total[0] == 3 * 128
    found = finding("red.global.add.u32 [%rd50], 1; ld.global.u32 %r1, [%rd50];", grid=2)
    assert (found.kind, "by atomics" in found.message) == ("cross-CTA race", True)
    run("red.global.add.u32 [%rd50], 1; ld.relaxed.gpu.global.u32 %r1, [%rd50];", [total], grid=2)
    own = "mul.wide.u32 %rd2, %r91, 512; add.u64 %rd3, %rd51, %rd2; add.u64 %rd3, %rd3, %rd40;"
    read_only = f"ld.global.u32 %r1, [%rd50]; {own}"
    run(read_only + "st.global.u32 [%rd3], %r1;", [total, buffer(256)], grid=2)


@pytest.mark.parametrize(
    "body",
    [
        "red.relaxed.cta.global.add.u32 [%rd50], 1;",
        "atom.acq_rel.cta.global.add.u32 %r1, [%rd50], 1;",
        "red.relaxed.gpu.global.add.u32 [%rd50], 1; ld.relaxed.cta.global.u32 %r1, [%rd50];",
    ],
)
def test_the_scope_of_an_atomic_must_include_the_other_cta(body: str) -> None:
    assert finding(body, grid=2).kind == "cross-CTA race"
    run(body, [buffer()], grid=1)
    run(body.replace(".cta.", ".gpu."), [buffer()], grid=2)


def test_barrier_deadlock() -> None:
    found = finding("setp.lt.u32 %p1, %r90, 32; @%p1 bar.sync 0; @!%p1 bar.sync 1;")
    assert (found.kind, "wait for ever" in found.message) == ("barrier deadlock", True)
    found = finding(
        "setp.lt.u32 %p1, %r90, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B: mov.u32 %r1, 0;"
    )
    assert (found.kind, "meet at two barriers" in found.message) == ("barrier", True)
    run("setp.lt.u32 %p1, %r90, 32; @%p1 ret; bar.sync 0;", [buffer()])  # ended threads are not waited for


def test_divergence() -> None:
    assert finding("setp.lt.u32 %p1, %r90, 40; @%p1 bar.sync 0;").kind == "divergence"
    shuffle = "shfl.sync.bfly.b32 %r1, %r90, 1, 31, 0xffffffff;"
    found = finding(f"setp.lt.u32 %p1, %r90, 40; @%p1 {shuffle}")
    assert (found.kind, found.thread, found.lanes) == ("divergence", 40, 24)
    run(f"setp.lt.u32 %p1, %r90, 64; @%p1 {shuffle}", [buffer()])
    run("setp.lt.u32 %p1, %r90, 8; @%p1 shfl.sync.bfly.b32 %r1, %r90, 1, 31, 0xff;", [buffer()])
    for collective in (
        "vote.sync.any.pred %p2, %p1, 0xffffffff;",
        "bar.warp.sync 0xffffffff;",
        "redux.sync.add.u32 %r1, %r90, 0xffffffff;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r3];",
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r5, %r6}, {%r7}, {%r1, %r2};",
    ):
        some = "mov.u32 %r3, room; setp.lt.u32 %p1, %r90, 8;"
        body = f"{SHARED} st.shared.u32 [%r3], %r90; {some} @%p1 {collective}"
        assert finding(body, declarations=ROOM).kind == "divergence", collective


def test_trap_and_local_memory() -> None:
    assert finding("setp.eq.u32 %p1, %r90, 5; @%p1 trap;").thread == 5
    depot = ".local .align 8 .b8 depot[16]; mov.u64 %rd1, depot; cvta.local.u64 %rd2, %rd1;"
    out = buffer()
    run(
        f"{depot} st.local.u32 [%rd1+4], %r90; ld.u32 %r1, [%rd2+4];"
        "add.u64 %rd3, %rd50, %rd40; st.u32 [%rd3], %r1;",
        [out],
    )
    assert np.array_equal(out, np.arange(128))
    assert finding(f"{depot} st.local.u32 [%rd1+16], %r90;").kind == "local out of bounds"


def test_loops_and_branches_meet_again() -> None:
    """Collatz steps: threads leave the loop at different times and store together."""
    out = buffer()
    body = f"""
  add.u32 %r1, %r90, 1; mov.u32 %r2, 0;
LOOP:
  setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;
  and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
  mad.lo.u32 %r1, %r1, 3, 1; bra NEXT;
EVEN: shr.u32 %r1, %r1, 1;
NEXT: add.u32 %r2, %r2, 1; bra LOOP;
DONE: bar.warp.sync 0xffffffff; {OUT} st.global.u32 [%rd1], %r2;
"""
    run(body, [out])

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [steps(n + 1) for n in range(128)]


def test_scopes_and_branch_tables() -> None:
    """Registers and labels of { } are its own; brx.idx takes each thread to its place."""
    out = buffer()
    block = """
  { .reg .pred p; .reg .b32 t<3>;
    setp.lt.u32 p, %r90, LIMIT; mov.u32 t1, 0; @p bra SKIP; mov.u32 t1, 1; SKIP: add.u32 %r1, %r1, t1; }
"""
    body = f"""
  mov.u32 %r1, 0; {block.replace("LIMIT", "10")} {block.replace("LIMIT", "100")}
  and.b32 %r2, %r90, 3; setp.eq.u32 %p1, %r2, 3; @%p1 bra END;
TABLE: .branchtargets ONE, TWO, END;
  brx.idx %r2, TABLE;
ONE: add.u32 %r1, %r1, 10; bra END;
TWO: add.u32 %r1, %r1, 20;
END: {OUT} st.global.u32 [%rd1], %r1;
"""
    run(body, [out])
    thread = np.arange(128)
    expected = (thread >= 10).astype(int) + (thread >= 100) + np.array([10, 20, 0, 0])[thread & 3]
    assert np.array_equal(out, expected)


def test_reducing_barrier() -> None:
    out = buffer()
    run(f"setp.lt.u32 %p1, %r90, 37; bar.red.popc.u32 %r1, 0, %p1; {OUT} st.global.u32 [%rd1], %r1;", [out])
    assert (out == 37).all()


def test_what_is_not_emulated_is_refused_by_name() -> None:
    with pytest.raises(
        Unsupported, match=r"mbarrier.init.* is not emulated: mbarrier, tcgen05, clusters and TMA are not"
    ):
        run("mbarrier.init.shared::cta.b64 [%r1], 1;", [buffer()])
    with pytest.raises(Unsupported, match="TMA is not emulated: load with pointers"):
        run("cp.async.bulk.commit_group;", [buffer()])


def test_arguments_are_checked() -> None:
    ptx = module("", 1)
    with pytest.raises(ValueError, match="takes 1 arguments, got 2"):
        launch(ptx, (1,), [buffer(), buffer()])
    with pytest.raises(ValueError, match=r"block must be \(128, 1, 1\)"):
        launch(ptx, (1,), [buffer()], block=64)


def test_counts() -> None:
    """A coalesced and a strided load, a conflict-free and a conflicting shared access, and the bytes of each
    argument.
    """
    source, out = buffer(128 * 8), buffer()
    body = f"""
  {SHARED}
  mul.wide.u32 %rd2, %r90, 32; add.u64 %rd3, %rd50, %rd2;
  ld.global.u32 %r4, [%rd3];
  st.shared.u32 [%r3], %r4;
  bar.sync 0;
  and.b32 %r5, %r90, 3; shl.b32 %r6, %r5, 7; add.u32 %r7, %r1, %r6;
  ld.shared.u32 %r8, [%r7];
  add.u64 %rd4, %rd51, %rd40; st.global.u32 [%rd4], %r8;
"""
    result = run(body, [source, out], declarations=ROOM, counts=True)
    found = {(a.space, a.name): (a.requests, a.transactions, a.ideal, a.bytes) for a in result.accesses}
    assert found == {
        ("global", "ld.global.u32"): (4, 128, 16, 512),  # every lane in a sector of its own
        ("shared", "st.shared.u32"): (4, 4, 4, 512),
        ("shared", "ld.shared.u32"): (4, 16, 4, 512),  # four words of one bank
        ("global", "st.global.u32"): (4, 16, 16, 512),
    }
    assert (result.bytes_read, result.bytes_written) == ({"p0": 512, "p1": 0}, {"p0": 0, "p1": 512})
    assert result.instructions["ld.global.u32"] == 4
    assert result.instructions["bar.sync"] == 4
