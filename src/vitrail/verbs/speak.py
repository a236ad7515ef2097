"""How verbs listen and speak: flags in, results to standard output, all else to standard error."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from vitrail.errors import printable


def say(text: str) -> None:
    """One line on standard error."""
    print(printable(" ".join(text.split())), file=sys.stderr, flush=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], stderr: bool = False) -> None:
    """A table on standard output, or on standard error, whose cells are text and no markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(stderr=stderr).print(table)


def parse(kind: Any, verb: str, arguments: list[str], default: Any = None) -> Any:
    """The flags of `verb` as a `kind`. Exits with a message, as tyro does, where they are not understood."""
    import tyro

    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"vitrail {verb}", args=arguments, **given)


def leads() -> bool:
    """Whether this process speaks for all that torchrun started; alone, yes."""
    return os.environ.get("RANK", "0") == "0"
