"""Measuring methods one after the other; each result is on disk before the next begins, so a run can go on later."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_kvcache.api import compress, patch_model, unpatch_model, warn_of_half_precision
from hf_kvcache.evaluation import Interval, bootstrap, filled_cache, make_task, score_answers, score_answers_aware
from hf_kvcache.evaluation.filler import shipped_prose
from hf_kvcache.evaluation.protocol import context_ids
from hf_kvcache.fingerprint import fingerprint, weights_digest
from hf_kvcache.measure import cache_bytes, kl_divergence, speed, top1_agreement
from hf_kvcache.planning.verify import predictions, references
from hf_kvcache.planning.windows import Window, windows
from hf_kvcache.report import report
from hf_kvcache.resolve import option_names, resolve, split_names

FOLLOWING = 128
DECODED = 16


@dataclass(frozen=True)
class Setting:
    """One line of the table: what is given to `patch_model`.

    Args:
        method: names joined by `+`, or `none`.
        options: of the method.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How tables and pages name it."""
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method} {given}".strip()


@dataclass(frozen=True)
class Record:
    """What was measured under one setting.

    Args:
        run: of which it is a part: model, texts and lengths, and what is in files that options name, as a digest.
        setting: as `Setting.label`.
        figures: by name; intervals are three of them.
        heads: the share of a context that every head keeps, `[layers][heads]`, empty for a layer that holds none.
        error: what went wrong, in one line; then there are no figures.
    """

    run: str
    setting: str
    figures: dict[str, float]
    heads: list[list[float]]
    error: str = ""


def parse_setting(text: str, budgets: Sequence[float]) -> list[Setting]:
    """`NAME` or `NAME{"option": value}`, once for every budget where the method has one and none is given.

    Example:
        >>> parse_setting('snapkv+turboquant{"bits": 4}', [0.5, 0.25])[1].label
        'snapkv+turboquant bits=4, budget=0.25'
    """
    from hf_kvcache.methods import METHODS

    found = re.fullmatch(r"([^{]+)(\{.*\})?", text)
    try:
        assert found is not None
        options = json.loads(found[2] or "{}")
    except (AssertionError, json.JSONDecodeError):
        raise ValueError(f'expected NAME or NAME{{"option": value}}, got {text!r}') from None
    names = [name.strip() for name in split_names(found[1])]
    takes = any("budget" in option_names(METHODS[name]) for name in names if name in METHODS)
    given = [{**options, "budget": budget} for budget in budgets] if takes and "budget" not in options else []
    return [Setting("+".join(names), chosen) for chosen in given or [options]]


@torch.no_grad()
def run_bench(
    model: Any,
    tokenizer: Any,
    settings: Iterable[Setting],
    folder: Path,
    *,
    tasks: Sequence[str] = ("niah-4",),
    contexts: int = 4,
    length: int = 1024,
    texts: Any = None,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Measures every setting that `folder` does not hold yet, and returns all of this run's records.

    A setting that fails has a record too, with its `error`; another run tries it again.

    Args:
        model: unpatched, in float32: half precision hides what is gentler than 4 bits.
        tokenizer: of the model.
        settings: to measure.
        folder: for `bench.jsonl`, which holds every result as soon as it is there.
        tasks: retrieval tasks, for `make_task`; each is asked after the compression and, `aware`, before it.
        contexts: how many texts and how many contexts of every task.
        length: tokens of a context.
        texts: for the fidelity; None for the shipped prose.
        say: is told what happens.

    Raises:
        ValueError: for an unknown method or option, before anything is measured.
    """
    settings = list(settings)
    for setting in settings:
        resolve(setting.method, setting.options)
    warn_of_half_precision(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.jsonl"
    texts = [shipped_prose()] if texts is None else texts
    cut = windows(model, tokenizer, texts, contexts, length, FOLLOWING)
    # the fingerprint is the same for fine-tuned weights and in every dtype and place, figures are not
    place = [weights_digest(model), str(model.dtype), str(model.device)]
    described = [fingerprint(model), *place, *tasks, contexts, length, [window.context.tolist() for window in cut]]
    known = {(record.run, record.setting): record for record in read_records(path) if not record.error}
    measure = _Bench(model, tokenizer, cut, tasks, contexts, length)
    found = []
    for setting in settings:
        run = _digest([*described, *_contents(setting)])
        if (run, setting.label) in known:
            say(f"{setting.label}: measured before")
        else:
            start = time.perf_counter()
            measure.prepare()
            record = _tried(measure, setting, run)
            _append(record, path)
            known[run, setting.label] = record
            seconds = time.perf_counter() - start
            outcome = f"failed: {record.error}" if record.error else f"KL {record.figures['kl']:.4f}"
            say(f"{setting.label}: {outcome}, {seconds:.0f} s")
        found.append(known[run, setting.label])
    return found


def _digest(described: Any) -> str:
    """Twelve hexadecimal digits that stand for what can be written as JSON."""
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]


def _contents(setting: Setting) -> list[str]:
    """Digests of the files that options name, such as a plan, which may be made anew under the same name."""
    paths = [value for value in setting.options.values() if isinstance(value, (str, Path)) and os.path.isfile(value)]
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def _tried(measure: _Bench, setting: Setting, run: str) -> Record:
    """The record of a setting, measured or failed: the others do not depend on it."""
    try:
        return Record(run, setting.label, *measure(setting))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return Record(run, setting.label, {}, [], f"{type(error).__name__}: {reason}")


def _append(record: Record, path: Path) -> None:
    """Writes a line; one that a killed run left unfinished is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(asdict(record)).encode() + b"\n")


class _Bench:
    """All measurements on one model, after `prepare`."""

    def __init__(
        self, model: Any, tokenizer: Any, cut: Sequence[Window], tasks: Sequence[str], contexts: int, length: int
    ) -> None:
        self.model, self.tokenizer, self.windows, self.length = model, tokenizer, cut, length
        self.tasks = {name: [self._task(name, seed) for seed in range(contexts)] for name in tasks}
        self._full: Any = None

    def prepare(self) -> None:
        """Measures the model alone, once."""
        if self._full is None:
            self._full = references(self.model, self.windows)

    def __call__(self, setting: Setting) -> tuple[dict[str, float], list[list[float]]]:
        patch_model(self.model, setting.method, tokenizer=self.tokenizer, **setting.options)
        try:
            figures, heads = self._fidelity()
            for name, made in self.tasks.items():
                figures |= self._retrieval(name, made)
            return figures | self._speed(), heads
        finally:
            unpatch_model(self.model)

    def _task(self, name: str, seed: int) -> Any:
        sized = not re.fullmatch(r"(kv|func)-\d+", name)
        return make_task(name, self.tokenizer, seed, self.length if sized else None)

    def _fidelity(self) -> tuple[dict[str, float], list[list[float]]]:
        """KL and top-1 agreement on texts, real bytes, and the shares that heads keep, of the first text."""
        divergences, agreements, quotations, ratios = [], [], [], []
        heads: list[list[float]] = []
        for window, full in zip(self.windows, self._full, strict=True):
            cache = compress(self.model, window.context)
            held = report(cache)
            # of the bytes as they are held: what a model in float32 keeps dense counts with its 32 bits
            bits = 8 * next(self.model.parameters()).element_size()
            ratios.append(held.full_bytes / held.bytes * 16 / bits)
            if not heads:
                heads = [[kept / max(layer.seen, 1) for kept in layer.stored] for layer in held.layers]
            copies = [predictions(self.model, cache, window, question) for question in window.questions]
            divergences.append([kl_divergence(full[0], copies[0])])
            quotations.append([kl_divergence(full[1], copies[1])])
            agreements.append([top1_agreement(full[0], copies[0])])
            kv_bytes = cache_bytes(cache)
        figures = {"times_smaller_than_16_bit": sum(ratios) / len(ratios), "kv_bytes": float(kv_bytes)}
        for name, values in (("kl", divergences), ("quotation_kl", quotations), ("top1", agreements)):
            figures |= _figures(name, bootstrap(values))
        return figures, heads

    def _retrieval(self, name: str, made: Sequence[Any]) -> dict[str, float]:
        """Accuracy and answer NLL, asked after the compression and before it."""
        figures: dict[str, float] = {}
        agnostic, aware = [], []
        for task in made:
            cache = filled_cache(self.model, context_ids(self.model, self.tokenizer, task.context))
            agnostic.append(score_answers(self.model, self.tokenizer, cache, task))
            aware.append(score_answers_aware(self.model, self.tokenizer, task))
        for form, answers in (("", agnostic), (" aware", aware)):
            exact = [[float(answer.exact) for answer in context] for context in answers]
            figures |= _figures(f"{name}{form} accuracy", bootstrap(exact))
            figures |= _figures(f"{name}{form} nll", bootstrap([[answer.nll for answer in one] for one in answers]))
        return figures

    def _speed(self) -> dict[str, float]:
        """Tokens a second of one prefill and of decoding, and the memory that a prefill takes at its peak."""
        ids = self.windows[0].context
        with _peak(ids.device) as peak:
            timed = speed(self.model, ids, DECODED)
        found = {"prefill tokens/s": ids.shape[1] / timed.prefill, "decode tokens/s": 1 / timed.decode}
        return found | {"peak MB": peak[0] / 2**20}


@contextmanager
def _peak(device: torch.device) -> Iterator[list[float]]:
    """Yields a list whose only number will be the bytes taken at most above those taken now."""
    found = [0.0]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = float(torch.cuda.max_memory_allocated(device) - before)
        return
    import psutil  # type: ignore[import-untyped]

    resident = psutil.Process().memory_info
    before, done = resident().rss, threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], float(resident().rss - before))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def read_records(path: Path) -> list[Record]:
    """What `run_bench` wrote; a last line that was cut off does not count."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Writes one row a record."""
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", *names, "run", "error"])
        for record in records:
            figures = [f"{record.figures[name]:.6g}" if name in record.figures else "" for name in names]
            writer.writerow([record.setting, *figures, record.run, record.error])


def _figures(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name} low": interval.low, f"{name} high": interval.high}
