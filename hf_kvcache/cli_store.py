"""The command line of prefix stores: `hf-kvcache store ls | stat | verify | gc | export`.

What the driver of a URL has to know beside it is given by name, to every command:

    hf-kvcache store stat s3://bucket/prompts --option profile=work --option endpoint_url=http://localhost:9000
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hf_kvcache.sequential.store import PrefixStore

store_app = typer.Typer(help="Look into, check and clean a store of prompts (method sequential).", no_args_is_help=True)
console = Console(markup=False, emoji=False)

Url = Annotated[str, typer.Argument(help="Folder or URL of the store.")]
SECRET_HELP = "File with the secret that pages are signed with; one newline at its end does not count."
SecretFile = Annotated[Path | None, typer.Option("--secret", help=SECRET_HELP)]
OPTION_HELP = (
    "For the driver of the URL, any number of times: endpoint_url=http://host:9000, profile=work, anon=true. "
    "What reads as JSON is taken as such; key='\"1234\"' stays text."
)
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help=OPTION_HELP)]
TARGET_HELP = "The same, for the target."
TargetOptions = Annotated[list[str] | None, typer.Option("--target-option", metavar="NAME=VALUE", help=TARGET_HELP)]


@store_app.command("ls")
def list_pages(
    url: Url,
    secret: SecretFile = None,
    option: Options = None,
    limit: Annotated[int, typer.Option(help="Pages shown.")] = 50,
) -> None:
    """List pages, those used last first."""
    entries = sorted(_open(url, secret, option).entries(), key=lambda entry: -entry.used)
    table = Table("key", "behind", "tokens", "codec", "bytes", "hits", "bits", "used")
    for entry in entries[:limit]:
        bits = "-" if entry.information is None else f"{entry.information:.0f}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        span = f"{entry.start}-{entry.start + len(entry.ids)}"
        row = (entry.key[:12], entry.parent[:12], span, entry.codec, f"{entry.size:,}", str(entry.hits), bits, when)
        table.add_row(*row)
    console.print(table)
    if len(entries) > limit:
        console.print(f"and {len(entries) - limit} more; --limit shows them")


@store_app.command()
def stat(
    url: Url,
    secret: SecretFile = None,
    option: Options = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the trie: sizes and adoptions.")] = None,
) -> None:
    """Sum up a store: pages, bytes, branches, what was adopted."""
    from hf_kvcache.sequential.trie import build

    entries = list(_open(url, secret, option).entries())
    roots = build(entries)
    children = {entry.parent for entry in entries}
    leaves = sum(entry.key not in children for entry in entries)
    size, tokens = sum(entry.size for entry in entries), sum(len(entry.ids) for entry in entries)
    console.print(f"{len(entries)} pages, {tokens:,} tokens, {size:,} bytes ({size / max(tokens, 1):,.0f} a token)")
    console.print(
        f"{len(roots)} first pages, {leaves} branches, {sum(entry.hits for entry in entries)} adoptions of pages"
    )
    for name in sorted({(entry.codec, entry.model) for entry in entries}):
        own = [entry for entry in entries if (entry.codec, entry.model) == name]
        console.print(
            f"  {name[0]}, model {name[1] or 'unknown'}: {len(own)} pages, {sum(e.size for e in own):,} bytes"
        )
    if plot is not None:
        from hf_kvcache.plot_trie import plot_trie

        plot_trie(entries, plot, url)
        console.print(f"wrote {plot}")


@store_app.command()
def verify(url: Url, secret: SecretFile = None, option: Options = None) -> None:
    """Read every page; remove and name those that are damaged. Ends with 1 unless all are whole and can be read."""
    store = _open(url, secret, option)
    whole, damaged = store.verify()
    console.print(f"{whole} pages are whole, {len(damaged)} were damaged and are removed")
    for key in damaged:
        console.print(f"  {key}")
    unreadable = store.counts.unreadable_pages
    if unreadable:
        console.print(f"{unreadable} cannot be read here and are kept; the warning says why")
    if damaged or unreadable:
        raise typer.Exit(1)


@store_app.command()
def gc(
    url: Url,
    secret: SecretFile = None,
    option: Options = None,
    limit: Annotated[int | None, typer.Option(help="Bytes to come down to.")] = None,
) -> None:
    """Remove what nothing leads to and, above a limit, what is worth least."""
    console.print(f"freed {_open(url, secret, option).gc(limit):,} bytes")


@store_app.command()
def export(
    url: Url,
    target: Annotated[str, typer.Argument(help="Folder or URL.")],
    secret: SecretFile = None,
    option: Options = None,
    target_option: TargetOptions = None,
) -> None:
    """Copy every whole page to another store."""
    copied = _open(url, secret, option).export(_open(target, secret, target_option, new=True))
    console.print(f"copied {copied} pages to {target}")


def _open(url: str, secret: Path | None, options: Sequence[str] | None, new: bool = False) -> PrefixStore:
    from hf_kvcache.sequential.store import PrefixStore

    if not new and "://" not in url and not (Path(url) / "pages").is_dir():
        raise FileNotFoundError(f"there is no store in {url}; expected the folder that patch_model was given")
    known = b"" if secret is None else _without_newline(secret.read_bytes())
    return PrefixStore(url, secret=known, options=dict(_option(text) for text in options or ()))


def _option(text: str) -> tuple[str, Any]:
    """Name and value of one `--option`."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ValueError(f"an option is NAME=VALUE, got {text!r}; for example --option endpoint_url=http://host:9000")
    try:
        return name, json.loads(value)
    except ValueError:
        # most values are plain text, and nobody wants to quote it twice
        return name, value


def _without_newline(secret: bytes) -> bytes:
    """A secret as `echo` and editors write it; more is not taken off, since random bytes may end in white space."""
    return secret.removesuffix(b"\r\n" if secret.endswith(b"\r\n") else b"\n")
