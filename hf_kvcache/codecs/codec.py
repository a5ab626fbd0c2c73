"""The interface of a codec: keys and values of a sealed segment in, a payload of tensors out, attention over it."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

Payload = dict[str, Tensor]


class Codec(Protocol):
    """How sealed keys and values are stored.

    A codec sees *flat* entries `[N, D]`, in the order of the segment's layout, so that every (row, head) may keep
    another number of tokens. The first dimension of every payload tensor counts entries. A codec is a frozen value; all
    state is in the payload.

    Attributes:
        name: of the codec, in saved files.
        residual_length: how many of the last tokens of the prompt, and while decoding, stay dense.
        block: while decoding, how many tokens are sealed at a time; 0 to seal only the prompt.
    """

    name: ClassVar[str]

    @property
    def residual_length(self) -> int: ...

    @property
    def block(self) -> int: ...

    def encode(self, key: Tensor, value: Tensor) -> Payload:
        """Encodes key and value `[N, D]`. The payload must not keep a view of its inputs' storage alive."""
        ...

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Returns key and value `[N, D]`, as exactly as the codec can."""
        ...

    def select(self, payload: Payload, index: Tensor) -> Payload:
        """The payload of the entries `index` alone, in that order. Nothing is encoded anew, and tensors of entries that
        are not the codec's own (their positions, say) are selected with the rest."""
        ...

    def attend(
        self,
        payload: Payload,
        start: int,
        shape: tuple[int, int, int],
        query: Tensor,
        scale: float,
        softcap: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Partial attention over the block of entries that begins at `start`.

        Args:
            payload: what `encode` returned.
            start: the first entry of the block.
            shape: (R, H, T): the block holds R rows x H heads of T tokens each.
            query: `[R, H, M, D]`, the query group folded into the rows.
            scale: factor of the scores.
            softcap: tanh cap of the scores, 0 for none.
            mask: `[R, H, M, T]` or broadcastable to it, True = attend; None to attend to all.

        Returns:
            out `[R, H, M, D]` and lse `[R, H, M]`.
        """
        ...
