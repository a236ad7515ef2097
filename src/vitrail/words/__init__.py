"""All the words of figures and reports, one TOML file per language, with the same keys in each.

A value is a `str.format` template; what it says of a model comes in as fields. No torch here.
"""

import tomllib
from importlib.resources import files
from typing import Any

from vitrail.errors import VitrailError, printable

LANGUAGES = ("en", "ko")


class Words:
    """One language's catalogue: `words("curves.title")`, `words("maps.label", label="cat")`."""

    def __init__(self, lang: str = "en") -> None:
        if lang not in LANGUAGES:
            raise VitrailError(f"no language '{lang}'; give one of {', '.join(LANGUAGES)}")
        self.lang = lang
        self._tables: dict[str, dict[str, str]] = tomllib.loads(
            files(__name__).joinpath(f"{lang}.toml").read_text("utf-8")
        )

    def __call__(self, key: str, **fields: Any) -> str:
        table, name = key.split(".")
        shown = {name: printable(value) if isinstance(value, str) else value for name, value in fields.items()}
        return self._tables[table][name].format(**shown)

    def keys(self) -> set[str]:
        """Every key, as `table.name`."""
        return {f"{table}.{name}" for table, names in self._tables.items() for name in names}
