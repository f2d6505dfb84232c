"""The binding of the CUDA kernels says of every launcher what the header says: ctypes would not
notice otherwise.
"""

import ctypes
import re
from pathlib import Path

from delora_kernels.backends.cuda import launch
from delora_kernels.backends.cuda import library as cuda_library

HEADER = (Path(__file__).parents[2] / "csrc/delora_kernels.h").read_text(encoding="utf-8")
KINDS = {
    "dk_matrix": launch.Matrix,
    "dk_vector": launch.Vector,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}


def test_every_launcher_has_the_arguments_of_the_header() -> None:
    declared, products = {}, []
    for name, arguments in re.findall(r"DK_API int dk_(\w+)\(([^;]*?)\);", HEADER):
        types = [argument.rsplit(" ", 1)[0].strip() + "*" * argument.count("*") for argument in arguments.split(",")]
        if types[-1].startswith("void*") or "void *stream" in arguments:
            with_tf32 = arguments.split(",")[-2].strip() == "int32_t in_tf32"
            products += [name] if with_tf32 else []
            types = types[: -2 if with_tf32 else -1]
            declared[name] = tuple(ctypes.c_void_p if "*" in kind else KINDS[kind] for kind in types)
    assert declared == launch.LAUNCHERS
    assert sorted(products) == sorted(launch.PRODUCTS)


def test_versions_and_dtypes_of_the_header() -> None:
    assert re.search(r"#define DK_ABI_VERSION (\d+)", HEADER)[1] == str(cuda_library.ABI_VERSION)
    named = dict(re.findall(r"DK_(FLOAT32|FLOAT16|BFLOAT16) = (\d)", HEADER))
    assert {f"torch.{name.lower()}": int(number) for name, number in named.items()} == {
        str(dtype): number for dtype, number in launch.DTYPES.items()
    }
