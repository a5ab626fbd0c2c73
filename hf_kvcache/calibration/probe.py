"""`ModelProbe`: what methods may ask of the model while they are applied (`methods.method.CalibrationModel`).

The decoder is run layer by layer with the arguments that its own forward would pass, recorded once, so that
no family needs code of its own and a changed plan is evaluated only from the first layer that it changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from hf_kvcache.attention import SharingContext
from hf_kvcache.calibration.texts import Calibration, find_tokenizer, token_windows
from hf_kvcache.devices import input_device
from hf_kvcache.eviction.importance import HeadImportance
from hf_kvcache.patches.adapter import Adapter
from hf_kvcache.patches.attach import attach, detach
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.spec import CacheSpec

if TYPE_CHECKING:
    from hf_kvcache.calibration.healing import PairJudge

KEPT_TRACES = 3


@dataclass
class Batch:
    """Calibration windows as the first layer gets them.

    Args:
        hidden: input of the first layer, `[B, T, hidden]`.
        calls: for every layer the keyword arguments that the decoder gives it.
    """

    hidden: Tensor
    calls: list[dict[str, Any]]


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
        self.num_layers, self.kinds = full.num_layers, full.kinds
        self.fingerprint = full.fingerprint
        self.layers = adapter.find_layers(model)
        self._texts: Calibration = None
        self._batch: Batch | None = None
        self._traces: deque[Trace] = deque(maxlen=KEPT_TRACES)
        self._untouched: Trace | None = None
        self._pair_judge: PairJudge | None = None
        self._divergences: dict[tuple[int, int], float] = {}

    @torch.no_grad()
    def use_texts(self, texts: Calibration, samples: int, length: int) -> None:
        """Sets the calibration texts and runs the untouched model on `samples` windows of `length` tokens of them."""
        if texts is not self._texts:
            self._pair_judge, self._divergences = None, {}
        self._texts = texts
        self._traces.clear()
        with self.attached():
            self._batch = self.batch(token_windows(texts, self.model, self.tokenizer, samples, length))
            self._untouched = self._run(self.full.sharing, [self._batch.hidden], {})

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a text, without special tokens."""
        tokenizer = self.tokenizer or find_tokenizer(self.model)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
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
        kv = {layer: kv for layer, kv in known.kv.items() if layer < start}
        with self.attached():
            self._traces.append(self._run(plan, known.inputs[: start + 1], kv))
        return self._traces[-1].final

    @torch.no_grad()
    def healed_divergence(self, consumer: int, source: int) -> float:
        """KL(untouched || shared and healed) when only this pair of layers shares (see `calibration.healing`)."""
        if (consumer, source) not in self._divergences:
            with self.attached():
                from hf_kvcache.calibration.healing import PairJudge

                self._pair_judge = self._pair_judge or PairJudge(self)
                self._divergences[consumer, source] = self._pair_judge.divergence(consumer, source)
        return self._divergences[consumer, source]

    def head_importance(self, samples: int, length: int) -> HeadImportance:
        """How much every head matters for retrieval (see `calibration.retrieval_heads`)."""
        from hf_kvcache.calibration.retrieval_heads import measure_head_importance

        return measure_head_importance(self, samples, length)

    @torch.no_grad()
    def heal(self, plan: SharingPlan) -> SharingPlan:
        """The plan with refitted weights for its consumers (see `calibration.healing`)."""
        from hf_kvcache.calibration.healing import heal_plan

        return heal_plan(self, plan)

    @torch.no_grad()
    def run_untouched(self) -> None:
        """Runs the untouched model on the calibration batch once more, for hooks that want to see its layers."""
        assert self._batch is not None
        with self.attached():
            self._run(self.full.sharing, [self._batch.hidden], {})

    @property
    def untouched(self) -> Trace:
        """The run of the untouched model on the calibration batch."""
        if self._untouched is None:
            raise RuntimeError("no calibration batch yet; call use_texts first")
        return self._untouched

    def tokens(self, samples: int, length: int) -> Tensor:
        """Calibration windows as token ids `[samples, length]`, fewer and shorter where the texts are short."""
        return token_windows(self._texts, self.model, self.tokenizer, samples, length, shrink=True)

    def batch(self, ids: Tensor) -> Batch:
        """A batch of windows `[B, T]`, up to the first layer. Must run inside `attached`.

        The layers are made to hand their input on, so that the decoder's own forward costs nothing and still shows
        with what arguments it calls each of them.
        """
        batch = Batch(torch.empty(0), [])

        def pass_on(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not batch.calls:
                batch.hidden = hidden
            batch.calls.append(kwargs)
            return hidden

        with forward_of(self.layers, pass_on):
            self.adapter.find_decoder(self.model)(input_ids=ids.to(input_device(self.model)), use_cache=False)
        return batch

    def run_layer(self, layer: int, hidden: Tensor, batch: Batch, context: SharingContext | None = None) -> Tensor:
        """One decoder layer on `hidden` `[B, T, hidden]`, with the arguments of the recorded forward."""
        output = self.layers[layer](hidden, **{**batch.calls[layer], "kv_sharing": context})
        return output[0] if isinstance(output, tuple) else output

    def norm(self, hidden: Tensor) -> Tensor:
        """The decoder's final norm."""
        return getattr(self.adapter.find_decoder(self.model), self.adapter.norm)(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model predicts from hidden states `[B, T, hidden]` after the final norm, `[B, T, vocabulary]`.

        By the forward of the model itself, with a decoder that is done already: some families scale or cap the logits.
        """
        if self.model.get_output_embeddings() is None:
            # a decoder without a head is read out by its embeddings, as a model with tied weights is
            return nn.functional.linear(hidden, self.model.get_input_embeddings().weight)
        decoded = MoeModelOutputWithPast(last_hidden_state=hidden)
        with forward_of([self.adapter.find_decoder(self.model)], lambda *args, **kwargs: decoded):
            return self.model(inputs_embeds=hidden, use_cache=False).logits

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Our attention function on the model, in evaluation mode, for the time of a run."""
        training = [module for module in self.model.modules() if module.training]
        attach(self.model, self.adapter, self.full)
        self.model.eval()
        try:
            yield
        finally:
            detach(self.model)
            for module in training:
                module.training = True

    def _run(self, plan: SharingPlan, inputs: list[Tensor], kv: dict[int, tuple[Tensor, Tensor]]) -> Trace:
        """Runs the layers under `plan` from the last of the given `inputs` on, with the KV of the layers before it."""
        assert self._batch is not None
        context, inputs = SharingContext(plan), list(inputs)
        context.kv.update(kv)
        for layer in range(len(inputs) - 1, self.num_layers):
            inputs.append(self.run_layer(layer, inputs[layer], self._batch, context))
        return Trace(plan, inputs[:-1], context.kv, self.norm(inputs[-1]))


@contextmanager
def forward_of(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Lets modules compute something else for a while."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del module.forward
            if before is not None:
                module.forward = before


def first_difference(one: SharingPlan, other: SharingPlan) -> int:
    """The first layer that reads other KV under one plan than under the other."""
    pairs = zip(one.source_layers, other.source_layers, strict=True)
    return next((layer for layer, sources in enumerate(pairs) if sources[0] != sources[1]), one.num_layers)
