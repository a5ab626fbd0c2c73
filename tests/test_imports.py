"""Who may import whom, and what `import hf_kvcache` may cost.

Lowest first: `kernels`, then the axes (`sharing`, `eviction`, `codecs`, `stores`, `segment`), then
`spec`, then `methods`; on the other side what runs inside transformers: `attention`, `layers`,
`persistence`, `cache`, `patches`. Only the modules of `BORDER` see both sides.
"""

import ast
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

AXES = {"sharing", "plan", "eviction", "codecs", "stores", "segment", "layout", "tail"}
GROUND = {"autocast", "clock", "devices", "kernels", "fingerprint", "progress", "safefile"}
VALUES = {"spec"} | GROUND | AXES
RUNTIME = {"attention", "layers", "persistence", "cache", "deferred", "patches"}

# group (a module or package directly in hf_kvcache) -> the groups that it may import
LAYERS = {
    "kernels": {"kernels"},
    "autocast": set(),
    "clock": set(),
    "described": set(),
    "devices": set(),
    "fingerprint": set(),
    "progress": set(),
    "safefile": set(),
    **dict.fromkeys(AXES, GROUND | AXES),
    "spec": VALUES,
    # what a spec may hold of it is loaded when the method is applied
    "sequential": VALUES | {"sequential"},
    "methods": VALUES | {"methods", "sequential"},
    "resolve": VALUES | {"methods"},
    "attention": VALUES,
    "layers": VALUES | {"attention", "layers"},
    "persistence": VALUES,
    "cache": VALUES | {"attention", "layers", "persistence", "sequential"},
    "deferred": VALUES | {"layers", "cache"},
    "patches": VALUES | RUNTIME | {"sequential"},
}
# the groups that may import everything: the public functions and what is built on them
BORDER = {
    "__init__",
    "__main__",
    "api",
    "arithmetic",
    "bench",
    "calibration",
    "cli",
    "cli_store",
    "demo",
    "evaluation",
    "integrations",
    "laws",
    "measure",
    "models",
    "planning",
    "plot_trie",
    "plots",
    "real_models",
    "report",
    "smollm2",
    "testing",
}

# package -> the only groups that may import it (a prefix of the module's dotted name)
RESTRICTED = {
    "transformers": RUNTIME | BORDER,
    "triton": {"kernels.triton_ops"},
    "lm_eval": {"integrations"},
    "datasets": {"integrations"},
    "matplotlib": {"plots", "plot_trie", "demo"},
    "gguf": {"demo", "cli", "testing"},
    "typer": {"cli", "cli_store"},
    "rich": {"cli", "cli_store", "demo", "progress", "report"},
}

# not needed to use the library, or slow to import
NOT_IMPORTED = (
    *("triton", "lm_eval", "datasets", "matplotlib", "gguf", "typer", "rich"),
    *("zstandard", "constriction", "redis", "s3fs", "sqlite3"),
)

# processor seconds, so that other work does not count
LIMIT = 0.2

# what a user of a transformers model has imported anyway; hf_kvcache is timed on top of it
BASE = (
    "torch",
    "transformers",
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.generation.utils",
)


def sources() -> dict[str, Path]:
    """Dotted module name below hf_kvcache -> its file, without following the two symlinks."""
    found = {}
    for folder in ("hf_kvcache", "kernels", "patches"):
        prefix = () if folder == "hf_kvcache" else (folder,)
        for directory, subfolders, files in os.walk(ROOT / folder):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            for name in files:
                path = Path(directory, name)
                if path.suffix == ".py":
                    parts = (*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)
                    package = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
                    found[".".join(package)] = path
    return found


SOURCES = sources()


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from (other, *runtime_nodes(other))
        else:
            yield node
            yield from runtime_nodes(node)


def imported_modules(module: str, source: str, is_package: bool) -> set[str]:
    """Absolute dotted names that `source`, the text of `hf_kvcache.<module>`, imports."""
    parts = ["hf_kvcache", *(module.split(".") if module != "__init__" else [])]
    package = parts if is_package else parts[:-1]
    found = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from hf_kvcache import spec` names a module, `from hf_kvcache.spec import X` does not
            found |= {f"{name}.{a.name}" for a in node.names} if name == "hf_kvcache" else {name}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def imports_of(module: str) -> set[str]:
    path = SOURCES[module]
    return imported_modules(module, path.read_text("utf-8"), path.name == "__init__.py")


def group_of(name: str) -> str:
    """The group of an absolute name inside hf_kvcache; a public name counts as `__init__`."""
    group = name.split(".")[1] if "." in name else "__init__"
    return group if group in LAYERS or group in BORDER else "__init__"


def test_the_reader_of_imports_sees_what_it_should():
    source = (
        "import torch.nn as nn\n"
        "from hf_kvcache import spec, patch_model\n"
        "from hf_kvcache.codecs.dense import DenseCodec\n"
        "from . import base\n"
        "from .snapkv import SnapKV\n"
        "from ..segment import Segment\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import transformers\nelse:\n    import json\n"
        "def f():\n    import triton\n    importlib.import_module('rich.table')\n"
    )
    assert imported_modules("methods.adakv", source, is_package=False) == {
        "torch.nn",
        "hf_kvcache.spec",
        "hf_kvcache.patch_model",
        "hf_kvcache.codecs.dense",
        "hf_kvcache.methods",
        "hf_kvcache.methods.snapkv",
        "hf_kvcache.segment",
        "typing",
        "json",
        "triton",
        "rich.table",
    }
    assert group_of("hf_kvcache.patch_model") == "__init__"
    assert group_of("hf_kvcache.codecs.dense") == "codecs"


def test_the_tree_is_read():
    assert {"__init__", "api", "spec", "cache", "methods"} <= set(SOURCES)
    assert any(module.startswith("kernels.") for module in SOURCES)
    assert any(module.startswith("patches.") for module in SOURCES)


def test_every_module_has_a_layer():
    groups = {module.split(".")[0] for module in SOURCES}
    unknown = sorted(groups - set(LAYERS) - BORDER)
    assert not unknown, f"add {unknown} to LAYERS or BORDER in tests/test_imports.py"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_downwards(module):
    group = module.split(".")[0]
    if group in BORDER or group not in LAYERS:
        pytest.skip("may import everything, or has no layer, which another test says")
    inside = {n for n in imports_of(module) if n == "hf_kvcache" or n.startswith("hf_kvcache.")}
    wrong = sorted(name for name in inside if group_of(name) not in LAYERS[group])
    assert not wrong, f"hf_kvcache.{module} may import {sorted(LAYERS[group])}, not {wrong}"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_third_party_packages_stay_in_their_place(module):
    for name in imports_of(module):
        allowed = RESTRICTED.get(name.split(".")[0])
        if allowed is not None:
            assert any(module == a or module.startswith(f"{a}.") for a in allowed), (
                f"hf_kvcache.{module} imports {name}; only {sorted(allowed)} may"
            )


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_kernels_and_patches_are_imported_by_their_full_name(module):
    # under a second name a module runs twice, and its torch ops are registered twice
    short = sorted(n for n in imports_of(module) if n.split(".")[0] in {"kernels", "patches"})
    assert not short, f"hf_kvcache.{module} imports {short}; write hf_kvcache.{short[0]}"


def test_tests_and_examples_use_the_full_names_too():
    files = [path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert files
    for path in files:
        for name in imported_modules("__init__", path.read_text("utf-8"), is_package=False):
            assert name.split(".")[0] not in {"kernels", "patches"}, f"{path} imports {name}"


PROBE = """
import importlib, json, sys, time
for name in {base!r}:
    importlib.import_module(name)
before = set(sys.modules)
sys.dont_write_bytecode, sys.pycache_prefix = False, {folder!r}
start = time.process_time()
import hf_kvcache
seconds = time.process_time() - start
new = sorted({{name.split(".")[0] for name in set(sys.modules) - before}})
print(json.dumps({{"seconds": seconds, "new": new}}))
"""


@pytest.fixture(scope="module")
def fresh_imports(tmp_path_factory) -> list[dict]:
    """What three new processes say that find bytecode, as pip leaves it at installation; a first one writes it here."""
    command = [sys.executable, "-c", PROBE.format(base=BASE, folder=str(tmp_path_factory.mktemp("bytecode")))]
    runs: list[dict] = []
    for _ in range(4):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    return runs[1:]


def test_import_brings_no_optional_package(fresh_imports):
    new = set(fresh_imports[0]["new"])
    assert "hf_kvcache" in new
    assert not new & set(NOT_IMPORTED)


def test_import_is_quick(fresh_imports):
    seconds = [run["seconds"] for run in fresh_imports]
    assert statistics.median(seconds) <= LIMIT, f"import hf_kvcache took {seconds} CPU seconds"
