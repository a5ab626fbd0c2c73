"""`ModelProbe`: what methods may ask of the model while they are applied (`methods.method.CalibrationModel`).

The decoder is run layer by layer with the arguments that its own forward would pass, recorded once by hooks, so that
no family needs code of its own and a changed plan is evaluated only from the first layer that it changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.attention import SharingContext
from hf_kvcache.calibration.texts import Calibration, token_windows
from hf_kvcache.patches.adapter import Adapter
from hf_kvcache.patches.attach import attach, detach
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.spec import CacheSpec

KEPT_TRACES = 3


@dataclass
class Trace:
    """One run under one plan.

    Args:
        plan: that the run was under.
        inputs: of every layer, `[B, T, hidden]`.
        kv: of every producer, keys and values `[B, H_kv, T, D]`.
        final: hidden states after the final norm, `[B, T, hidden]`.
    """

    plan: SharingPlan
    inputs: list[Tensor]
    kv: dict[int, tuple[Tensor, Tensor]]
    final: Tensor


class ModelProbe:
    """Answers a method's questions about an unpatched model.

    Args:
        model: the model.
        adapter: of its family.
        full: the spec of the model with nothing lost.
        tokenizer: for calibration texts, None to look for one beside the model.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, full: CacheSpec, tokenizer: Any = None) -> None:
        self.model, self.adapter, self.full, self.tokenizer = model, adapter, full, tokenizer
        self.num_layers, self.sliding_windows = full.num_layers, full.sliding_windows
        self.fingerprint = full.fingerprint
        self.layers = adapter.find_layers(model)
        self._ids: Tensor | None = None
        self._calls: list[dict[str, Any]] = []
        self._traces: deque[Trace] = deque(maxlen=KEPT_TRACES)
        self._untouched: Trace | None = None

    @torch.no_grad()
    def use_texts(self, texts: Calibration, samples: int, length: int) -> None:
        """Sets the calibration batch and runs the untouched model on it."""
        ids = token_windows(texts, self.model, self.tokenizer, samples, length)
        self._ids = ids.to(self.model.get_input_embeddings().weight.device)
        self._traces.clear()
        with self._attached():
            self._untouched = self._record()

    @property
    def untouched(self) -> Trace:
        """The run of the untouched model on the calibration batch."""
        if self._untouched is None:
            raise RuntimeError("no calibration batch yet; call use_texts first")
        return self._untouched

    def average_kv(self) -> list[tuple[Tensor, Tensor]]:
        """For every layer its keys and values `[H_kv, T, D]`, averaged over the calibration rows."""
        kv = self.untouched.kv
        return [tuple(tensor.float().mean(0) for tensor in kv[layer]) for layer in range(self.num_layers)]

    @torch.no_grad()
    def final_hidden(self, plan: SharingPlan) -> Tensor:
        """The hidden states `[B, T, hidden]` after the final norm under `plan`."""
        known = max([self.untouched, *self._traces], key=lambda trace: first_difference(plan, trace.plan))
        start = first_difference(plan, known.plan)
        if start == self.num_layers:
            return known.final
        inputs, context, hidden = known.inputs[:start], SharingContext(plan), known.inputs[start]
        context.kv.update((layer, kv) for layer, kv in known.kv.items() if layer < start)
        with self._attached():
            for layer in range(start, self.num_layers):
                inputs.append(hidden)
                hidden = self.run_layer(layer, hidden, context)
        self._traces.append(Trace(plan, inputs, context.kv, self.norm(hidden)))
        return self._traces[-1].final

    def run_layer(self, layer: int, hidden: Tensor, context: SharingContext) -> Tensor:
        """One decoder layer on `hidden` `[B, T, hidden]`, with the arguments of the recorded forward."""
        output = self.layers[layer](hidden, **{**self._calls[layer], "kv_sharing": context})
        return output[0] if isinstance(output, tuple) else output

    def norm(self, hidden: Tensor) -> Tensor:
        """The decoder's final norm."""
        return getattr(self.adapter.find_decoder(self.model), self.adapter.norm)(hidden)

    def _record(self) -> Trace:
        """Runs the decoder's own forward and records what it gives every layer."""
        context, inputs = SharingContext(self.full.sharing), []
        self._calls = []

        def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            self._calls.append(kwargs)

        handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self.layers]
        try:
            decoder = self.adapter.find_decoder(self.model)
            output = decoder(input_ids=self._ids, use_cache=False, kv_sharing=context)
        finally:
            for handle in handles:
                handle.remove()
        return Trace(self.full.sharing, inputs, context.kv, output.last_hidden_state)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Our attention function on the model, in evaluation mode, for the time of a run."""
        training = self.model.training
        attach(self.model, self.adapter, self.full)
        self.model.eval()
        try:
            yield
        finally:
            detach(self.model)
            self.model.train(training)


def first_difference(one: SharingPlan, other: SharingPlan) -> int:
    """The first layer that reads other KV under one plan than under the other."""
    pairs = zip(one.source_layers, other.source_layers, strict=True)
    return next((layer for layer, sources in enumerate(pairs) if sources[0] != sources[1]), one.num_layers)
