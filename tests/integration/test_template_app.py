"""An app in the shape of the widespread Lightning-Hydra template: its callbacks and ours, from wheel and checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_packaging_install import installed, wheel  # noqa: F401  # fixtures

CONFIGS = {
    "train.yaml": """
        # @package _global_
        defaults:
          - _self_
          - data: digits
          - model: net
          - callbacks: default
          - logger: null
          - trainer: default
          - paths: default
          - hydra: default
          - experiment: null
          - optional local: default
        task_name: train
        seed: 1
        ckpt_path: null
        """,
    "callbacks/default.yaml": """
        defaults:
          - model_checkpoint
          - _self_
        model_checkpoint:
          dirpath: ${paths.output_dir}/checkpoints
          monitor: val/accuracy
          mode: max
        """,
    "callbacks/model_checkpoint.yaml": """
        model_checkpoint:
          _target_: lightning.pytorch.callbacks.ModelCheckpoint
          dirpath: null
          monitor: null
          mode: min
        """,
    "data/digits.yaml": "_target_: src.parts.Data",
    "model/net.yaml": """
        _target_: src.parts.Net
        optimizer:
          _target_: torch.optim.Adam
          _partial_: true
          lr: 0.001
        width: 256
        """,
    "trainer/default.yaml": """
        _target_: lightning.pytorch.trainer.Trainer
        default_root_dir: ${paths.output_dir}
        max_epochs: 3
        accelerator: cpu
        limit_val_batches: 2
        enable_progress_bar: false
        """,
    "paths/default.yaml": """
        root_dir: ${oc.env:PROJECT_ROOT}
        log_dir: ${paths.root_dir}/logs/
        output_dir: ${hydra:runtime.output_dir}
        """,
    "hydra/default.yaml": """
        run:
          dir: ${paths.log_dir}/${task_name}/runs/only
        """,
    "experiment/fast.yaml": """
        # @package _global_
        defaults:
          - override /callbacks: [default, rank_quantization, sequential_freezing]
        callbacks:
          rank_quantization:
            when: setup
            method: fixed
            on_loss: keep
            max_overhead: 1.0
            ratio: 3.0
        """,
}
PARTS = """
import lightning as L
import torch
from torch import nn
from torch.nn import functional

from lightning_accel.zoo import Digits as Data

class Net(L.LightningModule):
    def __init__(self, optimizer, width):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["optimizer"])
        self.optimizer = optimizer
        layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.optimizer(params=self.parameters())
"""
TRAIN = """
import os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["PROJECT_ROOT"] = str(ROOT)
sys.path.insert(0, str(ROOT))

import hydra
import lightning as L
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    L.seed_everything(cfg.seed, workers=True)
    data = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = [
        hydra.utils.instantiate(c) for c in cfg.callbacks.values() if isinstance(c, DictConfig) and "_target_" in c
    ]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=False)
    trainer.fit(model=model, datamodule=data, ckpt_path=cfg.get("ckpt_path"))
    best = trainer.checkpoint_callback.best_model_path
    trainer.test(model=model, datamodule=data, ckpt_path=best, verbose=False)
    import lightning_accel
    print("package", lightning_accel.__file__)
    print("callbacks", *(type(c).__name__ for c in callbacks))
    print("layers", *(type(m).__name__ for m in model.net), sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def project(tmp_path):
    for name, text in CONFIGS.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        cut = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        path.write_text("\n".join(line[cut:] for line in lines) + "\n")
    for name, text in {"__init__.py": "", "parts.py": PARTS, "train.py": TRAIN}.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "configs" / "__init__.py").write_text("")
    (tmp_path / ".project-root").write_text("")
    return tmp_path


def train(project, *overrides, path=None):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "src/train.py", *overrides]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:6] in ("packag", "callba", "layers"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["editable", "wheel"])
def test_an_experiment_of_the_app_adds_our_callbacks_to_its_own(project, way, request):
    path = request.getfixturevalue("installed") if way == "wheel" else None
    said = train(project, "experiment=fast", path=path)
    assert Path(said["package"]).is_relative_to(path or Path(__file__).parents[2])
    assert said["callbacks"] == "ModelCheckpoint RankQuantization SequentialFreezing"
    *layers, parameters = said["layers"].split()
    assert layers.count("LowRankLinear") >= 1
    (checkpoint,) = (project / "logs" / "train" / "runs" / "only" / "checkpoints").glob("*.ckpt")
    assert checkpoint.stat().st_size > 0

    line = train(project, "callbacks=[default,l1inf_projection]", "callbacks.l1inf_projection.radius=1.0", path=path)
    assert line["callbacks"] == "ModelCheckpoint L1InfProjection"
    assert int(line["layers"].split()[-1]) > int(parameters)
