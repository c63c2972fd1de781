"""A linear's columns of a merged product lie between those of its kin: rows are further apart than they are long. Where that would be seen (a view that needs rows without gaps, ``as_strided``,
what leaves the graph), they are copied out."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .infra import target_name
from .sites import example

VIEWS = {"view", "unflatten", "transpose", "swapaxes", "permute", "movedim", "t", "unsqueeze", "squeeze", "expand", "narrow", "select", "chunk", "split", "unbind", "flatten", "reshape", "detach"}
"""Functions and methods whose result may lie in the memory of their input."""
STRIDES = {"as_strided", "as_strided_", "set_", "view_as", "view_as_real", "view_as_complex", "stride", "is_contiguous", "storage_offset", "untyped_storage", "data_ptr"}
"""Those that tell, or build on, how it lies."""


def stays(node: fx.Node, part: Tensor) -> bool:
    """Whether all that is made of ``node``, whose value would lie as ``part`` does, can be made of it where it lies."""
    return all(_reads(user, node, part) for user in node.users)


def _reads(user: fx.Node, node: fx.Node, part: Tensor) -> bool:
    if user.op == "output":
        return False
    name = target_name(user.target)
    if name in STRIDES:
        return False
    if user.target is operator.getitem and isinstance(user.args[1], int) and isinstance(part, (tuple, list)):
        return stays(user, part[user.args[1]])
    if name not in VIEWS or not user.args or user.args[0] is not node:
        return True
    try:
        args: Any = fx.map_arg(user.args[1:], _value)
        kwargs: Any = fx.map_arg(user.kwargs, _value)
        return stays(user, getattr(torch.Tensor, name)(part, *args, **kwargs))
    except (RuntimeError, TypeError, ValueError):  # what torch says of a view that there is not
        return False


def _value(node: fx.Node) -> Any:
    found = example(node)
    if found is None:
        raise ValueError(f"{node} has no value")
    return found
