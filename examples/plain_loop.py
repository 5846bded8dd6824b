"""Projection and shrinking without Lightning: a plain loop of torch.

Run: python examples/plain_loop.py
"""

import torch
from torch import nn
from torch.nn import functional

from lightning_accel.projection import project_l1inf, radius_for_sparsity, shrink
from lightning_accel.zoo import Digits


def main() -> None:
    torch.manual_seed(0)
    data = Digits()
    data.prepare_data()
    data.setup()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    hidden = model[1]
    assert isinstance(hidden, nn.Linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    keep, loss = torch.ones(256, 1), torch.zeros(())
    for epoch, sparsity in enumerate([0.0, 0.0, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75]):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]  # so it stands in torch
            optimizer.step()
            with torch.no_grad():  # what the projection has cleared stays so, the rest trains on freely
                hidden.weight.mul_(keep)
        weight = hidden.weight.detach()  # a row is what one hidden unit reads
        radius = radius_for_sparsity(weight, sparsity)
        keep = project_l1inf(weight, radius).any(1, keepdim=True).float()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {int(keep.sum())} of 256 hidden units stay")
    with torch.no_grad():
        hidden.weight.mul_(keep)

    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float().mean().item() for x, y in data.test_dataloader()]
    small = shrink(model.eval(), next(iter(data.test_dataloader()))[0])
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, small.model)]
    print(f"test accuracy {sum(right) / len(right):.3f}; parameters {parameters[0]:,} -> {parameters[1]:,}")


if __name__ == "__main__":
    main()
