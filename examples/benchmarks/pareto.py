"""What each byte buys: KL against KV bytes for single methods, compositions and transformers' quantised caches.

SmolLM2-135M, float32, the protocol of `fidelity.py`. KVSharer's maps are the committed ones, healed first. Writes
`results/pareto.csv`, leaving out points that it has already, and `results/pareto.png`; transformers' caches take part
where hqq and optimum-quanto are installed.

    python examples/benchmarks/pareto.py [--windows 2]
    python examples/benchmarks/pareto.py --plot        # draws the picture of an existing CSV again
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from committed_plans import committed_pairs, healed
from common import RESULTS, add_results, kl_against_ratio, read_results
from fidelity import Fidelity
from peer_backends import missing

from hf_kvcache import KVSharer, Method, smollm2

CSV = RESULTS / "pareto.csv"
SHARES = (4 / 30,)
KEPT = (0.5, 0.25, 0.125)
PEERS = ("fp8", "quanto4", "quanto2", "hqq4", "hqq2")
TITLE = "SmolLM2-135M: KL to the untouched model after a prompt of 1,024 tokens, five domains"


def settings(plans: dict[float, Any]) -> Iterator[tuple[str, str, list[str | Method], dict[str, Any]]]:
    """Family, setting, methods and options of every point."""
    bits = (8, 4, 3, 2)
    for width in bits:
        yield "turboquant", f"{width} bits", ["turboquant"], {"bits": width}
    for width in (4, 2):
        yield "uniform", f"{width} bits", ["uniform"], {"bits": width}
    for share, plan in plans.items():
        yield "kvsharer", f"share {share:.2f}", [KVSharer(plan=plan)], {}
        for width in (8, 4, 3):
            options = {"bits": width}
            yield (
                "kvsharer+turboquant",
                f"share {share:.2f}, {width} bits",
                [KVSharer(plan=plan), "turboquant"],
                options,
            )
    for host in ("snapkv", "adakv+criticalkv", "kvzip"):
        for kept in KEPT:
            yield host, f"kept {kept:g}", [host], {"budget": kept}
    for host in ("adakv+criticalkv", "kvzip"):
        for kept in KEPT:
            for width in (4, 3):
                options = {"budget": kept, "bits": width}
                yield f"{host}+turboquant", f"kept {kept:g}, {width} bits", [host, "turboquant"], options
    plan = plans[SHARES[0]]
    for kept in KEPT:
        methods = [KVSharer(plan=plan), "kvzip", "turboquant"]
        yield "kvsharer+kvzip+turboquant", f"kept {kept:g}, 4 bits", methods, {"budget": kept, "bits": 4}


def measure(windows: int) -> None:
    """Adds to the CSV the points that it lacks."""
    model, tokenizer = smollm2.load()
    done = {(row["method"], row["setting"]) for row in read_results("pareto")} if CSV.exists() else set()
    protocol = Fidelity(model, tokenizer, windows)
    for peer in PEERS:
        reason = missing("transformers", peer)
        if reason:
            print(f"skipping {peer}: {reason}")
        elif ("transformers", peer) not in done:
            add("transformers", peer, protocol.of_peer(peer))
    plans = {share: healed(model, tokenizer, committed_pairs(round(30 * share))) for share in SHARES}
    for family, setting, methods, options in settings(plans):
        if (family, setting) not in done:
            add(family, setting, protocol.of_method(f"{family} {setting}", methods, **options))


def add(family: str, setting: str, rows: list[dict[str, Any]]) -> None:
    """Adds the mean over the domains to the CSV."""
    mean = {name: value for name, value in rows[-1].items() if name != "domain"}
    add_results("pareto", {**mean, "method": family, "setting": setting}, ("method", "setting"))


def plot() -> None:
    """Draws the CSV: one line a family, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows = read_results("pareto")
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for index, family in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [row for row in rows if row["method"] == family]
        own = sorted((float(row["kv_bytes_of_full"]), float(row["kl"]), row["setting"]) for row in points)
        peer = family == "transformers"
        axes.plot(
            [1 / share for share, _, _ in own],
            [kl for _, kl, _ in own],
            "x" if peer else "o-",
            color="black" if peer else f"C{index}",
            label="transformers' quantised caches" if peer else family,
            linewidth=1.2,
            markersize=7 if peer else 4,
        )
        if peer:
            for place, (share, kl, setting) in enumerate(own):
                axes.annotate(
                    setting, (1 / share, kl), xytext=(5, 12 * (place % 2) - 8), textcoords="offset points", fontsize=8
                )
    kl_against_ratio(
        axes, [1, 2, 4, 8, 16, 32, 64], "KV bytes: how many times less than float32 (half of it against 16 bits)"
    )
    axes.set_title(TITLE, fontsize=10)
    figure.savefig(RESULTS / "pareto.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2, help="evaluation windows a domain")
    parser.add_argument("--plot", action="store_true", help="only draw the CSV again")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if not options.plot:
        measure(options.windows)
    plot()


if __name__ == "__main__":
    main()
