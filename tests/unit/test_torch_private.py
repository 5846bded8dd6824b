"""Canaries: every private attribute of torch that we touch still means what it meant."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel import torch_private


def test_transforms_are_seen_while_they_run():
    seen = []
    look = lambda x: seen.append(torch_private.active_transform()) or x.sum()  # noqa: E731
    assert torch_private.active_transform() is None
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    assert seen == ["a transform of torch.func"] * 2
    with forward_ad.dual_level():
        assert torch_private.active_transform() == "forward-mode differentiation"
    assert torch_private.active_transform() is None


def test_modes_are_seen_by_name():
    class Watching(TorchFunctionMode):
        pass

    assert torch_private.active_mode() is None
    with Watching():
        assert torch_private.active_mode() == "Watching"
    with FlopCounterMode(display=False):
        assert "FlopCounter" in torch_private.active_mode()
    assert torch_private.active_mode() is None


def test_hooks_on_saved_tensors_are_seen():
    assert not torch_private.saved_tensor_hooks_are_active()
    with torch.autograd.graph.save_on_cpu():
        assert torch_private.saved_tensor_hooks_are_active()


def test_a_backward_tells_whether_its_graph_is_kept():
    seen = []

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(torch_private.backward_keeps_graph())
            return g

    total = Looking.apply(torch.ones(2, requires_grad=True)).sum()
    total.backward(retain_graph=True)
    total.backward()
    assert seen == [True, False]


def test_hooks_of_one_module_and_of_all():
    layer = nn.Linear(2, 2)
    assert torch_private.hooks_of(layer) is None
    handles = [layer.register_forward_pre_hook(lambda module, args: None)]
    assert torch_private.hooks_of(layer) == "forward pre hooks"
    handles.append(layer.register_forward_hook(lambda module, args, y: None, with_kwargs=False))
    assert torch_private.hooks_of(layer) == "forward hooks"
    for handle in handles:
        handle.remove()
    handle = layer.register_full_backward_hook(lambda module, given, wanted: None)
    assert torch_private.hooks_of(layer) == "backward hooks"
    handle.remove()
    assert torch_private.hooks_of(layer) is None
    assert torch_private.global_hooks() is None
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    assert torch_private.global_hooks() == "global forward hooks"
    handle.remove()


def test_attributes_of_a_module_are_the_users_own():
    layer = nn.Linear(2, 3)
    layer.scale = 0.5
    assert torch_private.own_attributes(layer) == {"in_features": 2, "out_features": 3, "scale": 0.5}


def test_a_backward_tells_which_one_it_is_and_what_it_reaches():
    seen = []
    mark = torch.zeros((), requires_grad=True)
    node = torch.autograd.graph.get_gradient_edge(mark).node

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, mark, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append((torch_private.running_backward(), torch_private.backward_reaches(node)))
            return None, g

    x = torch.ones(2, requires_grad=True)
    assert torch_private.running_backward() == -1
    Looking.apply(mark, x).sum().backward()
    torch.autograd.grad(Looking.apply(mark, x).sum(), x)
    assert [reached for _, reached in seen] == [True, False]
    assert len({number for number, _ in seen} - {-1}) == 2
    assert type(Looking.apply(mark, x).grad_fn) is torch_private.node_class(Looking)


def test_slices_tell_where_they_were_taken_from():
    x = torch.ones(3, 4, 5, requires_grad=True) * 1
    edge = (x.grad_fn, 0)
    assert torch_private.part_of(x[:, -1]) == (edge, 1, 3, 4)
    assert torch_private.part_of(x.select(-3, 2)) == (edge, 0, 2, 3)
    assert torch_private.part_of(x.unbind(1)[2]) == (edge, 1, 2, 4)
    assert torch_private.part_of(list(x)[1]) == (edge, 0, 1, 3)
    assert torch_private.part_of(x[1:2]) is None
    assert torch_private.part_of(torch.ones(2)) is None


def test_jit_tracing_is_seen():
    seen = []
    assert not torch_private.is_jit_tracing()
    torch.jit.trace(lambda x: (seen.append(torch_private.is_jit_tracing()), x + 1)[1], torch.ones(1), check_trace=False)
    assert seen == [True]
