"""Calibration texts: where they come from and how they become token windows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# fewer tokens than this determine no regression worth having
LEAST_TOKENS = 1024
Calibration: TypeAlias = Sequence[str] | str | Path | Tensor | None


class TextTooShort(ValueError):
    """There are fewer tokens than asked for."""


def shipped_texts() -> list[str]:
    """The sample in the package: public-domain prose, and modern prose, manuals, dialogue and code written for it."""
    folder = files("hf_kvcache") / "data" / "calibration"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".txt")), key=lambda path: path.name)
    return [path.read_text(encoding="utf-8") for path in paths]


def token_windows(
    calibration: Calibration, model: nn.Module, tokenizer: Any, samples: int, length: int, shrink: bool = False
) -> Tensor:
    """Cuts calibration texts into `[samples, length]` token ids, spread evenly over all of them.

    Args:
        calibration: texts, the path of one text file, token ids `[N, T]` or `[T]`, or None for the shipped sample.
        model: whose tokenizer is looked for when `tokenizer` is None.
        tokenizer: turns text into ids.
        samples, length: how many windows of how many tokens.
        shrink: take fewer and shorter windows where the texts are short, rather than refuse them.

    Raises:
        TextTooShort: when the texts are not long enough.
    """
    if isinstance(calibration, Tensor):
        streams = [row.flatten() for row in calibration.reshape(-1, calibration.shape[-1]).long()]
    else:
        tokenizer = tokenizer or find_tokenizer(model)
        texts = _read(calibration)
        streams = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).long() for text in texts]
    if shrink:
        length = min(length, max(map(len, streams), default=0))
    windows = torch.cat(
        [torch.empty(0, length, dtype=torch.long)]
        + [stream[: len(stream) // length * length].view(-1, length) for stream in streams]
    )
    if shrink and len(windows) * length >= LEAST_TOKENS:
        samples = min(samples, len(windows))
    if len(windows) < samples:
        total = sum(len(stream) for stream in streams)
        raise TextTooShort(
            f"the calibration text is too short: expected at least {samples} windows of {length} tokens, "
            f"got {len(windows)} ({total} tokens); give more text"
        )
    chosen = torch.linspace(0, len(windows) - 1, samples).round().long()
    return windows[chosen]


def find_tokenizer(model: nn.Module) -> Any:
    """The tokenizer saved beside the model."""
    # its module takes as long to import as the rest of this library
    from transformers import AutoTokenizer

    path = getattr(model.config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(
            f"text needs a tokenizer and none could be loaded from {path!r} ({type(error).__name__}); pass "
            "tokenizer=AutoTokenizer.from_pretrained(...), or token ids [N, T] or a saved plan where those are taken"
        ) from error


def _read(calibration: Sequence[str] | str | Path | None) -> Sequence[str]:
    if calibration is None:
        return shipped_texts()
    if not isinstance(calibration, (str, Path)):
        return calibration
    path = Path(calibration)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a list of texts or the path of a text file, and there is no file {str(calibration)!r}"
        )
    return [path.read_text(encoding="utf-8")]
