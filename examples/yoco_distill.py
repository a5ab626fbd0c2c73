"""Distilling a converted model from the unmodified one: `train_yoco.py` without `--from-scratch` runs this.

Loss, after SwiftKV (arXiv 2410.03960): T^2 KL(teacher || student) at T = 2, plus the mean square error of the hidden
state before the last layer, here relative to its mean square: outliers of the stream would drown the first term.

Stages, each a Trainer of its own that resumes where it stopped:
    projections   the shared keys and values and the queries that read them
    upper         everything from the layer that is shared upwards
    all           everything, and the residual weights of yoco++
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_kvcache import new_cache

TEMPERATURE = 2.0
RATES = {"projections": 5e-4, "upper": 2e-4, "all": 5e-5}


class Windows(torch.utils.data.Dataset):
    """Windows of tokens `[length]` of a text, in a random order."""

    def __init__(self, ids: Tensor, length: int, tokens: int, seed: int) -> None:
        if len(ids) < length:
            raise ValueError(
                f"the text has {len(ids)} tokens, expected at least one window of {length}; give more text"
            )
        starts = torch.randint(
            len(ids) - length + 1, (max(1, tokens // length),), generator=torch.Generator().manual_seed(seed)
        )
        self.rows = [ids[start : start + length] for start in starts.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


class Distiller(Trainer):
    """A Trainer whose loss compares with a teacher; it needs no labels."""

    def __init__(self, teacher: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        # the Trainer moves the student and what it reads, and knows nothing of the teacher
        self.teacher = teacher.to(self.args.device)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        asked = {"input_ids": inputs["input_ids"], "use_cache": False, "output_hidden_states": True}
        with torch.no_grad():
            wanted = self.teacher(**asked)
        found = model(**asked)
        teacher, student = ((out.logits.float() / TEMPERATURE).log_softmax(-1) for out in (wanted, found))
        divergence = (teacher.exp() * (teacher - student)).sum(-1).mean() * TEMPERATURE**2
        before, after = wanted.hidden_states[-2].float(), found.hidden_states[-2].float()
        loss = divergence + functional.mse_loss(after, before) / before.square().mean()
        return (loss, found) if return_outputs else loss


def train_only(model: Any, stage: str) -> None:
    """Makes the parameters of a stage the only ones that are trained."""
    sources = new_cache(model).spec.sharing.source_layers
    layers = model.get_decoder().layers
    readers = [layer for layer, source in enumerate(sources) if layer != source]
    producers = sorted({sources[layer] for layer in readers})
    unused = {id(weight) for weight in model.parameters() if not weight.requires_grad}
    for weight in model.parameters():
        weight.requires_grad_(stage == "all" and id(weight) not in unused)
    chosen: list[nn.Module] = []
    if stage == "projections":
        chosen += [getattr(layers[layer].self_attn, name) for layer in producers for name in ("k_proj", "v_proj")]
        chosen += [layers[layer].self_attn.q_proj for layer in readers]
    elif stage == "upper":
        chosen += [getattr(layers[layer].self_attn, name) for layer in producers for name in ("k_proj", "v_proj")]
        chosen += [layers[layer] for layer in readers]
    for module in chosen:
        for weight in module.parameters():
            weight.requires_grad_(id(weight) not in unused)


def distill(
    model: Any, teacher: Any, ids: Tensor, stages: dict[str, int], folder: Path, length: int, batch: int, seed: int = 0
) -> None:
    """Trains a converted model in stages, and saves it in the folder.

    Args:
        stages: tokens for each stage, in order.
        ids: of the text.
        folder: for checkpoints; a run that was stopped goes on from there.
    """
    teacher = copy.deepcopy(teacher).eval()
    # weights that the sharing leaves unused are frozen by the patch, and must stay so from stage to stage
    used = [weight for weight in model.parameters() if weight.requires_grad]
    for stage, tokens in stages.items():
        for weight in used:
            weight.requires_grad_(True)
        train_only(model, stage)
        place = folder / stage
        arguments = TrainingArguments(
            str(place),
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=RATES[stage],
            lr_scheduler_type="cosine",
            warmup_steps=5,
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_steps=25,
            save_total_limit=1,
            logging_steps=5,
            seed=seed,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        )
        trainer = Distiller(teacher, model=model, args=arguments, train_dataset=Windows(ids, length, tokens, seed))
        last = get_last_checkpoint(str(place)) if place.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        trainer.save_state()
    for weight in used:
        weight.requires_grad_(True)
    model.save_pretrained(folder / "model")
