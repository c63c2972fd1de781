"""A pass is a named function GraphModule -> GraphModule; a pipeline is a list that prints.

Each pass gets a private clone, may edit it, and returns it; the runner lints and recompiles. What a pass knows or decides rides on the graph:
``node.meta["site"]`` names a linear, ``gm.meta["sites"]``, ``gm.meta["plan"]`` and ``gm.meta["skipped"]`` are dictionaries replaced, never edited in place.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.core.errors import PassError, QcompileError, unknown

log = logging.getLogger("qcompile.passes")
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
INPLACE = {"setitem", "__setitem__", *(f"i{name}" for name in OPERATORS), *(f"__i{name}__" for name in OPERATORS)}
NO_WRITES = {"requires_grad_", "share_memory_", "retain_grad", "and_", "or_", "not_", "is_"}


@dataclass(frozen=True)
class Pass:
    """``fn(gm, context) -> gm``. ``after`` names passes that must have run: checked, never solved; the recipe's list is the order."""

    name: str
    fn: Callable[[fx.GraphModule, Any], fx.GraphModule]
    after: tuple[str, ...] = ()

    def __call__(self, gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
        out = self.fn(clone(gm), context)
        out.graph.lint()
        out.recompile()
        return out


@dataclass(frozen=True)
class Step:
    """What one pass did: its number, name, the graph's text before and after, seconds, and a line of its own."""

    index: int
    name: str
    before: str
    after: str
    seconds: float
    note: str = ""

    @property
    def changed(self) -> int:
        """Lines of text that differ."""
        return sum(line[0] in "+-" for line in self.diff().splitlines())

    def diff(self) -> str:
        """Unified diff of the two texts, without headers."""
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))

    def __str__(self) -> str:
        return f"{self.index:02d} {self.name:<12} {self.changed:4d} lines changed  {self.seconds * 1e3:8.1f} ms  {self.note}".rstrip()


def graph_pass(*, after: tuple[str, ...] = ()) -> Callable[[Callable[[fx.GraphModule, Any], fx.GraphModule]], Pass]:
    """Make a function a Pass of the same name."""
    return lambda fn: Pass(fn.__name__, fn, after)


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares tensors and owns its nodes."""
    return compat.copy_graph(gm)


def run(passes: Sequence[Pass], gm: fx.GraphModule, context: Any = None, steps: list[Step] | None = None) -> fx.GraphModule:
    """Run the passes in order; a Step for each is appended to ``steps``. An unexpected failure becomes a PassError that names the pass and what ran before.

    The graphs' texts are built where somebody reads them: a list of steps, or the log.
    """
    read = steps is not None or log.isEnabledFor(logging.INFO)
    steps = [] if steps is None else steps
    before = text(gm) if read else ""
    for p in passes:
        done = [step.name for step in steps]
        if missing := [name for name in p.after if name not in done]:
            raise PassError(f"pass {p.name!r} must run after {', '.join(missing)}; before it ran: {', '.join(done) or 'nothing'}")
        start = time.perf_counter()
        try:
            gm = p(gm, context)
        except QcompileError:
            raise
        except Exception as error:
            raise PassError(f"pass {p.name!r} failed after {', '.join(done) or 'nothing'}: {type(error).__name__}: {error}") from error
        seconds, after = time.perf_counter() - start, text(gm) if read else ""
        step = Step(len(steps), p.name, before, after, seconds, gm.meta.get("note", ""))
        before, gm.meta["note"] = after, ""
        steps.append(step)
        log.info("%s", step)
        log.debug("after %s:\n%s", p.name, after)
        compat.trace_artifact(f"qcompile_{step.index:02d}_{step.name}", lambda gm=gm: text(gm))  # type: ignore[misc]
    return gm


def find(name: str, passes: dict[str, Pass]) -> Pass:
    """A pass by its name; OptionError with the list."""
    if name not in passes:
        raise unknown("pass", name, passes)
    return passes[name]


def text(gm: fx.GraphModule) -> str:
    """The graph, one line for each node: the form that dumps, diffs and expected files use, stable across versions of torch.

    Parameters print as their names in the model; sites carry their decision as a comment.
    """
    sites, plan = gm.meta.get("sites", {}), gm.meta.get("plan", {})
    names: dict[fx.Node, str] = {}
    lines = []
    inputs = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = "%" + node.meta["param"].path if "param" in node.meta else node.name
            if "param" not in node.meta:
                inputs.append(f"{node.name}{_type(node)}")
        elif node.op == "output":
            lines.append(f"return {_show(node.args[0], names)}")
        else:
            names[node] = node.name
            site = node.meta.get("site")
            note = f"  # {site}: {plan[site]}" if site in plan else f"  # {site} {sites[site].role}" if site in sites else ""
            args = [_show(a, names) for a in node.args] + [f"{k}={_show(v, names)}" for k, v in node.kwargs.items()]
            if node.op == "call_method":
                call = f"{args[0]}.{node.target}({', '.join(args[1:])})"
            elif node.op == "get_attr":
                call = f"self.{node.target}"
            else:
                call = f"{target_name(node.target)}({', '.join(args)})"
            lines.append(f"{node.name} = {call}{note}")
    return "\n".join([f"inputs: {', '.join(inputs)}", *lines])


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node``, and what it is made of, as far as nothing reads it."""
    if node.op != "placeholder" and not node.users:
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for n in inputs:
            erase_unread(graph, n)


def target_name(target: Any) -> str:
    """A short name for what a node calls."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target)) if not isinstance(target, str) else target


def called(node: fx.Node) -> str:
    """The name of what a node calls as it is written, underscores and all, without its overload."""
    target = getattr(node.target, "overloadpacket", node.target)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def written_by(node: fx.Node) -> list[fx.Node]:
    """What a call writes to in place: by its name (``add_``, ``__iadd__``, ``setitem``, but not ``operator.and_``), ``inplace=True``, or ``out=``; of ``_foreach`` calls, which take lists, all of them."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = called(node)
    inplace = (name.endswith("_") and not name.endswith("__") and name not in NO_WRITES) or name in INPLACE or node.kwargs.get("inplace") is True
    values: list[Any] = [*([node.args[0] if node.args else next(iter(node.kwargs.values()), None)] if inplace else []), node.kwargs.get("out")]
    return [n for value in values for n in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(n, fx.Node)]


def _type(node: fx.Node) -> str:
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        return ""
    return f": {str(value.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in value.shape)}]"


def _show(arg: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return names.get(arg, arg.name)
    if isinstance(arg, (list, tuple)):
        inner = ", ".join(_show(a, names) for a in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner}{',' if len(arg) == 1 else ''})"
    if isinstance(arg, slice):
        return ":".join("" if part is None else _show(part, names) for part in (arg.start, arg.stop)) + (f":{arg.step}" if arg.step is not None else "")
    if isinstance(arg, torch.dtype):
        return str(arg).removeprefix("torch.")
    return repr(arg)
