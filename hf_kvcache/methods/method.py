"""`Method`: a frozen value that turns one `CacheSpec` into another, and what it may ask of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from hf_kvcache.eviction.importance import HeadImportance
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.spec import CacheSpec, LayerKind


class CalibrationModel(Protocol):
    """The model as a method sees it while it is applied: no module, only questions.

    All answers are over one calibration batch, which `use_texts` sets.
    """

    num_layers: int
    fingerprint: str
    kinds: tuple[LayerKind, ...]

    def use_texts(self, texts: Any, samples: int, length: int) -> None:
        """Tokenises `texts` (None for the shipped sample) into `samples` rows of `length` tokens."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a text, without special tokens."""
        ...

    def average_kv(self) -> list[tuple[Tensor, Tensor]]:
        """For every layer its keys and values `[H_kv, T, D]`, averaged over the calibration rows."""
        ...

    def final_hidden(self, plan: SharingPlan) -> Tensor:
        """The hidden states `[B, T, hidden]` after the final norm under `plan`."""
        ...

    def healed_divergence(self, consumer: int, source: int) -> float:
        """KL(untouched || shared) in nats a token when only this pair shares and the consumer is healed."""
        ...

    def head_importance(self, samples: int, length: int) -> HeadImportance:
        """How much every head matters for retrieval, from `samples` questions about texts of `length` tokens."""
        ...

    def heal(self, plan: SharingPlan) -> SharingPlan:
        """The plan with refitted weights for its consumers."""
        ...


@dataclass(frozen=True)
class Method:
    """The base of all methods. Its dataclass fields are its options.

    Subclasses set `name`, `slot` and `paper`, and implement `apply`. Third-party methods need no registration: pass an
    instance to `patch_model`.
    """

    name: ClassVar[str]
    slot: ClassVar[str]
    paper: ClassVar[str]
    # the option that names this method where nothing else does, as in `patch_model(model, plan=...)`
    implied_by: ClassVar[str | None] = None

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        """Returns the spec with this method's slot filled."""
        raise NotImplementedError(f"{type(self).__name__} must implement apply(spec, model)")
