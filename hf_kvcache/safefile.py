"""Reading safetensors files of our own formats: tensors and a JSON description, checked before use. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: str | Path, file_format: str, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes tensors and a JSON-able description under the name of a format.

    Raises:
        OSError: when the file cannot be written.
    """
    metadata = {"format": file_format, "description": json.dumps(description)}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); expected a file in a folder that is there") from error


def read(path: str | Path, file_format: str | None, how_to_make: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write` wrote; a missing, truncated or foreign file is an error that says how to make a good one.

    `file_format` None takes any of our formats. The description has the format found under `"format"`.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found is None or found != (file_format or found):
                expected = file_format or "one of ours"
                raise ValueError(f"{path} has the format {found!r}, expected {expected!r}; {how_to_make}")
            description = {**json.loads(metadata["description"]), "format": found}
            return description, {name: file.get_tensor(name) for name in list(file.keys())}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}; {how_to_make}") from None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file of ours ({error}); {how_to_make}") from error
