"""The README's figures are those of the committed results."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "examples" / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, table in tables.TABLES.items():
        assert f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text
        assert table() in text
    assert tables.filled(text) == text, "run python examples/benchmarks/tables.py"
