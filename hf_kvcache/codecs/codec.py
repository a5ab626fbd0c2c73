"""The interface of a codec: keys and values of a sealed segment in, a payload of tensors out, attention over it."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

Payload = dict[str, Tensor]


class Codec(Protocol):
    """How sealed keys and values are stored.

    A codec sees *flat* entries `[N, D]`: the tokens of one (batch row, KV head) after the other, so that every head may
    keep another number of tokens. The first dimension of every payload tensor counts entries or groups of entries in
    this order. A codec is a frozen value; all state is in the payload.
    """

    name: ClassVar[str]

    def encode(self, key: Tensor, value: Tensor) -> Payload:
        """Encodes key and value `[N, D]`. The payload must not keep a view of its inputs' storage alive."""
        ...

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Returns key and value `[N, D]`, as exactly as the codec can."""
        ...

    def attend(
        self, payload: Payload, start: int, shape: tuple[int, int, int], query: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention over the block of entries that begins at `start`.

        Args:
            payload: what `encode` returned.
            start: the first entry of the block.
            shape: (R, H, T): the block holds R rows x H heads of T tokens each.
            query: `[R, H, M, D]`, the query group folded into the rows.
            scale: factor of the scores.
            softcap: tanh cap of the scores, 0 for none.

        Returns:
            out `[R, H, M, D]` and lse `[R, H, M]`.
        """
        ...
