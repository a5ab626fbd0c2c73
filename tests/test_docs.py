"""The documentation: a page for every method, all of one form, and a site that is built without a warning."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_kvcache import METHODS

ROOT = Path(__file__).parents[1]
SECTIONS = ["Idea and formula", "Options", "Bytes", "Measured", "Paper and file"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    folder = tmp_path_factory.mktemp("docs")
    generate.write(folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_of_one_form(pages, name):
    text = (pages / "methods" / f"{name}.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    for section in re.split(r"^## ", text, flags=re.M):
        title, _, body = section.partition("\n")
        assert body.strip(), f"the section {title!r} of {name} is empty"
    for option in (field.name for field in fields(METHODS[name])):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{option}` |")]
        assert len(line.split("|")[3].strip()) > 10, f"say in the docstring of {name} what {option} means"
    (file,) = [part for part in text.split("`") if part.startswith("hf_kvcache/methods/")]
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_lists_every_method(name):
    assert f"| `{name}` | {METHODS[name].slot} |" in (ROOT / "README.md").read_text()


def test_the_site_is_built_without_a_warning(pages, tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    configuration = tmp_path / "mkdocs.yml"
    text = (
        (ROOT / "mkdocs.yml")
        .read_text()
        .replace("build/docs", str(pages))
        .replace("build/site", str(tmp_path / "site"))
    )
    configuration.write_text(text)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(configuration)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "site" / "methods" / "snapkv" / "index.html").is_file()
