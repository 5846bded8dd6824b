"""Make functions of the text of a schedule, for any number of streams where the text allows it."""

import io
import math
import tokenize
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.machine_code.c_functions import MachineCode
from lightning_accel.machine_code.toolchain import CannotCompileError
from lightning_accel.recurrent.compiler import emit_aten_call
from lightning_accel.recurrent.compiler.rewrite import aten
from lightning_accel.recurrent.compiler.trace import CannotScheduleError
from lightning_accel.recurrent.compiler.weight_gradients import layer_norm_sums
from lightning_accel.recurrent.scan import scan_into


def generalize(at_three: str, at_five: str) -> str | None:
    """Turn integers that grew with the batch, in texts written for 3 and 5 streams, into multiples of ``B``.

    Returns:
        The text for any number of streams; ``None`` if the texts differ otherwise.
    """
    threes, fives = _tokens(at_three), _tokens(at_five)
    if len(threes) != len(fives):
        return None
    pieces: list[tuple[int, str]] = []
    for three, five in zip(threes, fives, strict=True):
        text = three.string
        if three.string != five.string:
            if not (three.type == five.type == tokenize.NUMBER and three.string.isdigit() and five.string.isdigit()):
                return None
            multiple, rest = divmod(int(three.string), 3)
            if rest or multiple * 5 != int(five.string):
                return None
            text = f"({multiple} * B)"
        pieces.append((three.type, text))
    return tokenize.untokenize(pieces)


def compile_source(source: str, constants: dict[str, Tensor], device: torch.device, streams: int) -> dict[str, Any]:
    """Compile the text for ``B = streams`` and return its functions by name."""
    space: dict[str, Any] = {
        "torch": torch,
        "aten": aten,
        **emit_aten_call.fast_functions(),
        "constants": constants,
        "device": device,
        "B": streams,
        "inf": math.inf,
        "nan": math.nan,
        "scan_into": scan_into,
        "MachineCode": MachineCode,
        "layer_norm_sums": layer_norm_sums,
        "ws_get": _buffer_maker(device),
        "two_buffers": _pair_maker(device),
        "add_to": _add_to,
        "add_product": _add_product,
    }
    try:
        exec(compile(source, "<recurrent schedule>", "exec"), space)
    except CannotCompileError as error:
        raise CannotScheduleError(str(error)) from error
    except SyntaxError as error:
        raise CannotScheduleError(f"the schedule's code does not compile: {error}") from error
    return space


def _buffer_maker(device: torch.device) -> Callable[..., Tensor]:
    def ws_get(ws: dict[str, Any], name: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        found = ws.get(name)
        if found is None:
            found = ws[name] = torch.empty(size, dtype=dtype, device=device)
        return found

    return ws_get


def _pair_maker(device: torch.device) -> Callable[..., list[Tensor]]:
    def two_buffers(
        ws: dict[str, Any], name: str, length: int, size: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        if name not in ws:
            ws[name] = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        pair = ws[name]
        return [pair[k % 2] for k in range(length)]

    return two_buffers


def _add_to(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))
