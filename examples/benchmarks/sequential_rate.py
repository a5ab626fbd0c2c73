"""The residual codec of `sequential`: fidelity against bytes on disk, beside TurboQuant and KIVI's grids. Float32.

    python examples/benchmarks/sequential_rate.py            # needs results/turboquant_fidelity.csv of the same windows
    python examples/benchmarks/sequential_rate.py --plot     # draws the picture of an existing CSV again

The first 1024 tokens of a window are the prompt. Its keys and values are written as four page files, read back, and the
next 160 tokens are teacher-forced through what was read. KL is KL(untouched || restored), in nats a token. Bytes are
those of the files, headers, ids and checksums included; the basis, one file a model, is given apart. `ratio` is against
16 bits a number. The basis is calibrated on the shipped sample, the domains tested are others.

TurboQuant and KIVI's grids (`uniform channel`: keys by channel, values by token) are read from the results of
`turboquant.py fidelity`, which measures the same windows; their bytes are what the cache holds. Of another model than
SmolLM2 TurboQuant is measured here.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import RESULTS, kl_against_ratio, read_results, windows, write_results
from fidelity import PREFIX, SCORED, Fidelity, texts
from torch import Tensor

from hf_kvcache import KVCache, new_cache, patch_model, unpatch_model
from hf_kvcache.calibration.sequential_basis import calibrate_basis
from hf_kvcache.measure import Continuation, continued, kl_divergence, top1_agreement
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.patches.prefix import model_facts
from hf_kvcache.real_models import REAL_MODELS
from hf_kvcache.sequential import record
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.basis import Basis
from hf_kvcache.sequential.identity import page_key
from hf_kvcache.sequential.lossless import Lossless
from hf_kvcache.sequential.page import Context, Page, PageCodec
from hf_kvcache.sequential.residual import Residual

PAGE = 256
ROOT = "0" * 64
# rounding steps, 1/quality: with a basis in the unit of the calibration, without one in deviations of a head
STEPS = (0.1, 0.14, 0.2, 0.28, 0.4)
PLAIN_STEPS = (0.25, 0.3, 0.35, 0.5)
# what the picture shows: the beginning of a codec's name, and the line's label
CURVES = {
    "residual step ": "residual, calibrated",
    "residual uncalibrated step ": "residual, no calibration",
    "turboquant ": "turboquant",
    "uniform channel ": "uniform, keys by channel (KIVI's grids)",
}


def read_prompt(model: Any, ids: Tensor) -> tuple[list[Page], Context]:
    """Keys and values of a prompt `[1, T]` as pages, from one cold prefill of a model patched with nothing."""
    attachment = require_attached(model)
    decoder = attachment.adapter.find_decoder(model)
    cache, kept = new_cache(model), {}
    for index, layer in cache.producers.items():
        layer.witness = partial(_keep, kept, index)
    decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    facts = model_facts(decoder, cache, attachment.adapter, "")
    tokens = ids[0].numpy().astype(np.uint32)
    pages = [
        Page(
            tokens[start : start + PAGE],
            start,
            *([kept[layer][kind][0, :, start : start + PAGE] for layer in facts.geometry.producers] for kind in (0, 1)),
        )
        for start in range(0, len(tokens), PAGE)
    ]
    return pages, Context(facts.geometry, facts.rotate)


def _keep(kept: dict[int, tuple[Tensor, Tensor]], index: int, first: int, key: Tensor, value: Tensor) -> None:
    kept[index] = key.clone(), value.clone()


def through_files(pages: list[Page], codec: PageCodec, context: Context) -> tuple[list[Page], int]:
    """The pages as they come back from their files, and the bytes of these."""
    parent, size, restored = ROOT, 0, []
    for page in pages:
        key = page_key(parent, page.ids)
        entry = Entry(key, parent, page.ids, page.start, codec.name, 0, 1.0)
        data = record.write(page, codec, context, entry).data
        restored.append(record.read(data, key, parent, {codec.name: codec}, context, b""))
        parent, size = key, size + len(data)
    return restored, size


def cache_of(model: Any, pages: list[Page]) -> KVCache:
    """A cache that has adopted pages."""
    cache = new_cache(model)
    for place, layer in enumerate(cache.producers.values()):
        key, value = (torch.cat([part[place] for part in parts], dim=1) for parts in _columns(pages))
        layer.adopt(key[None], value[None])
    return cache


def _columns(pages: list[Page]):
    return [page.keys for page in pages], [page.values for page in pages]


def answers(model: Any, window: Tensor, pages: list[Page]) -> Continuation:
    return continued(model, cache_of(model, pages), window[None, PREFIX:], PREFIX)


def codecs(basis: Basis, steps: list[float], plain_steps: list[float]) -> dict[str, PageCodec]:
    """The codecs to measure, by name."""
    calibrated = {f"residual step {step}": Residual(1 / step, basis) for step in steps}
    plain = {f"residual uncalibrated step {step}": Residual(1 / step, None) for step in plain_steps}
    return {**calibrated, **plain, "lossless": Lossless()}


def measure(
    model: Any, tokenizer: Any, chosen: dict[str, PageCodec], count: int, domains: list[str]
) -> list[dict[str, Any]]:
    """One row for every codec and domain, the mean over domains last."""
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    patch_model(model, None)
    for domain in domains:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in scores}
        for window in windows(tokenizer, texts()[domain], count, PREFIX + SCORED + 1):
            pages, context = read_prompt(model, window[None, :PREFIX])
            full = answers(model, window, pages)
            for name, codec in chosen.items():
                restored, size = through_files(pages, codec, context)
                other = answers(model, window, restored)
                found[name].append(
                    {
                        "kl": kl_divergence(full, other),
                        "loss_increase": other.loss - full.loss,
                        "top1": top1_agreement(full, other),
                        "bytes": size,
                        "ratio": 2 * context.geometry.numbers * PREFIX / size,
                    }
                )
        for name, rows in found.items():
            scores[name].append({"domain": domain, **{key: mean(row[key] for row in rows) for key in rows[0]}})
            print(domain, name, {key: f"{value:.4g}" for key, value in list(scores[name][-1].items())[1:]}, flush=True)
    unpatch_model(model)
    for rows in scores.values():
        rows.append({"domain": "mean", **{key: mean(row[key] for row in rows) for key in list(rows[0])[1:]}})
    return [{"codec": name, "windows": count, **row} for name, rows in scores.items() for row in rows]


def rivals(model: Any, tokenizer: Any, name: str, count: int, full: int) -> list[dict[str, Any]]:
    """The rows of TurboQuant and of KIVI's grids on the same windows; `full` bytes are the prompt in float32.

    Those of SmolLM2 are published already; of another model they are measured.
    """
    if name == "smollm2":
        found = read_results("turboquant_fidelity")
    else:
        protocol = Fidelity(model, tokenizer, count)
        found = [row for bits in (4, 3) for row in protocol.of_method(f"turboquant {bits}", "turboquant", bits=bits)]
    rows = []
    for row in found:
        if row["domain"] == "mean" and row["method"] in {
            *(f"turboquant {bits}" for bits in (4, 3, 2)),
            *(f"uniform channel {bits}" for bits in (4, 3, 2)),
        }:
            size = float(row["kv_bytes_of_full"]) * full
            numbers = {key: float(row[key]) for key in ("kl", "loss_increase", "top1")}
            rows.append(
                {"codec": row["method"], "windows": row["windows"], "domain": "mean", **numbers}
                | {"bytes": size, "ratio": full / 2 / size}
            )
    return rows


def ratio_at(rows: list[dict[str, Any]], prefix: str, kl: float) -> float | None:
    """How many times smaller a codec is at a KL, between the two measured steps around it (log-linear)."""
    for (low, more, _), (high, less, _) in itertools.pairwise(curve(rows, prefix)):
        if low <= kl <= high:
            share = (np.log(kl) - np.log(low)) / (np.log(high) - np.log(low))
            return float(np.exp(np.log(more) + share * (np.log(less) - np.log(more))))
    return None


def curve(rows: list[dict[str, Any]], prefix: str) -> list[tuple[float, float, str]]:
    """KL, ratio and setting of the means of a codec's settings, by KL."""
    return sorted(
        (float(row["kl"]), float(row["ratio"]), row["codec"].removeprefix(prefix))
        for row in rows
        if row["domain"] == "mean" and row["codec"].startswith(prefix) and row["codec"][len(prefix)].isdigit()
    )


def plot(name: str) -> None:
    """Draws KL against how many times smaller than 16 bits, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for prefix, label in CURVES.items():
        points = curve(read_results(name), prefix)
        if points:
            axes.plot([ratio for _, ratio, _ in points], [kl for kl, _, _ in points], "o-", label=label, markersize=4)
        for kl, ratio, setting in points:
            if " step " not in prefix:
                axes.annotate(f"{setting} bits", (ratio, kl), xytext=(5, -9), textcoords="offset points", fontsize=8)
    kl_against_ratio(axes, [3, 4, 6, 8, 12, 16, 24], "bytes on disk: how many times less than 16 bits a number")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=sorted(REAL_MODELS))
    parser.add_argument("--windows", type=int, default=2, help="evaluation windows a domain")
    parser.add_argument("--domains", nargs="+", default=sorted(texts()))
    parser.add_argument("--basis", type=Path, help="a saved basis; calibrated and saved there when it is missing")
    parser.add_argument("--steps", type=float, nargs="+", default=STEPS)
    parser.add_argument("--plain-steps", type=float, nargs="+", default=PLAIN_STEPS)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 1024 tokens")
    parser.add_argument("--plot", action="store_true", help="only draw the CSV again")
    options = parser.parse_args()
    name = "sequential_rate" if options.model == "smollm2" else f"sequential_rate_{options.model}"
    if options.plot:
        return plot(name)
    torch.set_grad_enabled(False)
    model, tokenizer = REAL_MODELS[options.model].load()
    if options.basis is not None and options.basis.exists():
        basis = Basis.load(options.basis)
    else:
        basis = calibrate_basis(model, tokenizer=tokenizer, samples=options.samples)
        if options.basis is not None:
            basis.save(options.basis)
    print(f"basis: {basis.nbytes:,} bytes")
    chosen = codecs(basis, options.steps, options.plain_steps)
    rows = measure(model, tokenizer, chosen, options.windows, options.domains)
    full = 2 * basis.geometry.numbers * PREFIX
    rows += rivals(model, tokenizer, options.model, options.windows, 2 * full)
    goals = []
    for rival in ("turboquant 4", "turboquant 3", "uniform channel 4"):
        target = next((row for row in rows if row["codec"] == rival), None)
        for prefix in ("residual step ", "residual uncalibrated step "):
            ratio = None if target is None else ratio_at(rows, prefix, target["kl"])
            if ratio is not None:
                goals.append(
                    {
                        "codec": f"{prefix.removesuffix(' step ')} at the KL of {rival}",
                        "windows": options.windows,
                        "domain": "mean",
                    }
                    | {"kl": target["kl"], "loss_increase": None, "top1": None, "bytes": full / ratio, "ratio": ratio}
                )
    write_results(name, [{**row, "basis_bytes": basis.nbytes} for row in rows + goals])
    plot(name)


if __name__ == "__main__":
    main()
