"""Known functions of fla."""

from __future__ import annotations

from llcompile.patterns.known.row import KnownFunction

ROWS: tuple[KnownFunction, ...] = ()
