"""Every spelling of a linear becomes one: ``torch.nn.functional.linear(x, weight, bias)`` with ``weight`` a parameter or its transpose.

Each rule is pattern, check, rewrite; a check that refuses gives its reason, which the report prints. Spellings met in transformers: ``linear``, ``addmm`` (GPT-2's Conv1D, weight K x N),
``matmul``/``mm``/``@`` with a parameter, and convolutions with a kernel of one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.core.errors import Skip

from . import experts
from .infra import graph_pass, target_name
from .sites import CASTS, LeftAlone, example, is_transpose

LINEAR = F.linear
MATMULS = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__"}
CONVOLUTIONS = {torch.conv1d, torch.conv2d, F.conv1d, F.conv2d}
OTHERS = {torch.bmm, torch.baddbmm, torch.einsum, torch.addbmm, "bmm", "baddbmm", torch.conv3d, F.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, F.bilinear}


@graph_pass()
def normalize(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite what can be; list the other matrix products with parameters in ``gm.meta["skipped"]``."""
    skipped: list[LeftAlone] = list(gm.meta.get("skipped", []))
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        rule = next((rule for match, rule in RULES if match(node)), None)
        if rule is None:
            continue
        refusal = rule(gm.graph, node)
        if isinstance(refusal, Skip):
            skipped += [_left_alone(p, str(refusal)) for p in _parameters(node)]
    gm.meta["skipped"] = skipped
    return gm


def parameter_of(node: Any) -> fx.Node | Skip:
    """Follow casts and transposes back to a parameter, or to one of stacked parameters; or why there is none."""
    start = node
    while isinstance(node, fx.Node):
        if node.op == "placeholder" or is_element(node):
            known = node.op != "placeholder" or "param" in node.meta
            return node if known else Skip("the second factor is not a parameter")
        if node.target in CASTS or (node.target is getattr and node.args[1] == "data") or is_transpose(node):
            node = node.args[0]
        else:
            break
    return Skip(f"the weight is computed in the graph ({target_name(getattr(start, 'target', start))})")


def is_element(node: fx.Node) -> bool:
    """``W[3]`` of a 3-D parameter."""
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(node.args[1], int) and isinstance(source, fx.Node) and "param" in source.meta and example(source).dim() == 3


def _linear(graph: fx.Graph, node: fx.Node) -> Skip | None:
    x, weight, bias = _arguments(node, ("input", "weight", "bias"))
    found = parameter_of(weight)
    if isinstance(found, Skip):
        return found
    _replace(graph, node, x, weight, False, bias)
    return None


def _addmm(graph: fx.Graph, node: fx.Node) -> Skip | None:
    bias, x, weight = _arguments(node, ("input", "mat1", "mat2"))
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return Skip("addmm with beta or alpha other than 1")
    found = parameter_of(weight)
    if isinstance(found, Skip):
        return found
    value = example(bias)
    if value is None or value.dim() != 1:
        return Skip("addmm whose first argument is not a bias vector")
    _replace(graph, node, x, weight, True, bias)
    return None


def _matmul(graph: fx.Graph, node: fx.Node) -> Skip | None:
    x, weight = _arguments(node, ("input", "other"))
    found = parameter_of(weight)
    if isinstance(found, Skip):
        return Skip("the parameter is the first factor of the product") if _behind(x) else found
    value = example(found)
    if value is None or value.dim() != 2:
        return Skip(f"a product with a parameter of shape {tuple(value.shape) if value is not None else '?'}")
    _replace(graph, node, x, weight, True, None)
    return None


def _convolution(graph: fx.Graph, node: fx.Node) -> Skip | None:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
    value, xv = example(weight), example(x)
    if value is None or not isinstance(weight, fx.Node) or "param" not in weight.meta or xv is None:
        return Skip("a convolution whose weight is computed in the graph")
    kernel = tuple(int(s) for s in value.shape[2:])
    if any(size != 1 for size in kernel):
        return Skip(f"a convolution with a kernel of {'x'.join(map(str, kernel))}")

    def trivial(arg: Any, default: int) -> bool:
        return arg is None or arg in ("valid", "same") or all(v == default for v in (arg if isinstance(arg, (tuple, list)) else (arg,)))

    if not (trivial(stride, 1) and trivial(padding, 0) and trivial(dilation, 1) and groups in (None, 1)):
        return Skip("a convolution with stride, padding, dilation or groups")
    if xv.dim() != len(kernel) + 2:
        return Skip("a convolution without a batch axis")
    with graph.inserting_before(node):
        moved = graph.call_method("movedim", (x, 1, -1))
        moved.meta["example_value"] = xv.movedim(1, -1)
        flat = graph.call_method("flatten", (weight, 1))
        flat.meta["example_value"] = value.flatten(1)
        flat.meta["flat"] = True
        y = graph.call_function(LINEAR, (moved, flat, bias))
        out = _as_convolution(graph, graph.call_method("movedim", (y, -1, 1)), node.meta["example_value"])
    y.meta = {**node.meta, "example_value": node.meta["example_value"].movedim(1, -1)}
    _substitute(graph, node, out)
    return None


def _as_convolution(graph: fx.Graph, out: fx.Node, value: torch.Tensor) -> fx.Node:
    """``out`` (B, N, *) in the memory format of the convolution's own output: views behind it were traced for that one. The product itself has the channels last."""
    if value.is_contiguous():
        return graph.call_method("contiguous", (out,))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return out if last is None else graph.call_method("contiguous", (out,), {"memory_format": last})


def _other(graph: fx.Graph, node: fx.Node) -> Skip | None:
    found = experts.resolve(node)
    if found is not None:
        return found if isinstance(found, Skip) else None
    return Skip(f"{getattr(node.target, '__name__', node.target)} is no linear layer") if _parameters(node) else None


RULES: tuple[tuple[Callable[[fx.Node], bool], Callable[[fx.Graph, fx.Node], Skip | None]], ...] = (
    (lambda n: n.target is LINEAR, _linear),
    (lambda n: n.target in (torch.addmm, "addmm"), _addmm),
    (lambda n: n.target in MATMULS, _matmul),
    (lambda n: n.target in CONVOLUTIONS, _convolution),
    (lambda n: n.target in OTHERS or experts.is_grouped(n.target), _other),
)


def _arguments(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]


def _replace(graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, transposed: bool, bias: Any) -> None:
    """``linear(x, weight or its transpose, bias)`` in the node's place; casts of the weight stay where they are."""
    with graph.inserting_before(node):
        if transposed and is_transpose(weight):
            weight = weight.args[0]  # type: ignore[assignment]
        elif transposed:
            matrix = weight
            weight = graph.call_method("t", (matrix,))
            weight.meta["example_value"] = matrix.meta["example_value"].t()
        if node.target is LINEAR and node.args == (x, weight, bias):
            return
        y = graph.call_function(LINEAR, (x, weight, bias))
    y.meta = dict(node.meta)
    _substitute(graph, node, y)


def _substitute(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """The new node takes the old one's place, metadata and name, so that texts differ in one line."""
    name = old.name
    new.meta = new.meta or dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    new.name = name


def _parameters(node: fx.Node) -> list[fx.Node]:
    """Parameters of at least two dimensions among a node's inputs: read through views, or all that an input is computed from."""
    return list(dict.fromkeys(p for source in node.all_input_nodes for p in _behind(source) or _origins(source)))


def _behind(source: Any) -> list[fx.Node]:
    """The parameter that ``source`` is, seen through casts, transposes and simple views."""
    for _ in range(8):
        if not isinstance(source, fx.Node) or source.op == "placeholder" or not source.all_input_nodes:
            break
        if source.op == "call_method" or is_transpose(source) or source.target in (getattr, operator.getitem):
            source = source.all_input_nodes[0]
        else:
            break
    return [source] if _is_matrix(source) else []


def _origins(source: fx.Node, limit: int = 32) -> list[fx.Node]:
    """Parameters that ``source`` is computed from, where it is computed from nothing else (weight norm, masks of weights, sums with adapters): not activations."""
    seen, front = {source}, [source]
    while front:
        node = front.pop()
        if (node.op == "placeholder" and "param" not in node.meta) or node.op == "get_attr" or len(seen) > limit:
            return []
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        front += new
    return [node for node in seen if _is_matrix(node)]


def _is_matrix(node: Any) -> bool:
    value = example(node)
    return isinstance(node, fx.Node) and node.op == "placeholder" and "param" in node.meta and value is not None and value.dim() >= 2


def _left_alone(parameter: fx.Node, reason: str) -> LeftAlone:
    value = example(parameter)
    return LeftAlone(parameter.meta["param"].path, tuple(value.shape), value.numel() * value.dtype.itemsize, reason)
