"""The releases that were tested: those of the table in docs/compatibility.md, which `make matrix` writes."""

from __future__ import annotations

# Distribution: oldest and newest release in which every row of the self-test acted.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.15.0"),
    "transformers": ("5.15.0", "5.24.0"),
    "fla-core": ("0.6.0", "0.6.0"),
}
