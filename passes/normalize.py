"""Every spelling of a linear becomes one: ``torch.nn.functional.linear(x, weight, bias)`` with ``weight`` a parameter or its transpose.

Each rule is pattern, check, rewrite; a check that refuses gives its reason, which the report prints. Spellings met in models: ``linear``, ``addmm`` (GPT-2's Conv1D, weight K x N),
``matmul``/``mm``/``@``/``inner`` with a parameter (as the first factor, too), ``einsum`` (``einsum.py``), convolutions with a kernel of one, and ``multi_head_attention_forward``. A matrix that any other operation reads, unless it is known to be
harmless (a view, a cast, pointwise, a norm, a table that is looked up), is listed, too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.core.errors import Skip

from . import attention, einsum, experts
from .apart import apart
from .checkpoints import write_out
from .infra import called, graph_pass, target_name
from .sites import CASTS, LeftAlone, example, is_transpose, rows

ATEN = torch.ops.aten
LINEAR = F.linear
LINEARS = {LINEAR, ATEN.linear, ATEN.linear.default}
INNER = {torch.inner, "inner"}
ADDMMS = {torch.addmm, "addmm", ATEN.addmm, ATEN.addmm.default}
MATMULS = {torch.matmul, torch.mm, operator.matmul, torch.linalg.matmul, "matmul", "mm", "__matmul__", ATEN.mm, ATEN.mm.default, ATEN.matmul, ATEN.matmul.default}
CONVOLUTIONS = {torch.conv1d, torch.conv2d, F.conv1d, F.conv2d}
OTHERS = {torch.bmm, torch.baddbmm, torch.einsum, torch.addbmm, "bmm", "baddbmm", torch.conv3d, F.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, F.bilinear}
PRODUCTS = LINEARS | INNER | ADDMMS | MATMULS | CONVOLUTIONS | OTHERS | {"__rmatmul__", attention.FORWARD}
HARMLESS = {
    "view", "reshape", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "transpose", "t", "adjoint", "permute", "movedim", "moveaxis",
    "swapaxes", "swapdims", "getitem", "getattr", "select", "narrow", "index_select", "gather", "take", "take_along_dim", "chunk", "split", "split_with_sizes", "tensor_split",
    "unbind", "tile", "repeat", "repeat_interleave", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "flip", "roll", "as_strided", "contiguous", "clone", "detach",
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "cuda", "cpu", "size", "stride", "dim", "numel", "len", "item", "tolist", "new_zeros", "new_ones",
    "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like", "masked_fill", "where", "pad", "interpolate", "upsample", "triu", "tril", "diagonal", "diag",
    "requires_grad", "embedding", "embedding_bag", "one_hot", "setitem", "copy", "index_put", "index_copy", "scatter", "dropout", "add", "sub", "mul", "div", "truediv",
    "floordiv", "mod", "neg", "pow", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "abs", "square", "sigmoid", "logsigmoid", "tanh", "relu", "relu6", "gelu", "silu", "mish",
    "softplus", "softmax", "log_softmax", "clamp", "clip", "maximum", "minimum", "sin", "cos", "sign", "floor", "ceil", "round", "reciprocal", "lerp", "addcmul", "addcdiv",
    "iadd", "isub", "imul", "itruediv", "rsub", "multiply", "divide", "subtract", "eq", "ne", "lt", "gt", "le", "ge", "logical_not", "logical_and", "erf", "cumsum", "prelu",
    "leaky_relu", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize", "norm", "weight_norm", "weight_norm_interface", "linalg_norm", "linalg_vector_norm", "vector_norm", "sum", "mean",
    "get_data_attr", "lower_version_count_by_1", "renorm", "set", "var", "std", "amax", "amin", "max", "min", "argmax", "all", "any", "isnan", "isinf", "isfinite", "scaled_dot_product_attention",
}  # fmt: skip
"""Operations that may read a matrix without being a product with a layer's weight, by their names (``add``, ``add_`` and ``__add__`` are one)."""
ENCODER = ": this fast path of nn.TransformerEncoderLayer is one operation; torch.backends.mha.set_fastpath_enabled(False) makes it a graph of linears"
WHY = {"_transformer_encoder_layer_fwd": ENCODER, "_native_multi_head_attention": ENCODER.replace("TransformerEncoderLayer", "MultiheadAttention")}

PLAIN = {"buffer": "a buffer, no parameter", "tensor": "a plain tensor, no parameter: nn.Parameter(tensor, requires_grad=False) is one"}
"""Why what is no parameter is left alone, by its kind."""


@graph_pass()
def normalize(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite what can be; list the other matrix products with parameters in ``gm.meta["skipped"]``."""
    write_out(gm, marked=False)  # a model in training mode checkpoints under no_grad, too
    skipped: list[LeftAlone] = list(gm.meta.get("skipped", []))
    alone = apart(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        rule = next(rule for match, rule in RULES if match(node))
        refusal = alone[node] if node in alone and node.target in PRODUCTS else rule(gm.graph, node)
        if isinstance(refusal, Skip):
            node.meta["left_alone"] = True
            skipped += [_left_alone(node, p, PLAIN[p.meta["buffer"].kind] if "buffer" in p.meta else str(refusal)) for p in _parameters(node)]
    gm.meta["skipped"] = skipped
    return gm


def parameter_of(node: Any) -> fx.Node | Skip:
    """Follow casts and transposes back to a parameter, or to one of stacked parameters; or why there is none."""
    start = node
    while isinstance(node, fx.Node):
        if node.op == "placeholder" or is_element(node):
            known = node.op != "placeholder" or "param" in node.meta
            if known and (value := example(node)) is not None and value.is_complex():
                return Skip("a complex parameter")
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
    value = example(weight)
    if isinstance(found, Skip) or (value is not None and value.dim() != 2):
        return found if isinstance(found, Skip) else Skip("a product with a vector")
    _replace(graph, node, x, weight, False, bias)
    return None


def _inner(graph: fx.Graph, node: fx.Node) -> Skip | None:
    x, weight = _arguments(node, ("input", "other"))
    found = parameter_of(weight)
    value = example(weight)
    if isinstance(found, Skip) or value is None or value.dim() != 2:
        return found if isinstance(found, Skip) else Skip("an inner product with a parameter that is no matrix")
    _replace(graph, node, x, weight, False, None)
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
    if node.target == "__rmatmul__":
        x, weight = weight, x
    found = parameter_of(weight)
    first = isinstance(found, Skip) and not isinstance(parameter_of(x), Skip)
    if first:
        x, weight, found = weight, x, parameter_of(x)
    if isinstance(found, Skip):
        return Skip("the parameter is the first factor of the product") if _behind(x) else found
    value = example(found)
    if value is None or value.dim() != 2:
        return Skip(f"a product with a parameter of shape {tuple(value.shape) if value is not None else '?'}")
    if first:
        return _columns(graph, node, x, weight)
    _replace(graph, node, x, weight, True, None)
    return None


def _columns(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node) -> Skip | None:
    """``W @ x``: the columns of ``x`` are what a linear calls rows (state-space models write their time step so)."""
    value, out = example(x), node.meta["example_value"]
    if not isinstance(x, fx.Node) or value is None or not value.dim():
        return Skip("the parameter is the first factor of the product")
    vector = value.dim() == 1
    with graph.inserting_before(node):
        if not vector:
            x = graph.call_method("transpose", (x, -1, -2))
            x.meta["example_value"] = value.transpose(-1, -2)
        y = graph.call_function(LINEAR, (x, weight, None))
        back = y if vector else graph.call_method("contiguous", (graph.call_method("transpose", (y, -1, -2)),))
    y.meta = {**node.meta, "example_value": out if vector else out.transpose(-1, -2)}
    _substitute(graph, node, back)
    return None


def _einsum(graph: fx.Graph, node: fx.Node) -> Skip | None:
    operands: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if experts.resolve(node) is not None or len(operands) != 2 or not all(isinstance(n, fx.Node) for n in operands):
        return _other(graph, node)
    known = [isinstance(found := parameter_of(n), fx.Node) and (found is n or example(n).dim() == 2) for n in operands]
    if sum(known) != 1:
        return _other(graph, node)
    x, weight = operands if known[1] else operands[::-1]
    with graph.inserting_before(node):
        made = einsum.expand(graph, node, known[1], x, weight)
    if isinstance(made, Skip):
        return made if _parameters(node) else None
    _substitute(graph, node, made[1])
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

    if not (trivial(padding, 0) and trivial(dilation, 1) and groups in (None, 1)):
        return Skip("a convolution with padding, dilation or groups")
    if xv.dim() != len(kernel) + 2:
        return Skip("a convolution without a batch axis")
    with graph.inserting_before(node):
        moved = graph.call_method("movedim", (x, 1, -1))
        moved.meta["example_value"] = xv.movedim(1, -1)
        if not trivial(stride, 1):  # a shortcut past a block that halves the picture: every second place is multiplied
            steps = tuple(stride) * (len(kernel) // len(stride)) if isinstance(stride, (tuple, list)) else (stride,) * len(kernel)
            places = (slice(None), *(slice(None, None, step) for step in steps))
            taken = graph.call_function(operator.getitem, (moved, places))
            taken.meta["example_value"] = moved.meta["example_value"][places]
            moved = taken
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
    name = _name(node)
    if name in HARMLESS or not _parameters(node):
        return None
    return Skip(f"{name} is no linear layer{WHY.get(name, '')}")


def _name(node: fx.Node) -> str:
    """What a node calls, without the marks of in-place and reflected methods: ``__radd__`` and ``add_`` are ``add``."""
    name = called(node)
    plain = name.strip("_")
    return next((n for n in (plain, plain.removeprefix("r"), plain.removeprefix("i")) if n in HARMLESS), name)


RULES: tuple[tuple[Callable[[fx.Node], bool], Callable[[fx.Graph, fx.Node], Skip | None]], ...] = (
    (lambda n: n.target in LINEARS, _linear),
    (lambda n: n.target in INNER, _inner),
    (lambda n: n.target in ADDMMS, _addmm),
    (lambda n: n.target in MATMULS or n.target == "__rmatmul__", _matmul),
    (lambda n: n.target in CONVOLUTIONS, _convolution),
    (lambda n: n.target is torch.einsum, _einsum),
    (lambda n: n.target is attention.FORWARD, attention.expand),
    (lambda n: True, _other),
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
    """Parameters (and factors that are buffers) of at least two dimensions among a node's inputs: read through views, or all that an input is computed from."""
    found = dict.fromkeys(p for source in node.all_input_nodes for p in _behind(source) or _origins(source))
    return [p for p in found if "param" in p.meta] or [p for p in found if node.target in PRODUCTS]  # of buffers only the factors of products, and no masks of weights


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
        if (node.op == "placeholder" and "param" not in node.meta and ("buffer" not in node.meta or "mutated" in node.meta)) or node.op == "get_attr" or node.target in PRODUCTS or len(seen) > limit:
            return []  # a product of parameters alone is an activation, and a site of its own
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        front += new
    return [node for node in seen if _is_matrix(node)]


def _is_matrix(node: Any) -> bool:
    value = example(node)
    known = isinstance(node, fx.Node) and node.op == "placeholder" and ("param" in node.meta or ("buffer" in node.meta and "mutated" not in node.meta))
    return known and value is not None and value.dim() >= 2


def _left_alone(node: fx.Node, parameter: fx.Node, reason: str) -> LeftAlone:
    value, param = example(parameter), parameter.meta.get("param") or parameter.meta["buffer"]
    return LeftAlone(param.path, tuple(value.shape), value.numel() * value.dtype.itemsize, reason, param.index, _flops(node, parameter))


def _flops(node: fx.Node, parameter: fx.Node) -> int:
    """Floating-point operations of a node's product with a parameter, on the example input; those of a fused layer (a cell, attention) by the rows that it reads."""
    w, out = example(parameter), example(node)
    x = next((value for n in node.all_input_nodes if parameter not in _behind(n) and isinstance(value := example(n), torch.Tensor)), None)
    if node.target in CONVOLUTIONS | OTHERS and "conv" in _name(node):
        transposed = "transpose" in _name(node)
        over = x if transposed else out
        return 2 * _numel(over) * int(w.numel()) // int(w.shape[0]) if over is not None else 0
    if x is None or not x.dim():
        return 0
    if node.target in PRODUCTS and isinstance(out, torch.Tensor) and _numel(out):  # (M, K) x (K, N): MK * KN / MN is K^2
        batch = int(w.shape[0]) if w.dim() > 2 else 1
        return 2 * _numel(out) * round(math.sqrt(_numel(x) * int(w.numel()) / (_numel(out) * batch)))
    return 2 * rows(x.shape) * int(w.numel())


def _numel(value: torch.Tensor) -> int:
    return rows((*value.shape, 1))
