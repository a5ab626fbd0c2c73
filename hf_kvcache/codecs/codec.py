"""The interface of a codec: keys and values of a sealed segment in, a payload of tensors out, attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

Payload = dict[str, Tensor]


class Codec(Protocol):
    """How sealed keys and values are stored.

    A codec sees *flat* entries `[N, D]`, in the order of the segment's layout, so that every (row, head) may keep
    another number of tokens. The first dimension of every payload tensor counts entries in this order, unless the codec
    says otherwise of a name. A codec is a frozen value; all state is in the payload.

    Entries have *owners*: the (stored row, KV head) that an entry belongs to, numbered row * H + head. A codec may keep
    statistics by owner; without owners all entries count as one owner's.

    Attributes:
        name: of the codec, in saved files.
        lossy: whether decoding gives something else than what was encoded.
        residual_length: how many of the last tokens of the prompt, and while decoding, stay dense.
        block: while decoding, how many tokens are sealed at a time; 0 to seal only the prompt. Where eviction goes on
            while decoding, neither counts: everything is sealed whenever it evicts.
    """

    name: ClassVar[str]
    lossy: ClassVar[bool]

    @property
    def residual_length(self) -> int: ...

    @property
    def block(self) -> int: ...

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        """Encodes key and value `[N, D]`. The payload must not keep a view of its inputs' storage alive.

        Args:
            key, value: of the entries.
            owners: `[N]`, the owner of every entry; `[O, N / O]` where each has as many, one owner after the other.
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
            query: `[R, H, M, D]`, the query group folded into the rows; or, where H is 1, `[R, H', M, D]`: several
                heads read the same tokens.
            scale: factor of the scores.
            softcap: tanh cap of the scores, 0 for none.
            mask: boolean (True = attend) or additive (0 and -inf), broadcastable to the query's `[R, H, M]` x T; None
                when all are attended.
            owners: `[R, H]` of the query: whose entries each head reads; None when head h of row r reads those of owner
                r * H + h. A part that several heads read holds entries of all of them, and the mask shows each its own.

        Returns:
            out `[R, H, M, D]`, in the dtype of the query or in float32, and lse `[R, H, M]`; a row that attends to
            nothing has out 0 and lse -inf.
        """
        ...

    def select(self, payload: Payload, index: Tensor, owners: Tensor | None = None) -> Payload:
        """The payload of some entries. Nothing is encoded anew.

        Args:
            payload: of the codec; tensors of its entries that are not the codec's own (their positions, say) are
                selected with the rest.
            index: `[n]`, which entries, in their new order.
            owners: `[R]`, for every new owner which old one it is; None when they stay the same.
        """
        ...

    def join(self, payloads: Sequence[Payload], runs: int = 1) -> Payload:
        """The entries of several payloads: of one that was encoded first, and of others that were encoded like it.

        Args:
            payloads: in their order.
            runs: how many equally long runs each of them holds, one after the other. The entries of a run come to lie
                behind those of the same run in the payload before.
        """
        ...


@runtime_checkable
class PickyCodec(Codec, Protocol):
    """A codec that not every model fits."""

    def check_fit(self, dim: int) -> None:
        """Raises when entries of `dim` numbers cannot be encoded."""
        ...


@runtime_checkable
class RaggedCodec(Codec, Protocol):
    """A codec with a kernel for runs of unequal length (see `kernels/ragged_attention.py`)."""

    def attends_runs(self, payload: Payload, query: Tensor) -> bool:
        """Whether there is a kernel for this payload on this device; without one, `attend` block by block is faster."""
        ...

    def attend_runs(
        self, payload: Payload, work: Tensor, parts: Tensor, query: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of every run's own queries.

        Args:
            payload: what `encode` returned.
            work, parts: the stretches of the runs.
            query: `[R, H, M, D]`; run r * H + h, which is also the owner of its entries, has the queries `[r, h]`.
            scale, softcap: as for `attend`.

        Returns:
            out `[R, H, M, D]` and lse `[R, H, M]`; a run without entries has out 0 and lse -inf.
        """
        ...


@runtime_checkable
class GatheringCodec(Codec, Protocol):
    """A codec with a kernel that reads the entries to encode from where they are (see `kernels/encode_entries.py`)."""

    def encode_chosen(
        self, key: Tensor, value: Tensor, index: Tensor, owners: Tensor, like: Payload | None = None
    ) -> Payload:
        """As `encode` of the chosen entries.

        Args:
            key, value: `[B, H, T, D]`.
            index: `[N]`, the entries b H T + h T + t, in the order of the segment's layout.
            owners: `[N]`, b H + h of each.
            like: see `encode`.
        """
        ...


def one_reader(query: Tensor, heads: int, tokens: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The query `[R, heads, M, D]` of `Codec.attend` and its mask `[R, heads, M, tokens]`, for a codec that reads every
    part once: several heads that read the same part become further rows of one."""
    folded = query.flatten(1, 2).unsqueeze(1) if query.shape[1] != heads else query
    if mask is not None:
        mask = mask.expand(*query.shape[:3], tokens).reshape(*folded.shape[:3], tokens)
    return folded, mask


def select_entries(
    payload: Payload,
    index: Tensor,
    owners: Tensor | None = None,
    shared: tuple[str, ...] = (),
    of_owners: tuple[str, ...] = (),
) -> Payload:
    """The entries `index` of every tensor.

    Tensors named in `shared` do not count entries and stay as they are; those in `of_owners` count owners. These were
    counted by their entries: owners behind the last that had one have none to be selected, and any statistics do.
    """
    selected = {}
    for name, tensor in payload.items():
        if name in of_owners:
            wanted = None if owners is None else owners.to(tensor.device).clamp(max=len(tensor) - 1)
            selected[name] = tensor if wanted is None else tensor.index_select(0, wanted)
        else:
            selected[name] = tensor if name in shared else tensor.index_select(0, index.to(tensor.device))
    return selected


def join_entries(payloads: Sequence[Payload], shared: tuple[str, ...] = (), runs: int = 1) -> Payload:
    """The entries of all payloads, run by run; what does not count entries, named in `shared`, is the first one's."""
    first = payloads[0]
    return {
        name: tensor if name in shared else join_runs([payload[name] for payload in payloads], runs)
        for name, tensor in first.items()
    }


def join_runs(tensors: Sequence[Tensor], runs: int) -> Tensor:
    """Tensors of `runs` equally long runs as one of such runs."""
    apart = [tensor.unflatten(0, (runs, len(tensor) // runs)) for tensor in tensors]
    return torch.cat(apart, dim=1).flatten(0, 1)
