"""The folder names `kernels/` and `patches/` at the top level, and what a wheel contains.

Hugging Face has a package named `kernels`, which transformers looks for at import. With a
`kernels/__init__.py` ours would be taken for it whenever the root is on `sys.path` (`python -c`,
`python -m`, a notebook).
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "patches")

LEFTOVERS = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.safetensors", "*.gguf")

PROBE = f"""
import importlib, pathlib, sys

root = pathlib.Path({str(ROOT)!r})
import transformers
import transformers.integrations.hub_kernels
from transformers import LlamaForCausalLM

ours = sorted(path.stem for path in root.joinpath("kernels").glob("*.py"))
assert ours, "no kernels found"
for name in ours:
    importlib.import_module("hf_kvcache.kernels." + name)
for path in root.joinpath("patches").glob("*.py"):
    importlib.import_module("hf_kvcache.patches." + path.stem)

# transformers may leave an empty namespace module named kernels; one with a file would be ours
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in {{"kernels", "patches"}}:
        file = getattr(module, "__file__", None)
        assert file is None or root not in pathlib.Path(file).resolve().parents, (name, file)
"""

FAKE_KERNELS = '''
"""Stands in for the real package: anything can be imported from it."""

class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and isinstance(args[0], type) else Anything()
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Anything()

def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return type(name, (Anything,), {}) if name[0].isupper() else Anything()
'''


def run(command: list, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run in a fresh process; on failure show what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def needs_installation() -> None:
    try:
        importlib.metadata.version("hf_kvcache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hf_kvcache is not installed: pip install -e . or make test")


@pytest.fixture
def fake_kernels(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a package named `kernels` that transformers accepts."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    metadata = site / f"kernels-{version}.dist-info"
    metadata.mkdir()
    header = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (metadata / "METADATA").write_text(header)
    return site


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_namespace_packages(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", ["conftest.py", "tests/__init__.py", "pytest.ini"])
def test_nothing_puts_the_root_on_the_path_of_pytest(path):
    assert not (ROOT / path).exists()
    assert "pythonpath" not in (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_linked_into_the_package(folder):
    link = ROOT / "hf_kvcache" / folder
    if link.is_file():
        pytest.skip("this checkout has no symbolic links")
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder


def test_python_c_in_the_root():
    run([sys.executable, "-c", PROBE])


def test_python_c_in_the_root_beside_the_real_kernels(fake_kernels):
    probe = PROBE + (
        "import kernels\n"
        f"assert pathlib.Path(kernels.__file__).is_relative_to({str(fake_kernels)!r})\n"
        "assert transformers.utils.is_kernels_available()\n"
    )
    run([sys.executable, "-c", probe], PYTHONPATH=str(fake_kernels))


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(True, id="python -m pytest"),
        pytest.param(False, id="pytest", marks=pytest.mark.slow),
    ],
)
def test_pytest_in_the_root(module, tmp_path):
    needs_installation()
    test = tmp_path / "test_probe.py"
    test.write_text(PROBE + "\ndef test_nothing():\n    pass\n")
    plain = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    start = ["-m", "pytest"] if module else ["-c", plain]
    options = ["-c", ROOT / "setup.cfg", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    run([sys.executable, *start, *options, "--collect-only", "-q", test])


def test_pytest_collects_a_file_of_ours():
    needs_installation()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    assert "test_imports_point_downwards" in run([*command, "tests/test_imports.py"]).stdout


@pytest.mark.slow
def test_a_script(tmp_path):
    needs_installation()
    script = tmp_path / "script.py"
    script.write_text(PROBE)
    run([sys.executable, script])


def copy_of_the_tree(target: Path, *, links: bool) -> Path:
    """What a checkout has; without `links`, as on a file system that has none."""
    shutil.copytree(ROOT, target, symlinks=True, ignore=LEFTOVERS)
    for folder in MAPPED:
        link = target / "hf_kvcache" / folder
        if not links:
            link.unlink()
            link.write_text(f"../{folder}")
    return target


def test_a_checkout_without_symbolic_links_works(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree", links=False)
    name = next((tree / "kernels").glob("*.py")).stem
    code = (
        f"import hf_kvcache.kernels.{name} as module, pathlib\n"
        f"assert pathlib.Path(module.__file__).is_relative_to({str(tree)!r}), module.__file__"
    )
    run([sys.executable, "-c", code], cwd=tree)


def expected_in_a_wheel() -> set[str]:
    """Every source file and data file of the tree, by its name in a wheel."""
    expected = set()
    for folder in ("hf_kvcache", *MAPPED):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT).parts
            linked = inside[0] == "hf_kvcache" and inside[1] in MAPPED
            if linked or "__pycache__" in inside or not path.is_file():
                continue
            if path.suffix in (".py", ".yaml") or path.name == "py.typed" or "data" in inside:
                prefix = () if folder == "hf_kvcache" else ("hf_kvcache",)
                expected.add("/".join((*prefix, *inside)))
    return expected


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_wheel_contains_the_tree(links, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    tree = copy_of_the_tree(tmp_path / "tree", links=links)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run([*pip, "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path, "."], cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == expected_in_a_wheel(), "list new packages and data files in setup.cfg"
    assert "hf_kvcache/data/demo.txt" in names
    assert all(name.startswith("hf_kvcache/") for name in names)
