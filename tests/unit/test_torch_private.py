"""Canaries: every private attribute of torch that we touch still means what it meant."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
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


def test_all_that_can_be_around_a_call_is_seen():
    assert torch_private.nothing_is_around()
    x = torch.ones(2, requires_grad=True)
    seen = []
    look = lambda *_: seen.append(torch_private.nothing_is_around())  # noqa: E731
    around = (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.forward_ad.dual_level(),
        torch.utils.flop_counter.FlopCounterMode(display=False),
        torch.device("cpu"),
    )
    for context in around:
        with context:
            look()
    torch.func.vmap(lambda v: (look(), v)[1])(x)
    torch.jit.trace(lambda v: (look(), v + 1)[1], torch.ones(1), check_trace=False)
    y = x * 2
    y.register_hook(look)
    y.sum().backward()
    assert seen == [False] * (len(around) + 3)
    assert torch_private.nothing_is_around()


def test_a_function_applied_outside_of_transforms_leaves_the_same_node():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = torch.ones(2, requires_grad=True)
    y = torch_private.apply_outside_of_transforms(Twice)(x)
    assert type(y.grad_fn) is torch_private.node_class(Twice)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2.0, 2.0]


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


def test_nothing_comes_into_a_trace_while_it_is_paused():
    def function(x):
        with torch_private.not_traced():
            x.view(torch.uint8).sum()
        return x + 1

    traced = torch.jit.trace(function, torch.ones(1))
    assert "aten::sum" not in str(traced.graph)
    assert "aten::add" in str(traced.graph)


def test_gradient_hooks_move_with_the_handles_that_remove_them():
    source, target, seen = torch.ones(2, requires_grad=True) * 1.0, nn.Parameter(torch.ones(2)), []
    handle = source.register_hook(lambda _: seen.append("gradient"))
    torch_private.move_gradient_hooks(source, target, {0: lambda _: seen.append("after")})
    target.sum().backward()
    assert seen == ["gradient", "after"]
    handle.remove()
    target.sum().backward()
    assert seen == ["gradient", "after", "after"]


def test_subclass_of_tensor_without_torch_function_computes_plainly_and_its_gradient_can_be_set():
    class Own(torch.Tensor):
        __torch_function__ = torch_private.no_torch_function
        grad = "another meaning"

    tensor = torch.ones(2)
    tensor.__class__ = Own
    assert type(tensor + 1) is torch.Tensor
    torch_private.set_gradient(tensor, torch.zeros(2))
    assert torch.equal(torch._C.TensorBase.grad.__get__(tensor), torch.zeros(2))


def test_forward_hooks_come_off():
    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    torch_private.drop_forward_hooks(layer)
    layer(torch.ones(1, 2))
    assert seen == []


def test_the_dictionaries_of_a_module_are_what_it_is_made_of():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert torch_private.children_of(module) == dict(module.named_children())
    assert torch_private.parameters_of(module[0]) == dict(module[0].named_parameters())
    assert torch_private.buffers_of(module[1]) == dict(module[1].named_buffers())
    torch_private.parameters_of(module[0])["bias"] = None
    torch_private.buffers_of(module[1])["running_mean"] = torch.ones(2)
    torch_private.children_of(module)["2"] = nn.ReLU()
    assert module[0].bias is None
    assert torch.equal(module[1].running_mean, torch.ones(2))
    assert len(module) == 3


def test_compiled_modules_are_seen():
    assert not torch_private.is_compiled(nn.Linear(1, 1))
    layer = nn.Linear(1, 1)
    assert torch_private.is_compiled(torch.compile(layer, backend="eager"))
    assert not torch_private.is_compiled(layer)
    layer.compile(backend="eager")
    assert torch_private.is_compiled(layer)


def test_a_cache_of_parametrizations_is_seen():
    assert not torch_private.parametrizations_are_cached()
    with parametrize.cached():
        assert torch_private.parametrizations_are_cached()
    assert not torch_private.parametrizations_are_cached()


def test_users_of_a_storage_are_counted():
    x = torch.ones(4)
    assert torch_private.storage_users(x) == 1
    view = x[1:]
    assert torch_private.storage_users(x) == torch_private.storage_users(view) == 2
    array = x.numpy()
    assert torch_private.storage_users(x) >= 3
    del view, array
    assert torch_private.storage_users(x) == 1


def test_hooks_on_gradients_are_seen():
    parameter = nn.Parameter(torch.ones(1))
    assert torch_private.gradient_hooks_of(parameter) is None
    handle = parameter.register_hook(lambda g: g)
    assert torch_private.gradient_hooks_of(parameter) == "a gradient hook"
    handle.remove()
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    assert torch_private.gradient_hooks_of(parameter) == "a hook after gradient accumulation"


def test_tensors_tell_how_often_they_were_written_and_what_they_view():
    x = torch.ones(2, 2)
    assert (x._version, x._base, x._backward_hooks) == (0, None, None)
    assert x[0]._base is x
    x[0].add_(1)
    assert x._version == 1
    torch._foreach_add_([x], 1.0)
    assert x._version == 2


def test_one_call_works_on_many_tensors():
    a, b = [torch.ones(2), torch.ones(3)], [torch.full((2,), 3.0), torch.full((3,), 3.0)]
    torch._foreach_add_(a, b)
    torch._foreach_mul_(a, 2.0)
    torch._foreach_sub_(a, b)
    assert [t.tolist() for t in a] == [[5.0] * 2, [5.0] * 3]
    torch._foreach_copy_(a, b)
    torch.testing.assert_close(torch._foreach_norm(a), [torch.tensor(3 * 2**0.5), torch.tensor(3 * 3**0.5)])


def test_the_classes_that_layers_share():
    norms = torch.nn.modules.batchnorm
    assert all(issubclass(kind, norms._BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert issubclass(nn.InstanceNorm2d, norms._NormBase)
    assert not issubclass(nn.LayerNorm, norms._NormBase)
    assert issubclass(nn.Conv2d, nn.modules.conv._ConvNd)
    assert issubclass(nn.ConvTranspose1d, nn.modules.conv._ConvNd)


def test_modules_are_moved_saved_and_replicated_through_the_methods_we_override():
    calls = []

    class Watched(nn.Linear):
        def _apply(self, function, recurse=True):
            calls.append("moved")
            return super()._apply(function, recurse)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            calls.append("saved")
            super()._save_to_state_dict(destination, prefix, keep_vars)

        def _load_from_state_dict(self, state_dict, prefix, *others):
            calls.append(f"loaded {sorted(state_dict)} as {prefix}")
            super()._load_from_state_dict(state_dict, prefix, *others)

    module = nn.Sequential(Watched(2, 2))
    module.double()
    module.load_state_dict(module.state_dict())
    assert calls == ["moved", "saved", "loaded ['0.bias', '0.weight'] as 0."]
    assert getattr(module[0]._replicate_for_data_parallel(), "_is_replica", False)
    assert not getattr(module[0], "_is_replica", False)
    assert torch.compile(module, backend="eager")._orig_mod is module


def test_optimizers_and_schedulers_leave_the_marks_we_read():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    handle = optimizer.register_step_post_hook(hook := lambda *_: None)
    assert list(optimizer._optimizer_step_post_hooks.values()) == [hook]
    handle.remove()
    assert not getattr(optimizer.step, "_wrapped_by_lr_sched", False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert optimizer.step._wrapped_by_lr_sched
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    other._opt_called = True
    scheduler.step()  # without a warning, which is an error here


def test_traces_are_made_of_the_operations_we_know():
    def function(a, b):
        product = (a @ b).to(torch.float64).softmax(-1)
        (g,) = torch.autograd.grad((product.log_softmax(-1) * product).sum(), a)
        return g

    given = torch.ones(2, 3, 4, requires_grad=True), torch.ones(4, 5)
    graph = make_fx(function)(*given).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) for target in targets)
    names = {target._schema.name.removeprefix("aten::") for target in targets}
    assert {"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"} <= names
    assert {"_to_copy", "_unsafe_view"} <= names
    assert torch.ops.aten.add.Tensor._overloadname == "Tensor"
    schema = torch.ops.aten.add_.Tensor._schema
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
    assert schema.arguments[0].alias_info.is_write


def test_nests_of_tensors_are_taken_apart():
    leaves, structure = _pytree.tree_flatten({"a": [1, (2, 3)], "b": None})
    assert leaves == [1, 2, 3, None]
    assert _pytree.tree_unflatten(leaves, structure) == {"a": [1, (2, 3)], "b": None}
    assert _pytree.tree_map(lambda x: x, (1, [2])) == (1, [2])


def test_everything_private_has_a_canary_here():
    text = Path(__file__).read_text()
    functions = [name for name, value in vars(torch_private).items() if inspect.isfunction(value) and name[0] != "_"]
    assert [name for name in functions if f"torch_private.{name}" not in text] == []
    assert [name for name in torch_private.USED_IN_PLACE if name not in text] == []
