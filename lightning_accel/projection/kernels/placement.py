"""Where a tensor lies decides how a projection is computed: one question, so that tests can answer it otherwise."""

from torch import Tensor


def is_far(x: Tensor) -> bool:
    """Whether looking at a number of ``x`` waits for a device: then no number is looked at, and operations are large.

    What is computed for such a tensor is right for tensors on the CPU as well, if not quick.
    """
    return x.device.type != "cpu"
