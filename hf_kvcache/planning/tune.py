"""`tune`: measures on the user's text what every choice costs, solves for the bytes asked, verifies the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hf_kvcache.api import unpatched_fingerprint, warn_of_half_precision
from hf_kvcache.calibration.texts import Calibration, find_tokenizer
from hf_kvcache.methods.planned import LARGEST, scorer_names, without_measuring
from hf_kvcache.plan import CachePlan
from hf_kvcache.planning.costs import Costs, measure_costs
from hf_kvcache.planning.share import Pair, Sharing, solve_shared
from hf_kvcache.planning.solve import planned_share
from hf_kvcache.planning.verify import Verified, references, verify
from hf_kvcache.planning.windows import windows
from hf_kvcache.progress import progress

logger = logging.getLogger(__name__)

FOLLOWING = 128
# every third window is held back for the verification
HELD = 3
ATTEMPTS = 4
# bytes that a cache holds beside its entries make a plan a little larger than the sum of its choices
SLACK = 0.003
# a second attempt asks for so much more than it should need
MARGIN = 1.002
# of a cache that may be in layers which plans are for
LEAST_PART = 0.02


@dataclass(frozen=True)
class Tuned:
    """A plan and what is known about it.

    Args:
        plan: with the figures below in its settings.
        expected: nats a token that it should cost by the sum of its choices.
        verified: what it costs on held-back text.
        uniform: what the plan of `target_ratio`, made without measuring, costs there.
    """

    plan: CachePlan
    expected: float
    verified: Verified
    uniform: Verified


class Tuner:
    """Measures once, and makes a plan for any ratio.

    Args:
        model: unpatched. In float32: half precision hides what is gentler than 4 bits.
        tokenizer: of the model; None to look for one at the place it was loaded from.
        texts: to measure on: texts, the path of a text file, or token ids; None for the shipped sample.
        scorer: the method that says which tokens a head keeps.
        samples: windows to measure on; half as many again are held back.
        length: tokens of each context.
        draws: samples of the gradient a question (see `planning.gradients`).
        sharing: price layers that read their neighbours' keys and values, too.
        say: gets a line of text now and then.

    Example:
        >>> tuner = Tuner(model, tokenizer, "my_texts.txt")
        >>> for ratio in (4, 8, 16):
        ...     tuner.tune(ratio).plan.save(f"plan-{ratio}.safetensors")
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        texts: Calibration = None,
        *,
        scorer: str = "kvzip",
        samples: int = 6,
        length: int = 1024,
        draws: int = 12,
        sharing: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        for name, count in (("samples", samples), ("length", length), ("draws", draws)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive int, got {count!r}")
        if scorer not in scorer_names():
            raise ValueError(f"scorer must be one of the methods {', '.join(scorer_names())}, got {scorer!r}")
        self.model, self.fingerprint = model, unpatched_fingerprint(model)
        warn_of_half_precision(model)
        self.tokenizer = tokenizer or find_tokenizer(model)
        self.scorer, self.say = scorer, say
        held = max(samples // (HELD - 1), 1)
        found = windows(model, self.tokenizer, texts, samples + held, length, FOLLOWING)
        self.held = [window for index, window in enumerate(found) if index % HELD == 1][:held]
        self.measured = [window for window in found if all(window is not other for other in self.held)]
        self._share = sharing
        self._costs: Costs | None = None
        self._references: Any = None
        self._settings = {"samples": samples, "held_back": held, "length": length, "draws": draws}

    @property
    def costs(self) -> Costs:
        """What every choice costs; measured when it is first asked for."""
        if self._costs is None:
            start = time.perf_counter()
            self.say(f"reading {len(self.measured)} windows of {self._settings['length']} tokens")
            with progress("measuring what every choice costs", len(self.measured)) as step:
                self._costs = measure_costs(
                    self.model, self.tokenizer, self.measured, self.scorer, self._settings["draws"], done=step
                )
            self.say(f"measured {self._costs.loss.numel()} choices in {time.perf_counter() - start:.0f} s")
        return self._costs

    @cached_property
    def sharing(self) -> Sharing:
        """Fits and judges on the windows that are measured on: nothing that is held back is seen."""
        ids = torch.cat([window.context for window in self.measured])
        return Sharing(self.model, self.tokenizer, ids, self.costs.layers, len(self.measured[0].questions))

    @cached_property
    def pairs(self) -> list[Pair]:
        """Layers that may share, the cheapest first; measured when it is first asked for."""
        if not (self._share and self.sharing.possible):
            return []
        start = time.perf_counter()
        try:
            with progress("measuring what sharing costs", len(self.costs.layers) - 1) as step:
                found = self.sharing.price(step)
        except NotImplementedError as error:
            self.say(f"no layer will share: {error}")
            return []
        low = found[0]
        self.say(
            f"priced {len(found)} pairs of layers in {time.perf_counter() - start:.0f} s; the cheapest, "
            f"{low.consumer}<-{low.source}, costs {low.loss:.4f} nats a token"
        )
        return found

    def tune(self, target_ratio: float) -> Tuned:
        """The plan of least loss whose caches are `target_ratio` times smaller than in 16 bits.

        Raises:
            ValueError: when the ratio is out of reach. A plan that only just misses it is returned with a warning.
        """
        if isinstance(target_ratio, bool) or not isinstance(target_ratio, (int, float)) or not target_ratio > 1:
            raise ValueError(f"target_ratio is a number above 1, got {target_ratio!r}")
        plan, expected, verified = self._best(float(target_ratio))
        layers = self.costs.num_layers
        uniform = self.unmeasured(target_ratio)
        text = {
            "target_ratio": f"{target_ratio:g}",
            "ratio": f"{verified.ratio:.3f}",
            "kl_continuation": f"{verified.continuation:.4g}",
            "kl_quotation": f"{verified.quotation:.4g}",
            "kl_expected": f"{expected:.4g}",
            "kl_unmeasured_plan": f"{uniform.continuation:.4g} and {uniform.quotation:.4g}",
            "layers_measured": f"{len(self.costs.layers)} of {layers}",
            **({"cheapest_shared_pair": f"{self.pairs[0].loss:.4g}"} if self.pairs else {}),
            **{name: str(value) for name, value in self._settings.items()},
        }
        return Tuned(replace(plan, settings=text), expected, verified, uniform)

    def _best(self, target: float) -> tuple[CachePlan, float, Verified]:
        """The plan by the prices; where layers share in it, it has to prove better than the best in which none do."""
        found = self._reaching(target, self.pairs)
        if found[0].sharing is not None:
            try:
                other = self._reaching(target, ())
            except ValueError:  # only a plan that shares is small enough
                other = found
            found = min(found, other, key=lambda plan: (not reaches(plan[2], target), plan[2].loss))
        if not reaches(found[2], target):
            logger.warning(
                "target_ratio=%g was not reached: the plan makes a cache %.2f times smaller; ask for a little more",
                target,
                found[2].ratio,
            )
        return found

    def _reaching(self, target: float, pairs: Sequence[Pair]) -> tuple[CachePlan, float, Verified]:
        """A plan, the loss it is expected to cost, and what it costs and holds: the smallest one, if all miss."""
        asked, best = target, None
        held: list[tuple[float, float]] = []
        for _ in range(ATTEMPTS):
            try:
                asked = next_ratio(target, held) if held else target
                plan, expected = solve_shared(self.costs, pairs, asked, self.fingerprint)
            except ValueError as error:
                if best is None:
                    raise
                raise ValueError(
                    f"target_ratio={target:g} is out of reach: a cache also holds what no plan shrinks, such as layers "
                    f"with a sliding window, and the smallest plan tried was {best[2].ratio:.2f} times smaller; "
                    "ask for less"
                ) from error
            plan = self.sharing.heal(plan)
            verified = self.verify(plan)
            self.say(f"asked for {asked:.2f}: {plan.summary()}; held {verified.ratio:.2f} times fewer bytes")
            if best is None or verified.ratio > best[2].ratio:
                best = plan, expected, verified
            if reaches(verified, target):
                break
            held.append((planned_share(self.costs, plan), 1 / verified.ratio))
        assert best is not None
        return best

    def unmeasured(self, ratio: float) -> Verified:
        """What one share and one pair of widths for all layers, as with `target_ratio`, cost on held-back windows."""
        kept, key_bits, value_bits = without_measuring(min(ratio, LARGEST))
        options: dict[str, Any] = {"key_bits": key_bits, "value_bits": value_bits}
        if kept < 1:
            return self._verified(f"{self.scorer}+turboquant", budget=kept, **options)
        return self._verified("turboquant", **options)

    def verify(self, plan: CachePlan) -> Verified:
        """What a plan costs on the held-back windows."""
        return self._verified(plan=plan)

    def _verified(self, method: Any = None, **options: Any) -> Verified:
        if self._references is None:
            self._references = references(self.model, self.held)
        return verify(self.model, self.tokenizer, self.held, self._references, method, **options)


def reaches(verified: Verified, target: float) -> bool:
    """Whether a cache is as small as asked."""
    return verified.ratio >= target * (1 - SLACK)


def next_ratio(target: float, held: Sequence[tuple[float, float]]) -> float:
    """What to ask a plan for after others held too much.

    A cache holds what its plan shrinks and what no plan does:  held = fixed + part * planned, all against a full cache
    in 16 bits, of which `part` is in layers that plans are for. Two plans tell both; after one, `part` is taken to be
    1, which never asks for too much.

    Args:
        target: the ratio that is wanted.
        held: for every plan so far what it was to hold of those layers (`planned_share`) and what the cache held.

    Raises:
        ValueError: when what no plan shrinks is too much by itself.
    """
    planned, total = held[-1]
    part = 1.0
    if planned != held[0][0]:
        slope = (total - held[0][1]) / (planned - held[0][0])
        # anything else is noise, or another share map
        part = slope if LEAST_PART < slope < 1 else 1.0
    wanted = planned - (total - 1 / (MARGIN * target)) / part
    if wanted <= 0:
        raise ValueError(f"what no plan shrinks makes a cache more than 1 / {target:g} of a full one; ask for less")
    return 1 / wanted


def tune(model: Any, tokenizer: Any = None, *, target_ratio: float, texts: Calibration = None, **options: Any) -> Tuned:
    """Makes one plan; see `Tuner` for the other options.

    Example:
        >>> tuned = tune(model, tokenizer, target_ratio=8, texts="my_texts.txt")
        >>> patch_model(model, plan=tuned.plan)
    """
    return Tuner(model, tokenizer, texts, **options).tune(target_ratio)
