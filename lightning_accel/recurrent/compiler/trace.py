"""Trace one time step of a recurrent cell, forward and vector-Jacobian product, as one graph of ATen operations."""

import operator
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vjp
from torch.fx.experimental.proxy_tensor import make_fx

Node: TypeAlias = Any  # torch types a node's arguments as a union of everything a graph can hold
Step = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]


class CannotScheduleError(Exception):
    """A cell cannot be scheduled; the message says why and names the line."""


@dataclass(frozen=True)
class TensorSpec:
    """One time step's tensor: shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    def with_batch(self, streams: int, was: int) -> "TensorSpec":
        """Change the first dimension, where it is the batch."""
        if not self.shape or self.shape[0] != was:
            return self
        return TensorSpec((streams, *self.shape[1:]), self.dtype, self.device)

    def example(self, generator: torch.Generator) -> Tensor:
        """Make a random tensor of this shape without touching the global random state."""
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return torch.rand(self.shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)


@dataclass(frozen=True)
class Dependencies:
    """What the differentiable results of one step depend on, as autograd connects them.

    Attributes:
        of_ys: For each output, the places of inputs, states and weights.
        of_states: For each next state, likewise.
    """

    of_ys: tuple[tuple[frozenset[int], frozenset[int], frozenset[int]], ...]
    of_states: tuple[tuple[frozenset[int], frozenset[int], frozenset[int]], ...]


@dataclass
class StepGraph:
    """One step's forward and backward as a graph of ATen operations.

    Its placeholders are, in order: per-step inputs, states, weights (parameters and buffers), gradients of the
    differentiable results. Its results are: outputs and next states, then gradients of the differentiable inputs.

    Attributes:
        graph: The operations.
        constants: Tensors that the graph reads by name.
        counts: Number of per-step inputs, states, weights and outputs.
        smooth_inputs: Which inputs are differentiable.
        smooth_results: Which outputs and next states are.
        dependencies: What each of these depends on.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    counts: tuple[int, int, int, int]
    smooth_inputs: tuple[bool, ...]
    smooth_results: tuple[bool, ...]
    dependencies: Dependencies

    def __post_init__(self) -> None:
        self.read_roles()

    @property
    def streams(self) -> int:
        """Size of the batch that was traced."""
        sizes: torch.Size = (self.states or self.xs)[0].meta["val"].shape
        return sizes[0] if sizes else 1

    def read_roles(self) -> None:
        """Find the nodes of each role; to be called again after a rewrite."""
        nx, ns, nw, ny = self.counts
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        flat = list(next(n for n in self.graph.nodes if n.op == "output").args[0])
        inputs, tangents = placeholders[: nx + ns + nw], iter(placeholders[nx + ns + nw :])
        results, pulled = flat[: ny + ns], iter(flat[ny + ns :])
        self.xs, self.states, self.weights = inputs[:nx], inputs[nx : nx + ns], inputs[nx + ns :]
        self.ys, self.next_states = results[:ny], results[ny:]
        d_results = [next(tangents) if smooth else None for smooth in self.smooth_results]
        d_inputs = [next(pulled) if smooth else None for smooth in self.smooth_inputs]
        self.d_ys, self.d_next_states = d_results[:ny], d_results[ny:]
        self.d_xs, self.d_states, self.d_weights = d_inputs[:nx], d_inputs[nx : nx + ns], d_inputs[nx + ns :]


def trace_step(
    module: nn.Module, step: Callable[..., Any], xs: Sequence[TensorSpec], states: Sequence[TensorSpec]
) -> StepGraph:
    """Trace ``step`` of ``module``.

    Args:
        module: Owner of the parameters and buffers; a copy that nobody else uses, for tracing exchanges its weights.
        step: ``step(module, xs, states) -> (ys, next_states)`` on lists of tensors.
        xs: One step's inputs.
        states: One step's states.

    Raises:
        CannotScheduleError: If the step looks at values, changes tensors in place that it did not make, draws random
            numbers, returns states of another shape or type, or can not be traced.
    """
    parameters = [p.detach() for p in module.parameters()]
    values = [*parameters, *(b.detach().clone() for b in module.buffers())]
    generator = torch.Generator().manual_seed(0)
    x_values = [spec.example(generator) for spec in xs]
    s_values = [spec.example(generator) for spec in states]

    def run(xs: list[Tensor], states: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        stepper, named = as_function(module, step, weights)
        ys, following = functional_call(stepper, named, (xs, states))
        return list(ys), list(following)

    differentiable = [_is_differentiable(v) for v in (*x_values, *s_values, *parameters)]
    differentiable += [False] * (len(values) - len(parameters))
    out_flags: list[bool] = []

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> Any:
        active = [p for p, flag in zip(primals, differentiable, strict=True) if flag]

        def forward(*active: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            rest = iter(active)
            full = [next(rest) if flag else p for p, flag in zip(primals, differentiable, strict=True)]
            nx, ns = len(x_values), len(s_values)
            ys, following = run(full[:nx], full[nx : nx + ns], full[nx + ns :])
            results = [*ys, *following]
            return [r for r in results if _is_differentiable(r)], [r for r in results if not _is_differentiable(r)]

        smooth, pullback, rest = vjp(forward, *active, has_aux=True)  # type: ignore[misc]  # typed for two results
        return smooth, rest, pullback(tangents)

    primals = [*x_values, *s_values, *values]
    state_before = torch.get_rng_state()
    try:
        with torch.enable_grad():
            dependencies, ys, following = _run_once(run, x_values, s_values, values, differentiable)
        _check_states(s_values, following)
        out_flags += [_is_differentiable(r) for r in (*ys, *following)]
        tangents = [torch.ones_like(r) for r in (*ys, *following) if _is_differentiable(r)]
        with torch.enable_grad():
            traced = make_fx(joint)(primals, tangents)
    except CannotScheduleError:
        raise
    except Exception as error:
        raise CannotScheduleError(f"one step can not be traced: {_last_line(error)}") from error
    finally:
        if not torch.equal(
            torch.get_rng_state(), state_before
        ):  # it drew; else another thread's draws would come again
            torch.set_rng_state(state_before)
    constants = {n.target: getattr(traced, n.target) for n in traced.graph.nodes if n.op == "get_attr"}
    if any(isinstance(c, Tensor) and c.requires_grad for c in constants.values()):
        raise CannotScheduleError("the step uses a tensor that wants a gradient and is no parameter of the cell.")
    _refuse_side_effects(traced)
    _flatten_results(traced.graph, out_flags, sum(differentiable))
    counts = (len(x_values), len(s_values), len(values), len(ys))
    return StepGraph(traced.graph, constants, counts, tuple(differentiable), tuple(out_flags), dependencies)


def as_function(
    module: nn.Module, step: Callable[..., Any], weights: Sequence[Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Prepare ``functional_call(stepper, named, (xs, states))``: a step with other parameters and buffers."""
    names = [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]
    return _Stepper(module, step), {f"module.{n}": w for n, w in zip(names, weights, strict=True)}


def _run_once(
    run: Callable[..., tuple[list[Tensor], list[Tensor]]],
    xs: list[Tensor],
    states: list[Tensor],
    weights: list[Tensor],
    differentiable: list[bool],
) -> tuple[Dependencies, list[Tensor], list[Tensor]]:
    """Run one step as it is, and ask autograd what its results depend on."""
    inputs = [
        t.detach().requires_grad_() if smooth else t
        for t, smooth in zip((*xs, *states, *weights), differentiable, strict=True)
    ]
    nx, ns = len(xs), len(states)
    ys, following = run(inputs[:nx], inputs[nx : nx + ns], inputs[nx + ns :])
    for result in (*ys, *following):
        if not isinstance(result, Tensor):
            raise CannotScheduleError(f"a step returns a {type(result).__name__} where a tensor was expected.")
        if result.is_complex():
            raise CannotScheduleError("a step returns complex numbers.")
    leaves = [(k, t) for k, t in enumerate(inputs) if t.requires_grad]

    def reached(result: Tensor) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
        if not result.requires_grad:
            return frozenset(), frozenset(), frozenset()
        found = torch.autograd.grad(
            result.sum(), [t for _, t in leaves], retain_graph=True, allow_unused=True, materialize_grads=False
        )
        places = [k for (k, _), g in zip(leaves, found, strict=True) if g is not None]
        return (
            frozenset(k for k in places if k < nx),
            frozenset(k - nx for k in places if nx <= k < nx + ns),
            frozenset(k - nx - ns for k in places if k >= nx + ns),
        )

    dependencies = Dependencies(tuple(map(reached, ys)), tuple(map(reached, following)))
    return dependencies, [y.detach() for y in ys], [s.detach() for s in following]


class _Stepper(nn.Module):
    """Give ``functional_call`` a module whose forward is the step."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._step = step

    def forward(self, xs: list[Tensor], states: list[Tensor]) -> Any:
        return self._step(self.module, xs, states)


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point


def _check_states(states: Sequence[Tensor], following: Sequence[Tensor]) -> None:
    if len(states) != len(following):
        raise CannotScheduleError(f"a step takes {len(states)} states and returns {len(following)}.")
    for k, (old, new) in enumerate(zip(states, following, strict=True)):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise CannotScheduleError(
                f"state {k} changes from {tuple(old.shape)}, {old.dtype} to {tuple(new.shape)}, {new.dtype} in a step."
            )


def _last_line(error: Exception) -> str:
    """Name the line of the cell that failed: the innermost one that is not torch's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    own = [f for f in frames if f.filename != __file__] or frames
    where = f" (line {own[-1].lineno} of {own[-1].filename.rsplit('/', 1)[-1]}: `{own[-1].line}`)" if own else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{where}"


def _refuse_side_effects(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        where = f" (`{node.name}`)"
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise CannotScheduleError(
                f"the step draws random numbers with {node.target}{where}; "
                "draw them before the loop and pass them as inputs."
            )
        if node.target._schema.is_mutable and not _make_functional(traced.graph, node):
            raise CannotScheduleError(f"the step changes a tensor in place with {node.target}{where}.")


def _make_functional(graph: fx.Graph, node: Node) -> bool:
    """Replace an in-place operation on a tensor that the step itself made and of which no view exists."""
    packet, overload = node.target.overloadpacket.__name__, node.target._overloadname
    changed = node.args[0]
    functional = getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None) if packet.endswith("_") else None
    if functional is None or not isinstance(changed, fx.Node) or changed.op != "call_function":
        return False
    if any(_makes_view(n) for n in (changed, *changed.users)):
        return False
    with graph.inserting_before(node):
        result = graph.call_function(functional, node.args, node.kwargs)
    result.meta = dict(node.meta)
    result.name = f"{node.name}functional"
    position = {n: k for k, n in enumerate(graph.nodes)}
    changed.replace_all_uses_with(result, delete_user_cb=lambda user: position[user] > position[result])
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _makes_view(node: Node) -> bool:
    if node.target is operator.getitem:  # torch's own cells change parts of an `unsafe_split`, which are nobody's view
        source = node.args[0]
        return not isinstance(source, fx.Node) or _makes_view(source)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def _flatten_results(graph: fx.Graph, smooth_results: list[bool], gradients: int) -> None:
    """Make the graph's result one tuple: outputs and next states in their order, then gradients."""
    output = next(n for n in graph.nodes if n.op == "output")
    flat = _flat(output.args[0])
    if len(flat) != len(smooth_results) + gradients or not all(isinstance(leaf, fx.Node) for leaf in flat):
        raise CannotScheduleError("the gradients of one step can not be traced.")
    smooth, rest = iter(flat[: sum(smooth_results)]), iter(flat[sum(smooth_results) : len(smooth_results)])
    results = [next(smooth) if flag else next(rest) for flag in smooth_results]
    output.args = ((*results, *flat[len(smooth_results) :]),)


def _flat(part: Any) -> list[Node]:
    if isinstance(part, (list, tuple)):
        return [leaf for p in part for leaf in _flat(p)]
    return [part]
