"""Everything that is written for GPUs, once on the device: first whether it is right, then how fast it is.

Made for minutes with a device: all of it in less than eight minutes. On a CPU it runs to the end as well, with small
sizes and marked as such, so that nothing but the device is new on the day. Without Hydra and a network::

    python -m lightning_accel.bench.suites.gpu FOLDER
"""

import contextlib
import copy
import dataclasses
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_accel.bench.on_gpu.checks import CELLS, checks
from lightning_accel.bench.on_gpu.models import resnet50, vit_small
from lightning_accel.bench.on_gpu.training import asynchronous_rows, overhead_rows
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.low_rank import decompose, make_plan
from lightning_accel.measure import PairedRatio, compare_paired, environment, time_interleaved
from lightning_accel.projection import project_l1inf
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.schedule_choice import Schedule

_BUDGET = 420.0  # seconds; what has not begun by then is left out, so that all ends within eight minutes
_SECONDS = 8.0  # of a case, the first round aside
_RATIO = 2.0  # of a low-rank model's weights
_log = logging.getLogger(__name__)
_ON_CPU = "CPU, small sizes: only shows that it runs"


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows.

    Args:
        quick: Small sizes and few rounds, as always on a CPU.
        device: To run on.
    """
    small = quick or torch.device(device).type != "cuda"
    begin = time.perf_counter()
    for part in (_correct, _low_rank, _recurrent, _projections, _overhead, _asynchronous):
        if time.perf_counter() - begin > _BUDGET:
            _log.warning("%s is left out: %.0f s are over.", part.__name__.strip("_"), _BUDGET)
            continue
        yield from part(device, small=small)


def _correct(device: str, *, small: bool) -> Iterator[BenchRow]:
    for what, error, allowed in checks(device, quick=small):
        share = max(error, 1e-12) / allowed
        ratio = PairedRatio(median=share, low=share, high=share, p_value=1.0, pairs=1)
        yield BenchRow(
            suite="gpu",
            case=f"correct: {what}",
            variant="error",
            baseline="largest allowed",
            ratio=ratio,
            target=1.0,
            better="at most",
            note=f"relative error {error:.1e} of at most {allowed:.0e}",
        )


def _low_rank(device: str, *, small: bool) -> Iterator[BenchRow]:
    cases: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "ResNet-50": (resnet50, (128, 3, 224, 224)),
        "ViT-S/16": (vit_small, (128, 3, 224, 224)),
    }
    if small:
        cases = {
            "ResNet of 2 bottlenecks": (lambda: resnet50((1, 1), 16, 10), (4, 3, 32, 32)),
            "ViT of 1 block": (lambda: vit_small(1, 32), (4, 3, 32, 32)),
        }
    for name, (make, shape) in cases.items():
        torch.manual_seed(0)
        dense = make().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        low = copy.deepcopy(dense)
        decompose(low, make_plan(low, None, ratio=_RATIO, method="snapped"))
        title = f"{name}, bf16, channels_last, batch {shape[0]}"
        models = {"dense": dense, "low rank": low}
        train = _timed({key: _training_step(m, x) for key, m in models.items()}, device, small=small)
        yield _row(f"{title}, training step", train, "dense", device, target=1.5, small=small)
        infer = _timed({key: _inference(m, x) for key, m in models.items()}, device, small=small)
        yield _row(f"{title}, inference", infer, "dense", device, target=1.35, small=small)


def _recurrent(device: str, *, small: bool) -> Iterator[BenchRow]:
    steps, streams, hidden = (16, 4, 32) if small else (512, 32, 512)
    targets: dict[str, tuple[float, float | None]] = {"LSTM": (20.0, 2.0), "LayerNorm LSTM": (20.0, 3.0)}
    targets |= {"peephole LSTM": (20.0, None)}
    x = torch.randn(steps, streams, hidden, device=device)
    native = nn.LSTM(hidden, hidden).to(device)
    for name, (times, against_native) in targets.items():
        torch.manual_seed(0)
        cell = CELLS[name](hidden, hidden).to(device)
        wanted: tuple[Schedule, ...] = ("loop", "compiled", "intra_stream")
        layers: dict[str, nn.Module] = {s: Recurrent(copy.deepcopy(cell), schedule=s) for s in wanted}
        layers["nn.LSTM"] = native
        for layer in layers.values():
            for _ in range(4):  # kernels are compiled and graphs recorded before anything is timed
                _pass(layer, x)()
        seconds = _timed({key: _pass(layer, x) for key, layer in layers.items()}, device, small=small)
        title = f"{name}, H={hidden}, T={steps}, B={streams}, forward and backward"
        yield _row(title, seconds, "loop", device, variant="compiled", target=times, small=small)
        yield _row(title, seconds, "loop", device, variant="intra_stream", target=None, small=small)
        yield _row(title, seconds, "nn.LSTM", device, variant="compiled", target=against_native, small=small, most=True)
    rnn = Recurrent(CELLS["LSTM"](hidden, hidden).to(device), schedule="compiled")
    lengths = torch.linspace(steps, steps // 2, streams).long()
    packed = pack_padded_sequence(x, lengths)
    both = {"padded": _pass(rnn, x), "packed": lambda: rnn(packed)[0].data.sum().backward()}
    for call in both.values():
        call()
    seconds = _timed(both, device, small=small)
    title = f"LSTM, packed sequences, H={hidden}, T={steps}, B={streams}"
    yield _row(title, seconds, "padded", device, variant="packed", target=1.0, small=small, most=True)


def _projections(device: str, *, small: bool) -> Iterator[BenchRow]:
    for shape in ((200, 300),) if small else ((1_000, 10_000), (10_000, 10_000)):
        x = torch.randn(shape, device=device)
        work, copied = x.clone(), torch.empty_like(x)
        radius = 0.1 * float(x.abs().amax(1).sum())
        variants: dict[str, Callable[[], object]] = {"copy_": lambda x=x, copied=copied: copied.copy_(x)}  # type: ignore[misc]
        for dims, name in ((0, "rows"), (1, "columns")):
            variants[f"bi-level {name}"] = lambda work=work, radius=radius, dims=dims: project_l1inf(  # type: ignore[misc]
                work, radius, (dims,), out=work, nonfinite="skip"
            )
        exact = f"exact rows, {shape[0]:,} groups"
        variants[exact] = lambda x=x, radius=radius, copied=copied: project_l1inf(  # type: ignore[misc]
            x, radius, method="exact", out=copied, nonfinite="skip"
        )
        seconds = _timed(variants, device, small=small)
        for name in variants:
            if name != "copy_":
                title = f"projection in place, {shape[0]:,} x {shape[1]:,}"
                target = 1.5 if name.startswith("bi-level") else None
                yield _row(title, seconds, "copy_", device, variant=name, target=target, small=small, most=True)


def _overhead(device: str, *, small: bool) -> Iterator[BenchRow]:
    yield from overhead_rows(device, small=small, note=_marked(device, small=small))


def _asynchronous(device: str, *, small: bool) -> Iterator[BenchRow]:
    yield from asynchronous_rows(device, small=small, note=_marked(device, small=small))


def _marked(device: str, *, small: bool) -> str:
    note = _note(device, small=small)
    return f"{note}; " if note else ""


def _note(device: str, *, small: bool) -> str:
    return _ON_CPU if torch.device(device).type != "cuda" else ("small sizes" if small else "")


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def _inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model = copy.deepcopy(model).eval()

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
            model(x)

    return infer


def _pass(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x)[0].sum().backward()

    return run


def _timed(calls: Mapping[str, Callable[[], object]], device: str, *, small: bool) -> dict[str, list[float]]:
    return time_interleaved(
        calls, rounds=3 if small else 20, warmup=1, device=device, budget_seconds=_SECONDS, min_rounds=3
    )


def _row(
    case: str,
    seconds: Mapping[str, list[float]],
    baseline: str,
    device: str,
    *,
    variant: str = "low rank",
    target: float | None,
    small: bool,
    most: bool = False,
) -> BenchRow:
    pair = (seconds[baseline], seconds[variant])
    return BenchRow(
        suite="gpu",
        case=case,
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(*(pair[::-1] if most else pair)),
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        target=None if small else target,
        better="at most" if most else "at least",
        note=_note(device, small=small),
    )


def main(folder: Path, device: str | None = None) -> int:
    """Run the suite by itself; write ``gpu.json`` and ``gpu.md`` after each row; return 1 if something is not right."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    begin, done, wrong = time.perf_counter(), list[BenchRow](), 0
    head = "| case | against | ratio | target |\n|---|---|---|---|\n"
    for row in rows(quick=False, device=device):
        done.append(row)
        wrong += row.case.startswith("correct") and not row.reached
        print(f"{time.perf_counter() - begin:5.0f} s  {row.case}: {row.variant} {row.ratio.median:.3g} {row.note}")
        plain = {"environment": environment(device), "rows": [dataclasses.asdict(r) for r in done]}
        (folder / "gpu.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        lines = [
            f"| {r.case} | {r.variant} against {r.baseline} | {r.ratio.median:.3g} | {r.better} {r.target or '-'} |\n"
            for r in done
        ]
        with contextlib.suppress(OSError):
            (folder / "gpu.md").write_text(head + "".join(lines) + _missed(done), encoding="utf-8")
    print(_missed(done))
    print(f"{len(done)} rows in {time.perf_counter() - begin:.0f} s, {wrong} not right; {folder}")
    return int(wrong > 0)


def _missed(rows: Iterable[BenchRow]) -> str:
    """Say which rows did not reach their targets."""
    losses = [r for r in rows if r.reached is False]
    if not losses:
        return "\nAll targets that were set are reached.\n"
    lines = [f"- {r.case}: {r.variant} {r.ratio.median:.3g}, {r.better} {r.target:g} wanted\n" for r in losses]
    return "\nMissed:\n\n" + "".join(lines)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench_gpu"), *sys.argv[2:3]))
