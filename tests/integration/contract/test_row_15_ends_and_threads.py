"""Row 15: an exception leaves no trace in the module; other threads may use other modules meanwhile."""

import copy
import threading

import pytest
import torch
from accelerators import cases
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer


class Breaks(ContractModule):
    """Raises in a step."""

    problem = None
    at = 0

    def training_step(self, batch, batch_idx):
        if self.problem is not None and self.trainer.global_step == self.at:
            raise self.problem
        return super().training_step(batch, batch_idx)


def hooks_of(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: [len(getattr(m, kind)) for kind in kinds] for name, m in module.named_modules()}


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("at", [0, 3, 13])
@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_exception_leaves_no_trace(entry, problem, at, tmp_path):
    module = Breaks(entry.name)
    module.problem, module.at = problem("on purpose"), at
    with pytest.raises((problem, SystemExit)):
        fit(entry, tmp_path, module=module)
    module.problem = None
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(any(counts) for counts in hooks_of(module).values())
    assert not any("forward" in m.__dict__ for m in module.modules())
    torch.save(copy.deepcopy(module).state_dict(), tmp_path / "state.pt")

    again, _ = fit(entry, tmp_path / "again", callbacks=entry.callbacks(), module=module)
    assert entry.acted(again)


@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_another_thread_infers_and_trains_meanwhile(entry, tmp_path):
    alone, _ = fit(entry, tmp_path / "alone")
    other = ContractModule(entry.name)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    x = next(iter(loader(entry.data())))[0]
    expected = other(x).detach().clone()
    stop, seen, problems = threading.Event(), [], []

    def use():
        try:
            while not stop.is_set():
                y = other(x)
                y.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(bool(torch.equal(y.detach(), expected)))
        except Exception as error:
            problems.append(repr(error))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        module, _ = fit(entry, tmp_path / "meanwhile")
    finally:
        stop.set()
        thread.join(60)
    assert not problems
    assert seen
    assert all(seen), "what the other thread computes is not touched"
    assert entry.acted(module)
    assert_equal_modules(alone, module, tolerance=1e-6)  # schedules chosen by a clock differ by rounding


@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_fitted_module_serves_in_a_thread(entry, tmp_path):
    module, _ = fit(entry, tmp_path)
    assert entry.acted(module)
    module.eval()
    x = next(iter(loader(entry.data())))[0]
    expected, found = module(x).detach(), []
    thread = threading.Thread(target=lambda: found.append(module(x).detach()))
    thread.start()
    thread.join(60)
    assert torch.equal(found[0], expected)
    (result,) = trainer(tmp_path / "test", []).test(module, loader(entry.data()), verbose=False)
    assert result["test/loss"] > 0.0
