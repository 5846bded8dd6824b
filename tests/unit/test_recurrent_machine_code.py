"""Loops as machine code: the same results as the plain loop, and nothing lost where there is no compiler."""

import copy
import functools
import math
import re
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_accel.machine import c_functions
from lightning_accel.machine.c_functions import MachineCode
from lightning_accel.machine.toolchain import CannotCompileError, compile_budget, load
from lightning_accel.recurrent import (
    LayerNormLSTMCell,
    PeepholeLSTMCell,
    Recurrent,
    ZoneoutLSTMCell,
    schedule_choice,
)
from lightning_accel.recurrent.compiler import run_blocks
from lightning_accel.recurrent.scan import linear_scan

F, H, T, B = 5, 20, 9, 3


def made_of(rnn):
    """Schedules that were traced, by their keys, under the only assumptions that there were."""
    (schedules,) = rnn.schedules[0]._traced.values()
    return schedules.made


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class OddCell(nn.Module):
    """Everything else that has a C form: sums over a row, comparisons, other functions, a concatenated state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Linear(F + 2 * hidden, 2 * hidden)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        a, b = self.mix(torch.cat([x, h, c], -1)).chunk(2, -1)
        a = torch.where(a > b, a, 0.5 * b - c)
        scale = 1.0 + a.mean(-1, keepdim=True).abs()
        c = torch.relu(b) / scale + nn.functional.softplus(a).neg().exp() * c
        h = torch.maximum(torch.sin(a), torch.minimum(b, c)).clamp_min(-0.9) * torch.rsqrt(1.0 + c * c)
        return torch.cat([h, c], -1), (h, c)


class TwoDependentLoops(nn.Module):
    """A loop that feeds another one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lower, self.upper = nn.GRUCell(F, hidden), LayerNormLSTMCell(hidden, hidden)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        lower = self.lower(x, state[0])
        y, (h, c) = self.upper(lower, (state[1], state[2]))
        return y * lower, (lower, h, c)


def gradients(rnn, x, state):
    y, last = rnn(x, state)
    total = sum((k + 1.0) * r.cos().sum() for k, r in enumerate((y, *last)))
    found = torch.autograd.grad(total, [*torch.utils._pytree.tree_leaves((x, state)), *rnn.parameters()])
    return [y, *last, *found]


def as_loop(rnn):
    twin = copy.deepcopy(rnn)
    twin.schedules[0].schedule, twin.schedules[0].choices = "loop", {}
    return twin


@pytest.mark.parametrize("rows", [256, 2 * B])
@pytest.mark.parametrize(("kind", "states"), [(OddCell, 2), (TwoDependentLoops, 3)])
def test_other_operations_and_several_loops(kind, states, rows, monkeypatch):
    monkeypatch.setattr(run_blocks, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(run_blocks, "_BLOCK_NUMBERS", 0)
    rnn = Recurrent(kind(H).double(), schedule="compiled")
    x = torch.randn(T, B, F, dtype=torch.double, requires_grad=True)
    state = tuple(torch.randn(B, H, dtype=torch.double, requires_grad=True) for _ in range(states))
    actual, expected = gradients(rnn, x, state), gradients(as_loop(rnn), x, state)
    assert set(rnn.schedules[0].choices.values()) == {"compiled"}
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max().item() <= 1e-12 * max(e.abs().max().item(), 1.0)


def test_masks_given_with_the_input():
    rnn = Recurrent(ZoneoutLSTMCell(F, H).double(), schedule="compiled")
    x = (torch.randn(T, B, F, dtype=torch.double), (torch.rand(T, B, 2 * H) < 0.3).double())
    torch.testing.assert_close(rnn(x)[0], as_loop(rnn)(x)[0], rtol=0, atol=1e-12)


def test_batches_of_one_and_others_share_the_code():
    rnn = Recurrent(LayerNormLSTMCell(F, H).double(), schedule="compiled")
    for steps, streams in ((T, B), (1, 1), (4, 1), (3, 7)):
        x = torch.randn(steps, streams, F, dtype=torch.double)
        torch.testing.assert_close(rnn(x)[0], as_loop(rnn)(x)[0], rtol=0, atol=1e-12)
    (made,) = made_of(rnn).values()
    assert len({id(code) for code in made._variants.values()}) == 1


def test_inputs_and_gradients_that_are_not_dense():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="compiled")
    x = torch.randn(B, F, T, dtype=torch.double).permute(2, 0, 1)
    found = []
    for module in (rnn, as_loop(rnn)):
        module(x)[0].sum().backward()  # its gradient is one number, repeated
        found.append([p.grad for p in module.parameters()])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_float32_is_as_near_as_torchs_own():
    rnn = Recurrent(PeepholeLSTMCell(F, H), schedule="compiled")
    exact = as_loop(rnn).double()
    x = 3.0 * torch.randn(T, B, F)
    y = rnn(x)[0]
    assert (y - exact(x.double())[0]).abs().max().item() < 1e-6


def test_functions_at_their_ends():
    values = [0.0, -0.0, 1e-30, 1e-4, 0.6, 0.7, 9.0, 87.0, 89.0, 1e30, math.inf, math.nan]
    x = torch.tensor([*values, *(-v for v in values)])[None, None]
    ramp = torch.linspace(-100.0, 100.0, 4001)[None, None]
    text = """void all(int64_t n, int64_t B, const int64_t *at, product_t call) {
        const real *x = (real *)at[0];
        real *e = (real *)at[3], *s = (real *)at[6], *t = (real *)at[9];
        for (int64_t k = 0; k < B; ++k) { e[k] = exp_real(x[k]); s[k] = sigmoid_real(x[k]); t[k] = tanh_real(x[k]); }
    }"""
    machine = MachineCode(text, torch.float32)
    for given in (x, ramp):
        results = [torch.empty_like(given) for _ in range(3)]
        machine.run("all", 1, given.numel(), [given, *results], [])
        for result, function in zip(results, (torch.exp, torch.sigmoid, torch.tanh), strict=True):
            torch.testing.assert_close(result, function(given), rtol=1e-6, atol=3e-38, equal_nan=True)


def test_nothing_is_compiled_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(schedule_choice, "_COMPILE_SECONDS", math.inf)
    rnn = Recurrent(PeepholeLSTMCell(F, H))
    rnn(torch.randn(T, B, F))[0].sum().backward()
    assert {key[0] for key in made_of(rnn)} == {"intra_stream", "scan"}
    monkeypatch.setattr(schedule_choice, "_COMPILE_SECONDS", 0.0)
    rnn.schedules[0].choices.clear()
    rnn.schedules[0].calls_left = 0
    rnn(torch.randn(T, B, F))
    assert "compiled" not in {key[0] for key in made_of(rnn)}
    rnn.schedules[0].choices.clear()
    rnn.schedules[0].calls_left = math.inf
    rnn(torch.randn(T, B, F))
    assert "compiled" in {key[0] for key in made_of(rnn)}


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(c_functions, "find_compiler", lambda: None)
    c_functions._refusal.cache_clear()
    schedule_choice._said.clear()
    yield
    c_functions._refusal.cache_clear()
    schedule_choice._said.clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_one_warning_and_the_same_results():
    rnn, other = Recurrent(PeepholeLSTMCell(F, H)), Recurrent(PeepholeLSTMCell(F, H))
    x = torch.randn(T, B, F)
    with pytest.warns(UserWarning, match="without machine code.*there is no C compiler"):
        y = rnn(x)[0]
    other(x)
    torch.testing.assert_close(y, as_loop(rnn)(x)[0])
    with pytest.warns(UserWarning, match="plain loop, not 'compiled': no machine code: there is no C compiler"):
        Recurrent(PeepholeLSTMCell(F, H), schedule="compiled")(x)


@pytest.mark.usefixtures("no_compiler")
def test_what_a_machine_with_a_compiler_chose_runs_without_one():
    rnn = Recurrent(PeepholeLSTMCell(F, H))
    x = torch.randn(T, B, F)
    key = schedule_choice.kind_of_call(choice_step(rnn), [x], [torch.zeros(B, H)] * 2)
    rnn.schedules[0].choices[key] = "compiled"
    with pytest.warns(UserWarning, match="there is no C compiler"):
        y = rnn(x)[0]
    assert {k[0] for k, made in made_of(rnn).items() if made is not None} == {"intra_stream"}
    torch.testing.assert_close(y, as_loop(rnn)(x)[0])


def choice_step(rnn):
    """The step under which a layer's calls are remembered."""
    seen = []
    run = rnn.schedules[0].run
    rnn.schedules[0].run = lambda step, xs, states: seen.append(step) or run(step, xs, states)
    rnn.schedules[0].schedule = "loop"
    rnn(torch.randn(1, 1, F))
    del rnn.schedules[0].run
    rnn.schedules[0].schedule = "auto"
    rnn.schedules[0].choices.clear()
    return seen[0]


class OuterProduct(nn.Module):
    """Its second factor changes with every step."""

    def forward(self, x, state):
        h = torch.tanh(x @ state.t() @ state)
        return h, h


PRODUCTS = """
void products(int64_t n, int64_t B, const int64_t *at, product_t call) {
    real *const w = (real *)at[6], *const made = packed(B, n, COLUMNS, INNER, w, at[8]);
    for (int64_t t = 0; t < n; ++t)
        product(call, B, COLUMNS, INNER, (real *)at[0] + t * at[1], at[2], w, at[8], made, (real *)at[3] + t * at[4],
            at[5], t % 2, t);
    free(made);
}
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (7, 5), (40, 20), (300, 33)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_products_of_few_and_of_many_rows(by_columns, columns, inner, dtype):
    machine = MachineCode(PRODUCTS.replace("COLUMNS", str(columns)).replace("INNER", str(inner)), dtype)
    w = torch.randn(columns, inner, dtype=dtype).t() if by_columns else torch.randn(inner, columns, dtype=dtype)
    for rows in (*range(1, 18), 31, 32, 33):
        a, c = torch.randn(5, rows, inner + 3, dtype=dtype), torch.randn(5, rows, columns + 2, dtype=dtype)
        expected, around = c.clone(), c[..., columns:].clone()
        for t in range(5):
            expected[t, :, :columns] = a[t, :, :inner] @ w + (t % 2) * c[t, :, :columns]
        machine.run("products", 5, rows, [a[..., :inner], c[..., :columns]], [w])
        close = 1e-4 if dtype is torch.float32 else 1e-11
        torch.testing.assert_close(c, expected, rtol=close, atol=close, msg=lambda text, rows=rows: f"{rows}: {text}")
        assert torch.equal(c[..., columns:], around)


def test_loops_that_have_no_c_form_say_why():
    with pytest.warns(UserWarning, match="none of its loops can be written in C: .*a product whose second factor"):
        Recurrent(OuterProduct(), schedule="compiled")(torch.randn(T, B, F), torch.randn(B, F))


def test_text_that_does_not_compile_and_compilers_that_do_not_work(monkeypatch, tmp_path):
    with pytest.raises(CannotCompileError, match="refused the text"):
        MachineCode("this is no C;", torch.float32)
    silent = tmp_path / "cc"
    silent.write_text('#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n')
    silent.chmod(0o755)
    monkeypatch.setenv("CC", str(silent))
    with pytest.raises(CannotCompileError, match="does not load"):
        MachineCode("int one(void) { return 1; }", torch.float32)
    silent.write_text("not a program")
    with pytest.raises(CannotCompileError, match="did not run"):
        MachineCode("int two(void) { return 2; }", torch.float32)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotCompileError, match="there is no C compiler"):
        MachineCode("int three(void) { return 3; }", torch.float32)


@pytest.mark.parametrize("steps", [300, 2])
def test_scans_in_machine_code(steps):
    a = torch.rand(steps, 40, 300, dtype=torch.double)[:, :, ::2].requires_grad_()
    b, h0 = torch.randn(steps, 40, 150, dtype=torch.double).requires_grad_(), torch.randn(40, 150, dtype=torch.double)
    state, expected = h0, []
    for a_t, b_t in zip(a, b, strict=True):
        state = torch.addcmul(b_t, a_t, state)
        expected.append(state)
    scanned, looped = linear_scan(a, b, h0), torch.stack(expected)
    weights = torch.randn(1, 40, 150, dtype=torch.double).expand(steps, -1, -1)
    torch.testing.assert_close(scanned, looped, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(
        torch.autograd.grad(scanned, (a, b), weights), torch.autograd.grad(looped, (a, b), weights), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_a_compiler_that_hangs_is_killed_with_its_children_and_given_up(monkeypatch, tmp_path):
    hanging, children = tmp_path / "cc", tmp_path / "children"
    left = tmp_path / "left"
    hanging.write_text(
        f'#!/bin/sh\ntouch "$TMPDIR/half.s"\necho "$TMPDIR" > {left}\nsleep 300 &\n'
        f'echo $! > {children}\necho $$ >> {children}\nprintf "\\377"\nwait\n'
    )
    hanging.chmod(0o755)
    monkeypatch.setenv("CC", str(hanging))
    with compile_budget(3.0), pytest.raises(CannotCompileError, match="is given up: it had not ended"):
        load("int four(void) { return 4; }")
    started, deadline = [int(pid) for pid in children.read_text().split()], time.monotonic() + 20
    while any(map(runs, started)) and time.monotonic() < deadline:  # a killed process takes a moment to be gone
        time.sleep(0.01)
    assert len(started) == 2
    assert not any(map(runs, started))
    assert not Path(left.read_text().strip()).exists()
    with pytest.raises(CannotCompileError, match="is given up"):
        load("int five(void) { return 5; }")


def test_one_long_text_does_not_cost_the_others_their_machine_code(monkeypatch, tmp_path):
    slow = tmp_path / "cc"  # takes its time for one text only
    slow.write_text(
        '#!/bin/sh\nfor a; do case "$a" in *.c) grep -q sleepy "$a" && exec sleep 300;; esac; done\nexec cc "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    assert load("int six(void) { return 6; }").six() == 6
    for attempt in range(2):
        with compile_budget(0.5), pytest.raises(CannotCompileError, match="is stopped at this text"):
            load(f"int sleepy{attempt}(void) {{ return 0; }}")
        assert load(f"int seven{attempt}(void) {{ return 7; }}")[f"seven{attempt}"]() == 7
    with compile_budget(0.5), pytest.raises(CannotCompileError, match="is given up"):  # it is the compiler after all
        load("int sleepy(void) { return 0; }")
    with pytest.raises(CannotCompileError, match="is given up"):
        load("int eight(void) { return 8; }")


def test_only_what_is_never_timed_is_compiled_quickly(monkeypatch):
    asked = []

    def note(text, *, quick=False):
        asked.append((re.match(r"typedef (\w+) real", text)[1], quick))
        return load(text, quick=quick)

    monkeypatch.setattr(c_functions, "load", note)
    monkeypatch.setattr(c_functions, "compiled_library", functools.cache(c_functions.compiled_library.__wrapped__))
    Recurrent(PeepholeLSTMCell(F, H), schedule="compiled")(torch.randn(T, B, F))
    assert [kind for kind in asked if kind != ("float", False)] == [("double", True)]
    asked.clear()
    Recurrent(PeepholeLSTMCell(F, H).double(), schedule="compiled")(torch.randn(T, B, F, dtype=torch.double))
    assert ("double", False) in asked


def runs(pid):
    """Whether a process still runs; one that was killed may wait to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_compiler_with_arguments_that_speaks_no_utf8(monkeypatch, tmp_path):
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\nprintf "\\377\\376 f\\374r nichts\\n" >&2\nshift\nexec cc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", f"{wrapper} --first")
    assert load("int six(void) { return 6; }").six() == 6
    with pytest.raises(CannotCompileError, match="refused the text"):
        load("no C;")
