"""Decoding in steps of a fixed shape, which a GPU replays as one CUDA graph.

At batch 1 a decoding step is some hundred launches of a few microseconds each, and the gaps between them take longer
than the attention that a compressed cache saves. A graph has no gaps. Between two flushes of the tail nothing in a step
changes but numbers: the token, its position and its place in the tail, which are tensors here (see `FixedTail`).
Prompts, flushes and everything else run as before, and after a flush the step is recorded anew.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.autocast import autocasts
from hf_kvcache.cache import KVCache
from hf_kvcache.layers import KVCacheLayer
from hf_kvcache.layers.fixed import FixedTail, Places
from hf_kvcache.patches.rotary import length_dependent
from hf_kvcache.spec import STATE, CacheSpec
from hf_kvcache.stores import DeviceStore
from hf_kvcache.tail import Tail

# tokens that a recorded step can serve at most, and those that it must be able to serve: recording costs a few steps
MOST, LEAST = 256, 8
# arguments of a forward that a step understands; any other one that says something makes it an ordinary forward
UNDERSTOOD = {"input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache", "return_dict"}
PASSED_ON = ("logits_to_keep",)

# runs a step and records it; returns what replays it, and the output that every replay overwrites
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def capture_graph(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Records `run` as a CUDA graph. It may be run any number of times before it counts."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # what other threads do with the device meanwhile is none of its business, and no error
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output


def capture_for(device: torch.device) -> Capture | None:
    """What records a step on a device; None where it is computed anew each time, which is everywhere but on a GPU."""
    return capture_graph if device.type == "cuda" else None


@dataclass
class Step:
    """What one recording was made of, and what it reads and writes.

    Args:
        parts: segments and buffers: when one of them is another object, the recording is of no use any more.
        lengths: of the tails of all layers when it was made.
        masked: whether there was a mask of padding.
        passed: arguments of the forward that it was made with.
        ids, positions: `[B, 1]` of the token.
        alive: boolean `[B]`, False where it is padding.
        places: of tails, by their length and memory when it was made.
        tails: of every layer that holds KV.
        taken: tokens since.
        replay: None where nothing is recorded.
        output: of the forward.
    """

    parts: tuple[Any, ...]
    lengths: tuple[int, ...]
    masked: bool
    passed: dict[str, Any]
    ids: Tensor
    positions: Tensor
    alive: Tensor
    places: dict[tuple[int, int], Places]
    tails: tuple[FixedTail, ...] = ()
    taken: int = 0
    replay: Callable[[], None] | None = None
    output: Any = None

    def serves(self, layers: list[KVCacheLayer], masked: bool, passed: dict[str, Any]) -> bool:
        """Whether the layers are as they were, but for the tokens that it took: none was cropped, or came otherwise."""
        parts = parts_of(layers)
        return (
            len(parts) == len(self.parts)
            and all(part is old for part, old in zip(parts, self.parts, strict=True))
            and all(layer.tail.length == n + self.taken for layer, n in zip(layers, self.lengths, strict=True))
            and all(layer.tail.length < layer.tail.capacity for layer in layers)
            and (masked, passed) == (self.masked, self.passed)
            # what was made in inference mode can be written to in it only
            and (torch.is_inference_mode_enabled() or not self.ids.is_inference())
        )


def parts_of(layers: list[KVCacheLayer]) -> tuple[Any, ...]:
    return tuple(part for layer in layers for part in (*layer.segments, *layer.tail.tensors()))


def size_of(tail: Tail) -> tuple[int, int]:
    """Tails of one size hold tokens in the same places."""
    return tail.length, tail.capacity


class CompiledDecode:
    """Takes the place of a model's forward.

    Args:
        model: a patched model.
        spec: of its cache.

    Attributes:
        recorded: how many steps were recorded.
        replayed: how many tokens were decoded in steps of a fixed shape.
    """

    def __init__(self, model: nn.Module, spec: CacheSpec) -> None:
        require_fixed_shapes(model, spec)
        self.model, self.shadowed = model, model.__dict__.get("forward")
        self.steps: weakref.WeakKeyDictionary[KVCache, Step] = weakref.WeakKeyDictionary()
        self.recorded = self.replayed = 0
        model.forward = self

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that it took the place of."""
        return self.shadowed or type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the forward, which `generate` looks at."""
        return inspect.signature(self.original)

    def remove(self, model: nn.Module) -> None:
        """Gives the model its forward back."""
        if model.__dict__.get("forward") is self:
            del model.__dict__["forward"]
            if self.shadowed is not None:
                model.forward = self.shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = inspect.signature(self.original).bind(*args, **kwargs).arguments
            kwargs.update(kwargs.pop("kwargs", {}))
        cache = kwargs.get("past_key_values")
        if isinstance(cache, KVCache) and self._understands(kwargs):
            step = self._step(cache, kwargs)
            if step is not None:
                return self._take(step, cache, kwargs)
        return self.original(**kwargs)

    def _understands(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward brings one more token, and asks for nothing but its logits."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.shape[1] != 1:
            return False
        if torch.is_grad_enabled() or self.model.training or kwargs.get("use_cache") is False:
            return False
        if autocasts(ids.device):
            # the weights that it has cast are gone when it ends, and a recording would read where they were
            return False
        if kwargs.get("return_dict") is False or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
            return False
        if not all(isinstance(kwargs.get(name, 0), int) for name in PASSED_ON):
            return False
        others = set(kwargs) - UNDERSTOOD - set(PASSED_ON)
        return all(kwargs[name] is None or kwargs[name] is False for name in others)

    def _step(self, cache: KVCache, kwargs: dict[str, Any]) -> Step | None:
        """The step that takes the next token; None where the next token changes more than the tail."""
        layers = layers_of(cache)
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        room = min(layer.room for layer in layers)
        fits = ids.shape[0] == cache.batch_size and (mask is None or mask.shape[1] == layers[0].seen + 1)
        if not room or not fits:
            self.steps.pop(cache, None)
            return None
        passed = {name: kwargs[name] for name in PASSED_ON if name in kwargs}
        step = self.steps.get(cache)
        if step is not None and step.serves(layers, mask is not None, passed):
            return step
        self.steps.pop(cache, None)
        return None if room < LEAST else self._prepare(cache, layers, ids, mask, min(room, MOST), passed)

    def _prepare(
        self, cache: KVCache, layers: list[KVCacheLayer], ids: Tensor, mask: Tensor | None, room: int, passed: dict
    ) -> Step:
        """A step that is not recorded yet."""
        for layer in layers:
            layer.tail.make_room(room)
        lengths = tuple(layer.tail.length for layer in layers)
        step = Step(
            parts_of(layers),
            lengths,
            mask is not None,
            passed,
            ids=torch.zeros_like(ids),
            positions=torch.zeros_like(ids),
            alive=torch.ones(len(ids), dtype=torch.bool, device=ids.device),
            places={},
        )
        for layer in layers:
            tail, first = layer.tail, layer.seen - layer.tail.length
            if size_of(tail) not in step.places:
                step.places[size_of(tail)] = Places(tail, None if mask is None else mask[:, first : layer.seen])
        step.tails = tuple(FixedTail(layer.tail, step.places[size_of(layer.tail)]) for layer in layers)
        self.steps[cache] = step
        return step

    def _take(self, step: Step, cache: KVCache, kwargs: dict[str, Any]) -> Any:
        """Decodes one token."""
        layers, mask, positions = layers_of(cache), kwargs.get("attention_mask"), kwargs.get("position_ids")
        step.ids.copy_(kwargs["input_ids"])
        step.positions.copy_(layers[0].seen + torch.zeros_like(step.ids) if positions is None else positions)
        for (length, _), places in step.places.items():
            places.next.fill_(length + step.taken)
        if mask is not None:
            step.alive.copy_(mask[:, -1].bool())
        # streams and graphs are of the current device, which need not be the model's
        with torch.cuda.device_of(step.ids):
            self._compute(step, cache)
        for layer in layers:
            layer.advance()
        step.taken += 1
        self.replayed += 1
        return type(step.output)(**{name: _copied(item) for name, item in step.output.items()}, past_key_values=cache)

    def _compute(self, step: Step, cache: KVCache) -> None:
        """Replays the step, recording it first where it is not yet."""
        # the model may have moved since it was compiled
        capture = capture_for(step.ids.device)
        if step.replay is not None:
            step.replay()
        elif capture is None:
            step.output = self._run(step, cache)
        else:
            step.replay, step.output = capture(lambda: self._run(step, cache))
            self.recorded += 1
            # recording computes nothing
            step.replay()

    def _run(self, step: Step, cache: KVCache) -> Any:
        """The forward, on the tensors of the step; its output without the cache, which a step must not keep alive."""
        for places in step.places.values():
            places.take(step.alive)
        with fixed(cache, step.tails):
            output = self.original(
                input_ids=step.ids,
                position_ids=step.positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **step.passed,
            )
        kept = {name: item for name, item in output.items() if name != "past_key_values"}
        return type(output)(**kept)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: recordings are of the memory that they were made with."""
        return {name: item for name, item in self.__dict__.items() if name != "steps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, steps=weakref.WeakKeyDictionary())


def _copied(item: Any) -> Any:
    """What the next step does not overwrite."""
    if isinstance(item, Tensor):
        return item.clone()
    return tuple(map(_copied, item)) if isinstance(item, tuple) else item


@contextmanager
def fixed(cache: KVCache, tails: tuple[FixedTail, ...]) -> Iterator[None]:
    """The cache while its layers take and attend in a step of a fixed shape."""
    layers = layers_of(cache)
    for layer, tail in zip(layers, tails, strict=True):
        layer.fixed = tail
    try:
        yield
    finally:
        for layer in layers:
            layer.fixed = None


def layers_of(cache: KVCache) -> list[KVCacheLayer]:
    """The layers that hold KV."""
    return [layer for layer in cache.layers if isinstance(layer, KVCacheLayer)]


def require_fixed_shapes(model: nn.Module, spec: CacheSpec) -> None:
    """Raises for a model whose steps cannot have a fixed shape."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    ropes = sorted(length_dependent(model.config.get_text_config()))
    windows = {window for window in spec.sliding_windows if window is not None}
    for wrong, what, instead in (
        (STATE in windows, "layers that keep a state", "decode without it"),
        (
            bool(windows - {STATE}),
            "layers with sliding windows, whose caches change with every token",
            "decode without",
        ),
        (spec.every is not None, "eviction while decoding, which looks at every query", "evict after the prompt only"),
        (not isinstance(spec.store, DeviceStore), "a cache that is not on the device", "leave the offload method out"),
        (spec.prefix is not None, "a store of prompts", "leave it out, or decode without it"),
        (bool(ropes), f"RoPE of the type {', '.join(ropes)}, which asks how long the text is", "decode without"),
        (len(devices) > 1, f"a model on several devices ({', '.join(map(str, devices))})", "load it on one device"),
    ):
        if wrong:
            raise NotImplementedError(
                f"compile_decode needs steps of a fixed shape and does not support {what}; {instead}"
            )
