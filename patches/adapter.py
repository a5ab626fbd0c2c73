"""`Adapter`: where a model family keeps the parts that this library needs. It describes; it holds no forward."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

import torch
from torch import nn

from hf_kvcache.patches.rotary import Rotary
from hf_kvcache.sharing import SharingPlan


class KVProjections(Protocol):
    """How a family makes keys and values from hidden states, and how to make it stop."""

    def skip(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Replacements, by attribute of the attention module, that compute no key and no value."""
        ...

    def idle(self, attention: nn.Module) -> list[nn.Parameter]:
        """Weights behind the projections that have nothing to do either."""
        ...


@dataclass(frozen=True)
class Adapter:
    """The layout of a family of decoder-only models.

    Args:
        kv: how its layers project keys and values.
        decoder: the attribute of the causal language model that holds the decoder.
        layers: the attribute of the decoder that lists its layers.
        attention: the attribute of a layer that holds its attention module.
        query: the attribute of the attention module that makes its queries alone, None where there is none.
        output: the attribute of the attention module that projects its heads to the residual stream (W_O).
        norm: the attribute of the decoder that holds the final norm.
        rotary: where its rotary embedding is.
        sources: the attribute of the configuration that says for every layer whose KV it reads, where the architecture
            itself shares; None where every layer has its own.
    """

    kv: KVProjections
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    query: str | None = "q_proj"
    output: str = "o_proj"
    norm: str = "norm"
    rotary: Rotary = Rotary()  # noqa: RUF009 - a frozen value
    sources: str | None = None

    def find_decoder(self, model: nn.Module) -> nn.Module:
        """The decoder of `model`, which may be the decoder itself."""
        return model if hasattr(model, self.layers) else attrgetter(self.decoder)(model)

    def find_layers(self, model: nn.Module) -> list[nn.Module]:
        return list(getattr(self.find_decoder(model), self.layers))

    def find_attention(self, model: nn.Module, layer: int) -> nn.Module:
        return getattr(self.find_layers(model)[layer], self.attention)

    def unrotated(self, model: nn.Module) -> tuple[int, ...]:
        """The layers whose queries and keys RoPE does not turn."""
        attentions = enumerate(getattr(layer, self.attention) for layer in self.find_layers(model))
        return tuple(layer for layer, attention in attentions if not self.rotary.turns(attention))

    def own_sharing(self, model: nn.Module) -> SharingPlan | None:
        """What the architecture itself shares, None for nothing."""
        return None if self.sources is None else SharingPlan(tuple(getattr(model.config, self.sources)))

    def check(self, model: nn.Module) -> None:
        """Raises when the model lacks a part that this adapter promises, naming it."""
        try:
            layers = self.find_layers(model)
            attrgetter(self.norm)(self.find_decoder(model))
            attrgetter(self.rotary.module)(self.find_decoder(model))
            for layer in layers:
                attrgetter(f"{self.attention}.{self.output}")(layer)
                self.kv.skip(getattr(layer, self.attention))
        except AttributeError as error:
            raise NotImplementedError(
                f"{type(model).__name__} does not look as its adapter says: {error}; "
                "see CONTRIBUTING.md, 'Add a model family'"
            ) from error


class Substitute(nn.Module):
    """Stands in the place of a module, shares its parameters and its names in the state dict, computes otherwise.

    The original can therefore be saved, moved and restored as if it had never been replaced.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that it does not become a child and its parameters do not get a second name
        self._original = (original,)
        self._parameters, self._modules = original._parameters, original._modules
        self._buffers = original._buffers

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def idle(self) -> list[nn.Parameter]:
        """The parameters of the original that this one does not use."""
        return []

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self.original._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.original._load_from_state_dict(*args, **kwargs)


class NoProjection(Substitute):
    """Replaces the key or value projection of a consumer: returns zeros of the right width, which nobody reads.

    The full width, since some families normalise over all heads before they split them.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.out_features = out_features(original)

    def idle(self) -> list[nn.Parameter]:
        return list(self.original.parameters())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)


def replaceable(module: nn.Module) -> bool:
    """Whether a projection is a plain Linear in memory, whose weight another can stand in for."""
    return type(module) is nn.Linear and module.weight.device.type != "meta"


def out_features(module: nn.Module) -> int:
    """The width of a projection's output."""
    width = getattr(module, "out_features", None)
    if width is None:
        raise AttributeError(f"{type(module).__name__} has no out_features, so its output width is unknown")
    return width


@dataclass(frozen=True)
class OwnSharing:
    """Families whose consumers have no projections to skip."""

    def skip(self, attention: nn.Module) -> dict[str, nn.Module]:
        return {}

    def idle(self, attention: nn.Module) -> list[nn.Parameter]:
        return []


@dataclass(frozen=True)
class SeparateKV:
    """Families with one projection for keys and one for values, and perhaps a norm behind each."""

    key: str = "k_proj"
    value: str = "v_proj"
    norms: tuple[str, ...] = ("k_norm", "v_norm")

    def skip(self, attention: nn.Module) -> dict[str, nn.Module]:
        return {name: NoProjection(getattr(attention, name)) for name in (self.key, self.value)}

    def idle(self, attention: nn.Module) -> list[nn.Parameter]:
        norms = [getattr(attention, name) for name in self.norms if hasattr(attention, name)]
        return [parameter for norm in norms for parameter in norm.parameters()]


def home(module: nn.Module) -> torch.device | None:
    """Where the weights of a module are; None for those that are brought to another device only to be used."""
    device = next(module.parameters()).device
    return None if device.type == "meta" else device
