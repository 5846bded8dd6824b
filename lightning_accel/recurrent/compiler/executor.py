"""The schedule of one step: its stages, and the functions that run them for any batch size and length."""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_accel.machine.c_functions import refusal
from lightning_accel.recurrent.cell_step import nesting_of, run_loop
from lightning_accel.recurrent.compiler.captured_blocks import CapturedBlocks
from lightning_accel.recurrent.compiler.compile_source import compile_source, generalize
from lightning_accel.recurrent.compiler.emit_python.generator import Generator, Language, Wanted
from lightning_accel.recurrent.compiler.emit_triton.triton_code import triton_refusal
from lightning_accel.recurrent.compiler.run_blocks import RunSequence
from lightning_accel.recurrent.compiler.scan_lowering import is_affine
from lightning_accel.recurrent.compiler.stage import Stages, rewrite, stage
from lightning_accel.recurrent.compiler.trace import (
    CannotScheduleError,
    StepGraph,
    TensorSpec,
    as_function,
    trace_step,
)
from lightning_accel.recurrent.compiler.workspace import SpareWorkspaces
from lightning_accel.recurrent.exactness.assumptions import assumptions_of, first_change
from lightning_accel.recurrent.exactness.private_copy import private_copy

EXAMPLE_STREAMS = (3, 5)  # numbers of streams whose texts are compared, see `generalize`
_MOST_BATCH_SIZES = 8  # of a step that is another one for each batch size


class StepSchedule:
    """The intra-stream schedule of one step function, for one set of shapes but any batch size and length.

    Args:
        module: Owner of the parameters and buffers. A copy of it is traced.
        step: ``step(module, xs, states) -> (ys, next_states)`` on lists of tensors of one time step.
        xs: One step's inputs; dimension 0 is the batch.
        states: One step's states; likewise.
        scan: Whether loops that are elementwise and affine in one state become scans; one at least has to be.
        compiled: Whether loops that can be written in ``language`` run as machine code; one at least has to.
        reads_sizes: Whether the step may branch on the number of streams, so that each number needs a trace.
        traces: Traces of this step by number of streams, shared by several schedules; new ones are added.
        language: Of the compiled loops; by default Triton on CUDA, C elsewhere. Triton's kernels of tensors on the CPU
            run in its interpreter, which shows what they compute and takes its time.

    Attributes:
        failure: What went wrong in a backward, which then ran plainly; ``None`` as long as nothing did.
        block_steps: Steps of a block; by default as many as fit the cache.
        widest: Numbers a stream of the widest value of a step.
        device: Of its tensors.
        captured: Whether blocks of steps are recorded as CUDA graphs.
        for_any_batch: Whether one text is to serve all batch sizes if it can, for which two are traced.

    Raises:
        CannotScheduleError: If the step can not be traced or staged; the message says why.

    References:
        Hwang, Sung, arXiv:1503.02852. *Deviations*: nodes are the tensor operations of a traced step and of its
        derivative instead of layers; loops of the derivative are found in the same way.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[..., Any],
        xs: Sequence[TensorSpec],
        states: Sequence[TensorSpec],
        *,
        scan: bool = False,
        compiled: bool = False,
        reads_sizes: bool = True,
        traces: dict[int, StepGraph] | None = None,
        language: Language | None = None,
    ) -> None:
        self.scan, self.compiled, self._reads_sizes = scan, compiled, reads_sizes
        self._module, self._step = module, step
        self._xs, self._states = list(xs), list(states)
        self._streams = xs[0].shape[0] if xs and xs[0].shape else 1
        self.device = xs[0].device
        self._variants: dict[tuple[Wanted, int | None], dict[str, Any]] = {}
        self._general: dict[Wanted, str | None] = {}
        self._lock = threading.RLock()
        self._steps: dict[int, StepGraph] = {} if traces is None else traces
        self.failure: str | None = None
        self.block_steps: int | None = None
        self.for_any_batch = True
        self.captured = self.device.type == "cuda" and not (scan or compiled)
        self.spares = SpareWorkspaces(self.device)
        self.stages = self._stage(EXAMPLE_STREAMS[0])
        self.widest = self.stages.widest(EXAMPLE_STREAMS[0])
        nesting = nesting_of(step)
        self._returned = None if nesting is None else (nesting.ys, nesting.states)
        if scan:
            self._find_scans()
        self._language: Language = language or language_of(self.device)
        if compiled:
            reason = self._refusal()
            if reason is not None:
                raise CannotScheduleError(f"no machine code: {reason}.")

    def __call__(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the sequence.

        Args:
            xs: Each of shape (T, B, ...).
            states: Each of shape (B, ...).
            weights: Parameters, then buffers, in the order of the module.

        Returns:
            Outputs, each of shape (T, B, ...), and final states.
        """
        tensors = [*xs, *states, *weights]
        grad = torch.is_grad_enabled()
        needs = [grad and t.requires_grad for t in tensors]
        nx, ns = len(xs), len(states)
        wanted = Wanted(tuple(needs[:nx]), tuple(needs[nx + ns :]), any(needs))
        results = RunSequence.apply(self, wanted, nx, ns, *tensors)
        nesting = nesting_of(self._step)
        if nesting is not None and self._returned is not None:  # as if the step had run
            nesting.ys, nesting.states = self._returned
        ny = self.stages.step.counts[3]
        return list(results[:ny]), list(results[ny:])

    def run_plainly(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the plain loop on a copy of the module with the given weights in it."""
        stepper, named = as_function(private_copy(self._module), self._step, weights)

        def step(_: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            ys, following = functional_call(stepper, named, (list(xs), list(states)))
            return list(ys), list(following)

        return run_loop(step, self._module, xs, states)

    def code(self, wanted: Wanted, streams: int) -> dict[str, Any]:
        """Return the compiled functions for a variant; writes them the first time."""
        with self._lock:
            key = (wanted, streams)
            if key not in self._variants:
                general = self._text_for_any_batch(wanted) if self.for_any_batch else None
                if general is not None and (not self._reads_sizes or self._agrees(general, wanted, streams)):
                    if (wanted, None) not in self._variants:
                        self._variants[wanted, None] = self._compile(wanted, EXAMPLE_STREAMS[0], general)
                    self._variants[key] = self._variants[wanted, None]
                else:
                    own = {s for _, s in self._variants if s is not None}
                    if len(own) >= _MOST_BATCH_SIZES:
                        raise CannotScheduleError("its step is another one for each batch size, and there are many.")
                    self._variants[key] = self._compile(wanted, streams, None)
            return self._variants[key]

    def release(self) -> None:
        """Give back the memory that calls left; the next one takes fresh pages."""
        self.spares.clear()

    def fail(self, reason: str) -> None:
        """Note that a backward had to run plainly."""
        self.failure = self.failure or reason

    def source(self, wanted: Wanted, streams: int = EXAMPLE_STREAMS[0]) -> str:
        """Return the text of a variant for a number of streams."""
        return self._generator(wanted, streams).source()

    def _generator(self, wanted: Wanted, streams: int) -> Generator:
        return Generator(self._stage(streams), wanted, scan=self.scan, compiled=self.compiled, language=self._language)

    def _refusal(self) -> str | None:
        """Return why nothing can be compiled here; ``None`` if something can."""
        if self._language == "Triton":
            return triton_refusal()
        if self.device.type != "cpu":
            return f"there is no C form for {self.device.type}"
        return refusal()

    def _find_scans(self) -> None:
        loops = [s for s in self.stages.forward if s.loop]
        if not loops or not all(is_affine(s.nodes, self.stages.step.states) for s in loops):
            raise CannotScheduleError("no scan: the recurrence is not elementwise and affine in one state.")

    def _text_for_any_batch(self, wanted: Wanted) -> str | None:
        if wanted not in self._general:
            few, more = EXAMPLE_STREAMS
            self._general[wanted] = generalize(self.source(wanted, few), self.source(wanted, more), few, more)
        return self._general[wanted]

    def _agrees(self, general: str, wanted: Wanted, streams: int) -> bool:
        """Tell whether a trace of this number of streams gives the text for any number."""
        few, _ = EXAMPLE_STREAMS
        if streams == few:
            return True
        return general == generalize(self.source(wanted, few), self.source(wanted, streams), few, streams)

    def _compile(self, wanted: Wanted, streams: int, general: str | None) -> dict[str, Any]:
        generator = self._generator(wanted, streams)
        text = generator.source()
        functions = compile_source(general or text, generator.step.constants, self.device)
        if self.captured:
            for name in ("forward", "backward"):
                if name in functions:
                    functions[name] = CapturedBlocks(functions[name], self.device)
        functions["places"] = generator.output_names()
        functions["dependencies"] = generator.step.dependencies
        return functions

    def _stage(self, streams: int) -> Stages:
        if streams not in self._steps:
            xs = [s.with_batch(streams, self._streams) for s in self._xs]
            states = [s.with_batch(streams, self._streams) for s in self._states]
            twin = private_copy(self._module)
            loaded = dict(sys.modules)  # a step may import something
            before = assumptions_of(twin, loaded)
            traced = trace_step(twin, self._step, xs, states)
            if assumptions_of(twin, loaded).key != before.key:
                raise CannotScheduleError(f"one step changes {first_change(twin, before)}.")
            rewrite(traced)
            self._steps[streams] = traced
        return stage(self._steps[streams])


def language_of(device: torch.device) -> Language:
    """Return the language of compiled loops on a device."""
    return "Triton" if device.type == "cuda" else "C"
