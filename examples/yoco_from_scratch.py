"""Training small models from scratch on a text and on associative recall: `train_yoco.py --from-scratch` runs this.

Every model sees the same tokens in the same order for a seed. Runs that are done are kept in the output folder, one
JSON file each, and not repeated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from yoco_models import CONTROL, MODELS, build, count, device

# a context of associative recall: that many pairs, a gap longer than the control can see, then queries
PAIRS, KEYS, GAP, QUERIES, RECALL_WINDOW = 4, 16, 30, 12, 8


@dataclass(frozen=True)
class Budget:
    """How long and how large.

    Args:
        tokens: trained on, for the text.
        recall_steps: at most, for associative recall; a model that has learned it stops early.
        width, layers, heads, kv_heads, mlp, vocabulary, length, batch: of models and batches.
        rate: the highest learning rate.
    """

    tokens: int = 1_000_000
    recall_steps: int = 3000
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 704
    vocabulary: int = 2048
    length: int = 256
    batch: int = 4
    rate: float = 1e-3

    def sizes(self, **changes: Any) -> dict[str, Any]:
        """Fields of a configuration."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 4 * self.length,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **changes,
        }


def encode(files: Sequence[Path], vocabulary: int, folder: Path) -> tuple[Tensor, list[Tensor]]:
    """Token ids of the training text, and of every held-out document: each ninth file.

    The tokenizer is a byte-level BPE trained on the training text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    held = list(files)[4::9] or list(files)[-1:]
    train = [file for file in files if file not in held]
    if not train:
        raise ValueError(f"expected at least two text files, one of them to validate on, got {len(files)}")
    path = folder / "tokenizer.json"
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in train]
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet))
        tokenizer.save(str(path))
    ids = torch.cat([torch.tensor(tokenizer.encode(text).ids) for text in texts])
    return ids, [torch.tensor(tokenizer.encode(file.read_text("utf-8", errors="replace")).ids) for file in held]


def train(
    model: PreTrainedModel, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, rate: float, stop: Any = None
) -> list[tuple[int, float]]:
    """AdamW with warm-up and cosine, in mixed precision (weights in float32); returns (step, loss) now and then.

    Args:
        batches: step -> ids and labels.
        stop: asked every 50 steps whether that is enough.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.05 + 0.95 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2),
    )
    curve, recent = [], []
    model.train()
    for step in range(steps):
        ids, labels = (tensor.to(model.device) for tensor in batches(step))
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 10 == 0 or step + 1 == steps:
            curve.append((step + 1, sum(recent) / len(recent)))
            recent = []
        if stop is not None and (step + 1) % 50 == 0 and stop():
            break
    return curve


@torch.no_grad()
def window_losses(model: PreTrainedModel, documents: Sequence[Tensor], length: int) -> list[float]:
    """Mean loss of every window of `length` tokens of the documents."""
    model.eval()
    losses: list[float] = []
    for ids in documents:
        windows = ids[: len(ids) // length * length].view(-1, length)
        for part in windows.split(16):
            part = part.to(model.device)
            logits = model(part, use_cache=False).logits[:, :-1]
            found = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            losses += found.view(len(part), -1).mean(1).tolist()
    return losses


def train_on_text(name: str, seed: int, budget: Budget, ids: Tensor, documents: list[Tensor]) -> dict[str, Any]:
    """One run on the text."""
    parameters = count(build("transformer", budget.sizes(), budget.length // 2, seed))
    model = build(name, budget.sizes(), budget.length // 2, seed, parameters).to(device())
    order = torch.Generator().manual_seed(1000 + seed)
    steps = budget.tokens // (budget.batch * budget.length)
    starts = torch.randint(len(ids) - budget.length, (steps, budget.batch), generator=order)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        part = torch.stack([ids[start : start + budget.length] for start in starts[step].tolist()])
        return part, part

    began = time.process_time()
    curve = train(model, batch, steps, budget.rate)
    seconds = time.process_time() - began
    found = {"parameters": count(model), "seconds": seconds, "curve": curve}
    return found | {"losses": window_losses(model, documents, budget.length)}


def recall_batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Contexts of associative recall and labels, -100 where nothing is asked.

    Keys are tokens 1 to `KEYS`, values the next `KEYS` tokens, 0 fills the gap. Each query is a key and its value, and
    the value is to be predicted.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :PAIRS] + 1
    values = torch.randint(KEYS + 1, 2 * KEYS + 1, (size, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (size, QUERIES), generator=generator)
    pairs = torch.stack([keys, values], dim=2)
    queries = pairs.gather(1, asked.unsqueeze(2).expand(-1, -1, 2)).flatten(1)
    ids = torch.cat([pairs.flatten(1), torch.zeros(size, GAP, dtype=torch.long), queries], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -2 * QUERIES + 1 :: 2] = ids[:, -2 * QUERIES + 1 :: 2]
    return ids, labels


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, contexts: int, seed: int) -> float:
    """Share of values that are predicted right, in contexts that training has not seen."""
    model.eval()
    ids, labels = (tensor.to(model.device) for tensor in recall_batch(contexts, seed))
    found = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    right = (found == labels[:, 1:])[asked]
    model.train()
    return float(right.float().mean())


def train_on_recall(name: str, seed: int, budget: Budget) -> dict[str, Any]:
    """One run on associative recall, until it is learned or the budget is spent."""
    sizes = budget.sizes(
        vocab_size=2 * KEYS + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_key_value_heads=4
    )
    parameters = count(build("transformer", sizes, RECALL_WINDOW, seed))
    model = build(name, sizes, RECALL_WINDOW, seed, parameters).to(device())
    offset = 10**5 * (seed + 1)
    began = time.process_time()
    curve = train(
        model,
        lambda step: recall_batch(32, offset + step),
        budget.recall_steps,
        2e-3,
        stop=lambda: recall_accuracy(model, 256, seed=10**6) >= 0.999,
    )
    seconds = time.process_time() - began
    accuracy = recall_accuracy(model, 512, seed=10**6 + 1)
    return {"parameters": count(model), "seconds": seconds, "curve": curve, "accuracy": accuracy}


def run_all(folder: Path, files: Sequence[Path], budget: Budget, seeds: int, tasks: Sequence[str]) -> dict[str, Any]:
    """All runs that are not done yet; returns all results by `task/model/seed`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "budget.json"
    if settings.exists() and json.loads(settings.read_text()) != asdict(budget):
        raise ValueError(f"{folder} holds runs of another budget: {settings.read_text()}; give another output folder")
    settings.write_text(json.dumps(asdict(budget)))
    results = {}
    corpus: tuple[Tensor, list[Tensor]] | None = None
    for seed in range(seeds):
        for task in tasks:
            for name in (*MODELS, CONTROL) if task == "recall" else MODELS:
                path = folder / f"{task}.{name}.{seed}.json"
                if not path.exists():
                    if task == "recall":
                        found = train_on_recall(name, seed, budget)
                    else:
                        corpus = corpus or encode(files, budget.vocabulary, folder)
                        found = train_on_text(name, seed, budget, *corpus)
                    path.write_text(json.dumps(found))
                    last = {key: value for key, value in found.items() if key not in ("curve", "losses")}
                    print(f"{task} {name} seed {seed}: {last}", flush=True)
                results[f"{task}/{name}/{seed}"] = json.loads(path.read_text())
    return results
