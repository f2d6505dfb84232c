"""benchmarks.codegen reads disassemblies: small ones made by hand, where every figure is known."""

import pytest

pytest.importorskip("triton")

from benchmarks.codegen import device, limits, sass
from benchmarks.codegen.limits import Allowed
from benchmarks.codegen.warp import Warp, matrix_cycles

NONE = 7


def line(at: int, text: str, stall: int = 1, sets: int = NONE, reads: int = NONE, waits: int = 0) -> str:
    """One instruction as cuobjdump prints it."""
    control = stall | sets << 5 | reads << 8 | waits << 11
    return (
        f"        /*{16 * at:04x}*/                   {text} ;      /* 0x0000000000007918 */\n"
        f"                                                        /* 0x{control << 41:016x} */\n"
    )


def listing(*instructions: tuple) -> list[sass.Instruction]:  # type: ignore[type-arg]
    """The instructions of (text, stall, sets, reads, waits)."""
    return sass.parse("".join(line(at, *each) for at, each in enumerate(instructions)))


COPY_LOOP = (
    ("ULDC.64 UR4, c[0x0][0x210]",),
    ("IMAD.WIDE R4, R0, 0x2, R2",),
    ("LDGSTS.E.BYPASS.128 [R15], desc[UR4][R4.64], P4",),
    ("LDGDEPBAR", 1, 0),
    ("DEPBAR.LE SB0, 0x0",),  # the loop
    ("BAR.SYNC.DEFER_BLOCKING 0x0",),
    ("@P6 LDGSTS.E.BYPASS.128 [R15], desc[UR4][R4.64], P4",),
    ("LDGDEPBAR", 1, 0),
    ("@!P5 BRA 0x40",),
    ("EXIT",),
    ("BRA 0xa0",),
)


def test_what_an_instruction_says() -> None:
    text = line(3, "@!P1 LDG.E.128 R12, desc[UR8][R4.64+0x10]", 4, 2, 1, 0b100001)
    (found,) = sass.parse(text)
    assert found == (48, "!P1", "LDG.E.128", ("R12", "desc[UR8][R4.64+0x10]"), 4, 2, 1, 33)
    assert (found.base, found.width, found.loads, found.target) == ("LDG", 16, True, None)
    widths = {"LDG.E.U16": 2, "LDG.E": 4, "STG.E.64": 8, "LDGSTS.E.BYPASS.128": 16, "LDG.E.U8": 1}
    assert {name: listing((f"{name} R2, desc[UR4][R4.64]",))[0].width for name in widths} == widths


def test_loops_are_branches_backwards() -> None:
    """The last instruction of a function branches to itself: no loop. Inner loops come first."""
    assert sass.loops(listing(*COPY_LOOP)) == [(4, 8)]
    nested = (("NOP",), ("NOP",), ("@P0 BRA 0x10",), ("@P1 BRA 0x0",), ("BRA 0x60",), ("EXIT",))
    assert sass.loops(listing(*nested)) == [(1, 2), (0, 3)]


def test_pointers_lie_behind_each_other_at_multiples_of_their_size() -> None:
    signature = {
        "X": "*bf16",
        "NONE": "constexpr",
        "T": "i32",
        "Y": "*fp32",
        "scale": "fp32",
        "seed": "i64",
        "Z": "*i8",
    }
    assert sass.pointers(signature) == {0x210: "X", 0x220: "Y", 0x238: "Z"}


def test_where_an_address_comes_from() -> None:
    """Through what set its registers, past what set others, and what loads have put into them."""
    code = listing(
        ("LDC.64 R2, c[0x0][0x210]", 1, 0),
        ("ULDC.64 UR6, c[0x0][0x218]",),
        ("IADD3 R8, P0, R2, R9, RZ",),
        ("IADD3.X R9, R3, RZ, RZ, P0, !PT",),
        ("IADD3 R10, P1, R5, UR6, RZ",),
        ("@P2 IADD3 R12, R8, 0x40, RZ",),
        ("LDG.E.64 R2, desc[UR4][R8.64]", 1, 1),
        ("LDG.E R20, desc[UR4][R10.64]", 1, 2),
        ("LDG.E R21, desc[UR4][R2.64]", 1, 2),
        ("STG.E desc[UR4][R12.64], R20",),
    )
    names = {0x210: "X", 0x218: "Y"}
    assert [sass.origin(code, i, names) for i in (6, 7, 8, 9)] == ["X", "Y", None, "X"]


def walk(code: list[sass.Instruction], large: dict[int, int], main: tuple[int, int] | None = None, warps: int = 4):  # type: ignore[no-untyped-def]
    return Warp(code, main, large, warps, 132).run()


LATENCY = device.LATENCY * device.CLOCK


def test_a_copy_one_step_ahead_is_in_flight_when_it_is_waited_for() -> None:
    """A turn takes the latency and the transfer; a second program on each multiprocessor doubles
    the transfer.
    """
    code, size = listing(*COPY_LOOP), 8192
    found = walk(code, {2: size, 6: size}, (4, 8))
    transfer = size / (device.BANDWIDTH / device.CLOCK / device.SMS)
    assert found.in_flight == size
    assert found.same_step == set()
    assert LATENCY + transfer < found.step < LATENCY + transfer + 60
    assert found.issued == (4, 5, 1)
    assert Warp(code, (4, 8), {2: size, 6: size}, 4, 264).run().step > found.step + transfer - 1


def test_a_cuda_kernels_turn_is_that_of_its_copies() -> None:
    """Two turns' copies are on their way where one group may be left; what an inner loop brings
    element by element is no part of a turn. 100 registers of 128 threads: four blocks.
    """
    cuda = pytest.importorskip("benchmarks.codegen.cuda")
    code = listing(
        ("DEPBAR.LE SB0, 0x1",),  # the turn
        ("BAR.SYNC.DEFER_BLOCKING 0x0",),
        ("LDGSTS.E.BYPASS.128 [R15], desc[UR4][R4.64], P4",),
        ("LDGSTS.E.BYPASS.128 [R16], desc[UR4][R4.64], P4",),
        ("LDG.E.U16 R20, desc[UR4][R6.64]",),  # the slow path
        ("@P1 BRA 0x40",),
        ("LDG.E.U16 R21, desc[UR4][R8.64]",),
        ("HMMA.16816.F32 R8, R1",),
        ("@P2 BRA 0x0",),
        ("LDG.E.128 R24, desc[UR4][R8.64]",),
        ("@P3 BRA 0x0",),  # around it, without what it does most often
        ("EXIT",),
        ("BRA 0xc0",),
    )
    found = cuda.speed_of(code, registers=100, shared=8192)
    copies = 2 * 16 * cuda.THREADS
    assert found == {
        "blocks": 4, "in_flight": 4 * 2 * copies, "single": 1, "barriers": 1, "products": 1, "turn": 7,
    }  # fmt: skip


def test_deeper_pipelines_wait_less() -> None:
    """Two groups may be left: three copies are on their way when it waits, a third of the time."""
    ahead = list(COPY_LOOP)
    ahead[4:5] = [("DEPBAR.LE SB0, 0x2",)]
    ahead[4:4] = [COPY_LOOP[2], COPY_LOOP[3]] * 2
    ahead[12] = ("@!P5 BRA 0x80",)
    code = listing(*ahead)
    large = {i: 512 for i, each in enumerate(code) if each.base == "LDGSTS"}
    found = walk(code, large, (8, 12))
    assert found.in_flight == 3 * 512
    assert found.step == pytest.approx(LATENCY / 3, rel=0.1)


def test_a_load_that_is_waited_for_in_its_own_turn() -> None:
    code = listing(
        ("LDG.E.128 R4, desc[UR4][R2.64]", 1, 0),
        ("FADD R8, R4, R5", 4, NONE, NONE, 1),
        ("@P0 BRA 0x0",),
        ("EXIT",),
    )
    found = walk(code, {0: 2048}, (0, 2))
    assert found.same_step == {0}
    assert found.step > LATENCY
    cached = walk(code, {}, (0, 2))
    assert device.CACHED < cached.step < device.CACHED + 20
    assert cached.in_flight == 0


def test_a_branch_around_the_loop_is_not_taken_and_one_to_it_is() -> None:
    body = (("LDG.E R4, desc[UR4][R2.64]", 1, 0), ("FADD R8, R4, R5", 4, NONE, NONE, 1))
    around = listing(("@P6 BRA 0x40",), *body, ("@P0 BRA 0x10",), ("EXIT",))
    assert walk(around, {1: 512}, (1, 3)).step > LATENCY
    to_it = listing(("@P6 BRA 0x20",), ("BRA 0x50",), *body, ("@P0 BRA 0x20",), ("EXIT",))
    assert walk(to_it, {2: 512}, (2, 4)).step > LATENCY


def test_matrix_instructions_one_by_one_wait_longer() -> None:
    product = "HGMMA.64x8x16.F32.BF16 R32, gdesc[UR4], R32"
    together = listing((product,), (product,), (product + ", gsb0",), ("WARPGROUP.DEPBAR.LE gsb0, 0x0",), ("EXIT",))
    alone = listing(*((product + ", gsb0",), ("WARPGROUP.DEPBAR.LE gsb0, 0x0",)) * 3, ("EXIT",))
    assert walk(alone, {}).before > walk(together, {}).before + 20
    cycles = [matrix_cycles(listing((f"HGMMA.64x{N}x16.F32 R0, gdesc[UR4], R0",))[0]) for N in (8, 64, 256)]
    assert cycles == [18, 32, 128]


def test_a_barrier_waits_for_the_slots_of_all_warps() -> None:
    code = listing(*[("FADD R0, R1, R2",)] * 40, ("BAR.SYNC 0x0",), ("EXIT",))
    assert walk(code, {}, warps=16).before - walk(code, {}, warps=4).before == pytest.approx(3 * 40, abs=3)


ROW = {"kernel": "row_norm", "of": "dora r=16 4096x4096", "spill_bytes": 0, "serialized_mma": 0, "R": 16}
ROW |= {"in_flight_bytes": 30 << 10, "ctas_per_sm": 2, "threads": 128, "scalar_loads": 0, "barriers_per_step": 3}
ROW |= {"programs": 256, "mma": {"HMMA.16816": 4}, "narrow": True, "matrix_us": 3.0, "bytes_us": 8.0}
ROW |= {"large_reads": True, "large_writes": False, "estimate_us": 12.0}
BAD = {
    "spills": {"spill_bytes": 8}, "serialized": {"serialized_mma": 1}, "in_flight": {"in_flight_bytes": 24 << 10},
    "ctas": {"ctas_per_sm": 1}, "scalar_loads": {"scalar_loads": 1}, "barriers": {"barriers_per_step": 4},
    "programs": {"programs": 64}, "matrix": {"matrix_us": 4.1},
}  # fmt: skip


@pytest.mark.parametrize("measure", BAD)
def test_each_limit(measure: str) -> None:
    assert limits.beyond(ROW) == {}
    bad = ROW | BAD[measure]
    assert list(limits.beyond(bad)) == [measure]
    new, idle = limits.judged([bad], [])
    assert (new, idle) == ([Allowed("row_norm", ROW["of"], measure, (12.0, 8.0))], [])
    assert limits.judged([bad], new) == ([], [])
    assert limits.judged([ROW], new) == ([], new)  # mended: the exception is named as such
    assert limits.judged([], new) == ([], [])
    assert limits.judged([], new, complete=True) == ([], new)  # no launch is called so any more
    assert list(limits.beyond(bad | {"R": 128})) == [measure] * (measure in ("spills", "serialized"))


def test_one_program_of_eight_warps_will_do_with_more_in_flight() -> None:
    one = ROW | {"ctas_per_sm": 1, "in_flight_bytes": 32 << 10}
    assert list(limits.beyond(one)) == ["ctas"]
    assert limits.beyond(one | {"threads": 256}) == {}
    small = ROW | {"kernel": "fold", "large_reads": False, "in_flight_bytes": 0, "ctas_per_sm": 1, "programs": 8}
    assert limits.beyond(small) == {}
