"""``torch.einsum`` of an activation and a parameter, where it is a linear: the labels that only the two share are summed, and no label of the parameter is one of the rows."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.core.errors import Skip

from .sites import call_method, example

LINEAR = torch.nn.functional.linear


@dataclass(frozen=True)
class Terms:
    """Labels of ``x, weight -> out``, apart: ``rows`` are those of x that stay, ``columns`` those that are summed, ``outputs`` the weight's own. ``steps`` make the weight (outputs, columns)."""

    x: str
    out: str
    rows: str
    columns: str
    outputs: str
    steps: tuple[str, ...]


def terms(equation: str, x_first: bool) -> Terms | Skip:
    """What an equation means for a linear; or why it is none. ``x_first``: the parameter is the second operand.

    >>> terms("ibh,hnd->ibnd", True).steps
    ('flat', 't')
    """
    match = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", equation.replace(" ", ""))
    if match is None:
        return Skip(f"einsum {equation!r} is not of two operands with an output, all labels written out")
    x, w = (match[1], match[2]) if x_first else (match[2], match[1])
    out = match[3]
    if any(len(set(part)) != len(part) for part in (x, w, out)):
        return Skip(f"einsum {equation!r} takes a diagonal")
    columns, outputs = "".join(c for c in w if c in x and c not in out), "".join(c for c in w if c not in x)
    rows = "".join(c for c in x if c not in columns)
    if set(w) & set(rows):
        return Skip(f"einsum {equation!r} has a matrix for each {', '.join(sorted(set(w) & set(rows)))}")
    if not columns or not outputs or set(rows) | set(outputs) != set(out):
        return Skip(f"einsum {equation!r} is an outer product, or sums what one operand has alone")
    first, second = (columns, outputs) if w.startswith(columns) else (outputs, columns)
    if first + second != w or min(len(first), len(second)) > 1:
        return Skip(f"einsum {equation!r} sums axes of its parameter that lie between others")
    steps = [] if len(w) == 2 else ["flat" if len(first) == 1 else "rows"]
    return Terms(x, out, rows, columns, outputs, (*steps, *(["t"] if first == columns else [])))


def expand(graph: fx.Graph, node: fx.Node, x_first: bool, x: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node] | Skip:
    """(the linear, what replaces ``node``), made before it."""
    found = terms(str(node.args[0]), x_first)
    value, xv, wv = (example(n) for n in (node, x, weight))
    if isinstance(found, Skip):
        return found
    if not all(isinstance(v, Tensor) for v in (value, xv, wv)) or xv.dim() != len(found.x):
        return Skip("einsum of what is no tensor")
    matrix = weight
    for step in found.steps:
        matrix = call_method(graph, "t", matrix) if step == "t" else call_method(graph, "flatten", matrix, *((1,) if step == "flat" else (0, -2)))
    order = [found.x.index(c) for c in found.rows + found.columns]
    rows = x if order == sorted(order) else call_method(graph, "permute", x, *order)
    if len(found.columns) > 1:
        rows = call_method(graph, "flatten", rows, len(found.rows))
    place = [(found.rows + found.outputs).index(c) for c in found.out]
    back = y = graph.call_function(LINEAR, (rows, matrix, None))
    y.meta = {**node.meta, "example_value": value.permute([found.out.index(c) for c in found.rows + found.outputs]).flatten(len(found.rows))}
    if len(found.outputs) > 1:
        back = call_method(graph, "unflatten", back, -1, tuple(int(value.shape[found.out.index(c)]) for c in found.outputs))
    if place != sorted(place):
        back = call_method(graph, "permute", back, *place)
        back = call_method(graph, "contiguous", back) if value.is_contiguous() else back  # views behind it were traced for that
    return y, back
