"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console

_WIDE = 200  # columns, where no terminal says how many


def table_console() -> Console:
    """As wide as the terminal; without one wide enough that what is piped is not cut."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
