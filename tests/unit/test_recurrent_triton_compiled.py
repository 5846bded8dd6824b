"""Emitted Triton kernels, compiled for chips that are not here: they fit, use the tensor cores and hardly spill."""

import pytest
import torch
from recurrent_emitted import CELLS, Case

from lightning_accel.recurrent.compiler.emit_triton.ahead_of_time import SHARED_BYTES, compile_kernel, compile_scan
from lightning_accel.recurrent.compiler.emit_triton.triton_code import LaunchPlan
from lightning_accel.recurrent.compiler.trace import CannotScheduleError

ALONE = LaunchPlan(blocks=4, parts=1, columns=128, at_once=True)
SHARED = LaunchPlan(blocks=4, parts=16, columns=32, at_once=True)
SPILLED = {torch.float32: 320, torch.bfloat16: 64, torch.float64: 1600}  # bytes a thread at most; float64 only verifies
WIDE = [("lstm", 512), ("gru", 512), ("layer norm", 512), ("feedback", 256), ("lstm", 64), ("odd", 128)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_all(case, capability, plan):
    code = case.code()
    assert len(code.kernels) == 2
    return [compile_kernel(code, name, capability, plan) for name in code.kernels]


@pytest.mark.parametrize(
    ("plan", "capability"), [(ALONE, 80), (ALONE, 90), (SHARED, 90)], ids=["alone-80", "alone-90", "shared-90"]
)
@pytest.mark.parametrize(("name", "hidden"), WIDE)
def test_kernels_of_wide_cells_fit_the_chip(name, hidden, plan, capability):
    for found in compile_all(Case(name, 8, hidden, steps=2, streams=2), capability, plan):
        assert found.shared_bytes <= SHARED_BYTES[capability]
        assert found.spilled_bytes <= SPILLED[torch.float32]
        assert found.tensor_core_products > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["lstm", "layer norm"])
def test_other_numbers_fit_the_chip(name, dtype):
    for found in compile_all(Case(name, 8, 256, steps=2, streams=2, dtype=dtype), 90, ALONE):
        assert found.shared_bytes <= SHARED_BYTES[90]
        assert found.spilled_bytes <= SPILLED[dtype]


@pytest.mark.parametrize("name", sorted(set(CELLS) - {n for n, _ in WIDE}))
def test_kernels_of_all_other_cells_compile(name):
    for found in compile_all(Case(name, 8, 128, steps=2, streams=2), 90, ALONE):
        assert found.shared_bytes <= SHARED_BYTES[90]
        assert found.spilled_bytes <= SPILLED[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_kernels_of_every_cell_fit_every_chip_in_either_type(name, dtype, capability):
    for found in compile_all(Case(name, 8, 128, steps=2, streams=2, dtype=dtype), capability, ALONE):
        assert found.shared_bytes <= SHARED_BYTES[capability]
        assert found.spilled_bytes <= SPILLED[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", sorted(set(CELLS) - {"rnn"}))
def test_kernels_under_autocast_fit_every_chip(name, capability):
    """Weights in bfloat16, states and sums in float32."""
    for found in compile_all(Case(name, 8, 128, steps=2, streams=2, autocast=torch.bfloat16), capability, ALONE):
        assert found.shared_bytes <= SHARED_BYTES[capability]
        assert found.spilled_bytes <= SPILLED[torch.float32]


def test_torchs_plain_cell_under_autocast_is_left_to_its_loop():
    """Its step is one call to torch, in which a trace sees no casts; what cannot be traced is the plain loop."""
    case = Case("rnn", 8, 128, steps=2, streams=2, autocast=torch.bfloat16)
    with pytest.raises(CannotScheduleError, match="must have the same dtype, but got BFloat16 and Float"):
        case.code()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_scan_fits_the_chip_and_stays_in_registers(dtype, capability, reverse):
    """Its gradient is the same kernel, with time running backwards; 16-bit numbers are scanned as float32."""
    found = compile_scan(dtype, capability, reverse=reverse)
    assert found.shared_bytes <= SHARED_BYTES[capability]
    assert found.spilled_bytes == 0
    assert found.registers <= 128
    assert found.tensor_core_products == 0


def test_weights_that_fit_are_read_once_and_nothing_of_a_later_step_is_fetched_early():
    """A later step's state is not there yet, so the loop over steps must not be pipelined."""
    for found in compile_all(Case("lstm", 8, 64, steps=2, streams=2), 90, ALONE):
        assert found.asynchronous_copies == 0
