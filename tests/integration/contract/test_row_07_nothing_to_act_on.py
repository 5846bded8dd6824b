"""Row 7: nothing to act on is a clear error; what the user froze stays frozen."""

import re
import warnings

import pytest
import torch
from accelerators import cases
from contract_models import ContractModule
from contract_runs import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException


@pytest.mark.parametrize("entry", cases(lambda entry: entry.nothing_to_act_on is not None))
def test_nothing_to_act_on_says_what_was_looked_for(entry, tmp_path):
    hopeless = ContractModule(f"hopeless {entry.name}")
    if entry.nothing_is_a_warning:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(entry, tmp_path, module=hopeless)
        assert [w for w in said if re.search(entry.nothing_to_act_on, str(w.message))]
    else:
        with pytest.raises(MisconfigurationException, match=entry.nothing_to_act_on):
            fit(entry, tmp_path, module=hopeless)
    assert list(hopeless.state_dict()) == list(ContractModule(f"hopeless {entry.name}").state_dict())


@pytest.mark.parametrize("entry", cases())
def test_frozen_by_the_user_stays_frozen(entry, tmp_path):
    module = ContractModule(entry.name)
    first = next(child for child in module.network.children() if list(child.parameters()))
    first.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    prefix = next(name for name, child in module.named_modules() if child is first)
    fit(entry, tmp_path, module=module)

    frozen = {name: p for name, p in module.named_parameters() if name.startswith(f"{prefix}.")}
    assert frozen
    for name, parameter in frozen.items():
        assert not parameter.requires_grad, name
        if name in before:
            assert torch.equal(parameter, before[name]), name
    others = [p for name, p in module.named_parameters() if name not in frozen]
    assert all(parameter.requires_grad for parameter in others)
