"""The command line of prefix stores: `hf-kvcache store ls | stat | verify | gc | export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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


@store_app.command("ls")
def list_pages(
    url: Url, secret: SecretFile = None, limit: Annotated[int, typer.Option(help="Pages shown.")] = 50
) -> None:
    """List pages, those used last first."""
    entries = sorted(_open(url, secret).entries(), key=lambda entry: -entry.used)
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
    plot: Annotated[Path | None, typer.Option(help="Picture of the trie: sizes and adoptions.")] = None,
) -> None:
    """Sum up a store: pages, bytes, branches, what was adopted."""
    from hf_kvcache.sequential.trie import build

    entries = list(_open(url, secret).entries())
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
def verify(url: Url, secret: SecretFile = None) -> None:
    """Read every page; remove and name those that are damaged. Ends with 1 unless all are whole and can be read."""
    store = _open(url, secret)
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
    limit: Annotated[int | None, typer.Option(help="Bytes to come down to.")] = None,
) -> None:
    """Remove what nothing leads to and, above a limit, what is worth least."""
    console.print(f"freed {_open(url, secret).gc(limit):,} bytes")


@store_app.command()
def export(url: Url, target: Annotated[str, typer.Argument(help="Folder or URL.")], secret: SecretFile = None) -> None:
    """Copy every whole page to another store."""
    copied = _open(url, secret).export(_open(target, secret, new=True))
    console.print(f"copied {copied} pages to {target}")


def _open(url: str, secret: Path | None, new: bool = False) -> PrefixStore:
    from hf_kvcache.sequential.store import PrefixStore

    if not new and "://" not in url and not (Path(url) / "pages").is_dir():
        raise FileNotFoundError(f"there is no store in {url}; expected the folder that patch_model was given")
    return PrefixStore(url, secret=b"" if secret is None else _without_newline(secret.read_bytes()))


def _without_newline(secret: bytes) -> bytes:
    """A secret as `echo` and editors write it; more is not taken off, since random bytes may end in white space."""
    return secret.removesuffix(b"\r\n" if secret.endswith(b"\r\n") else b"\n")
