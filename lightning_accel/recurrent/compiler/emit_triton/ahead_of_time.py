"""Compile emitted kernels for a chip that is not there, and say what of the chip they would take.

Nothing runs: what a kernel computes, Triton's interpreter shows; that it becomes machine code, fits the chip and keeps
its values in registers is shown here.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_accel.recurrent.compiler.emit_triton.scan_kernel import scan_text
from lightning_accel.recurrent.compiler.emit_triton.triton_code import (
    OPTIONS,
    LaunchPlan,
    TritonCode,
    functions,
    precision_of,
)
from lightning_accel.recurrent.compiler.emit_triton.triton_expression import TYPES

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program can have, by compute capability (CUDA C programming guide, technical specifications).
"""

_POINTERS = {
    "float64": "*fp64",
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "bool": "*i1",
}


@dataclass(frozen=True)
class KernelResources:
    """What a kernel takes of a chip.

    Attributes:
        shared_bytes: Shared memory of a program.
        registers: Of a thread.
        spilled_bytes: What a thread keeps in memory because it has no register left.
        tensor_core_products: Instructions of tensor cores.
        asynchronous_copies: Instructions that fetch what a later pass of a loop reads.
    """

    shared_bytes: int
    registers: int
    spilled_bytes: int
    tensor_core_products: int
    asynchronous_copies: int


def compile_kernel(code: TritonCode, name: str, capability: int, plan: LaunchPlan) -> KernelResources:
    """Compile a kernel.

    Args:
        code: Holds it.
        name: Of the kernel.
        capability: Of the chip, 80 for A100, 90 for H100 and H200.
        plan: How it would be launched.

    Raises:
        Exception: Whatever Triton or the assembler has against it.
    """
    kernel = functions(code.source, interpreted=False)[name]
    types = code.kernels[name][2]
    signature, aligned = _signature(kernel.arg_names, types)
    constants = plan.constants(-1, precision_of(types))
    return _resources(kernel, signature, aligned, constants, capability=capability, cooperative=plan.parts > 1)


def compile_scan(dtype: torch.dtype, capability: int, *, reverse: bool) -> KernelResources:
    """Compile the kernel of the linear recurrence for numbers of a type; see `compile_kernel`."""
    kernel = functions(scan_text(TYPES[dtype]), interpreted=False)["loop_scan"]
    pointer = _POINTERS[str(dtype).removeprefix("torch.")]
    signature = {a: pointer if a.startswith("p_") else "i64" if a.startswith("t_") else "i32" for a in kernel.arg_names}
    del signature["REVERSE"]
    aligned = [a for a in signature if a[:2] in ("p_", "t_")]
    return _resources(kernel, signature, aligned, {"REVERSE": reverse}, capability=capability, cooperative=False)


def _resources(
    kernel: Any,
    signature: dict[str, str],
    aligned: list[str],
    constants: dict[str, Any],
    *,
    capability: int,
    cooperative: bool,
) -> KernelResources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned},
    )
    options = {**OPTIONS, "launch_cooperative_grid": cooperative}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembly = compiled.asm["ptx"]
    registers, spilled = _registers(compiled.asm["cubin"])
    return KernelResources(
        compiled.metadata.shared,
        registers,
        spilled,
        len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", assembly)),
        len(re.findall(r"\bcp\.async\.(?:ca|cg)\b", assembly)),
    )


def _signature(names: list[str], types: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Return the types of all arguments, and those that are multiples of 16, as torch's tensors of common sizes are."""
    signature = dict.fromkeys(("n", "B", "begin", "end"), "i32") | {"p_arrived": "*i32"}
    tensors = [a for a in names if a.startswith("p_") and a != "p_arrived"]
    for pointer, kind in zip(tensors, types, strict=True):
        tensor = pointer.removeprefix("p_")
        signature |= {pointer: _POINTERS[kind], f"t_{tensor}": "i64", f"b_{tensor}": "i32"}
    return signature, [a for a in signature if a[:2] in ("p_", "t_", "b_")]


def _registers(binary: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of a thread, as the vendor's tool reads them from machine code."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", report)
    if found is None:
        raise ValueError(f"`cuobjdump` reported no registers: {report!r}.")
    return int(found[1]), int(found[2])
