"""The interface of a codec: keys and values of a sealed segment in, a payload of tensors out, attention over it."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

Payload = dict[str, Tensor]


class Codec(Protocol):
    """How sealed keys and values are stored.

    A codec sees *flat* entries `[N, D]`; their order is the segment's business. The first dimension of every payload
    tensor counts entries in this order, unless the codec says otherwise of a name. A codec is a frozen value; all state
    is in the payload.

    Entries have *owners*: the (stored row, KV head) that an entry belongs to, numbered row * H + head. A codec may keep
    statistics by owner; without owners all entries count as one owner's.

    Attributes:
        name: of the codec, in saved files.
        residual_length: how many of the latest tokens of a prompt are to stay dense.
        block: how many tokens of the tail are sealed at once in decoding; 0 for never.
    """

    name: ClassVar[str]

    @property
    def residual_length(self) -> int: ...

    @property
    def block(self) -> int: ...

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        """Encodes key and value `[N, D]`. The payload must not keep a view of its inputs' storage alive.

        Args:
            key, value: of the entries.
            owners: `[N]`, the owner of every entry.
            like: an earlier payload for the same owners, whose statistics are to be used; the two may be joined then.
        """
        ...

    def decode(self, payload: Payload, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns key and value `[N, D]`, as exactly as the codec can."""
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
        owners: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Partial attention over the block of entries that begins at `start`.

        Args:
            payload: what `encode` returned.
            start: the first entry of the block.
            shape: (R, H, T): the block holds R rows x H heads of T tokens each.
            query: `[R, H, M, D]`, the query group folded into the rows.
            scale: factor of the scores.
            softcap: tanh cap of the scores, 0 for none.
            mask: boolean (True = attend), broadcastable to `[R, H, M, T]`; None when all are attended.
            owners: `[R, H]`, the owner of each of the R x H parts.

        Returns:
            out `[R, H, M, D]` and lse `[R, H, M]`; a row that attends to nothing has out 0 and lse -inf.
        """
        ...

    def select(self, payload: Payload, index: Tensor) -> Payload:
        """The payload of the entries `index` `[n]`, in that order; nothing is encoded anew."""
        ...


def select_entries(payload: Payload, index: Tensor, shared: tuple[str, ...] = ()) -> Payload:
    """The entries `index` of every tensor; those named in `shared` do not count entries and stay as they are."""
    return {
        name: tensor if name in shared else tensor.index_select(0, index.to(tensor.device))
        for name, tensor in payload.items()
    }
