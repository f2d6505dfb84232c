"""Every Triton kernel in every configuration that is shipped: what `benchmarks.codegen`
compiles.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.add_parts import BLOCK as PARTS_BLOCK
from delora_kernels.backends.triton.add_parts import FEW, MANY, add_parts_kernel, finish_dy_kernel
from delora_kernels.backends.triton.dropout import _BC, _BT, drop_kernel, mask_kernel
from delora_kernels.backends.triton.dy_sums import dy_sums_kernel
from delora_kernels.backends.triton.fold import BLOCK, WARPS, fold_backward_kernel, fold_kernel
from delora_kernels.backends.triton.grouped import grouped_times_small_kernel, grouped_update_kernel
from delora_kernels.backends.triton.grouped_sums import BLOCK as GROUPED_BLOCK
from delora_kernels.backends.triton.grouped_sums import grouped_sums_kernel, grouped_total_kernel
from delora_kernels.backends.triton.planes import BLOCK_COLUMNS as PLANE_COLUMNS
from delora_kernels.backends.triton.planes import BLOCK_ROWS as PLANE_ROWS
from delora_kernels.backends.triton.planes import planes_kernel
from delora_kernels.backends.triton.project_route import LARGEST_EXPERTS, LARGEST_MIXED_RANK, project_route_kernel
from delora_kernels.backends.triton.rank_gemm import DESCRIPTORS_FROM, GROUP, RANKS, rank_gemm_kernel
from delora_kernels.backends.triton.rank_update import TURN, rank_update_kernel
from delora_kernels.backends.triton.reflect import (
    CHUNK,
    REGISTERS,
    across_kernel,
    chunk_sums,
    reflect_backward_kernel,
    reflect_chunked_kernel,
    reflect_kernel,
    reflect_sums_kernel,
    whole,
)
from delora_kernels.backends.triton.route import (
    blocks,
    route_kernel,
    route_totals_kernel,
    totals_blocks,
    warps,
)
from delora_kernels.backends.triton.route_backward import route_backward_kernel
from delora_kernels.backends.triton.row_norm import row_norm_kernel, shape
from delora_kernels.backends.triton.scaled import BLOCK_COLUMNS, BLOCK_ROWS, scaled_kernel
from delora_kernels.backends.triton.stack_factors import BLOCK as STACK_BLOCK
from delora_kernels.backends.triton.stack_factors import COLUMNS as STACK_COLUMNS
from delora_kernels.backends.triton.stack_factors import stack_factors_kernel
from delora_kernels.backends.triton.times_small import FEWEST_RANKS, times_small_kernel
from delora_kernels.backends.triton.token_sums import token_sums_kernel

TYPES = {
    "bf16": ("bf16", "bf16"),
    "bf16+fp32": ("bf16", "fp32"),
    "fp16": ("fp16", "fp16"),
    "fp16+fp32": ("fp16", "fp32"),
    "fp32": ("fp32", "fp32"),
}
"""Name → dtype of token-sized tensors, dtype of factors."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Variant(NamedTuple):
    """One kernel in one configuration: what it is called, its pointers' dtypes, its constants, its
    launch options.
    """

    kernel: str
    config: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


GEMM_KERNELS = (
    *("times_small", "project_route", "token_sums", "dy_sums", "rank_update", "rank_gemm"),
    *("grouped_times_small", "grouped_update", "grouped_sums"),
)
"""Kernels whose 16-bit products must run on the matrix units of the newest instruction."""


def variants(capability: tuple[int, int] = (9, 0)) -> Iterator[Variant]:
    """Every shipped configuration, with the features that cost registers switched on.

    Args:
        capability: Of the device, (0, 0) for one that is not NVIDIA's: what is tuned for it, how it
            loads tiles.
    """
    for kernel in FEATURES:
        for rank_class in tables.TABLES[kernel]:
            for name, types in TYPES.items():
                for features in FEATURES[kernel]:
                    variant = _tabled(kernel, int(rank_class), name, *types, features, capability)
                    if variant is not None:
                        yield variant
    for name in ("bf16", "fp16"):
        for way in ("descriptors", "pointers") if capability >= DESCRIPTORS_FROM else ("pointers",):
            for layout in ("NT", "NN"):
                for keep in (False, True) if layout == "NT" else (False,):
                    yield _gemm(name, way, layout, keep, capability)
    for small in ("fp32", "bf16"):
        yield from _folds(small)
    yield from _passes()
    yield from _gating()
    yield from _gated_projections(capability)
    yield from _reflections()


FEATURES: dict[str, tuple[str, ...]] = {
    "times_small": ("", "dropout", "planes"),
    "token_sums": ("", "vectors", "term", "dropout"),
    "dy_sums": ("", "dots"),
    "rank_update": ("", "prefill", "dropout", "turns"),
    "row_norm": ("", "scaled", "low", "turns", "experts"),
    "grouped_times_small": ("", "dropout"),
    "grouped_update": ("dropout",),
    "grouped_sums": ("vectors", "dropout"),
}
"""Kernel → what its launches differ in: the vectors beside the product, the rank-R term of dx, what
is not there, the tile of few rows, more ranks than one turn takes.
"""


UNIT_STRIDES = {
    "times_small": ("stride_sc",),
    "token_sums": ("stride_sc",),
    "dy_sums": ("stride_sr",),
    "rank_update": ("stride_sr",),
    "row_norm": ("stride_wk", "stride_ak", "stride_br", "stride_sk"),
}
"""Kernel → the strides that are 1 where it is launched for contiguous W, Â and B̂."""


def _tabled(
    kernel: str, BR: int, name: str, big: str, small: str, features: str, capability: tuple[int, int]
) -> Variant | None:
    """Return a configuration of tables.TABLES, or None where no launch asks for it."""
    drop = features == "dropout"
    kinds = "fp32" if big == "fp32" else "mixed" if big != small else "dropped" if drop else ""
    if kernel == "row_norm":
        most = max(map(int, tables.TABLES["row_norm mixed" if kinds else kernel]))
        if BR > most or (features == "turns" and BR < most):
            return None  # so many ranks take several turns, which fewer do not
    tile = tables.tiles(kernel, BR, capability, kinds)
    how, precision = (0, "ieee") if big == small else {"bf16": (1, "ieee"), "fp16": (3, "tf32x3")}[big]
    constants: dict[str, Any] = {"INTERPRETED": False, "BR": BR, "BT": tile.tokens, "BC": tile.columns}
    if kernel.startswith("grouped_"):
        return _grouped(kernel, name, big, small, features, constants | {"HOW": how, "PRECISION": precision}, tile)
    constants |= dict.fromkeys(UNIT_STRIDES[kernel], 1) | {"UNIT": 1}
    if kernel in ("times_small", "rank_update"):
        constants["UNIT_S"] = 1
    if kernel == "times_small":
        function, pointers = times_small_kernel, {"X": big, "S": small, "OUT": small}
        constants |= {"DROP": drop, "PLANES": 1}
        if features == "planes":
            if name != "bf16+fp32" or BR <= FEWEST_RANKS:
                return None  # no other factors come so
            tile, how = tables.tiles(kernel, BR, capability, "planes"), 0
            pointers["S"] = "bf16"
            constants |= {"PLANES": 3, "BT": tile.tokens, "BC": tile.columns}
    elif kernel == "token_sums":
        function, pointers = token_sums_kernel, {"X": big, "H": small, "PRODUCT": "fp32"}
        if features == "term" and name not in ("bf16", "fp16"):
            return None  # it does not take them
        constants |= {"WITH_PRODUCT": True, "DROP": drop, "WITH_OUT": features == "term"}
        constants |= {"WITH_SUMS": features == "vectors", "WITH_DOTS": features == "vectors"}
        constants |= {"TRANSPOSED": features != "vectors"}
        if features == "vectors":
            pointers |= {"Y": big, "SUMS": "fp32", "DOTS": "fp32"}
        constants |= {"LANES": tables.lanes(tile, DTYPES[big]), "STAGES": tile.stages}
        if constants["WITH_OUT"]:
            pointers |= {"S": small, "OUT": big}
    elif kernel == "dy_sums":
        if name in ("fp32", "fp16+fp32"):
            return None  # it does not take them
        dots, column = bool(features), bool(features) and big == "bf16"  # c ⊙ S is float32: not beside float16
        function, pointers = dy_sums_kernel, {"DY": big, "S": small, "H": small, "DV": "fp32", "PRODUCT": "fp32"}
        pointers |= {"SUMS": "fp32", "Y": big, "DOTS": "fp32"} if dots else {}
        constants |= {"WITH_SUMS": dots, "WITH_DOTS": dots, "WITH_COLUMN": column, "HOW_H": how}
        constants["LANES"], constants["STAGES"] = tables.lanes(tile, DTYPES[big]), tile.stages
        if column:
            how, tile = 1, tables.tiles(kernel, BR, capability, "scaled" if big == small else "mixed")
            pointers["COLUMN"] = "fp32"
            constants |= {
                "BT": tile.tokens,
                "BC": tile.columns,
                "LANES": tables.lanes(tile, DTYPES[big]),
                "STAGES": tile.stages,
            }
    elif kernel == "rank_update":
        if features == "turns" and BR > TURN:
            return None  # no turn has so many ranks
        function, pointers = rank_update_kernel, {"H": small, "S": small, "OUT": big, "COLUMN": "fp32", "BIAS": big}
        pointers |= {} if features == "prefill" else {"BASE": big} | ({"EXTRA": big} if drop else {})
        constants |= {"WITH_BASE": features != "prefill", "WITH_COLUMN": True, "WITH_EXTRA": drop, "WITH_BIAS": True}
        constants |= {"MASK_TERM": drop, "MASK_BASE": drop}
        constants |= {"ONE_TURN": features != "turns", "STAGES": tile.stages}
        how = 2 if how == 1 else how
    else:
        function, pointers = row_norm_kernel, {"W": big, "A": small, "B": small, "NORM": "fp32"}
        BN, BK = shape(tile, BR, 1, 2 if features == "low" else 1)
        constants = dict.fromkeys(UNIT_STRIDES[kernel], 1) | {"INTERPRETED": False, "STAGES": tile.stages}
        constants |= {"BN": BN, "BK": BK, "BR": BR}
        constants |= {"WITH_COLUMN": True, "WITH_SCALED": features == "scaled", "ONE_TURN": features != "turns"}
        constants |= {"EXPERTS": features == "experts"}
        pointers |= {"MAGNITUDE": small, "COLUMN": "fp32"} | ({"SCALED": big} if features == "scaled" else {})
        how, precision = (0, "ieee") if big == small else (3, "tf32x3")
    if drop:
        pointers["SEED"] = "i64"
    constants |= {"HOW": how, "PRECISION": precision}
    options = {"num_warps": tile.warps} | ({} if "STAGES" in constants else {"num_stages": tile.stages})
    return Variant(kernel, f"{name} R={BR} {features}".strip(), function, pointers, constants, options)


BE = 256
"""What 128 experts take: a power of two above."""


def _grouped(
    kernel: str, name: str, big: str, small: str, features: str, constants: dict[str, Any], tile: tables.Tiles
) -> Variant:
    """Return a configuration of a kernel for rows sorted by expert."""
    drop, pointers = features == "dropout", {"OFFSETS": "i64"}
    constants |= {"BE": BE, "DROP": drop}
    if kernel == "grouped_times_small":
        function, pointers = grouped_times_small_kernel, pointers | {"X": big, "S": small, "OUT": small}
    elif kernel == "grouped_update":
        function, pointers = grouped_update_kernel, pointers | {"BASE": big, "H": small, "S": small, "BIAS": big}
        constants |= {"WITH_BIAS": True, "HOW": 2 if constants["HOW"] == 1 else constants["HOW"]}
    else:
        function, pointers = grouped_sums_kernel, pointers | {"X": big, "H": small, "PRODUCT": "fp32", "PARTS": "fp32"}
        constants |= {"WITH_PRODUCT": True, "WITH_SUMS": features == "vectors", "SPLIT": True}
        pointers |= {"SUMS": "fp32"} if features == "vectors" else {}
    pointers |= {"SEED": "i64"} if drop else {}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    config = f"{name} R={constants['BR']} {features}".strip()
    return Variant(kernel, config, function, pointers, constants, options)


def _gemm(name: str, way: str, layout: str, keep: bool, capability: tuple[int, int]) -> Variant:
    tile = tables.gemm_tiles(way, capability)
    rows, tma = layout == "NT", way == "descriptors"
    right = (tile.columns, tile.inner) if rows else (tile.inner, tile.columns)
    pointers = {"H": name, "S": name, "COLUMN": "fp32", "BIAS": name, "OUT": name} | ({"KEPT": name} if keep else {})
    pointers |= {"X": name, "W": name}
    if tma:
        pointers |= {"X": f"{name}[{tile.tokens}, {tile.inner}]", "W": f"{name}[{right[0]}, {right[1]}]"}
    constants = {"TMA": tma, "ROWS": rows, "WITH_COLUMN": True, "WITH_BIAS": True, "KEEP": keep, "PRECISION": "ieee"}
    constants |= {"INTERPRETED": False, "BT": tile.tokens, "BC": tile.columns, "BD": tile.inner, "BR": RANKS}
    config = f"{name} {layout} {way}" + (" kept" if keep else "")
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant("rank_gemm", config, rank_gemm_kernel, pointers, constants | {"GROUP": GROUP}, options)


def _folds(small: str) -> Iterator[Variant]:
    shared = {"A": small, "B": small, "LAM": "fp32", "WEIGHT_NORM": "fp32", "NORM_A": "fp32", "NORM_B": "fp32"}
    hats, warps = {"A_HAT": "bf16", "B_HAT": "bf16"}, {"num_warps": WARPS}
    constants = {"NORMALISE": True, "CLAMP": True, "WITH_VECTOR": True, "BLOCK": BLOCK}
    yield Variant("fold", small, fold_kernel, shared | hats, constants, warps)
    cast = constants | {"NORMALISE": False, "CLAMP": False, "WITH_VECTOR": False}
    yield Variant("fold", f"{small} cast", fold_kernel, {"A": small, "B": small} | hats, cast, warps)
    gradients = {"GRAD_A": "fp32", "GRAD_B": "fp32", "DA": small, "DB": small, "ALONG": "fp32"}
    constants = {"CLAMP": True, "WITH_VECTOR": True, "WITH_A": True, "WITH_B": True, "BLOCK": BLOCK}
    yield Variant("fold_backward", small, fold_backward_kernel, shared | gradients, constants, warps)


def _passes() -> Iterator[Variant]:
    """Kernels without a product: sums of parts, scaling, masks."""
    for config, at_once, block in (("bf16", 1, PARTS_BLOCK), ("bf16 many", *MANY)):
        size = {"AT_ONCE": at_once, "BLOCK": block}
        yield Variant("add_parts", config, add_parts_kernel, {"PARTS": "fp32", "OUT": "bf16"}, size, {})
    pointers = {"DV_PARTS": "fp32", "PRODUCT_PARTS": "fp32", "SUM_PARTS": "fp32", "DOT_PARTS": "fp32", "B": "bf16"}
    pointers |= {"COLUMN": "fp32", "DIVISOR": "fp32", "DV": "bf16", "DB": "fp32", "SUMS": "fp32", "DM": "fp32"}
    constants: dict[str, Any] = {f"WITH_{part}": True for part in ("DV", "PRODUCT", "SUMS", "DOTS", "COLUMN", "B")}
    pointers_of_total = {"OFFSETS": "i64", "PARTS": "fp32", "PRODUCT": "fp32", "SUMS": "fp32"}
    totals = {"WITH_PRODUCT": True, "WITH_SUMS": True, "BLOCK": GROUPED_BLOCK, "BE": BE}
    yield Variant("grouped_total", "", grouped_total_kernel, pointers_of_total, totals, {})
    for BR in (16, 32, 512):
        size = {"BN": PARTS_BLOCK // BR, "BR": BR, "BLOCK": PARTS_BLOCK, "AT_ONCE": FEW, "UNIT": 8}
        yield Variant("finish_dy", f"R={BR}", finish_dy_kernel, pointers, constants | size, {})
    for by_row in (False, True):
        size = {"BY_ROW": by_row, "BM": BLOCK_ROWS, "BC": BLOCK_COLUMNS}
        pointers = {"X": "bf16", "FACTOR": "fp32", "OUT": "bf16"}
        yield Variant("scaled", "rows" if by_row else "columns", scaled_kernel, pointers, size, {})
    for by_row in (False, True):
        size = {"WITH_FACTOR": True, "BY_ROW": by_row, "PLANES": 3, "BM": PLANE_ROWS, "BC": PLANE_COLUMNS}
        pointers = {"S": "fp32", "FACTOR": "fp32", "OUT": "bf16"}
        yield Variant("planes", "rows" if by_row else "columns", planes_kernel, pointers, size, {})
    size = {"BLOCK": STACK_BLOCK, "BN": STACK_BLOCK // STACK_COLUMNS, "BC": STACK_COLUMNS}
    constants = {f"WITH_{part}": True for part in ("A", "G", "A0", "B0")}
    for small in ("fp32", "bf16"):
        pointers = dict.fromkeys(("A", "G", "A0", "B", "B0"), small) | {"RESIDUAL": "fp32"}
        pointers |= {"ROWS": "bf16", "COLUMNS": "bf16"}
        yield Variant("stack_factors", small, stack_factors_kernel, pointers, constants | size, {})
    size = {"BT": _BT, "BC": _BC}
    yield Variant("mask", "", mask_kernel, {"SEED": "i64", "MASK": "i1"}, size, {})
    pointers = {"X": "bf16", "SEED": "i64", "DROPPED": "bf16", "REST": "bf16"}
    yield Variant("drop", "bf16", drop_kernel, pointers, size, {})


EXPERTS = (2, 8, 64)
EXPERT_RANKS = (1, 4, 16)


def _gating() -> Iterator[Variant]:
    """Return a mixture's gating and its gradient, for few and many experts, low and high ranks,
    each way to weigh.
    """
    for E in EXPERTS:
        pointers = dict.fromkeys(("SUMS", "FRACTION", "PROBABILITY", "Z"), "fp32")
        yield Variant("route_totals", f"E={E}", route_totals_kernel, pointers, totals_blocks(E), {})
    for small in ("fp32", "bf16"):
        for E in EXPERTS:
            for r in EXPERT_RANKS if E == 8 else (4,):
                for given, shared in ((False, False), (True, False), (False, True)):
                    way = "gates" if given else "shared A" if shared else "top-2"
                    flags: dict[str, Any] = {"GIVEN": given, "SHARED": shared, "WITH_SHARE": True}
                    flags |= {"RENORMALIZE": not given} | blocks(E, r)
                    config, options = f"{small} E={E} r={r} {way}", {"num_warps": warps(E), "maxnreg": tables.REGISTERS}
                    vectors = dict.fromkeys(("GATES", "SCALE", "SHARE", "W", "SUMS"), "fp32")
                    forward = vectors | {"PARTS": "fp32", "H": small, "V": small}
                    adds = {"ADDS": True, "K": 0 if given else 2}
                    yield Variant("route", config, route_kernel, forward, flags | adds, options)
                    names = ("DV_PARTS", "PRODUCT_PARTS", "SUM_PARTS", "DP", "DZ", "DB", "DGATES", "DS_SUM")
                    backward = vectors | dict.fromkeys(names, "fp32") | {"H": small, "DH": small}
                    del backward["GATES"]
                    flags |= {"ADDS_PRODUCT": True, "ADDS_SUMS": True, "WITH_DS": True, "BLOCK": PARTS_BLOCK}
                    yield Variant("route_backward", config, route_backward_kernel, backward, flags, options)


def _gated_projections(capability: tuple[int, int]) -> Iterator[Variant]:
    """Return the projection that gates in its epilogue, with a router and with given gates."""
    for rank_class in tables.TABLES["times_small"]:
        for name, (big, small) in TYPES.items():
            if big != small and int(rank_class) > LARGEST_MIXED_RANK:
                continue  # it does not take them
            for given in (False, True):
                plain = _tabled("times_small", int(rank_class), name, big, small, "", capability)
                assert plain is not None
                pointers = dict.fromkeys(("GATES", "SCALE", "SHARE", "W", "SUMS"), "fp32")
                pointers |= {"X": big, "S": small, "H": small, "V": small}
                constants = plain.constants | {"GIVEN": given, "WITH_SHARE": True, "K": 0 if given else 2}
                constants |= {"RENORMALIZE": not given, "BE": LARGEST_EXPERTS}
                for other in ("DROP", "PLANES", "UNIT", "UNIT_S"):
                    del constants[other]
                config = f"{name} R={rank_class} {'gates' if given else 'top-2'}"
                yield Variant("project_route", config, project_route_kernel, pointers, constants, plain.options)


BLOCK_SIZES = (8, 128, 2048, 4096, 8192, 14336, 28672)
"""Features of a reflected block: several blocks' tokens in a tile, a token in a tile, walked in
chunks.
"""


def _reflecting(tile: tables.Tiles) -> tuple[dict[str, Any], dict[str, Any]]:
    size = {"BT": tile.tokens, "BD": tile.columns, "STAGES": tile.stages}
    return size, {"num_warps": tile.warps, "maxnreg": REGISTERS}


def _reflections() -> Iterator[Variant]:
    """ETHER's and ETHER+'s reflections and their gradients, bias and dx included."""
    for name in ("bf16+fp32", "fp32"):
        big, small = TYPES[name]
        itemsize = DTYPES[big].itemsize
        for D in BLOCK_SIZES:
            for v in ({}, {"V": small}):
                config, with_v = f"{name} D={D}" + (" plus" if v else ""), {"WITH_V": bool(v)}
                tile = whole(D, itemsize, itemsize)
                kernel = reflect_chunked_kernel if tile is None else reflect_kernel
                constants, options = _reflecting(CHUNK if tile is None else tile)
                pointers = {"X": big, "U": small, "BIAS": big, "OUT": big, "ALONG": "fp32"} | v
                constants |= with_v | {"WITH_BIAS": True, "WITH_OUT": True, "WITH_ALONG": True}
                yield Variant("reflect", config, kernel, pointers, constants, options)
                tile = whole(D, 2 * itemsize)
                constants, options = _reflecting(chunk_sums(DTYPES[big]) if tile is None else tile)
                pointers, constants = {"DY": big, "X": big, "PARTS": "fp32"}, constants | with_v
                if tile is None:
                    pointers |= {"A": "fp32", "B": "fp32"}
                    constants |= {"LANES": tables.lanes(chunk_sums(DTYPES[big]), DTYPES[big])}
                    yield Variant("reflect_sums", config, reflect_sums_kernel, pointers, constants, options)
                else:
                    pointers |= {"U": small, "DX": big} | v
                    constants |= {"WITH_DX": True}
                    yield Variant("reflect_backward", config, reflect_backward_kernel, pointers, constants, options)
    for v in ({}, {"V": "fp32", "DV": "fp32"}):
        pointers = {"G": "fp32", "U": "fp32", "DU": "fp32"} | v
        yield Variant("across", "plus" if v else "", across_kernel, pointers, {"WITH_V": bool(v), "BD": 2048}, {})
