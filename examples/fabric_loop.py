"""Low rank and sequential freezing without a Trainer: a loop of Lightning Fabric.

Run: python examples/fabric_loop.py
"""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional

from lightning_accel.low_rank import (
    FreezingSchedule,
    decompose,
    freeze,
    frozen_parameters,
    low_rank_layers,
    make_plan,
    merge,
    replace_parameters,
)
from lightning_accel.zoo import MLP, Digits


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    data = Digits()
    data.prepare_data()
    data.setup()
    network: nn.Module = MLP(width=256)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    model, fabric_optimizer = fabric.setup(network, optimizer)
    loader = fabric.setup_dataloaders(data.train_dataloader())

    schedule, mine, loss = FreezingSchedule(), frozen_parameters(network), torch.zeros(())
    for epoch in range(6):
        if epoch == 2:  # two epochs dense, for a network that has learned nothing is not worth approximating
            plan = make_plan(network, None, ratio=2.0, method="fixed")  # a batch in place of None: measured ranks
            dense = dict(network.named_parameters())
            decompose(network, plan)
            layers = low_rank_layers(network)
            replace_parameters(optimizer, {dense[f"{name}.weight"]: layer for name, layer in layers.items()})
            mine = frozen_parameters(network)
        if epoch >= 2:
            freeze(network, schedule.frozen_group(epoch=epoch - 2), user_frozen=mine)
        for x, y in loader:
            fabric_optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            fabric.backward(loss)
            fabric_optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {sum(p.numel() for p in network.parameters()):,} parameters")

    merge(network)  # plain dense layers again
    with torch.no_grad():
        right = [(network(x).argmax(1) == y).float().mean().item() for x, y in data.test_dataloader()]
    print(f"test accuracy {sum(right) / len(right):.3f}")


if __name__ == "__main__":
    main()
