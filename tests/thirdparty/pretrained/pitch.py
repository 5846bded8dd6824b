"""torchcrepe's pretrained pitch network, made low rank at ratio 2 and fine-tuned on synthesized tones, against dense.

    python tests/thirdparty/table.py --out third_party pitch

The network comes with the package: six convolutions up to 1,024 channels wide and a classifier of 360 pitches. Tones
are harmonics of a known pitch in noise. Both arms start from the shipped weights and see the same batches, each at a
rate that suits it; then accuracies on tones that neither has seen, training steps and inference are compared, frame by
frame and in turns.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import time
import types
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import RankQuantization
from lightning_accel.low_rank import low_rank_layers
from lightning_accel.measure import available_cores, compare_paired, environment, time_interleaved

INSTALL = (("--no-deps", "torchcrepe"), ("librosa", "resampy"))
sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))  # torchcrepe reads audio files by it, only
torchcrepe = importlib.import_module("torchcrepe")
FRAME, RATE = torchcrepe.WINDOW_SIZE, torchcrepe.SAMPLE_RATE
LOWEST_CENTS = 1997.3794084376191  # of the first pitch, over 10 Hz
TOLERANCE_CENTS = 50.0
MARGIN = 0.005  # of accuracy
WARMUP_STEPS = 10


def tones(count: int, seed: int) -> TensorDataset:
    """Make frames of harmonic tones in noise, as torchcrepe normalizes them, with their pitches in cents over 10 Hz."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    pitch = 60.0 * torch.exp(uniform(0.0, math.log(1500.0 / 60.0), count))
    moments = torch.arange(FRAME) / RATE
    frames = torch.zeros(count, FRAME)
    for harmonic in range(1, 9):
        is_heard = (harmonic * pitch < RATE / 2).float()
        loudness = uniform(0.2, 1.0, count) / harmonic * is_heard
        phase = uniform(0.0, 2 * math.pi, count)
        frames += loudness[:, None] * torch.sin(2 * math.pi * harmonic * pitch[:, None] * moments + phase[:, None])
    noise = torch.randn(count, FRAME, generator=random) * frames.std(dim=1, keepdim=True)
    frames = frames + noise * 10 ** (-uniform(-6.0, 12.0, count, 1) / 20)  # decibels of tone over noise
    frames = (frames - frames.mean(dim=1, keepdim=True)) / frames.std(dim=1, keepdim=True)
    return TensorDataset(frames, 1200 * torch.log2(pitch / 10.0))


class Pitch(pl.LightningModule):
    """The shipped network; its batch norms keep the statistics of the data that it was trained on."""

    def __init__(self, capacity: str, lr: float) -> None:
        super().__init__()
        self.network, self.lr = torchcrepe.Crepe(capacity), lr
        weights = Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        cents = LOWEST_CENTS + torchcrepe.CENTS_PER_BIN * torch.arange(torchcrepe.PITCH_BINS)
        self.register_buffer("cents", cents, persistent=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.network(frames)

    def train(self, mode: bool = True) -> "Pitch":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def on_fit_start(self) -> None:
        self.train()  # Lightning keeps the modes that it finds

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        frames, pitch = batch
        wanted = torch.exp(-((self.cents - pitch[:, None]) ** 2) / (2 * 25.0**2))  # as CREPE was trained
        return F.binary_cross_entropy(self(frames), wanted)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)
        steps = self.trainer.estimated_stepping_batches

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @torch.no_grad()
    def is_right(self, data: TensorDataset, batch_size: int = 64) -> torch.Tensor:
        """Return for each frame whether the likeliest pitch is within a quarter tone."""
        self.eval()
        found = [self.cents[self(frames).argmax(dim=1)] for frames, _ in DataLoader(data, batch_size=batch_size)]
        return (torch.cat(found) - data.tensors[1]).abs() < TOLERANCE_CENTS


def fine_tune(model: Pitch, data: TensorDataset, callbacks: list[pl.Callback], batch_size: int) -> float:
    """Train for one epoch; return the seconds."""
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **dict.fromkeys(off, False))
    pl.seed_everything(0, verbose=False)
    begin = time.perf_counter()
    trainer.fit(model, DataLoader(data, batch_size=batch_size, shuffle=True))
    return time.perf_counter() - begin


def steps(model: Pitch, batch: list[torch.Tensor]):
    """Return what makes one training step, and one inference."""
    optimizer = torch.optim.Adam(model.parameters(), lr=model.lr, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> None:
        model.eval()
        model(batch[0])

    return step, infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--capacity", choices=("full", "tiny"), default="full")
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--method", choices=("snapped", "knapsack", "fixed"), default="fixed", help="of choosing ranks")
    parser.add_argument("--weighting", choices=("none", "activation"), default="none", help="of the decomposition")
    parser.add_argument("--train", type=int, default=1920, help="frames")
    parser.add_argument("--test", type=int, default=4000, help="frames")
    parser.add_argument("--batch", type=int, default=8, help="frames")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the low-rank network")
    parser.add_argument("--dense-lr", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=8, help="of steps and inferences that are timed in turns")
    parser.add_argument("--threads", type=int, default=available_cores())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, test = tones(given.train, 0), tones(given.test, 1)

    dense, low_rank = Pitch(given.capacity, given.dense_lr), Pitch(given.capacity, given.lr)
    shipped = dense.is_right(TensorDataset(*(tensor[: given.test // 4] for tensor in test.tensors)))
    quantization = RankQuantization(
        given.ratio, method=given.method, weighting=given.weighting, when="setup", on_loss="keep", min_energy=0.0
    )
    seconds = {
        "low rank": fine_tune(low_rank, train, [quantization], given.batch),
        "dense": fine_tune(dense, train, [], given.batch),
    }
    right = {"dense": dense.is_right(test), "low rank": low_rank.is_right(test)}
    difference = float(right["low rank"].float().mean() - right["dense"].float().mean())
    random = torch.Generator().manual_seed(0)
    gaps = right["low rank"].float() - right["dense"].float()
    draws = torch.randint(len(gaps), (2000, len(gaps)), generator=random)
    low, high = gaps[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()

    arms = {"dense": dense, "low rank": low_rank}
    batch = [tensor[: given.batch] for tensor in train.tensors]
    works = {name: steps(model, batch) for name, model in arms.items()}
    timed = [time_interleaved({n: pair[i] for n, pair in works.items()}, rounds=given.rounds) for i in (0, 1)]
    layers = {name: list(layer.ranks) for name, layer in low_rank_layers(low_rank).items()}
    result = {
        "package": f"torchcrepe {metadata.version('torchcrepe')}",
        "environment": environment(),
        "settings": {key: value for key, value in vars(given).items() if key != "out"},
        "ranks": layers,
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in arms.items()},
        "accuracy": {"shipped": float(shipped.float().mean())}
        | {name: float(hits.float().mean()) for name, hits in right.items()},
        "difference": {"mean": difference, "low": low, "high": high, "margin": MARGIN},
        "fit_seconds": seconds,
        "step": asdict(compare_paired(timed[0]["dense"], timed[0]["low rank"])) | {"seconds": timed[0]},
        "inference": asdict(compare_paired(timed[1]["dense"], timed[1]["low rank"])) | {"seconds": timed[1]},
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(page(result) + "\n")
    print(page(result))


def page(result: dict) -> str:
    """Return the table."""

    def ratio(part: dict) -> str:
        return f"{part['median']:.2f} [{part['low']:.2f}, {part['high']:.2f}]"

    def median(part: dict, arm: str) -> str:
        return f"{1e3 * statistics.median(part['seconds'][arm]):.0f} ms"

    accuracy, gap, settings = result["accuracy"], result["difference"], result["settings"]
    size = {name: count / 1e6 for name, count in result["parameters"].items()}
    verdict = "within" if gap["low"] >= -gap["margin"] else "not shown to be within"
    lines = [
        f"{result['package']}: {settings['capacity']} network, pretrained, decomposed at ratio {settings['ratio']:g} "
        f"(ranks {settings['method']}, weighting {settings['weighting']}), both fine-tuned on "
        f"{settings['train']} frames, tested on {settings['test']} others; "
        f"rates {settings['dense_lr']:g} (dense) and {settings['lr']:g}",
        "",
        "| | dense, fine-tuned | low rank, fine-tuned | ratio or difference [95 % interval] |",
        "|---|---:|---:|---:|",
        f"| pitch accuracy (shipped weights: {accuracy['shipped']:.4f}) | {accuracy['dense']:.4f} | "
        f"{accuracy['low rank']:.4f} | {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}], {verdict} "
        f"{100 * gap['margin']:g} points |",
        f"| training step, {settings['batch']} frames | {median(result['step'], 'dense')} | "
        f"{median(result['step'], 'low rank')} | {ratio(result['step'])} |",
        f"| inference, {settings['batch']} frames | {median(result['inference'], 'dense')} | "
        f"{median(result['inference'], 'low rank')} | {ratio(result['inference'])} |",
        f"| parameters | {size['dense']:.2f} M | {size['low rank']:.2f} M | {size['dense'] / size['low rank']:.2f} |",
        "",
        "Ranks: " + ", ".join(f"`{name}` {ranks}" for name, ranks in result["ranks"].items()) + ".",
        "Measured on: " + ", ".join(f"{key} {value}" for key, value in result["environment"].items()) + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
