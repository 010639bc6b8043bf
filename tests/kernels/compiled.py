"""Compiles Triton's kernels for GPUs that are not there, and says what the machine code is like.

    python tests/kernels/compiled.py CUBINS

In a process of its own, since Triton compiles nothing in one that interprets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

OF_ROWS = {"sums": "triton_softmax", "gradient": "triton_softmax", "backward": "triton_norm"}
OF_SELECTION = {"count": "triton_selection", "write": "triton_selection"}
KEY_BITS = {"bf16": 15, "fp32": 32, "i64": 64}
UNALIGNED = ("level", "first", "second", "born")
SCALARS = ("of_label", "of_each")  # of the softmax
HOPPER, AMPERE = 90, 80  # compute capability, times 10


def main(place: Path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(place)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    print(json.dumps([{**case, **compiled(place, number, **case)} for number,
                      case in enumerate(cases())]))


def cases() -> list[dict]:
    """Everything that may be taken in bf16 on Hopper; what is taken in bf16 on Ampere and in fp32
    on Hopper."""
    from megatron_spdf.kernels import program_shapes
    from megatron_spdf.kernels.program_shapes import CANDIDATES, NORM, SELECTION, SOFTMAX, WARPS

    rows = {**SOFTMAX, "backward": (2048, 2048 // NORM.entries_of_a_warp)}
    found = [{"kernel": kernel, "target": target, "dtype": dtype, "shape": shape,
              "options": {"num_warps": shape[1]}} for kernel, shape in rows.items()
             for target, dtype in ((HOPPER, "bf16"), (AMPERE, "bf16"), (HOPPER, "fp32"))]
    for kernel, warps in WARPS.items():
        found += [{"kernel": kernel, "target": target, "dtype": dtype, "options": {"num_warps": n}}
                  for target, dtype, numbers in ((HOPPER, "bf16", warps),
                                                 (AMPERE, "bf16", warps[:1]),
                                                 (HOPPER, "fp32", warps[:1])) for n in numbers]
    found += [{"kernel": kernel, "target": target, "dtype": dtype, "shape": shape,
               "options": {"num_warps": shape.warps}} for kernel in OF_SELECTION
              for target, dtype, size in ((HOPPER, "bf16", 2), (AMPERE, "bf16", 2),
                                          (HOPPER, "fp32", 4), (HOPPER, "i64", 8))
              for shape in SELECTION[size][: 2 if dtype == "bf16" else 1]]
    for (kernel, size), shapes in CANDIDATES.items():
        fp32 = [shapes[0]._replace(depth=32)] if size == 64 else []
        found += [{"kernel": kernel, "size": size, "target": target, "dtype": dtype, "shape": shape,
                   "options": {"num_warps": shape.warps, "num_stages": shape.stages}}
                  for target, dtype, some in (
                      (HOPPER, "bf16", shapes + program_shapes.HOPPER.get((kernel, size), [])),
                      (AMPERE, "bf16", shapes[:1]), (HOPPER, "fp32", fp32))
                  for shape in some]
    return found


def compiled(place: Path, number: int, kernel: str, target: int, dtype: str, options: dict,
             size: int = 0, shape: tuple | None = None) -> dict:
    """Registers and bytes of the stack of a thread, bytes of shared memory of a program,
    instructions by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    blocks = block_shapes(kernel, size, shape) if size else {}
    name = (OF_ROWS | OF_SELECTION).get(
        kernel, "triton_blocks" if blocks else "triton_tiles" if size else "triton_compact")
    function = getattr(import_module(f"megatron_spdf.kernels.{name}"), f"_{kernel}")
    fixed = constants(kernel, size, shape, KEY_BITS[dtype])
    kinds = {name: "constexpr" if name in fixed else f"tensordesc<{dtype}{blocks[name]}>"
             if name in blocks else kind(kernel, name, dtype) for name in function.arg_names}
    if blocks and kernel == "input_gradient":
        kinds["columns"] = "i32"  # their number
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(function.arg_names)
               if name not in (*fixed, *blocks, "real", *SCALARS, *UNALIGNED)}
    binary = triton.compile(ASTSource(function, kinds, constexprs=fixed, attrs=aligned),
                            target=GPUTarget("cuda", target, 32), options=options)
    file = place / f"{number}.cubin"
    file.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage, code = (subprocess.run([tool, f"--dump-{what}", file], capture_output=True, text=True,
                                  check=True).stdout
                   for what in ("resource-usage", "sass"))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][\w.]*)", code,
                       re.MULTILINE)
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared": binary.metadata.shared,
            "instructions": {name: names.count(name) for name in sorted(set(names) - {"NOP"})}}


def block_shapes(kernel: str, size: int, shape: tuple) -> dict[str, list[int]]:
    """Of the matrices that are moved in blocks, by argument."""
    width, depth, *_, stays = shape
    if not stays:
        return {}
    return {"forward": {"x": [width, depth], "values": [size, depth], "y": [width, size]},
            "input_gradient": {"gradient": [width, depth], "values": [depth, size],
                               "out": [width, size]}}[kernel]


def constants(kernel: str, size: int, shape: tuple | None, key_bits: int) -> dict:
    """As for the weights of GPT-3 XL; a column's stride of one is a constant to Triton, too."""
    from megatron_spdf.kernels.mask import SPAN

    if kernel in OF_SELECTION:
        return {"KEY_BITS": key_bits, "RANKS": 2, "LEVELS": -(-key_bits // shape.digit),
                "DIGIT": shape.digit, "BLOCK": shape.entries}
    if kernel in OF_ROWS:
        return {"BLOCK": shape[0]} | {"sums": {"MEAN": True}, "backward": {"ADDS": True}}.get(
            kernel, {})
    if not size:
        return {"SPAN": SPAN, "stride_column": 1} | ({"ADDS": True} if kernel == "compress" else {})
    width, depth, _, _, group, _ = shape
    return {"SLOTS": 2048 // size // 4, "PER_ROW": 2048 // size // 4, "SIZE": size,
            "DEPTH": depth} | {
        "forward": {"TOKENS": width, "BIASED": True},
                "input_gradient": {"TOKENS": width, "IN_COLUMN": 2048 // size // 4},
        "weight_gradient": {"ROWS": width, "GROUP": group, "ADDS": True}}[kernel]


def kind(kernel: str, name: str, dtype: str) -> str:
    """The type of an argument."""
    if name in SCALARS:
        return "fp32"
    if name in ("of_blocks", "born"):
        return "*i32"
    if name in ("found", "tops", "totals", "shares", "means", "rstds", "parts"):
        return "*fp32"
    if name == "labels":
        return "*i64"
    if name in ("bits", "others", "counts"):
        return "*i32" if name == "counts" else "*u8"
    if name in ("columns", "entries") and kernel not in ("expand", "compress", *OF_ROWS,
                                                         *OF_SELECTION):
        return "*i32"
    if name == "out" and kernel in ("compress", "weight_gradient"):
        return "*fp32"  # the gradient's buffer
    numbers = ("x", "of_x", "y", "bias", "values", "weight", "gradient", "residual", "dense",
               "logits", "out")
    return f"*{dtype}" if name in numbers else "i32"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
