"""lm-eval on compressed caches: the model type `hf-kvcache`, and the command that registers it.

lm-eval's own model scores a log-likelihood in one forward over context and continuation, which never reads a cache.
Here the context is prefilled and compressed first, and the continuation is scored against what is left. The last
`question_tokens` of a context are fed after the compression, at least one, so that also the first token of an answer is
predicted from the compressed cache.

    hf-kvcache lm-eval run --model hf-kvcache --tasks hfkv_niah_4,hfkv_kv_20 \\
        --model_args pretrained=DIR,method=adakv+criticalkv+turboquant,budget=0.25,bits=4
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ModuleNotFoundError(
        f"lm-eval is not installed ({error}); run: pip install 'hf_kvcache[lm-eval]'", name=error.name
    ) from error

from tqdm import tqdm  # type: ignore[import-untyped]

from hf_kvcache.api import compress, is_patched, patch_model
from hf_kvcache.integrations.scoring import ScoredText, score_texts
from hf_kvcache.methods import METHODS
from hf_kvcache.resolve import option_names, resolve

TASKS = Path(__file__).parent / "lm_eval_tasks"
# of a task's document: the end of its prompt, which is asked after the compression
ASKED = "asked"
# options of HFLM that its own scoring applies, and ours would not
NOT_OURS = ("softmax_dtype", "mixed_precision_dtype")


@register_model("hf-kvcache")
class KVCacheLM(HFLM):
    """lm-eval's Hugging Face model with a compressed cache.

    - `loglikelihood`: the context is compressed, all continuations of one context share its cache.
    - `loglikelihood_rolling`: the first half of every window is its context. Its own tokens are predicted while it is
      read, as by the full model; those of the second half from the compressed cache.
    - `generate_until`: everything that is generated is predicted from the compressed cache.

    A document with a field `asked` has its prompt fed from there on after the compression, so that the method does not
    know what will be asked (the tasks in `TASKS` come in both forms). A chat template may add to the prompt's end.

    Args:
        pretrained: name or folder of a model, or a model; one that is patched stays as it is.
        method: as for `patch_model`, and so are all options of methods among `options`.
        question_tokens: last tokens of a context that are fed after the compression; at least 1.
        options: of the method, and of lm-eval's `HFLM`.

    Example:
        >>> lm = KVCacheLM(patch_model(model, "kvzip", budget=0.25, tokenizer=tokenizer), tokenizer=tokenizer)
        >>> lm_eval.simple_evaluate(lm, tasks=["hfkv_niah_4"], task_manager=TaskManager(include_path=TASKS))
    """

    def __init__(self, pretrained: Any, method: Any = None, question_tokens: int = 1, **options: Any) -> None:
        if isinstance(question_tokens, bool) or not isinstance(question_tokens, int) or question_tokens < 1:
            raise ValueError(
                f"question_tokens must be an int of at least 1, got {question_tokens!r}: the token that is fed after "
                "the compression predicts the first one that is scored"
            )
        refused = [name for name in NOT_OURS if options.get(name) is not None]
        if refused:
            raise ValueError(
                f"hf-kvcache scores in the dtype of the model, and has no {' and no '.join(refused)}; leave it out, or "
                "load the model in another dtype with dtype=..."
            )
        own = set(inspect.signature(HFLM.__init__).parameters)
        of_methods = {name for cls in METHODS.values() for name in option_names(cls)} - own
        chosen = {name: options.pop(name) for name in list(options) if name in of_methods}
        if not isinstance(pretrained, str):
            # HFLM hands what it does not know on to the loading of a model, and to nobody where there is one
            chosen |= {name: options.pop(name) for name in set(options) - own}
            resolve(method, chosen)
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise NotImplementedError(f"hf-kvcache is for decoder-only models, this one is {self.backend}")
        launched = getattr(self, "accelerator", None)
        if launched is not None and self.world_size == 1:
            # HFLM shares the documents among GPUs only, and would have every process on a CPU answer all of them
            self._rank, self._world_size = launched.process_index, launched.num_processes
        if method is not None or chosen or not is_patched(self.model):
            patch_model(self.model, method, tokenizer=self.tokenizer, **chosen)
        self.question_tokens = question_tokens
        # (prompt, continuation) -> tokens of the prompt that are fed after the compression, where it is not the default
        self._asked: dict[Any, int] = {}
        self._held_back = question_tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = {request.args: self._tokens_asked(request) for request in requests}
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        texts = [self._scored(*request) for request in requests]
        bar = tqdm(total=len(texts), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        answers = score_texts(self.model, texts, self._contexts_at_once(override_bs), bar.update)
        bar.close()
        for (name, _, _), answer in zip(requests, answers, strict=True):
            if name is not None:
                self.cache_hook.add_partial("loglikelihood", name, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        by_asked: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            by_asked.setdefault(self._tokens_asked(request), []).append(index)
        answers = [""] * len(requests)
        for asked, indices in by_asked.items():
            with self._holding_back(asked):
                found = super().generate_until([requests[index] for index in indices], disable_tqdm=disable_tqdm)
            for index, answer in zip(indices, found, strict=True):
                answers[index] = answer
        return answers

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        sealed = context.shape[1] - self._held_back
        mask = options.get("attention_mask")
        # a row that is shorter than what is asked would leave nothing to compress
        if sealed > 0 and (mask is None or bool(mask[:, :sealed].any(-1).all())):
            head = None if mask is None or bool(mask.all()) else mask[:, :sealed]
            options["past_key_values"] = compress(self.model, context[:, :sealed], head)
        return super()._model_generate(context, max_length, stop, **options)

    def _scored(self, name: Any, context: list[int], continuation: list[int]) -> ScoredText:
        """One request of lm-eval, cut on the left to what the model takes."""
        ids = tuple((context + continuation)[-(self.max_length + 1) :])
        first = len(ids) - len(continuation)
        if name is None:
            # a window of a rolling log-likelihood, whose context is a token at most
            return ScoredText(ids, (len(ids) - 1) // 2, max(first, 1))
        asked = self._asked.get(name, self.question_tokens)
        return ScoredText(ids, max(first - asked, 0), max(first, 1))

    def _tokens_asked(self, request: Any) -> int:
        """How many tokens of a request's prompt are fed after the compression."""
        prompt, asked = request.args[0], (request.doc or {}).get(ASKED)
        if not asked or not asked.strip():
            return self.question_tokens
        # a chat template puts its own marks behind it, and may strip it
        place = prompt.rfind(asked.strip())
        if place < 0:
            raise ValueError(
                f"expected the field {ASKED!r} of a document in its prompt, to feed it after the compression, got "
                f"{asked!r} and a prompt that ends in {prompt[-80:]!r}; keep it as it is in the prompt, or leave the "
                "field out"
            )
        before = prompt[:place].removesuffix(asked[: -len(asked.lstrip())])
        return max(len(self.tok_encode(prompt)) - len(self.tok_encode(before)), 1) if before else self.question_tokens

    def _contexts_at_once(self, override: int | None) -> int:
        if override is not None:
            return override
        if self.batch_size == "auto":
            raise NotImplementedError("hf-kvcache has no batch_size=auto; give a number of contexts")
        return int(self.batch_size)

    @contextmanager
    def _holding_back(self, tokens: int) -> Iterator[None]:
        self._held_back = tokens
        try:
            yield
        finally:
            self._held_back = self.question_tokens


def main(arguments: Sequence[str]) -> None:
    """Runs lm-eval's own command line, in which `hf-kvcache` is now a model and our tasks have names."""
    import sys

    from lm_eval.__main__ import HarnessCLI, setup_logging

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        setup_logging()
        cli = HarnessCLI()
        parsed = cli.parse_args()
        # the command line takes one folder of tasks, the task manager behind it several; of one name the last counts
        parsed.include_path = [str(TASKS), *_folders_given(parsed)]
        cli.execute(parsed)
    finally:
        sys.argv = before


def _folders_given(parsed: Any) -> list[str]:
    """The folders of tasks that the user named on lm-eval's command line, or in the file of `--config`."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given = getattr(parsed, "include_path", None)
    if given is None and getattr(parsed, "config", None):
        given = EvaluatorConfig.load_yaml_config(parsed.config).get("include_path")
    return [given] if isinstance(given, str) else list(given or [])
