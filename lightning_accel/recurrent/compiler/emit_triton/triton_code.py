"""Make emitted Triton text callable: compiled for a CUDA device, or interpreted on the CPU."""

import functools
import hashlib
import importlib.util
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accel.machine.c_functions import dense_rows
from lightning_accel.machine.toolchain import CannotCompileError
from lightning_accel.recurrent.compiler.emit_triton.prelude import PRELUDE

CONSTANTS = ("BLOCK", "PARTS", "COLUMNS", "PHASE", "PRECISION", "STAGES")
"""Arguments of every kernel that are compiled into it, after all others."""

_BLOCK = 16  # streams of a program: as few as tensor cores multiply
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""How every kernel is compiled."""

_STAGES = 3  # tiles of a weight that are on their way at once
_COLUMNS = 128  # of a weight's tile where a program has a block of streams for itself
_SHARED_COLUMNS = 32  # where it shares one


@dataclass(frozen=True)
class LaunchPlan:
    """How a kernel is spread over a device.

    Attributes:
        blocks: Programs that differ in their streams.
        parts: Programs that share a block of streams.
        columns: Of a weight's tile.
        at_once: Whether one launch runs all steps; otherwise each phase of each step is a launch of its own.
    """

    blocks: int
    parts: int
    columns: int
    at_once: bool

    def constants(self, phase: int, precision: str) -> dict[str, Any]:
        """Return what is compiled into a kernel."""
        return {
            "BLOCK": _BLOCK,
            "PARTS": self.parts,
            "COLUMNS": self.columns,
            "PHASE": phase,
            "PRECISION": precision,
            "STAGES": _STAGES,
        }


def plan_launch(streams: int, streamed: int, device: torch.device) -> LaunchPlan:
    """Spread a kernel over a device.

    Args:
        streams: Size of the batch.
        streamed: Columns of the widest weight that is not kept on chip, 0 if all are: a program alone with such a
            weight waits for it at every step, so idle processors share it.
        device: To run on.
    """
    blocks = -(-streams // _BLOCK)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    parts = min(processors // blocks, -(-streamed // _SHARED_COLUMNS))
    if parts < 2:
        return LaunchPlan(blocks, 1, _COLUMNS, at_once=True)
    return LaunchPlan(blocks, parts, _SHARED_COLUMNS, at_once=True)


def triton_refusal() -> str | None:
    """Return why this machine has no Triton; ``None`` if it has."""
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed (extra `gpu`)"


class TritonCode:
    """Emitted kernels, each called as ``run(name, n, B, blocks, constants)``.

    Args:
        source: Functions as `TritonText` writes them.
        kernels: For each the number of phases, columns of its widest streamed weight, and the types of its tensors.

    Raises:
        CannotCompileError: If Triton is not installed.
    """

    def __init__(self, source: str, kernels: dict[str, tuple[int, int, tuple[str, ...]]]) -> None:
        reason = triton_refusal()
        if reason is not None:
            raise CannotCompileError(reason)
        self.source, self.kernels = source, kernels

    def run(self, name: str, steps: int, streams: int, blocks: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        """Call a kernel.

        Args:
            name: Of the kernel.
            steps: Time steps.
            streams: Size of the batch.
            blocks: Values of every time step, in the order of the text.
            constants: Values that no time step changes, after them.
        """
        arguments: list[Any] = []
        for block in blocks:
            arguments += dense_rows(block, of_steps=True)
        for constant in constants:
            arguments += dense_rows(constant, of_steps=False)
        phases, streamed, types = self.kernels[name]
        device = arguments[0].device
        plan = plan_launch(streams, streamed, device)
        arrived = torch.zeros(plan.blocks, dtype=torch.int32, device=device)
        ranges = [(0, steps, -1)]
        if not plan.at_once:
            ranges = [(step, step + 1, phase) for step in range(steps) for phase in range(phases)]
        kernel = functions(self.source, interpreted=device.type == "cpu")[name]
        for begin, end, phase in ranges:
            launch(
                kernel,
                (plan.blocks, plan.parts),
                [steps, streams, begin, end, arrived, *arguments],
                plan.constants(phase, "wide" if device.type == "cpu" else precision_of(types)),
            )


def launch(kernel: Any, grid: tuple[int, int], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
    """Launch a kernel; programs that meet on the way have to run at the same time."""
    device = arguments[4].device
    if device.type == "cpu":
        kernel[grid](*arguments, **constants)
        return
    together = constants.get("PARTS", 1) > 1 and constants["PHASE"] < 0
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants, **OPTIONS, launch_cooperative_grid=together)


def precision_of(types: Sequence[str]) -> str:
    """Return how products of float32 are computed: with TF32 only if the user lets torch do so, else in three parts."""
    if "float64" in types:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.lru_cache(maxsize=256)
def functions(source: str, *, interpreted: bool) -> dict[str, Any]:
    """Return the functions of a text by name, as Triton runs them.

    Triton reads the text of a function from its file; here, from the lines that Python keeps for tracebacks.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    text = f"{PRELUDE}\n\n{source}"
    name = f"<triton {hashlib.sha256(text.encode()).hexdigest()[:16]} {'interpreted' if interpreted else 'compiled'}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"tl": tl, "__name__": "lightning_accel.recurrent.emitted"}
    exec(compile(text, name, "exec"), space)
    wrap: Callable[..., Any] = InterpretedFunction if interpreted else JITFunction
    found = {key: value for key, value in space.items() if callable(value) and hasattr(value, "__code__")}
    # lengths and strides differ from call to call; the number of steps is not to be compiled in
    made = {
        key: wrap(value) if interpreted else wrap(value, do_not_specialize=_varying(key))
        for key, value in found.items()
    }
    space.update(made)
    return made


def _varying(name: str) -> list[str]:
    return ["n", "B", "begin", "end"] if name.startswith("loop_") else []
