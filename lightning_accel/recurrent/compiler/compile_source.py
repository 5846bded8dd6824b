"""Make functions of the text of a schedule, for any number of streams where the text allows it."""

import functools
import io
import math
import tokenize
from typing import Any

import torch
from torch import Tensor

from lightning_accel.machine import large_products
from lightning_accel.machine.c_functions import MachineCode, second_factor
from lightning_accel.machine.toolchain import CannotCompileError, is_for_comparison
from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.emit_python.weight_gradients import layer_norm_sums
from lightning_accel.recurrent.compiler.emit_triton.triton_code import TritonCode
from lightning_accel.recurrent.compiler.rewrite import aten
from lightning_accel.recurrent.compiler.trace import CannotScheduleError
from lightning_accel.recurrent.scan import scan_into


def generalize(one: str, other: str, streams: int, other_streams: int) -> str | None:
    """Turn integers that grew with the batch, in texts written for two numbers of streams, into multiples of ``B``.

    Returns:
        The text for any number of streams; ``None`` if the texts differ otherwise.
    """
    ours, theirs = _tokens(one), _tokens(other)
    if len(ours) != len(theirs):
        return None
    pieces: list[tuple[int, str]] = []
    for a, b in zip(ours, theirs, strict=True):
        text = a.string
        if a.string != b.string:
            if not (a.type == b.type == tokenize.NUMBER and a.string.isdigit() and b.string.isdigit()):
                return None
            multiple, rest = divmod(int(a.string), streams)
            if rest or multiple * other_streams != int(b.string):
                return None
            text = f"({multiple} * B)"
        pieces.append((a.type, text))
    return tokenize.untokenize(pieces)


def compile_source(source: str, constants: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Compile the text and return its functions by name; they share nothing that a call changes."""
    space: dict[str, Any] = {
        "torch": torch,
        "aten": aten,
        **emit_aten_call.fast_functions(),
        "constants": constants,
        "device": device,
        "inf": math.inf,
        "nan": math.nan,
        "scan_into": scan_into,
        "MachineCode": functools.partial(MachineCode, quick=is_for_comparison()),
        "second_factor": second_factor,
        "TritonCode": TritonCode,
        "layer_norm_sums": layer_norm_sums,
        "add_to": _add_to,
        "add_product": _add_product,
    }
    if "MachineCode" in source and device.type == "cpu" and large_products.are_worth_it():
        space["t_mm"], space["t_addmm"] = large_products.multiply, large_products.add_multiplied
        space["add_product"] = large_products.add_product
    try:
        exec(compile(source, "<recurrent schedule>", "exec"), space)
    except CannotCompileError as error:
        raise CannotScheduleError(str(error)) from error
    except SyntaxError as error:
        raise CannotScheduleError(f"the schedule's code does not compile: {error}") from error
    return space


def _add_to(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))
