"""Which parameters of a model are projected, and what a group of each is."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_accel.projection.kernels.layout import normalize_dims

NAMED_GROUPS = ("rows", "columns", "heads")
DEFAULT_MODULE_TYPES = ("Linear", "Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class Target:
    """One parameter to project.

    Attributes:
        name: In ``named_parameters``, without the prefixes of ``torch.compile``.
        module: That owns it.
        leaf: Its name there.
        group_dims: Dimensions of `view` that number the groups.
        shape: Shape to view the parameter in; its own unless groups are attention heads.
    """

    name: str
    module: nn.Module
    leaf: str
    group_dims: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter as of now; ``None`` after the layer's structure has changed."""
        found = self.module._parameters.get(self.leaf)
        return found if isinstance(found, nn.Parameter) else None

    @property
    def is_gone(self) -> bool:
        """Whether the parameter is no more, or one of another size has taken its place."""
        return self.parameter is None or self.parameter.numel() != math.prod(self.shape)

    def view(self) -> Tensor:
        """Return the parameter's data in the shape whose dimensions `group_dims` number.

        Raises:
            ValueError: If the parameter is gone.
        """
        parameter = self.parameter
        if parameter is None:
            raise ValueError(f"`{self.name}` is gone: its layer was changed. Find the targets anew.")
        data = parameter.detach()
        return data if data.shape == self.shape else data.view(self.shape)

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return math.prod(self.shape[d] for d in self.group_dims)

    @property
    def rest_dims(self) -> tuple[int, ...]:
        """Dimensions of `view` within a group."""
        return tuple(d for d in range(len(self.shape)) if d not in self.group_dims)


def find_targets(
    model: nn.Module,
    parameters: Sequence[str] = ("*weight",),
    *,
    module_types: Sequence[str] | None = DEFAULT_MODULE_TYPES,
    groups: str | Sequence[int] = "rows",
    num_heads: int | None = None,
) -> list[Target]:
    """Find the parameters to project.

    Args:
        model: Any module; a parameter of two names is found once.
        parameters: Shell patterns of parameter names, e.g. ``"encoder.*.weight"``.
        module_types: Class names of the modules that own them (subclasses count); ``None`` for any.
        groups: ``"rows"`` (dimension 0: output neurons and channels), ``"columns"`` (dimension 1: input features and
            channels), ``"heads"`` (rows split among attention heads; query, key and value of a fused projection
            together), or the dimensions that number the groups.
        num_heads: For ``"heads"``: number of heads, where the module has no ``num_heads`` itself.

    Returns:
        Parameters with at least two dimensions (any number where ``groups`` are given as dimensions that fit), in the
        order of the model.

    Raises:
        ValueError: If ``groups`` is not known, or rows cannot be split among the heads.
    """
    if isinstance(groups, str) and groups not in NAMED_GROUPS:
        raise ValueError(f"`groups` must be of {NAMED_GROUPS} or dimensions, got {groups!r}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for full_name, parameter in model.named_parameters():
        name = full_name.replace("_orig_mod.", "")
        path, _, leaf = full_name.rpartition(".")
        owner = modules[path]
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in parameters)
        if not wanted or not _is_of(owner, module_types) or isinstance(parameter, UninitializedParameter):
            continue
        if parameter.numel() == 0:
            continue
        shape, dims = tuple(parameter.shape), groups
        if dims == "heads" and parameter.ndim >= 2:
            shape, dims = _heads(name, shape, getattr(owner, "num_heads", None) or num_heads)
        least = 2 if isinstance(groups, str) else 1 + max((int(d) for d in groups), default=0)
        if parameter.ndim < least:
            continue
        numbered = {"rows": (0,), "columns": (1,)}[dims] if isinstance(dims, str) else dims
        found.append(Target(name, owner, leaf, normalize_dims(numbered, len(shape)), shape))
    return found


def find_lazy(
    model: nn.Module, parameters: Sequence[str] = ("*weight",), module_types: Sequence[str] | None = None
) -> list[str]:
    """Return the names of parameters whose shapes the first forward pass is still to find; arguments as above."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for full_name, parameter in model.named_parameters():
        name = full_name.replace("_orig_mod.", "")
        lazy = isinstance(parameter, UninitializedParameter) and _is_of(
            modules[full_name.rpartition(".")[0]], module_types
        )
        if lazy and any(fnmatch.fnmatchcase(name, pattern) for pattern in parameters):
            found.append(name)
    return found


def _is_of(module: nn.Module, types: Sequence[str] | None) -> bool:
    return types is None or any(base.__name__ in types for base in type(module).__mro__)


def _heads(name: str, shape: tuple[int, ...], num_heads: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows, *rest = shape
    if not num_heads or rows % num_heads:
        problem = f"do not split among {num_heads} heads" if num_heads else "belong to a module without `num_heads`"
        raise ValueError(
            f"`groups` 'heads': {rows} rows of `{name}` {problem}; pass `num_heads`, or take the parameter out of "
            "`parameters`."
        )
    fused = 3 if rows == 3 * rest[0] and rows % (3 * num_heads) == 0 else 1
    return (fused, num_heads, rows // (fused * num_heads), *rest), (1,)
