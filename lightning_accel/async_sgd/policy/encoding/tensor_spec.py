"""Name, shape and dtype of a tensor that server and workers have agreed on when the run was opened."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of a run."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(name: str, tensor: Tensor) -> "TensorSpec":
        """Describe a tensor."""
        return TensorSpec(name, tensor.shape, tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.shape.numel() * self.dtype.itemsize
