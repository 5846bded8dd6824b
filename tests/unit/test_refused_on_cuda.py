"""What the cards say is refused on CUDA is what the code says, word for word, as far as it can be asked on a CPU."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from recurrent_emitted import CELLS, Case
from torch import nn

from lightning_accel import AsyncSGDStrategy, L1InfProjection
from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.optimizer_side import refuse_elsewhere
from lightning_accel.async_sgd.shared_memory.spawn import resolve_start_method
from lightning_accel.callbacks.layer_exchange.structure import refuse_sharded, refuse_sharded_states
from lightning_accel.low_rank.factors.pointwise import multiplies
from lightning_accel.low_rank.rank_search.candidates import rank_unit
from lightning_accel.projection import project_l1inf
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import Target
from lightning_accel.recurrent.compiler.emit_triton.scan_kernel import scan_refusal
from lightning_accel.recurrent.compiler.executor import StepSchedule
from lightning_accel.recurrent.compiler.trace import TensorSpec
from lightning_accel.recurrent.packed.run_padded import packed_refusal
from lightning_accel.strategies.engines import refuse_device_elsewhere

ROOT = Path(__file__).parents[2] / "lightning_accel"


def said(card):
    """Return the reasons in a card's table, without marks."""
    section = (ROOT / card / "README.md").read_text().split("\n## On CUDA")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    reasons = [plain(row[-1]) for row in rows]
    return [reason for reason in reasons if reason]


def plain(text):
    return re.sub(r"\s+", " ", text.replace("`", "").strip())


def raised(call):
    with pytest.raises(Exception, match=r".") as caught:
        call()
    return str(caught.value)


class FSDPStrategy:
    """A strategy of that name."""


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """An optimizer of that name."""


class Sorting(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.mix = nn.Linear(features, hidden)

    def forward(self, x, state):
        h = torch.softmax(self.mix(x) + state[0], -1)
        return h, (h,)


def without_triton(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        return raised(lambda: Case("lstm", 3, 4, steps=2, streams=2))


def softmax(monkeypatch):
    monkeypatch.setitem(CELLS, "sorting", Sorting)
    return raised(lambda: Case("sorting", 4, 4, steps=2, streams=2).code())


def elsewhere(monkeypatch):
    case = Case("lstm", 3, 4, steps=2, streams=2)
    specs = [[TensorSpec.of(t.to("meta")) for t in part] for part in ([case.xs[0][0]], case.states)]
    return raised(lambda: StepSchedule(case.cell.to("meta"), case.step, *specs, compiled=True))


def late(monkeypatch):
    monkeypatch.setattr(placement, "is_far", lambda x: True)
    layer = nn.Linear(2, 2)
    layer.weight.data.fill_(torch.nan)
    projector = Projector([Target("weight", layer, "weight", (0,), (2, 2))], Ball(radius=1.0))
    projector.project(1)
    return raised(projector.check_finite)


def replicas(monkeypatch):
    devices = [torch.device("cuda", i) for i in range(2)]
    return raised(AsyncSGDStrategy(devices_per_replica=2, parallel_devices=devices).check_devices)


def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    strategy = AsyncSGDStrategy(optimizer_device="cuda:0")
    Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    return raised(strategy.check_devices)


def sgd(kind=torch.optim.SGD):
    return [kind([nn.Parameter(torch.ones(1))], lr=0.1)]


class Own(torch.optim.SGD):
    """Not torch's own."""


REASONS = {
    "recurrent": [
        without_triton,
        softmax,
        elsewhere,
        lambda _: packed_refusal("cuda", torch.float32, autocast=False),
        lambda _: scan_refusal("cuda", torch.complex64, dense=True),
        lambda _: scan_refusal("cuda", torch.float32, dense=False),
    ],
    "projection": [
        lambda _: raised(lambda: L1InfProjection()._run.refuse_strategies(FSDPStrategy())),
        late,
        lambda _: raised(lambda: project_l1inf(torch.tensor([[torch.nan]]), 1.0)),
    ],
    "low_rank": [
        lambda _: raised(lambda: refuse_sharded(FSDPStrategy(), "RankQuantization")),
        lambda _: raised(lambda: refuse_sharded_states(sgd(ZeroRedundancyOptimizer), "SequentialFreezing")),
    ],
    "async_sgd": [
        lambda _: raised(lambda: resolve_start_method("fork", on_cpu=False)),
        replicas,
        lambda _: raised(lambda: AsyncSGDStrategy(workers_per_device=2, devices_per_replica=2)),
        no_device,
        lambda _: raised(lambda: Settings(optimizer_device="mps")),
        lambda _: raised(lambda: refuse_elsewhere(sgd(Own), "cuda")),
        lambda _: raised(lambda: refuse_device_elsewhere("ray", "cuda")),
    ],
}


@pytest.mark.parametrize("card", REASONS)
def test_a_card_gives_the_reasons_that_the_code_gives(card, monkeypatch):
    given = [plain(reason(monkeypatch)) for reason in REASONS[card]]
    reasons = said(card)
    assert len(reasons) == len(given)
    for reason, from_code in zip(reasons, given, strict=True):
        assert reason in from_code


def test_what_is_not_refused_is_none():
    assert packed_refusal("cpu", torch.float32, autocast=False) is None
    assert packed_refusal("cpu", torch.float32, autocast=True) == "autocast is on"
    assert (
        packed_refusal("cpu", torch.float16, autocast=False)
        == "padded forms are for float32 and float64, not torch.float16"
    )
    assert scan_refusal("cuda", torch.float32, dense=True) is None
    assert scan_refusal("cpu", torch.float32, dense=True) == "there is no kernel for cpu"
    refuse_device_elsewhere("shared_memory", "cuda")
    refuse_elsewhere(sgd(), "cuda")


def test_what_low_rank_layers_do_in_another_way_on_cuda():
    assert (rank_unit("cuda"), rank_unit("cpu")) == (8, 1)
    assert multiplies(torch.empty(1, 2, 3, 3))
    assert not multiplies(torch.empty(1, 2, 3, 3, device="meta"))
