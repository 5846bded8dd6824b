"""How a worker pushes: the gradients go to the shards, their description to the head once all shards have them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.compression import ErrorFeedback
from lightning_accel.async_sgd.policy.encoding.wire import encode_push, encode_values
from lightning_accel.async_sgd.policy.pushes import NO_UPDATE, Push
from lightning_accel.async_sgd.ray_engine.calls import HeadCalls
from lightning_accel.async_sgd.ray_engine.messages import pack_request, unpack_answer
from lightning_accel.async_sgd.ray_engine.shards.group import is_death
from lightning_accel.async_sgd.ray_engine.shards.layout import Layout
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.shared_memory.pushing import is_finite


class PushSender:
    """Send the pushes of one worker, all for the same layers.

    Args:
        calls: Of the worker to the head.
        generation: Of the layers, as the shards count.
        layout: Which parameters lie on which shard.
        actors: Handles of the shards.
        first: Number of the push before the first.
        probe: Called with each stage that a push passes.
    """

    def __init__(
        self,
        calls: HeadCalls,
        generation: int,
        layout: Layout,
        actors: Sequence[Any],
        *,
        first: int,
        probe: Callable[[str], None],
    ) -> None:
        self.sequence = first
        self._calls = calls
        self._probe = probe
        self._generation = generation
        self._layout = layout
        self._actors = list(actors)
        self._feedback = ErrorFeedback(calls.settings.compression)
        self._under_way: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._outcome = "applied"

    def send(
        self,
        values: dict[str, Any],
        gradients: Sequence[Tensor | None],
        *,
        buffers: Sequence[Tensor],
        base: Sequence[Tensor],
    ) -> None:
        """Send the next push, without waiting; what is not finite goes without its gradients.

        Args:
            values: What describes it, but for what follows.
            gradients: One of each parameter, or None.
            buffers: All, or none.
            base: Parameters that the gradients belong to, or none.
        """
        self.sequence += 1
        present = [gradient for gradient in gradients if gradient is not None]
        finite = is_finite(present)  # before compression, which would keep a NaN for the next push
        carries = finite and bool(present) and values["optimizer"] != NO_UPDATE
        deposits: list[Any] = []
        calls = self._calls
        self._probe("before")
        if carries:
            for places, actor in zip(self._layout, self._actors, strict=True):
                if deposits:
                    self._probe("half-way")
                part = self._part(values, [gradients[p] for p in places], places, [base[p] for p in places if base])
                deposits.append(actor.deposit.remote(self._generation, part))
        described = {
            **values,
            "sequence": self.sequence,
            "finite": finite,
            "present": carries,
            "void": False,
            "buffers": bool(buffers),
        }
        payload = encode_values(buffers, version=0, steps=[]) if buffers else b""
        request = pack_request(Message("push", described, payload))
        self._probe("before the flag")
        reference = calls.head.push.remote(calls.worker, calls.incarnation, request, *deposits)
        self._under_way[self.sequence] = reference, described
        self._probe("after the flag")

    def _part(
        self, values: dict[str, Any], gradients: list[Tensor | None], places: Sequence[int], base: list[Tensor]
    ) -> bytes:
        compression = self._calls.settings.compression
        payload = []
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is None:
                continue
            if compression.name == "none":
                payload.append(gradient.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
            else:
                area = torch.empty(compression.nbytes(gradient.numel(), gradient.dtype), dtype=torch.uint8)
                self._feedback.write(place, gradient, area)
                payload.append(area)
        push = Push(
            worker=self._calls.worker,
            incarnation=self._calls.incarnation,
            sequence=self.sequence,
            base_version=values["base_version"],
            optimizer=values["optimizer"],
            gradients=gradients,
            base=base,
        )
        return encode_push(push, payload)

    def wait_for(self, sequence: int) -> tuple[str, tuple[Message, list[Any]] | None]:
        """Wait until push ``sequence`` and all before it were decided on.

        Returns:
            What became of the last one, and the answer to it if it came just now.
        """
        answer = None
        for number in [number for number in sorted(self._under_way) if number <= sequence]:
            reference, described = self._under_way.pop(number)
            try:
                data, references, _ = self._calls.outcome_of(reference)
            except Exception as error:
                if not is_death(error):
                    raise
                # a shard died before it had its part: nobody uses the others', and the batches are given out again
                data, references = self._withdraw(described)
            reply = unpack_answer(data)
            self._outcome = reply.values.pop("outcome")
            answer = reply, references
        return self._outcome, answer

    def _withdraw(self, described: dict[str, Any]) -> tuple[bytes, list[Any]]:
        void = {**described, "void": True, "finite": True, "present": False, "buffers": False, "groups": None}
        data, references, _ = self._calls.call("push", pack_request(Message("push", void)))
        self._actors = self._calls.call("shards")
        return data, references
