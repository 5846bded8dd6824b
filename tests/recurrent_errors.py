"""How far results are from what they have to be."""

import torch


def relative_errors(actual, expected):
    """Return ``max |a - e| / max |e|`` for each tensor of two mappings with equal keys; zeros have to be zeros."""
    assert list(actual) == list(expected)
    errors = {}
    for name, e in expected.items():
        a = torch.zeros(()) if actual[name] is None else actual[name].detach()
        largest = 0.0 if e is None else e.detach().abs().max().item()
        if largest == 0.0:
            errors[name] = 0.0 if not a.any() else float("inf")
        else:
            errors[name] = (a - e.detach()).abs().max().item() / largest
    return errors
