"""The parts that project a model step after step: what is chosen, how hard, what is kept, what is refused."""

import copy
import gc
import math
import weakref

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_accel.callbacks import GroupSparsity, L1InfProjection, MultilevelProjection
from lightning_accel.projection import project_l1inf
from lightning_accel.projection.on_device.late_norms import LateNorms
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.ramp import Ramp
from lightning_accel.projection.training.targets import find_targets


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 6, 3)
        self.body = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(12, 8)})
        self.norm = nn.LayerNorm(8)
        self.embedding = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)


def names(targets):
    return [t.name for t in targets]


def test_default_targets_are_weights_of_linear_and_convolution_layers():
    assert names(find_targets(Model())) == [
        "conv.weight",
        "body.a.weight",
        "body.b.weight",
        "attention.out_proj.weight",  # a subclass of Linear
    ]


def test_patterns_and_module_types_choose_targets():
    assert names(find_targets(Model(), ("body.*.weight", "emb*"), module_types=None)) == [
        "body.a.weight",
        "body.b.weight",
        "embedding.weight",
    ]
    assert names(find_targets(Model(), module_types=("Conv2d",))) == ["conv.weight"]


def test_targets_in_compiled_and_shared_modules_are_found_once_under_plain_names():
    model = Model()
    model.body["b"] = torch.compile(model.body["b"], backend="eager")
    model.again = model.body["a"]
    found = names(find_targets(model, ("body.*",)))
    assert found == ["body.a.weight", "body.b.weight"]


@pytest.mark.parametrize(
    ("groups", "dims"), [("rows", (0,)), ("columns", (1,)), ((1, 2), (1, 2)), ((-1,), (3,)), ((), ())]
)
def test_groups_are_named_or_numbered(groups, dims):
    (target,) = find_targets(Model(), ("conv.weight",), groups=groups)
    assert target.group_dims == dims
    assert sorted(target.group_dims + target.rest_dims) == [0, 1, 2, 3]


def test_heads_group_query_key_and_value_of_one_head():
    model = Model()
    (target,) = find_targets(model, ("attention.in_proj_weight",), module_types=None, groups="heads")
    assert target.shape == (3, 2, 4, 8)
    projector = Projector([target], Ball(target_sparsity=0.5))
    projector.project(1)
    blocks = model.attention.in_proj_weight.detach().view(3, 2, 4, 8)
    dead = (blocks == 0).all(0).all(1).all(1)
    assert dead.tolist().count(True) == 1
    (plain,) = find_targets(model, ("body.a.weight",), groups="heads", num_heads=3)
    assert plain.shape == (1, 3, 4, 8)


def test_invalid_groups_and_heads_are_refused():
    with pytest.raises(ValueError, match="`groups` must be of"):
        find_targets(Model(), groups="diagonal")
    with pytest.raises(ValueError, match="do not split among 5 heads"):
        find_targets(Model(), ("body.a.weight",), groups="heads", num_heads=5)
    with pytest.raises(ValueError, match=r"12 rows of `body\.a\.weight` belong to a module without"):
        find_targets(Model(), ("body.a.weight",), groups="heads")


def test_target_whose_layer_has_changed_says_so():
    model = Model()
    (target,) = find_targets(model, ("body.a.weight",))
    weight = target.module.weight
    del target.module.weight
    target.module.weight = weight.detach() * 2
    assert target.parameter is None
    with pytest.raises(ValueError, match=r"`body\.a\.weight` is gone"):
        target.view()


def test_ramp_is_zero_before_and_one_after():
    assert [Ramp().at(s) for s in (0, 1, 9)] == [0.0, 1.0, 1.0]
    assert [Ramp("linear", 2, 6).at(s) for s in (2, 3, 4, 6, 9)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert [Ramp("cubic", 0, 2).at(s) for s in (0, 1, 2)] == [0.0, 0.875, 1.0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"curve": "square"}, "`schedule` must be of"),
        ({"start_step": -1}, "`start_step` must be >= 0"),
        ({"curve": "linear"}, "`end_step` must be given"),
        ({"end_step": 3}, "`end_step` must be given"),
        ({"curve": "linear", "start_step": 3, "end_step": 3}, "`end_step` must be > `start_step`"),
    ],
)
def test_invalid_ramps_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Ramp(**arguments)


INVALID = [
    ({"min_groups": -1}, "`min_groups` must be >= 0, got -1"),
    ({"radius": 1.0, "target_sparsity": 0.5}, "got `radius` and `target_sparsity`. Set the others to None"),
    ({"radius": -1.0}, "`radius` must be >= 0"),
    ({"radius_fraction": 1.5}, "`radius_fraction` must be in"),
    ({"target_sparsity": -0.5}, "`target_sparsity` must be a fraction"),
    ({"target_sparsity": 90}, r"`target_sparsity` must be a fraction .*, got 90\. 90 % are 0\.9\."),
    ({"radius": 1.0, "scope": "layer"}, "`scope` must be"),
    ({"radius": 1.0, "nonfinite": "ignore"}, "`nonfinite` must be"),
    ({"radius": 1.0, "groups": "diagonal"}, "`groups` must be of"),
    ({"radius": 1.0, "num_heads": 0}, "`num_heads` must be >= 1"),
    ({"radius": 1.0, "every_n_steps": 0}, "`every_n_steps` must be >= 1"),
    ({"radius": 1.0, "every_n_epochs": -1}, "`every_n_epochs` must be >= 1"),
    ({"radius": 1.0, "every_n_steps": 2, "at_end": True}, "give at most one of `every_n_steps`"),
    ({"radius": 1.0, "mode": "prune"}, "`mode` must be of"),
    ({"radius": 1.0, "mode": "project_then_retrain"}, "`retrain_epoch` must be given"),
    ({"radius": 1.0, "retrain_epoch": 1}, "`retrain_epoch` must be given"),
    ({"radius": 1.0, "mode": "project_then_retrain", "retrain_epoch": -1}, "`retrain_epoch` must be >= 0"),
    ({"radius": 1.0, "mode": "project_then_retrain", "retrain_epoch": 1, "at_end": True}, "projects once"),
    ({"radius": 1.0, "rewind": "init"}, "`rewind` needs mode"),
    ({"radius": 1.0, "mode": "project_then_retrain", "retrain_epoch": 1, "start_step": 4}, "projects once"),
]


@pytest.mark.parametrize(("arguments", "match"), INVALID)
@pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])
def test_invalid_settings_are_refused_when_the_callback_is_made(kind, arguments, match):
    with pytest.raises(ValueError, match=match):
        kind(**arguments)


WRONG_KINDS = [
    ({"radius": "1"}, r"`radius` must be a number or None, got '1'\. Write it without quotation marks"),
    ({"radius": True}, "`radius` must be a number or None, got True"),
    ({"radius": torch.ones(2)}, "`radius` must be a number"),
    ({"radius_fraction": "0.5"}, "`radius_fraction` must be a number or None, got '0.5'"),
    ({"target_sparsity": [0.5]}, r"`target_sparsity` must be a number or None, got \[0\.5\]"),
    ({"radius": 1.0, "every_n_steps": 2.5}, r"`every_n_steps` must be an integer or None, got 2\.5"),
    ({"radius": 1.0, "every_n_epochs": "3"}, "`every_n_epochs` must be an integer or None, got '3'. Write it without"),
    ({"radius": 1.0, "start_step": None}, "`start_step` must be an integer, got None"),
    ({"radius": 1.0, "schedule": "linear", "end_step": 9.5}, "`end_step` must be an integer"),
    ({"radius": 1.0, "num_heads": 2.0}, "`num_heads` must be an integer"),
    ({"radius": 1.0, "mode": "project_then_retrain", "retrain_epoch": True}, "`retrain_epoch` must be an integer"),
    ({"radius": 1.0, "at_end": "no"}, "`at_end` must be True or False, got 'no'"),
    ({"radius": 1.0, "freeze_zero_groups": 1}, "`freeze_zero_groups` must be True or False, got 1"),
    ({"radius": 1.0, "min_groups": 0.5}, "`min_groups` must be an integer, got 0.5"),
    ({"radius": 1.0, "parameters": 3}, "`parameters` must be text or several texts, got 3"),
    ({"radius": 1.0, "parameters": ["*weight", 3]}, "`parameters` must be text .*, such as '.weight'"),
    ({"radius": 1.0, "module_types": [nn.Linear]}, "`module_types` must be text or .* a class name, such as 'Linear'"),
    ({"radius": 1.0, "groups": 0}, r"`groups` must name dimensions as integers, such as \(0,\), got 0"),
    ({"radius": 1.0, "groups": ["rows"]}, "`groups` must name dimensions as integers"),
    ({"radius": 1.0, "rewind": None}, "`rewind` must be 'none', 'init' or the path of a checkpoint, got None"),
]
NO_WORDS = [
    ({"parameters": ()}, r"`parameters` must hold at least one word .*, got \(\)\. Each is a shell pattern"),
    ({"parameters": ""}, "`parameters` must hold at least one word and no empty one, got ''"),
    ({"parameters": ["*weight", ""]}, "`parameters` must hold at least one word and no empty one"),
    ({"module_types": []}, r"`module_types` must hold at least one word .* None stands for any"),
    ({"groups": (0, 0)}, r"`groups` must name each dimension once, got \(0, 0\)"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG_KINDS)
@pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])
def test_values_of_another_kind_are_refused_when_the_callback_is_made(kind, arguments, match):
    with pytest.raises(TypeError, match=match):
        kind(**arguments)


@pytest.mark.parametrize(("arguments", "match"), NO_WORDS)
@pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])
def test_selections_of_nothing_are_refused_when_the_callback_is_made(kind, arguments, match):
    with pytest.raises(ValueError, match=match):
        kind(1.0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"norms": None}, TypeError, "`norms` must be text or several texts, got None"),
        ({"norms": ()}, ValueError, "`norms` must hold at least one word"),
        ({"dims": (0, 1)}, TypeError, "`dims` must name dimensions as integers, such as .*, got 0"),
        ({"dims": ((0,), (1, 1))}, ValueError, "`dims` must name each dimension once"),
    ],
)
def test_levels_of_another_kind_are_refused_when_the_callback_is_made(arguments, error, match):
    with pytest.raises(error, match=match):
        MultilevelProjection(1.0, **arguments)


@pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])
def test_numbers_and_words_are_taken_as_libraries_make_them(kind, tmp_path):
    kind(numpy.float32(1.0), start_step=numpy.int64(3), module_types="Linear", groups=[numpy.int64(1)])
    kind(1, mode="project_then_retrain", retrain_epoch=1, rewind=tmp_path / "last.ckpt")
    settings = OmegaConf.create({"parameters": ["*weight"], "module_types": ["Linear"], "groups": [0]})
    kind(1.0, **settings)


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        (L1InfProjection, {"method": "fast"}, "`method` must be"),
        (MultilevelProjection, {"norms": ("l1", "l2", "linf")}, "`dims` must be given for 3 levels"),
        (MultilevelProjection, {"norms": ("l2", "linf"), "scope": "global"}, "need 'l1' outermost"),
        (MultilevelProjection, {"norms": ("l1", "l3")}, "`norms` must be of"),
    ],
)
def test_invalid_balls_are_refused_when_the_callback_is_made(kind, arguments, match):
    with pytest.raises(ValueError, match=match):
        kind(1.0, **arguments)


def test_exact_method_takes_no_other_norms():
    with pytest.raises(ValueError, match="solves the l1,inf ball only"):
        Ball(radius=1.0, norms=("l1", "l2"), method="exact")


@pytest.mark.parametrize("method", ["bilevel", "exact"])
def test_global_budget_equals_one_projection_of_all_rows(method):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 9)])
    rows = torch.cat([layer.weight.detach() for layer in model])
    Projector(find_targets(model), Ball(radius=1.3, method=method, scope="global")).project(1)
    expected = project_l1inf(rows, 1.3, method=method)
    torch.testing.assert_close(torch.cat([layer.weight.detach() for layer in model]), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [1, 7])
def test_parameters_of_one_shape_are_projected_as_if_alone(count):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 5) for _ in range(count)])
    expected = [project_l1inf(layer.weight.detach(), 0.5) for layer in model]
    Projector(find_targets(model), Ball(radius=0.5)).project(1)
    for layer, weight in zip(model, expected, strict=True):
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("norms", [("l1", "l2"), ("l1", "l1"), ("l2", "linf")])
@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_other_norms_reach_their_fraction_of_the_first_norm(norms, scope):
    if norms[0] != "l1" and scope == "global":
        scope = "parameter"
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 9)])
    projector = Projector(find_targets(model), Ball(radius_fraction=0.25, norms=norms, scope=scope))
    projector.remember_first_norms()

    def norm(weight):
        inner = torch.linalg.vector_norm(weight.double(), {"l1": 1, "l2": 2, "linf": math.inf}[norms[1]], dim=1)
        return float(torch.linalg.vector_norm(inner, {"l1": 1, "l2": 2}[norms[0]]))

    before = [norm(layer.weight.detach()) for layer in model]
    projector.project(1)
    after = [norm(layer.weight.detach()) for layer in model]
    if scope == "global":
        before, after = [sum(before)], [sum(after)]
    for was, now in zip(before, after, strict=True):
        assert 0.25 * was * (1 - 1e-5) <= now <= 0.25 * was


@pytest.mark.parametrize("method", ["bilevel", "exact"])
def test_dead_groups_stay_dead_whatever_grows_there(method):
    torch.manual_seed(0)
    layer = nn.Linear(6, 10)
    model = nn.ModuleList([layer])
    projector = Projector(find_targets(model), Ball(target_sparsity=0.4, method=method), freeze_zero_groups=True)
    projector.project(1)
    dead = (layer.weight == 0).all(1)
    assert int(dead.sum()) == 4
    with torch.no_grad():
        layer.weight[dead] = 100.0
    again = copy.deepcopy(layer.weight.detach())
    projector.hold()
    assert torch.equal(layer.weight, again.masked_fill(dead[:, None], 0.0))
    with torch.no_grad():
        layer.weight[dead] = 100.0
    projector.project(2)
    assert torch.equal((layer.weight == 0).all(1), dead)
    assert torch.equal(layer.weight[~dead], again[~dead])


def test_state_goes_through_a_state_dict():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 10)])
    ball = Ball(radius_fraction=0.2, method="exact")
    projector = Projector(find_targets(model), ball, Ramp("linear", 0, 4), freeze_zero_groups=True)
    projector.remember_first_norms()
    projector.project(2)
    other = Projector(find_targets(model), ball, Ramp("linear", 0, 4), freeze_zero_groups=True)
    other.load_state_dict(projector.state_dict())
    (mine,), (theirs,) = projector.memories.values(), other.memories.values()
    assert mine.first_norm == theirs.first_norm
    assert torch.equal(mine.dead, theirs.dead)
    assert torch.equal(mine.mu, theirs.mu)


@pytest.mark.parametrize("compile", [True, False])
def test_weights_of_exchanged_layers_are_let_go(compile):
    model = nn.ModuleDict({"old": nn.Linear(6, 5), "kept": nn.Linear(6, 5)})
    projector = Projector(find_targets(model), Ball(radius=0.5), compile=compile)
    for step in (1, 2, 3):
        projector.project(step)
    gone = weakref.ref(model["old"].weight)
    del model["old"]
    model["new"] = nn.Linear(6, 5)
    projector.aim_at(find_targets(model))
    gc.collect()
    assert gone() is None
    projector.project(4)
    for layer in model.values():
        assert float(layer.weight.detach().abs().amax(1).sum()) <= 0.5


def test_one_bad_parameter_leaves_all_unchanged():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^`1\.weight` holds NaN"):
        Projector(find_targets(model), Ball(radius=0.5)).project(1)
    assert torch.equal(model[0].weight, before[0].weight)


def test_norms_that_were_not_waited_for_are_checked_later():
    projector = Projector([], Ball(radius=1.0), late=LateNorms([torch.tensor(1.0), torch.tensor(math.nan)]))
    with pytest.raises(ValueError, match="a projected parameter` holds NaN"):
        projector.check_finite()
    projector.check_finite()


def test_group_sparsity_counts_groups_and_entries_over_updates():
    metric = GroupSparsity()
    metric.update(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    metric.update(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), group_dims=(1,))
    assert metric.compute() == {"zero_groups": 0.5, "zero_entries": 5 / 8}
    metric.reset()
    metric.update(torch.zeros(3), group_dims=(0,))
    assert metric.compute() == {"zero_groups": 1.0, "zero_entries": 1.0}
    with pytest.raises(ValueError, match="must be dimensions"):
        metric.update(torch.zeros(3), group_dims=(1,))
