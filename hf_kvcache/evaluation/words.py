"""Words for keys and names: common, short, and not alike."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber bitter bold brave bright calm clever cold crisp dark deep dry eager early faint fierce firm fresh gentle "
    "golden grand green happy heavy hollow humble icy jolly keen large late lively lone loud mellow mild narrow neat "
    "noble odd pale plain proud quick quiet rapid rough royal rusty sharp shy silent silver simple slow smooth soft "
    "solid stern strong sweet tall tidy vivid warm wild wise"
)
NOUNS = _words(
    "acorn anchor apple arrow badge barrel basket beacon bell bottle bridge bucket button candle canyon castle cherry "
    "cliff clock cloud copper coral cradle crown desert dragon drum eagle ember engine falcon feather fiddle flute "
    "forest fountain garden glacier hammer harbor helmet island ivory jacket jungle kettle ladder lantern lemon "
    "marble meadow mirror mountain needle ocean orchard otter pebble pencil pepper piano pillow planet pocket puzzle "
    "rabbit ribbon river rocket saddle sailor shadow silk sparrow spider spoon statue summit temple thunder ticket "
    "tiger timber tower trumpet tunnel turtle valley velvet violin wagon walnut whistle window winter wizard"
)
