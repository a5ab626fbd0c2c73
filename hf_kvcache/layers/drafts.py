"""What assisted decoding, which crops the cache after every forward, would change: it is refused."""

from __future__ import annotations

from hf_kvcache.layers.settings import LayerSettings


def refuse_drafts(settings: LayerSettings, sealed: bool) -> None:
    """Raises where tokens that may be cropped again would change what a layer keeps, or see what others do not.

    Args:
        settings: of the layer.
        sealed: whether its prompt is sealed already, so that no draft can come in one forward with it.
    """
    policy = settings.policy
    if (policy is not None and policy.every) or (
        not sealed and settings.changes and (settings.shared or settings.deferred)
    ):
        raise NotImplementedError(
            "assisted decoding would change what this method generates: drafts in the forward of the prompt would "
            "see it before it is evicted or encoded, and eviction would follow the number of drafts accepted; expected "
            "a codec without shared layers, or an eviction method that judges each layer alone, once, after the prompt "
            "(snapkv, adakv, criticalkv ...)"
        )
