"""The plan: what is measured, what is chosen, what is left alone. Times come from fake timers."""

import copy
import dataclasses
import json
import math
import random

import pytest
import torch
from torch import nn

from lightning_accel import measure
from lightning_accel.low_rank import RankPlan, decompose, make_plan, theoretical_ranks
from lightning_accel.low_rank.calls import record_calls
from lightning_accel.low_rank.plan import LayerPlan
from lightning_accel.low_rank.rank_search.candidates import every_rank, plateau_below, plateau_candidates, rank_unit
from lightning_accel.low_rank.rank_search.timing import DiskCache, default_cache_dir, time_layer


def mlp(width=64, depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*[module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())])


def run(model):
    return model(torch.randn(8, 64))


class Clock:
    """Times candidates by a formula of the name and notes what it was asked."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.asked = []

    def __call__(self, candidates):
        self.asked.append(list(candidates))
        for step in candidates.values():
            step()  # every candidate must run
        return {name: [self.seconds(name)] * 3 for name in candidates}


def proportional(name):
    """Time is the rank; dense costs as much as rank 40 of 64."""
    return 40.0 if name == "dense" else float(name.split("x")[0])


def all_slower(name):
    return 1.0 if name == "dense" else 2.0


# --- nothing is disturbed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["knapsack", "paper"])
def test_if_every_candidate_is_slower_model_and_keys_are_untouched(method):
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    plan = make_plan(model, run, ratio=2.0, method=method, timer=Clock(all_slower))
    assert decompose(model, plan) == []
    assert [layer.decision for layer in plan.layers] == ["dense"] * 3
    assert all("dense is not beaten" in layer.reason for layer in plan.layers)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_planning_leaves_modes_gradients_hooks_random_state_and_batch_norm_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.Flatten(), nn.Linear(576, 32))
    model[1].eval()
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with measure.undisturbed(model):
        plan = make_plan(model, lambda m: m(x).sum().backward(), ratio=1.2)
    assert plan.layers[0].dense_ms > 0.0
    assert calls == [1]  # the one real batch; timing runs copies without the user's hooks
    assert len(model[0]._forward_pre_hooks) == len(model[4]._forward_pre_hooks) == 0
    assert not model[1].training
    assert model[2].training
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_timing_itself_keeps_the_random_state():
    dense = nn.Linear(64, 64)
    calls = record_calls(dense, {"x": dense}, run)
    state = torch.get_rng_state()
    time_layer(dense, [(8,)], calls["x"], timer=Clock(proportional))
    assert torch.equal(torch.get_rng_state(), state)
    assert dense.weight.grad is None


# --- what a layer is timed with -------------------------------------------------------------------------------------


def test_calls_are_learnt_from_the_real_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.often, self.never = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch):
            x = self.first(input=batch["x"])
            for _ in range(3):
                x = self.often(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self.conv(batch["image"].contiguous(memory_format=torch.channels_last))
            return self.often(x[:1])

    model = Model()
    batch = {"x": torch.randn(5, 4), "image": torch.randn(2, 3, 8, 8)}
    layers = dict(model.named_children())
    calls = record_calls(model, layers, lambda m: m(batch))
    assert set(calls) == {"first", "often", "conv"}
    assert (calls["first"].shape, calls["first"].needs_grad, calls["first"].calls) == ((5, 4), False, 1)
    assert (calls["often"].shape, calls["often"].needs_grad, calls["often"].calls) == ((5, 8), True, 4)
    assert (calls["conv"].autocast, calls["conv"].channels_last) == (torch.bfloat16, True)
    assert calls["first"].autocast is None
    plan = make_plan(model, lambda m: m(batch), ratio=1.1, timer=Clock(all_slower))
    by_name = {layer.name: layer for layer in plan.layers}
    assert by_name["never"].reason == "never called in the batch"
    assert by_name["often"].calls == 4
    assert by_name["often"].dense_ms == 4000.0


def test_hooks_are_removed_if_the_batch_fails():
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_plan(model, lambda m: m(torch.randn(8, 63)), ratio=2.0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_equal_layers_are_measured_once():
    model = mlp()
    clock = Clock(proportional)
    make_plan(model, run, ratio=2.0, timer=clock)
    assert len(clock.asked) == 2  # the first one needs no input gradient
    assert clock.asked[0][0] == "dense"


@pytest.mark.parametrize("phase", ["train", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_real_times_are_positive(phase, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 6, 32), nn.Linear(32, 32)).to(dtype)
    model[2].weight.requires_grad_(False)
    plan = make_plan(model, lambda m: m(torch.randn(2, 8, 8, dtype=dtype)), ratio=1.5, phase=phase, min_energy=0.0)
    for layer in plan.layers:
        assert layer.dense_ms > 0.0
        assert all(candidate.ms > 0.0 for candidate in layer.candidates)


def test_a_layer_whose_parameters_are_all_frozen_is_timed_without_update():
    model = mlp()
    model.requires_grad_(False)
    plan = make_plan(model, run, ratio=2.0)
    assert all(layer.dense_ms > 0.0 for layer in plan.layers)


def test_candidates_are_timed_in_both_phases_of_sequential_freezing():
    def phased(name):
        if name == "dense":
            return 40.0
        rank, group = name.split("/")
        return float(rank) * (0.7 if group == "0" else 1.0)

    clock = Clock(phased)
    plan = make_plan(mlp(depth=1), run, ratio=2.0, phase_weights=(2.0, 1.0), timer=clock)
    assert {"dense", "16/0", "16/1"} <= set(clock.asked[0])
    (sixteen,) = [candidate for candidate in plan.layers[0].candidates if candidate.ranks == (16,)]
    assert sixteen.ms == pytest.approx(16_000.0 * (2 * 0.7 + 1.0) / 3.0)
    real = make_plan(mlp(), run, ratio=2.0, phase_weights=(1.0, 1.0))
    assert all(candidate.ms > 0.0 for layer in real.layers for candidate in layer.candidates)
    once = make_plan(
        mlp(depth=1), run, ratio=2.0, phase="inference", phase_weights=(2.0, 1.0), timer=Clock(proportional)
    )
    assert once.layers[0].dense_ms == 40_000.0


# --- cache ----------------------------------------------------------------------------------------------------------


def test_second_plan_comes_from_the_cache(tmp_path, monkeypatch):
    model = mlp()
    first = make_plan(model, run, ratio=2.0, cache_dir=tmp_path)
    monkeypatch.setattr(measure, "time_interleaved", lambda *_, **__: pytest.fail("measured again"))
    assert make_plan(model, run, ratio=2.0, cache_dir=tmp_path) == first


def test_cache_is_keyed_by_threads_and_phase(tmp_path):
    model = mlp(depth=1)
    times = {}
    for phase, threads in (("train", 1), ("inference", 1), ("train", 2)):
        torch.set_num_threads(threads)
        make_plan(model, run, ratio=2.0, phase=phase, cache_dir=tmp_path)
        times[phase, threads] = len(list(tmp_path.glob("[0-9a-f]*.json")))
    torch.set_num_threads(1)
    assert sorted(times.values()) == [2, 3, 4]  # one file of energies, one a key


def test_damaged_and_unwritable_caches_count_as_missing(tmp_path):
    cache = DiskCache(tmp_path)
    cache.write("key", {"dense": 1.5})
    assert cache.read("key") == {"dense": 1.5}
    for text in ("{", "[1]", '{"dense": "x"}'):
        (tmp_path / "key.json").write_text(text)
        assert cache.read("key") == {}
    blocked = DiskCache(tmp_path / "key.json" / "below")
    blocked.write("other", {"dense": 1.0})
    assert blocked.read("other") == {}


def test_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lightning_accel" / "low_rank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lightning_accel" / "low_rank"


# --- candidates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "ratio", "ranks"),
    [
        ((1024, 1024), 2.0, (256,)),
        ((128, 128, 3, 3), 2.0, (77, 77)),
        ((64, 64, 3, 3), 2.0, (38, 38)),
        ((1, 9), 2.0, (1,)),
    ],
)
def test_theoretical_ranks(shape, ratio, ranks):
    assert theoretical_ranks(shape, ratio) == ranks


def test_plateaus_are_multiples_of_powers_of_two_on_both_sides_of_the_theoretical_rank():
    ranks = [r for (r,) in plateau_candidates((1024, 1024), 2.0)]
    assert ranks == [64, 128, 192, 256, 288, 320, 384, 448]
    conv = plateau_candidates((128, 128, 3, 3), 2.0)
    assert (64, 64) in conv
    assert (96, 96) in conv
    assert plateau_candidates((1, 512)) == []
    two = [ranks for ranks in plateau_candidates((64, 128, 3, 3)) if len(ranks) == 2]
    assert all(r1 == 2 * r2 for r1, r2 in two)
    assert (32,) in plateau_candidates((64, 128, 3, 3))


def test_the_papers_range_goes_down_rank_by_rank():
    assert every_rank((1024, 1024), 2.0) == [(rank,) for rank in range(256, 169, -1)]
    conv = every_rank((64, 128, 3, 3), 2.0)
    assert conv[0][1] == min(theoretical_ranks((64, 128, 3, 3), 2.0))
    assert conv[-1][1] == min(theoretical_ranks((64, 128, 3, 3), 3.0))


def test_theoretical_rank_of_a_ratio_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"`ratio` must be > 0, got 0.0"):
        theoretical_ranks((4, 4), 0.0)


# --- choices --------------------------------------------------------------------------------------------------------


def test_papers_rule_takes_the_rank_below_the_largest_drop():
    def cliff(name):
        if name == "dense":
            return 10.0
        rank = int(name)
        return 6.0 + 0.001 * rank if rank > 12 else 4.0 + 0.001 * rank

    plan = make_plan(mlp(depth=1), run, ratio=2.0, method="paper", timer=Clock(cliff))
    assert plan.layers[0].ranks == (12,)
    assert plan.layers[0].low_rank_ms == pytest.approx(4012.0)


def test_fixed_takes_the_theoretical_rank_unmeasured():
    plan = make_plan(mlp(), None, ratio=2.0, method="fixed")
    assert [layer.ranks for layer in plan.layers] == [(16,)] * 3
    assert plan.reached == pytest.approx(2.0)
    assert plan.predicted_speedup is None
    assert plan.layers[0].dense_ms is None


@pytest.mark.parametrize(
    ("ranks", "below"),
    [((77,), (64,)), ((64,), (64,)), ((63,), (48,)), ((32, 17), (32, 16)), ((15, 8), (12, 8)), ((3, 1), (3, 1))],
)
def test_plateaus_below(ranks, below):
    assert plateau_below(ranks) == below


def test_snapped_takes_the_plateau_below_the_theoretical_rank_unmeasured():
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Flatten(), nn.Linear(1000, 400))
    snapped, fixed = (make_plan(model, None, ratio=2.0, method=method) for method in ("snapped", "fixed"))
    assert [layer.ranks for layer in fixed.layers] == [(77, 77), (142,)]
    assert [layer.ranks for layer in snapped.layers] == [(64, 64), (128,)]
    assert snapped.predicted_speedup is None
    assert all(low.energy < high.energy for low, high in zip(snapped.layers, fixed.layers, strict=True))
    assert RankPlan.from_json(snapped.to_json()) == snapped


def test_layers_too_small_for_any_rank_stay_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    plan = make_plan(model, None, ratio=2.0, method="fixed")
    assert plan.layers[1].ranks is None
    assert "too small" in plan.layers[1].reason


def test_speedup_target_is_met_with_the_most_energy():
    plan = make_plan(mlp(), run, speedup=2.0, timer=Clock(proportional), min_energy=0.0)
    assert plan.predicted_speedup >= 2.0
    assert plan.reached == plan.predicted_speedup
    slower = make_plan(mlp(), run, speedup=1.3, timer=Clock(proportional), min_energy=0.0)
    assert slower.energy > plan.energy


def test_energy_target_is_met_in_the_least_time():
    plan = make_plan(mlp(), run, energy=0.8, timer=Clock(proportional))
    assert plan.energy >= 0.8
    assert plan.predicted_speedup > 1.0
    faster = make_plan(mlp(), run, energy=0.6, timer=Clock(proportional))
    assert faster.predicted_speedup > plan.predicted_speedup


def test_ratio_target_is_no_slower_and_no_larger_than_the_theoretical_ranks():
    plan = make_plan(mlp(), run, ratio=2.0, timer=Clock(proportional))
    assert plan.reached >= 2.0
    assert sum(layer.low_rank_ms for layer in plan.layers) <= 3 * 16_000.0
    fixed = make_plan(mlp(), None, ratio=2.0, method="fixed")
    assert plan.energy >= fixed.energy - 1e-12


def test_a_plateau_upward_is_taken_for_more_energy_at_the_same_time():
    def stairs(name):
        return 60.0 if name == "dense" else 16.0 * math.ceil(int(name) / 16)

    plan = make_plan(mlp(depth=1), run, speedup=60 / 17, timer=Clock(stairs), min_energy=0.0)
    assert plan.layers[0].ranks == (16,)


def test_energy_floor_keeps_layers_dense_and_says_so():
    plan = make_plan(mlp(), run, ratio=2.0, timer=Clock(proportional), min_energy=0.999)
    assert all(layer.ranks is None and "keeps an energy of 1.00" in layer.reason for layer in plan.layers)


@pytest.mark.parametrize("target", [{"speedup": 1000.0}, {"energy": 1.0}, {"ratio": 1000.0}])
def test_targets_out_of_reach_give_the_nearest_plan_and_the_truth(target):
    plan = make_plan(mlp(), run, timer=Clock(proportional), min_energy=0.0, **target)
    if "energy" in target:
        assert plan.reached == 1.0
    else:
        assert 1.0 <= plan.reached < 1000.0


def test_parameters_are_kept_in_budget_by_the_multiplier():
    """Where time does not fall with the rank, only the parameter budget holds the ranks down."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 64))
    plan = make_plan(model, run, ratio=2.0, timer=Clock(lambda name: 10.0 if name == "dense" else 1.0), min_energy=0.0)
    assert plan.parameters_after <= plan.parameters_before / 2
    assert len(plan.considered) == 3


def test_dense_for_some_layers_counts_in_the_target():
    def only_wide(name):
        return proportional(name) if name in ("dense", *map(str, range(8, 40))) else 1.0

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    plan = make_plan(model, run, speedup=1.2, timer=Clock(only_wide), min_energy=0.0)
    assert plan.predicted_speedup >= 1.2
    assert plan.layers[1].ranks is None


# --- the plan as data -----------------------------------------------------------------------------------------------


def test_json_round_trip_is_exact(tmp_path):
    model = nn.Sequential(mlp(), nn.Unflatten(1, (16, 2, 2)), nn.Conv2d(16, 32, 1), nn.ConvTranspose2d(32, 4, 2))
    plan = make_plan(model, run, ratio=1.3, min_energy=0.1)
    assert RankPlan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    assert [layer.decision for layer in plan.layers][-1] == "skipped"
    assert "/" not in json.dumps(plan.device).replace("Intel(R)", "")


def test_a_loaded_plan_repeats_the_decomposition_exactly():
    plan = make_plan(mlp(), run, ratio=2.0, timer=Clock(proportional))
    models = [mlp(), mlp()]
    decompose(models[0], plan)
    decompose(models[1], RankPlan.from_json(plan.to_json()))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99, "layers": []}', '{"format": 1, "layers": [{}]}'])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="no rank plan of format 1"):
        RankPlan.from_json(text)


def test_layers_can_be_sent_back_to_dense():
    plan = make_plan(mlp(), None, ratio=2.0, method="fixed")
    less = plan.dense({"0", "4"}, "for a test")
    assert [layer.ranks for layer in less.layers] == [None, (16,), None]
    assert less.layers[0].reason == "for a test"
    assert less.parameters_after == 2 * 64 * 64 + 2048
    assert plan.parameters_after == 3 * 2048


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        ({"ratio": 2.0}, lambda plan: plan.parameters_before / plan.parameters_after),
        ({"energy": 0.7}, lambda plan: plan.energy),
        ({"speedup": 1.5}, lambda plan: plan.predicted_speedup),
    ],
    ids=["ratio", "energy", "speedup"],
)
def test_what_is_reached_follows_layers_that_are_sent_back(target, reached):
    plan = make_plan(mlp(), run, min_energy=0.0, timer=Clock(proportional), **target)
    low = {layer.name for layer in plan.layers if layer.ranks is not None}
    less = plan.dense({min(low)}, "for a test")
    assert plan.reached == pytest.approx(reached(plan))
    assert less.reached == pytest.approx(reached(less))
    assert less.reached != pytest.approx(plan.reached)
    assert plan.dense(low, "for a test").reached == pytest.approx(1.0)
    by_hand = RankPlan(layers=plan.layers, method="fixed", target="ratio", value=2.0)
    assert by_hand.dense(low, "for a test").reached is None


def test_fixed_leaves_heads_and_other_small_layers_dense():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4), nn.Linear(4, 512))
    plan = make_plan(model, None, ratio=2.0, method="fixed")
    assert [layer.decision for layer in plan.layers] == ["low rank", "dense", "dense"]
    assert "less than 1% of the entries, and was not measured" in plan.layers[1].reason


def test_an_empty_plan_keeps_everything():
    plan = RankPlan(layers=(), method="fixed", target="ratio", value=2.0)
    assert (plan.energy, plan.parameters_before, plan.predicted_speedup) == (1.0, 0, None)


def test_skipped_lazy_layers_have_no_shape():
    plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64)), None, ratio=2.0, method="fixed")
    assert (plan.layers[1].shape, plan.layers[1].kind) == ((), "LazyLinear")


def test_plan_entries_are_frozen():
    entry = LayerPlan("x", "Linear", (2, 2), None, "dense", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.name = "y"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `ratio`, `energy` and `speedup`, got \\[\\]"),
        ({"ratio": 2.0, "energy": 0.9}, "exactly one of .* got \\['ratio', 'energy'\\]"),
        ({"ratio": 1.0}, "`ratio` must be > 1, got 1.0"),
        ({"speedup": math.inf}, "`speedup` must be > 1, got inf"),
        ({"ratio": math.nan}, "`ratio` must be > 1, got nan"),
        ({"energy": 0.0}, "`energy` must be in \\(0, 1\\], got 0.0"),
        ({"ratio": 2.0, "method": "best"}, "`method` must be knapsack, paper, fixed or snapped, got 'best'"),
        ({"energy": 0.9, "method": "paper"}, "method 'paper' needs `ratio`, got `energy`"),
        ({"ratio": 2.0, "min_energy": 1.5}, "`min_energy` must be in \\[0, 1\\], got 1.5"),
        ({"ratio": 2.0, "weighting": "all"}, "`weighting` must be none or activation, got 'all'"),
        ({"ratio": 2.0, "phase_weights": (0.0, 0.0)}, "`phase_weights` must be 2 numbers >= 0, not all 0"),
        ({"ratio": 2.0, "phase_weights": (1.0, -1.0)}, "`phase_weights` must be 2 numbers >= 0"),
        ({"ratio": 2.0, "phase_weights": (1.0, 2.0, 3.0)}, "`phase_weights` must be 2 numbers >= 0"),
        ({"ratio": float("nan")}, "`ratio` must be > 1, got nan"),
        ({"ratio": float("inf")}, "`ratio` must be > 1, got inf"),
        ({"energy": float("nan")}, "`energy` must be in"),
        ({"speedup": 1.0}, "`speedup` must be > 1, got 1.0"),
        ({"ratio": 2.0, "include": "head"}, "must be lists of patterns, got 'head'; use \\['head'\\]"),
        ({"ratio": 2.0, "phase": "test"}, "`phase` must be train or inference, got 'test'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(mlp(), run, **arguments)


def test_measuring_needs_a_batch():
    with pytest.raises(ValueError, match="`run_batch` must run one real batch, got None"):
        make_plan(mlp(), None, ratio=2.0)
    with pytest.raises(ValueError, match="`run_batch` must run one real batch, got None"):
        make_plan(mlp(), None, ratio=2.0, method="fixed", weighting="activation")


def test_a_model_without_layers_to_factor_is_refused():
    with pytest.raises(ValueError, match="can be factored; found: none at all"):
        make_plan(nn.Sequential(nn.ReLU()), run, ratio=2.0)
    with pytest.raises(ValueError, match=r"can be factored; found: .'0': 'not matched by `include`'"):
        make_plan(nn.Sequential(nn.Linear(4, 4)), run, ratio=2.0, include=("head*",))


@pytest.mark.parametrize("shape", [(256, 512), (96, 64, 3, 3), (1000, 384)])
def test_ranks_for_tensor_cores_are_multiples_of_eight(shape):
    found = plateau_candidates(shape, 2.0, unit=rank_unit("cuda"))
    assert found
    assert all(rank % 8 == 0 for ranks in found for rank in ranks if rank < min(shape[:2]))
    assert rank_unit("cpu") == 1
