"""Paired, interleaved timing and its statistics: one for rank search, schedule choice, gate and reports.

Times of one program vary by more than the differences that matter here, and they drift. So candidates are always
timed in turns, in shuffled order, and compared pair by pair: `time_interleaved` makes the times, `compare_paired` the
verdict.
"""

import contextlib
import itertools
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Verdict = Literal["faster", "slower", "no difference", "undecided"]

_EXACT_SIGN_FLIPS = 16  # up to here all 2**n sign patterns are enumerated
_RESAMPLES = 4000
_CACHE_BYTES = 128 * 2**20  # more than any device's second-level cache holds


@dataclass(frozen=True)
class PairedRatio:
    """How many times faster a candidate is than its baseline, from paired times.

    Attributes:
        median: Median over pairs of ``baseline seconds / candidate seconds``; over 1 the candidate is faster.
        low: Lower end of the bootstrap interval of the median.
        high: Upper end of it.
        p_value: Two-sided exact sign-flip test of "the mean log ratio is 0".
        pairs: Number of pairs.
        confidence: Of the interval, in (0, 1).
    """

    median: float
    low: float
    high: float
    p_value: float
    pairs: int
    confidence: float = 0.95

    @property
    def verdict(self) -> Verdict:
        """Say "faster" or "slower" only where interval *and* exact test agree; "undecided" with too few pairs."""
        alpha = 1.0 - self.confidence
        if 2.0 / 2.0**self.pairs > alpha:
            return "undecided"
        if self.p_value <= alpha and self.low > 1.0:
            return "faster"
        if self.p_value <= alpha and self.high < 1.0:
            return "slower"
        return "no difference"


def compare_paired(baseline: Sequence[float], candidate: Sequence[float], *, confidence: float = 0.95) -> PairedRatio:
    """Compare paired times of a baseline and a candidate.

    Args:
        baseline: Seconds, > 0; ``baseline[i]`` and ``candidate[i]`` were taken side by side. An infinite time means
            "never reached": a pair of two such counts as a ratio of 1.
        candidate: Seconds, as many as of the baseline.
        confidence: Of the bootstrap interval, in (0, 1).

    Raises:
        ValueError: If the lengths differ, nothing was measured, or a time is not positive.
    """
    if len(baseline) != len(candidate) or not baseline:
        lengths = f"{len(baseline)} and {len(candidate)}"
        raise ValueError(f"`baseline` and `candidate` must be of one length >= 1, got {lengths}.")
    if not all(seconds > 0.0 for seconds in (*baseline, *candidate)):  # NaN fails as well
        raise ValueError("times must be > 0 seconds; take a clock with a finer resolution or longer runs.")
    logs = [_log_ratio(b, c) for b, c in zip(baseline, candidate, strict=True)]
    low, high = bootstrap_interval(logs, confidence=confidence)
    return PairedRatio(
        median=_exp(_median(logs)),
        low=_exp(low),
        high=_exp(high),
        p_value=sign_flip_p_value(logs),
        pairs=len(logs),
        confidence=confidence,
    )


@dataclass(frozen=True)
class PairedDifference:
    """By how much a candidate's value differs from its baseline's, from paired values such as accuracies.

    Attributes:
        median: Median over pairs of ``candidate - baseline``.
        low: Lower end of the bootstrap interval of the median.
        high: Upper end of it.
        p_value: Two-sided exact sign-flip test of "the mean difference is 0".
        pairs: Number of pairs.
        confidence: Of the interval, in (0, 1).
    """

    median: float
    low: float
    high: float
    p_value: float
    pairs: int
    confidence: float = 0.95

    @property
    def verdict(self) -> Literal["higher", "lower", "no difference", "undecided"]:
        """Say "higher" or "lower" only where interval *and* exact test agree; "undecided" with too few pairs."""
        alpha = 1.0 - self.confidence
        if 2.0 / 2.0**self.pairs > alpha:
            return "undecided"
        if self.p_value <= alpha and (self.low > 0.0 or self.high < 0.0):
            return "higher" if self.low > 0.0 else "lower"
        return "no difference"


def subtract_paired(
    baseline: Sequence[float], candidate: Sequence[float], *, confidence: float = 0.95
) -> PairedDifference:
    """Compare paired finite values of a baseline and a candidate by their difference.

    Args:
        baseline: ``baseline[i]`` and ``candidate[i]`` come from one pair.
        candidate: As many as of the baseline.
        confidence: Of the bootstrap interval, in (0, 1).

    Raises:
        ValueError: If the lengths differ, nothing was measured, or a value is not finite.
    """
    if len(baseline) != len(candidate) or not baseline:
        lengths = f"{len(baseline)} and {len(candidate)}"
        raise ValueError(f"`baseline` and `candidate` must be of one length >= 1, got {lengths}.")
    differences = [c - b for b, c in zip(baseline, candidate, strict=True)]
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("values must be finite; leave out the pairs in which a run diverged.")
    low, high = bootstrap_interval(differences, confidence=confidence)
    p_value = sign_flip_p_value(differences)
    return PairedDifference(_median(differences), low, high, p_value, len(differences), confidence)


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the median of ``values`` (deterministic for one ``seed``).

    Raises:
        ValueError: If ``values`` is empty or ``confidence`` is not in (0, 1).
    """
    if not values:
        raise ValueError("`values` must not be empty.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    rng = random.Random(seed)
    medians = sorted(_median(rng.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    tail = (1.0 - confidence) / 2.0
    return medians[int(tail * (_RESAMPLES - 1))], medians[math.ceil((1.0 - tail) * (_RESAMPLES - 1))]


def sign_flip_p_value(values: Sequence[float], *, seed: int = 0) -> float:
    """Test "``values`` are symmetric around 0" by flipping signs, two-sided.

    Exact up to 16 values (it can not go under ``2 / 2**n``), by 4,000 random flips beyond. Infinite values count as
    ten times the largest finite one, so that a run that never ends weighs heavily without making sums undefined.

    Raises:
        ValueError: If ``values`` is empty.
    """
    if not values:
        raise ValueError("`values` must not be empty.")
    finite = [abs(v) for v in values if math.isfinite(v)]
    largest = 10.0 * max(finite, default=1.0) or 10.0
    clipped = [v if math.isfinite(v) else math.copysign(largest, v) for v in values]
    observed = abs(sum(clipped)) * (1.0 - 1e-12)
    if len(clipped) <= _EXACT_SIGN_FLIPS:
        patterns = itertools.product((1.0, -1.0), repeat=len(clipped))
        hits = [abs(sum(s * v for s, v in zip(signs, clipped, strict=True))) >= observed for signs in patterns]
        return sum(hits) / len(hits)
    rng = random.Random(seed)
    extreme = sum(abs(sum(rng.choice((1.0, -1.0)) * v for v in clipped)) >= observed for _ in range(_RESAMPLES))
    return (extreme + 1) / (_RESAMPLES + 1)


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    budget_seconds: float = math.inf,
    min_rounds: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time callables in turns, in an order shuffled anew each round, so that drift hits all of them alike.

    Args:
        candidates: Name to callable.
        rounds: How often each is timed, >= 1.
        warmup: Untimed calls of each beforehand, >= 0.
        device: Where the work runs. On a CUDA device the time is that between two events around the call, after the
            caches were filled with something else; with another clock the device is synchronized around each call.
        budget_seconds: Stop after the round that passes this wall time, warm-up included.
        min_rounds: Rounds that run whatever the budget says.
        seed: Of the order; the global random state is not touched.
        clock: Returns seconds.

    Returns:
        Seconds per call, one list a candidate, all of one length; index i of two lists makes a pair.

    Raises:
        ValueError: If there is no candidate, or ``rounds < 1``, or ``warmup < 0``.
    """
    if not candidates:
        raise ValueError("`candidates` must name at least one callable.")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"`rounds` must be >= 1 and `warmup` >= 0, got {rounds} and {warmup}.")
    order = list(candidates)
    rng = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for name in order * warmup:
        candidates[name]()
    timed = _between_events(device) if torch.device(device).type == "cuda" and clock is time.perf_counter else None
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() - start > budget_seconds:
            break
        rng.shuffle(order)
        for name in order:
            if timed is not None:
                seconds[name].append(timed(candidates[name]))
                continue
            synchronize(device)
            begin = clock()
            candidates[name]()
            synchronize(device)
            seconds[name].append(clock() - begin)
    return seconds


def _between_events(device: torch.device | str) -> Callable[[Callable[[], object]], float]:
    """Return what takes the seconds of a call on a CUDA device, from caches that hold nothing of it."""
    other = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)

    def seconds_of(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            other.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
        return max(float(begin.elapsed_time(end)), 1e-6) / 1000.0

    return seconds_of


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done its work; nothing to do on CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Put back what a trial step changes: parameters, buffers, gradients, modes and random states.

    Python's, torch's and every used CUDA device's generators are restored. Parameters are restored bit for bit and in
    place, so optimizers and views stay attached. Hooks the caller adds are the caller's to remove.
    """
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    modes = [(m, m.training) for module in modules for m in module.modules()]
    tensors = [t for module in modules for t in itertools.chain(module.parameters(), module.buffers())]
    saved = [(t, t.detach().clone()) for t in tensors]
    gradients = [(p, p.grad, p.requires_grad) for module in modules for p in module.parameters()]
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        for parameter, gradient, requires_grad in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for submodule, training in modes:
            submodule.training = training
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Describe where times were taken: device, versions, threads. Names no host, user or path."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "device_type": device.type,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _log_ratio(baseline: float, candidate: float) -> float:
    if math.isinf(baseline) and math.isinf(candidate):
        return 0.0
    if math.isinf(candidate):
        return -math.inf
    return math.inf if math.isinf(baseline) else math.log(baseline / candidate)


def _median(values: Sequence[float]) -> float:
    """Median in which ``inf`` and ``-inf`` meet at 0: half of the pairs were won for ever, half lost."""
    middle = statistics.median_low(values), statistics.median_high(values)
    return 0.0 if middle == (-math.inf, math.inf) else statistics.fmean(middle)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf
