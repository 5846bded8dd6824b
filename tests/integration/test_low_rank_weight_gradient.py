"""Hooks and gradients of a weight whose layer became low rank: they act as on a dense weight, or say what they are."""

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from test_low_rank_other_ways import Net, assert_equal, fit, low_rank, warned
from torch import nn

from lightning_accel.low_rank import LowRankConv, LowRankLinear, TuckerConv, low_rank_layers


class Plain(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Hooks(Callback):
    """Puts a hook on a weight in epoch 2, takes it off in epoch 3, and keeps the weight of each epoch's start."""

    def __init__(self, put):
        self.put, self.seen = put, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(pl_module.fc2.weight.detach().clone())
        if trainer.current_epoch == 2:
            self.handle = self.put(pl_module.fc2)
        if trainer.current_epoch == 3:
            self.handle.remove()

    def on_train_end(self, trainer, pl_module):
        self.seen.append(pl_module.fc2.weight.detach().clone())


def mask(layer):
    return layer.weight.register_hook(lambda gradient: gradient * 0.0)


def clear(layer):
    def zero(parameter):
        parameter.grad.zero_()

    return layer.weight.register_post_accumulate_grad_hook(zero)


@pytest.mark.parametrize("put", [mask, clear])
def test_gradient_hook_that_is_put_on_after_the_switch_acts_until_its_handle_removes_it(put):
    module, callback, hooks = Plain(), low_rank(), Hooks(put)
    with warned("put fc2 back, dense from now on: a gradient hook was put on its weight"):
        fit(module, callback, hooks, epochs=4)
    assert set(low_rank_layers(module)) == {"fc1"}
    assert torch.equal(hooks.seen[2], hooks.seen[3])
    assert not torch.equal(hooks.seen[3], hooks.seen[4])
    assert "gradient hook" in {layer.name: layer.reason for layer in callback.plan.layers}["fc2"]


class Logs(Callback):
    """Takes the norm of every weight's gradient, as logging callbacks do."""

    def __init__(self):
        self.norms = []

    def on_after_backward(self, trainer, pl_module):
        layers = (pl_module.fc1, pl_module.fc2, pl_module.head)
        self.norms.append([float(layer.weight.grad.norm()) for layer in layers])


def test_norms_of_gradients_can_be_logged_and_change_nothing():
    quiet, logged, logs = Plain(), Plain(), Logs()
    fit(quiet, low_rank())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(logged, low_rank(), logs)
    said = [str(w.message) for w in told if "is not computed where its factors are trained" in str(w.message)]
    assert [layer for text in said for layer in ("`fc1`", "`fc2`") if layer in text] == ["`fc1`", "`fc2`"]
    assert set(low_rank_layers(logged)) == {"fc1", "fc2"}
    assert_equal(quiet, logged)
    assert len(logs.norms) == 18
    assert all(norm > 0.0 for norms in logs.norms for norm in norms)


class Scales(Callback):
    """Changes a weight's gradient by hand."""

    def __init__(self, change):
        self.change, self.seen = change, []

    def on_after_backward(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.seen.append(pl_module.fc2.weight.detach().clone())
            self.change(pl_module.fc2.weight)


def assign(weight):
    weight.grad = torch.zeros(weight.shape)


def drop(weight):
    weight.grad = None


@pytest.mark.parametrize("change", [lambda weight: weight.grad.zero_(), assign])
@pytest.mark.filterwarnings("ignore:the gradient of the dense")
def test_gradient_that_is_changed_by_hand_is_what_the_weight_moves_by(change):
    module, scales = Plain(), Scales(change)
    with warned("put fc2 back, dense from now on: its weight was written into"):
        fit(module, low_rank(), scales)
    assert set(low_rank_layers(module)) == {"fc1"}
    assert all(torch.equal(weight, scales.seen[0]) for weight in [*scales.seen, module.fc2.weight])


def test_gradient_that_is_dropped_by_hand_moves_no_factor():
    module, scales = Plain(), Scales(drop)
    fit(module, low_rank(), scales)
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}
    assert torch.equal(module.fc2.weight, scales.seen[0])


FULL = {
    "linear": (lambda: LowRankLinear(5, 4, 4), (3, 5)),
    "conv": (lambda: LowRankConv(3, 4, (3, 3), 4), (2, 3, 5, 5)),
    "tucker": (lambda: TuckerConv(3, 4, (3, 3), (3, 4)), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.filterwarnings("ignore:the gradient of the dense")
def test_gradient_of_the_weight_is_the_dense_one_where_the_ranks_are_full(kind):
    torch.manual_seed(0)
    make, shape = FULL[kind]
    layer = make().double()
    for factor in layer.factor_names:
        nn.init.normal_(getattr(layer, factor))
    dense = layer.dense_layer(nn.Parameter(layer.weight.detach().clone()))
    x = torch.randn(shape, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)


@pytest.mark.filterwarnings("ignore:the gradient of the dense")
def test_gradient_of_the_weight_is_the_part_of_the_dense_one_that_the_factors_can_follow():
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, 2).double()
    dense = layer.dense_layer(nn.Parameter(layer.weight.detach().clone()))
    x = torch.randn(7, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    u, _ = torch.linalg.qr(layer.factor_out.detach())
    v, _ = torch.linalg.qr(layer.factor_in.detach().mT)
    g = dense.weight.grad
    expected = g - (torch.eye(5, dtype=g.dtype) - u @ u.mT) @ g @ (torch.eye(6, dtype=g.dtype) - v @ v.mT)
    torch.testing.assert_close(layer.weight.grad, expected)
    layer.factor_out.grad = None  # at rest
    torch.testing.assert_close(layer.weight.grad, u @ u.mT @ g)


def test_weight_that_is_handed_out_copies_and_pickles_as_a_plain_tensor():
    layer = LowRankLinear(4, 3, 2)
    layer.requires_grad_(False)
    assert layer.weight.grad is None
    for other in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert type(other) is torch.Tensor
        assert torch.equal(other, layer.weight)


def test_gradient_of_a_weight_that_was_kept_in_the_graph_is_its_own():
    layer = LowRankLinear(4, 3, 2)
    weight = layer.weight
    weight.retain_grad()
    (2.0 * weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 4), 2.0))
