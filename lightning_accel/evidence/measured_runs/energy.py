"""Energy of a span of time, where the machine tells: RAPL counters of processors, NVML counters of NVIDIA devices.

Both count the whole package or device, whoever uses it: a figure means something on a machine that does nothing else.
"""

import contextlib
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Reads the counters when it is made and when it is asked.

    Args:
        device: Whose energy counts besides that of the processors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._read()

    def joules(self) -> float | None:
        """Return the energy since the meter was made; ``None`` if the machine tells none."""
        end = self._read()
        shared = self._begin.keys() & end.keys()
        if not shared:
            return None
        return sum(_spent(self._begin[name], end[name], _wraps_at(name)) for name in shared)

    def _read(self) -> dict[str, float]:
        counters = {}
        for package in sorted(_RAPL.glob("intel-rapl:[0-9]*")):
            if package.name.count(":") == 1:  # sub-domains are part of their package
                with contextlib.suppress(OSError, ValueError):
                    counters[str(package)] = int((package / "energy_uj").read_text()) / 1e6
        if self._device.type == "cuda":
            with contextlib.suppress(Exception):  # NVML is optional, and not every device counts
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByIndex(self._device.index or 0)
                counters["nvml"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        return counters


def _wraps_at(name: str) -> float:
    with contextlib.suppress(OSError, ValueError):
        return int((Path(name) / "max_energy_range_uj").read_text()) / 1e6
    return 0.0


def _spent(begin: float, end: float, wraps_at: float) -> float:
    return end - begin if end >= begin else end - begin + wraps_at
