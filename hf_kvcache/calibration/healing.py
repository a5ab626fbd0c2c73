"""Healing of a sharing plan: refits the query and output projections of every consumer to the untouched model.

A consumer attends over keys and values that were made for another layer. Both fits go layer after layer, so
that each sees what the layers healed before it produce, and cost nothing at run time:

1. Its queries are refitted to the foreign keys, so that it attends where it used to (`calibration.query_fit`).
2. Its output projection is refitted to what it then reads. With X the outputs of its heads over the shared KV
   `[N, H_q D]`, Y the attention output of the untouched model `[N, hidden]` and W0 the old weights, it becomes

       W = argmin ||X W^T - Y||^2 + lambda ||W - W0||^2,    lambda = strength * mean(diag(X^T X)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_kvcache.attention import AttentionCall, SharingContext
from hf_kvcache.calibration.query_fit import AttentionExample, fit_query
from hf_kvcache.calibration.texts import TextTooShort
from hf_kvcache.patches.adapter import replaceable
from hf_kvcache.progress import progress
from hf_kvcache.sharing import SharingPlan

if TYPE_CHECKING:
    from hf_kvcache.calibration.probe import Batch, ModelProbe

# windows of several lengths, since a head that is healed on short texts alone errs on long ones
WINDOWS = ((4, 1024), (8, 512), (16, 256), (32, 128))
STRENGTH = 1e-2
PAIR_SAMPLES, PAIR_LENGTH = 16, 512


def heal_plan(probe: ModelProbe, plan: SharingPlan, windows: tuple[tuple[int, int], ...] = WINDOWS) -> SharingPlan:
    """Returns `plan` with healed projections for its consumers.

    Args:
        probe: the untouched model and its calibration texts.
        plan: which layers share.
        windows: (samples, length) of the calibration batches; of those that the texts fill.
    """
    if plan.is_identity:
        return plan
    healed: dict[str, Tensor] = {}
    with probe.attached(), progress("healing layers", probe.num_layers) as advance:
        streams = [Stream(probe, probe.batch(ids), plan) for ids in calibration_batches(probe, windows)]
        for layer in range(probe.num_layers):
            if layer in plan.consumers:
                weights = heal_layer(probe, layer, streams)
                healed |= {f"{probe.adapter.layers}.{layer}.{name}": weight for name, weight in weights.items()}
            else:
                for stream in streams:
                    stream.advance(layer)
            advance()
    return replace(plan, healed=healed)


def calibration_batches(probe: ModelProbe, windows: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Token ids of every shape that the texts fill; raises when they fill none."""
    found, refused = {}, None
    for window in windows:
        try:
            ids = probe.tokens(*window)
        except TextTooShort as error:
            # texts of a little more than one window leave a rest each, which may be too much for this length alone
            refused = error
        else:
            found[ids.shape] = ids
    if refused is not None and not found:
        raise refused
    return list(found.values())


def heal_layer(probe: ModelProbe, layer: int, streams: list[Stream]) -> dict[str, Tensor]:
    """Healed weights of a consumer by path below its layer; takes all streams past the layer."""
    adapter = probe.adapter
    attention = getattr(probe.layers[layer], adapter.attention)
    healed: dict[str, Tensor] = {}
    with ExitStack() as stack:

        def install(name: str, weight: Tensor) -> None:
            healed[f"{adapter.attention}.{name}"] = weight
            stack.enter_context(weight_of(getattr(attention, name), weight))

        output = healable(probe, layer)
        examples = [stream.untouched_example(layer, output) for stream in streams]
        if adapter.query is not None:
            asked = [
                stream.attention_example(layer, attention, call, key)
                for stream, (call, key, _) in zip(streams, examples, strict=True)
            ]
            install(adapter.query, fit_query(attention, adapter.query, asked))
        fit = Ridge(output.weight)
        for stream, (_, _, wanted) in zip(streams, examples, strict=True):
            fit.add(stream.head_outputs(layer, output), wanted)
        install(adapter.output, fit.solve(STRENGTH))
        for stream in streams:
            stream.advance_healed(layer)
    return healed


class Witness(SharingContext):
    """Leaves keys and values as they are and remembers the last call and its keys."""

    def resolve(self, call: AttentionCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = call, key
        return key, value


class Stream:
    """One calibration batch on its way through the untouched and the healed model, side by side."""

    def __init__(self, probe: ModelProbe, batch: Batch, plan: SharingPlan) -> None:
        self.probe, self.batch = probe, batch
        self.untouched = self.healed = batch.hidden
        self.context = SharingContext(plan)

    def untouched_example(self, layer: int, output: nn.Linear) -> tuple[AttentionCall, Tensor, Tensor]:
        """The untouched layer's attention call, its keys and Y; takes the untouched side past the layer."""
        witness = Witness(self.context.plan)
        with captured(output) as outputs:
            self.untouched = self.probe.run_layer(layer, self.untouched, self.batch, witness)
        wanted = outputs[0]
        return *witness.seen, wanted if output.bias is None else wanted - output.bias

    def attention_example(self, layer: int, attention: nn.Module, call: AttentionCall, key: Tensor) -> AttentionExample:
        """What the layer's attention gets when healed so far, and where it should look."""
        with stopped_at(attention) as stop:
            self._run_healed(layer)
        foreign_key = self.context.kv[self.context.plan.source_layers[layer]][0]
        return AttentionExample(stop[0], foreign_key, call, key)

    def head_outputs(self, layer: int, output: nn.Module) -> Tensor:
        """X of the layer."""
        with stopped_at(output) as stop:
            self._run_healed(layer)
        return stop[0]["args"][0]

    def advance_healed(self, layer: int) -> None:
        """Takes the healed side past a layer."""
        self.healed = self.probe.run_layer(layer, self.healed, self.batch, self.context)

    def advance(self, layer: int) -> None:
        """Takes both sides past a layer that is no consumer; before the first consumer they are one."""
        same = self.healed is self.untouched
        self.advance_healed(layer)
        self.untouched = self.healed if same else self.probe.run_layer(layer, self.untouched, self.batch)

    def _run_healed(self, layer: int) -> None:
        try:
            self.probe.run_layer(layer, self.healed, self.batch, self.context)
        except Stopped:
            return
        raise RuntimeError(f"layer {layer} did not reach the module that was to stop it")


class PairJudge:
    """Scores single pairs of layers by the divergence that is left after healing the consumer's output projection.

    The projection is fitted on four fifths of the calibration windows and judged on the others, so that a pair is not
    rewarded for what it can only memorise.
    """

    def __init__(self, probe: ModelProbe) -> None:
        self.probe = probe
        ids = probe.tokens(PAIR_SAMPLES, PAIR_LENGTH)
        every = min(5, len(ids))
        held_out = torch.arange(len(ids)) % every == every - 1
        self.fitted, self.judged = self._trace(ids[~held_out]), self._trace(ids[held_out])
        self.full = [self._log_probs(row) for row in probe.norm(self.judged.final)]

    def divergence(self, consumer: int, source: int) -> float:
        """Mean KL(untouched || healed) in nats a token on the judged windows, when only this pair shares."""
        probe, plan = self.probe, SharingPlan.from_pairs(self.probe.num_layers, [(consumer, source)])
        output = plain(getattr(probe.layers[consumer], probe.adapter.attention), probe.adapter.output, consumer)
        stream = self.fitted.stream(probe, consumer, source, plan)
        _, _, wanted = stream.untouched_example(consumer, output)
        fit = Ridge(output.weight)
        fit.add(stream.head_outputs(consumer, output), wanted)
        judged = self.judged.stream(probe, consumer, source, plan)
        with weight_of(output, fit.solve(STRENGTH)):
            judged.advance_healed(consumer)
        for layer in range(consumer + 1, probe.num_layers):
            judged.advance_healed(layer)
        own = (self._log_probs(row) for row in probe.norm(judged.healed))
        pairs = zip(self.full, own, strict=True)
        return sum(float((full.exp() * (full - other)).sum(-1).mean()) for full, other in pairs) / len(self.full)

    def _trace(self, ids: Tensor) -> UntouchedRun:
        probe, context = self.probe, SharingContext(SharingPlan.identity(self.probe.num_layers))
        batch = probe.batch(ids)
        inputs, hidden = [], batch.hidden
        for layer in range(probe.num_layers):
            inputs.append(hidden)
            hidden = probe.run_layer(layer, hidden, batch, context)
        return UntouchedRun(batch, inputs, context.kv, hidden)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        return self.probe.logits(hidden[None])[0].float().log_softmax(-1)


@dataclass(frozen=True)
class UntouchedRun:
    """The untouched model on one batch: inputs and KV of all layers and the last layer's output."""

    batch: Batch
    inputs: list[Tensor]
    kv: dict[int, tuple[Tensor, Tensor]]
    final: Tensor

    def stream(self, probe: ModelProbe, layer: int, source: int, plan: SharingPlan) -> Stream:
        """A stream that stands before `layer`, with the KV of `source` at hand."""
        stream = Stream(probe, self.batch, plan)
        stream.untouched = stream.healed = self.inputs[layer]
        stream.context.kv[source] = self.kv[source]
        return stream


class Ridge:
    """Accumulates a ridge regression and solves it.

    Args:
        old: W0, `[out_features, in_features]`.
    """

    def __init__(self, old: Tensor) -> None:
        size = old.shape[1]
        self.old = old.detach()
        self.gram = torch.zeros(size, size, dtype=torch.float32, device=old.device)
        self.cross = torch.zeros(size, old.shape[0], dtype=torch.float32, device=old.device)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Adds rows: given X `[..., in_features]`, wanted Y `[..., out_features]`."""
        given, wanted = given.flatten(0, -2).float(), wanted.flatten(0, -2).float()
        self.gram += given.T @ given
        self.cross += given.T @ wanted

    def solve(self, strength: float) -> Tensor:
        """W in the dtype of the old weights."""
        gram, cross, old = (tensor.double() for tensor in (self.gram, self.cross, self.old))
        pull = strength * gram.diagonal().mean()
        system = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(system, cross + pull * old.T).T.to(self.old.dtype).contiguous()


class Stopped(Exception):
    """A forward was stopped because the module of interest was reached."""


@contextmanager
def stopped_at(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Makes a forward raise `Stopped` when it reaches `module`; yields the list that gets what it was called with."""
    found: list[dict[str, Any]] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append({"args": args, "kwargs": kwargs})
        raise Stopped

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output of every call of a module."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def weight_of(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Lets a module compute with another weight for a while."""
    old = module.weight
    module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module.weight = old


def healable(probe: ModelProbe, layer: int) -> nn.Linear:
    """The output projection of a layer; raises unless it and what else healing refits can be refitted."""
    adapter, attention = probe.adapter, getattr(probe.layers[layer], probe.adapter.attention)
    if adapter.query is not None:
        plain(attention, adapter.query, layer)
    return plain(attention, adapter.output, layer)


def plain(attention: nn.Module, name: str, layer: int) -> nn.Linear:
    """A projection of an attention module; raises unless it is a plain Linear whose weight can be replaced."""
    module = getattr(attention, name)
    if not replaceable(module):
        raise NotImplementedError(
            f"healing refits {name} of layer {layer}, but that is a {type(module).__name__} on {module.weight.device}, "
            "and only a plain Linear in memory can be refitted; use heal=False"
        )
    return module
