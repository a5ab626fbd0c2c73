"""`PrefillRates`: what prefill takes of every model that uses a store."""

from __future__ import annotations

# a forward of fewer tokens says more of what a forward costs whatever it reads
FEWEST_TOKENS = 128


class PrefillRates:
    """Seconds a token, over all forwards long enough to tell.

    The few tokens behind a hit are charged what those of a long prompt are: computing their page again costs as much,
    while the forward that they came in is spared by no hit.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, float]] = {}

    def note(self, model: str, tokens: int, seconds: float) -> None:
        """Takes a forward into account.

        Args:
            model: its fingerprint.
            tokens: that were computed, those of all rows together.
            seconds: that it took.
        """
        if tokens >= FEWEST_TOKENS:
            all_tokens, all_seconds = self._sums.get(model, (0, 0.0))
            self._sums[model] = (all_tokens + tokens, all_seconds + seconds)

    def seconds(self, model: str) -> float:
        """Of prefill, a token; 0 when nothing is known."""
        tokens, seconds = self._sums.get(model, (1, 0.0))
        return seconds / tokens
