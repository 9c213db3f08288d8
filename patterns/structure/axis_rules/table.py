"""The axis rules of all operations."""

from __future__ import annotations

import torch

from llcompile.patterns.structure.axis_rules import along, others, pieces, products, views
from llcompile.patterns.structure.axis_rules.call import Rule
from llcompile.patterns.structure.axis_rules.views import pointwise
from llcompile.patterns.structure.program import Op

MODULES = (views, pieces, along, products, others)
RULES: dict[str, Rule] = {name: rule for module in MODULES for rule, names in module.RULES for name in names.split()}


def rule_for(op: Op) -> Rule | None:
    """The operation's rule; None for an unknown one."""
    if op.name in RULES:
        return RULES[op.name]
    tags = getattr(op.target, "tags", ())
    return pointwise if torch.Tag.pointwise in tags else None
