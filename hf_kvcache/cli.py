"""The command line: `hf-kvcache methods | demo | bench | calibrate | tune | lm-eval | report | store`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_kvcache.cli_store import store_app

app = typer.Typer(
    help="A compressed KV cache for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
calibrate_app = typer.Typer(help="Fit a method to a model and save the result.", no_args_is_help=True)
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(store_app, name="store")
# what is printed is text: brackets and colons in it are no markup
console = Console(markup=False, emoji=False)
DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[str, typer.Argument(help="Folder or name of the model, or 'smollm2' for the small one.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cuda:0; 'auto' spreads it over all there is.")]
DType = Annotated[str, typer.Option(help="Of the weights. In 16 bits, rounding hides what is gentler than 4.")]


def to_write(path: Path) -> Path:
    """Makes the folder of a file that is to be written, before the work that goes into it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written, its folder cannot be made ({error}); name another place") from error
    if path.is_dir():
        raise IsADirectoryError(f"expected the name of a file to write, but {path} is a folder; name a file in it")
    return path


@app.command()
def methods(name: Annotated[str, typer.Argument(help="One of them, to see its options.")] = "") -> None:
    """List the methods and what each does, or the options of one."""
    from hf_kvcache.described import options_of, summary_of
    from hf_kvcache.methods import METHODS
    from hf_kvcache.resolve import resolve

    table = Table(box=None, pad_edge=False)
    if not name:
        for column in ("method", "slot", "what it does"):
            table.add_column(column, no_wrap=column == "method")
        for known, method in sorted(METHODS.items()):
            table.add_row(known, method.slot, summary_of(method))
        console.print(table)
        console.print("\nhf-kvcache methods NAME lists the options of one.")
        return
    if name not in METHODS:
        resolve(name, {})
    for column in ("option", "default", "meaning"):
        table.add_column(column, no_wrap=column == "option")
    for option in options_of(METHODS[name]):
        table.add_row(option.name, option.default or "-", option.meaning)
    console.print(f"{name}: {summary_of(METHODS[name])}\nslot {METHODS[name].slot}, paper {METHODS[name].paper}\n")
    console.print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the table, plans and plot.")] = Path(
        "hf-kvcache-demo"
    ),
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    continuation: Annotated[int, typer.Option(help="Tokens scored after it.")] = 160,
    steps: Annotated[int, typer.Option(help="Decode steps timed.")] = 24,
) -> None:
    """Run a small real model on a long text under every method, and print one table."""
    from hf_kvcache.demo import run_demo

    run_demo(output, prompt, continuation, steps, console)


@calibrate_app.command("kvsharer")
def calibrate_kvsharer(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", callback=to_write, help="File to write the plan to.")],
    share: Annotated[float, typer.Option(help="Share of the layers that give up their KV.")] = 0.25,
    threshold: Annotated[float, typer.Option(help="Least cosine similarity for a pair to be kept.")] = 0.5,
    order: Annotated[str, typer.Option(help="Which pairs come first; the published rule is 'dissimilar'.")] = "kl",
    heal: Annotated[bool, typer.Option(help="Refit the consumers' projections.")] = True,
    text: Annotated[Path | None, typer.Option(help="Text file to calibrate on; default: the shipped sample.")] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Search which layers of a model can share KV, heal them, and save the plan."""
    from hf_kvcache.api import find_plan
    from hf_kvcache.methods import KVSharer

    method = KVSharer(share=share, threshold=threshold, order=order, heal=heal, calibration=text)
    loaded, tokenizer = load_model(model, device, dtype)
    plan = find_plan(loaded, method, tokenizer=tokenizer)
    console.print(f"{len(plan.consumers)} of {plan.num_layers} layers share: {plan_text(plan)}")
    save(plan, output)


@calibrate_app.command("headkv")
def calibrate_headkv(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", callback=to_write, help="File to write the importance to.")],
    samples: Annotated[int, typer.Option(help="Number of questions.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 512,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Measure with needles in long texts how much every head matters for retrieval, and save it."""
    from hf_kvcache.api import measure_heads

    loaded, tokenizer = load_model(model, device, dtype)
    importance = measure_heads(loaded, samples=samples, length=length, tokenizer=tokenizer)
    layers, heads = importance.values.shape
    console.print(f"{importance.settings['answered']} of {samples} questions answered; {layers} layers x {heads} heads")
    save(importance, output)


@calibrate_app.command("sequential")
def calibrate_sequential(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", callback=to_write, help="File to write the basis to.")],
    samples: Annotated[int, typer.Option(help="Number of texts.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    text: Annotated[Path | None, typer.Option(help="Text file to calibrate on; default: the shipped sample.")] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Fit the basis that the codec 'residual' of sequential turns keys and values with, and save it."""
    from hf_kvcache.calibration.sequential_basis import calibrate_basis

    loaded, tokenizer = load_model(model, device, dtype)
    basis = calibrate_basis(loaded, texts=text, samples=samples, length=length, tokenizer=tokenizer)
    console.print(f"{len(basis.parts)} transforms of up to {max(len(part.mean) for part in basis.parts)} channels")
    save(basis, output)


@app.command()
def bench(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, table and page.")],
    methods: Annotated[list[str], typer.Option(help='NAME or NAME{"option": value}; may be given again.')],
    budgets: Annotated[list[float] | None, typer.Option(help="Shares to keep, for methods that evict.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Retrieval tasks, such as niah-4 and kv-20.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text file for the fidelity; default: the shipped prose.")] = None,
    contexts: Annotated[int, typer.Option(help="Texts, and contexts of every task.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a context.")] = 1024,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Measure methods on a model: a CSV table and one HTML page. A run that was stopped goes on where it was."""
    from hf_kvcache.bench import parse_setting, run_bench, write_csv, write_page

    settings = [setting for text in methods for setting in parse_setting(text, budgets or [])]
    loaded, tokenizer = load_model(model, device, dtype)
    records = run_bench(
        loaded,
        tokenizer,
        settings,
        output,
        tasks=tasks or ["niah-4"],
        contexts=contexts,
        length=length,
        texts=data,
        say=console.print,
    )
    write_csv(records, output / "bench.csv")
    write_page(records, output / "bench.html", f"KV cache methods on {model}")
    console.print(f"wrote {output / 'bench.csv'} and {output / 'bench.html'}")
    failed = [record.setting for record in records if record.error]
    if failed:
        console.print(
            f"{len(failed)} of {len(records)} settings failed, another run tries them again: {'; '.join(failed)}"
        )
        raise typer.Exit(1)


@app.command()
def tune(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", callback=to_write, help="File to write the plan to.")],
    target_ratio: Annotated[float, typer.Option(help="How many times smaller than in 16 bits.")] = 8.0,
    data: Annotated[Path | None, typer.Option(help="Text file to measure on; default: the shipped sample.")] = None,
    scorer: Annotated[str, typer.Option(help="Method that says which tokens a head keeps.")] = "kvzip",
    samples: Annotated[int, typer.Option(help="Windows to measure on; half as many again are held back.")] = 6,
    length: Annotated[int, typer.Option(help="Tokens of each context.")] = 1024,
    draws: Annotated[int, typer.Option(help="Samples of the gradient for each question.")] = 12,
    sharing: Annotated[bool, typer.Option(help="Price layers that read their neighbours' KV, too.")] = True,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Measure on a text what every choice costs a model, and save the plan of least loss for the bytes asked."""
    from hf_kvcache.planning import tune as make_plan

    loaded, tokenizer = load_model(model, device, dtype)
    tuned = make_plan(
        loaded,
        tokenizer,
        target_ratio=target_ratio,
        texts=data,
        scorer=scorer,
        samples=samples,
        length=length,
        draws=draws,
        sharing=sharing,
        say=console.print,
    )
    table = Table("on held-back text", "times smaller", "KL of the continuation", "KL of a quotation")
    for name, found in (("this plan", tuned.verified), ("target_ratio alone", tuned.uniform)):
        table.add_row(name, f"{found.ratio:.2f}", f"{found.continuation:.4f}", f"{found.quotation:.4f}")
    console.print(table)
    console.print(tuned.plan.summary())
    save(tuned.plan, output)


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line; it then knows the model 'hf-kvcache' and the tasks 'hfkv_...'."""
    from hf_kvcache.integrations.lm_eval import main as run

    run(context.args)


@app.command()
def report(
    path: Annotated[Path | None, typer.Argument(help="A saved plan, head importance, basis or cache.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead of a file: what a model keeps a token, by folder, name or model type.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Of a cache: picture of what every head holds and which tokens.")
    ] = None,
    row: Annotated[int, typer.Option(help="Row of the batch that the picture is of.")] = 0,
) -> None:
    """Say what is in a file that this library wrote, or what the cache of a model takes."""
    if (path is None) == (config is None):
        raise ValueError("expected a file, or --config and a model, but not both")
    if config is not None:
        from hf_kvcache.arithmetic import arithmetic

        console.print(arithmetic(config))
        return
    assert path is not None
    from hf_kvcache import persistence, plan, safefile, sharing
    from hf_kvcache.eviction import importance
    from hf_kvcache.sequential import basis

    description, tensors = safefile.read(path, None, "write one with SharingPlan.save or KVCache.save")
    found = description["format"]
    if plot is not None and found != persistence.FORMAT:
        raise ValueError(f"--plot is for a saved cache, but {path} has the format {found!r}; leave --plot out")
    if found == importance.FORMAT:
        values = tensors["values"]
        console.print(f"{path}: {found}, model {description['fingerprint'] or 'any'}, {len(values)} layers")
        console.print(f"settings: {description['settings']}")
        for head in values.flatten().argsort(descending=True)[:8].tolist():
            layer, place = divmod(head, values.shape[1])
            console.print(f"layer {layer} head {place}: {values[layer, place] / values.sum():.3f} of all importance")
        return
    if found == plan.FORMAT:
        console.print(f"{path}: {found}, model {description['fingerprint'] or 'any'}, {len(tensors['kept'])} layers")
        console.print(plan.CachePlan.load(path).summary())
        console.print(f"settings: {description['settings']}")
        return
    size = sum(tensor.nbytes for tensor in tensors.values())
    if found == basis.FORMAT:
        layers = len(description["producers"])
        console.print(f"{path}: {found}, model {description['fingerprint'] or 'any'}, {layers} layers")
        console.print(
            f"{len(description['members'])} transforms for the codec 'residual' of sequential; {size:,} bytes"
        )
        return
    if found not in (sharing.FORMAT, persistence.FORMAT):
        raise ValueError(f"{path} has the format {found!r}, which this version does not know; update hf_kvcache")
    sources = description["source_layers"]
    console.print(f"{path}: {found}, model {description['fingerprint'] or 'any'}, {len(sources)} layers")
    console.print("sharing: " + (plan_text(sharing.SharingPlan(tuple(sources))) or "none"))
    if found == sharing.FORMAT:
        console.print(f"settings: {description['settings']}")
        console.print(f"healed weights: {len(tensors)}, {size:,} bytes")
    elif found == persistence.FORMAT:
        seen = max(layer.get("seen", 0) for layer in description["layers"])
        console.print(f"tokens seen: {seen}; {size:,} bytes of keys and values")
        if plot is not None:
            from hf_kvcache.plots import save_plot
            from hf_kvcache.report import cache_of_file

            save_plot(cache_of_file(path), plot, row=row)
            console.print(f"wrote {plot}")


def plan_text(plan: Any) -> str:
    """A plan as `consumer<-source` pairs."""
    return ", ".join(f"{consumer}<-{plan.source_layers[consumer]}" for consumer in plan.consumers)


def save(made: Any, output: Path) -> None:
    """Saves a plan or whatever else was fitted, and says where and how large it is."""
    made.save(output)
    console.print(f"saved {output} ({output.stat().st_size:,} bytes)")


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """A model and its tokenizer, by folder or name."""
    import torch

    from hf_kvcache import smollm2

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = getattr(torch, dtype)
    if name == "smollm2":
        loaded, tokenizer = smollm2.load(kind)
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return placed(loaded, found if device == "auto" else device), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spread = {"device_map": "auto"} if device == "auto" else {}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=kind, **spread).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"expected the folder or name of a model, or 'smollm2', got {name!r}: {reason}") from error
    return (loaded if spread else placed(loaded, device)), tokenizer


def placed(model: Any, device: str) -> Any:
    """The model on a device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device must be 'auto' or one the model can run on, got {device!r}: {reason}") from error


def main() -> None:
    """Runs the command line; an error of ours is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        errors = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)
        errors.print(f"error: {error}", style="red", highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
