"""The texts are clean, long enough, and what is held out was not calibrated on."""

from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_kvcache" / "data"
CALIBRATION = sorted((PACKAGE / "calibration").glob("*.txt"))
HELD_OUT_FOLDER = ROOT / "tests" / "data"
HELD_OUT = [*sorted(HELD_OUT_FOLDER.glob("*.txt")), PACKAGE / "demo.txt"]


def lines(path: Path) -> set[str]:
    """Lines long enough not to be alike by chance."""
    return {line for line in path.read_text("utf-8").splitlines() if len(line) > 60}


@pytest.mark.parametrize("path", [*CALIBRATION, *HELD_OUT], ids=lambda path: path.name)
def test_text_is_clean(path):
    raw = path.read_bytes()
    text = raw.decode("utf-8")
    assert 25_000 <= len(raw) <= 80_000
    assert b"\r" not in raw and "\ufeff" not in text and "\ufffd" not in text
    assert all(char.isprintable() or char == "\n" for char in text)
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_held_out_texts_are_not_calibrated_on():
    calibrated = set(chain.from_iterable(map(lines, CALIBRATION)))
    assert len(CALIBRATION) == 7
    for path in HELD_OUT:
        assert lines(path)
        assert not lines(path) & calibrated, path.name


def test_every_text_has_a_provenance():
    for path in (*CALIBRATION, *HELD_OUT):
        folder = PACKAGE if path.is_relative_to(PACKAGE) else HELD_OUT_FOLDER
        readme = (folder / "README.md").read_text("utf-8")
        assert f"| `{path.relative_to(folder).as_posix()}` |" in readme


def test_held_out_texts_stay_small():
    assert sum(path.stat().st_size for path in HELD_OUT) <= 310_000
