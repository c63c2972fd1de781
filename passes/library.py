"""Large FP8 products go to the library. Beyond ``MIDDLE`` rows cuBLAS is ahead of any template, and where what reads the product wants bfloat16, its rounding is the one that would follow anyway.

Runs on the post-grad graph, where the cast behind a product can be seen. The int8 library has no scales, and 16-bit ones are reached by ``dequantize`` (``kernels/linear.py``).
"""

from __future__ import annotations

import torch
from torch import fx

from qcompile.core.scheme import GROUPS
from qcompile.kernels.op import MIDDLE, rows_of
from qcompile.kernels.scaled_linear import parse

from .narrow import CAST, cast_behind, is_product

VIEW = torch.ops.aten.reshape.default


def library(graph: fx.Graph) -> None:
    """Put ``_scaled_mm`` in the place of products of whole rows or tensors of E4M3; rewrites in place."""
    for node in list(graph.nodes):
        if is_product(node, ("scaled_linear",)) and _fits(node):
            cast = cast_behind(node)
            if cast is not None and cast.args[1] is torch.bfloat16:
                _replace(graph, node, cast)


def _fits(node: fx.Node) -> bool:
    x, w = parse(str(node.args[3]))
    value = node.meta["val"]
    k = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    if value.device.type != "cuda" or x.fmt.native is not torch.float8_e4m3fn or w.fmt.native is not torch.float8_e4m3fn or w.scale is not None:
        return False
    whole = x.group == w.group and x.group in GROUPS.values()
    rows = rows_of(value.shape[0], value.device) if whole and value.dim() == 2 and value.shape[1] % 16 == 0 and k % 16 == 0 else None
    return rows is not None and rows > MIDDLE


def _replace(graph: fx.Graph, node: fx.Node, cast: fx.Node) -> None:
    """The product in bfloat16; a bias behind it is added in float32, as before."""
    x, x_scales, weight, _ = node.args
    x_scale, codes, scale = x_scales[0], weight[0], weight[1]  # type: ignore[index]
    value = node.meta["val"]
    with graph.inserting_before(node):
        transposed = _call(graph, torch.ops.aten.permute.default, (codes, [1, 0]), codes.meta["val"].t())  # type: ignore[union-attr]
        columns = scale.meta["val"].reshape(1, -1)  # type: ignore[union-attr]
        row = _call(graph, VIEW, (scale, list(columns.shape)), columns)
        if columns.shape[1] == 1:  # one for the tensor: both scales are of one element
            ones = x_scale.meta["val"].reshape(1, 1)  # type: ignore[union-attr]
            x_scale = _call(graph, VIEW, (x_scale, [1, 1]), ones)
        y = _call(graph, torch.ops.aten._scaled_mm.default, (x, transposed, x_scale, row, None, None, torch.bfloat16, True), value.to(torch.bfloat16))
        if cast.args[0] is node:
            cast.replace_all_uses_with(y)
            graph.erase_node(cast)
        else:
            node.replace_all_uses_with(_call(graph, CAST, (y, torch.float32), value))
    graph.erase_node(node)


def _call(graph: fx.Graph, target: object, args: tuple[object, ...], value: torch.Tensor) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta["val"] = value
    return node
