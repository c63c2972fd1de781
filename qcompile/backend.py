"""The ``torch.compile`` backend: capture, passes, Inductor, and the callable that Dynamo keeps.

A compiled graph takes Dynamo's arguments less the 16-bit weights that it no longer reads, plus the packed tensors that stand for them. Several instances of one class share one compiled
graph: for parameters that it has not seen, it looks up their names, decides their schemes again, and serves them only if the decisions equal its own; else it compiles a variant.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import codes, compat, stored
from qcompile.calibrate import Recorder, renamed, session
from qcompile.capture import capture
from qcompile.context import Context
from qcompile.core.digest import digest
from qcompile.core.errors import QcompileWarning, Skip, StrictError, WeightError
from qcompile.core.recipe import Choice
from qcompile.dumps import dump, trace_plan
from qcompile.fill import tensors_of
from qcompile.kernels import OPS
from qcompile.kernels.op import decompositions
from qcompile.later import Later
from qcompile.memory import guard, is_released, release
from qcompile.missed import GROUPED, limit, of_no_live_linear, refusals, regroup
from qcompile.options import DEFAULTS, PIPELINE, Options
from qcompile.owners import owners_of
from qcompile.passes import PASSES, TRAININGS, Pass
from qcompile.passes.flatten import flatten
from qcompile.passes.infra import Step, run, text
from qcompile.passes.match import Plan, signature
from qcompile.passes.sites import Site, view
from qcompile.passes.slots import Slot
from qcompile.settle import settle
from qcompile.sources import sources
from qcompile.weights import TABLE, Binding

log = logging.getLogger("qcompile.backend")


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="qcompile", options=...)`` calls for each captured graph."""
    options = options or dict(DEFAULTS)  # as they are now, also where a graph is built later
    opts = Options.parse(options, mode)
    compat.guard_parameters()
    training = _training(gm, example_inputs)
    if any(map(compat.is_fake, example_inputs)) and not (training and opts.train is None and session() is None):
        return Later(example_inputs, lambda inputs: backend(gm, inputs, options=options, mode=mode))
    codes.remember(example_inputs)
    if (sitting := session(example_inputs)) is not None:
        return Recorder(gm, example_inputs, opts, sitting)
    kind: type[CompiledGraph] = CompiledGraph
    if training:
        if opts.train is not None:
            from qcompile.train.graph import TrainingGraph
            from qcompile.train.lora import FrozenGraph

            kind = FrozenGraph if opts.recipe.frozen else TrainingGraph
        elif any(map(is_released, example_inputs)):
            raise WeightError("grad mode is on and weights were released: call the model under torch.no_grad(), train adapters beside them with the option 'train': 'lora', or load its weights again to train it")
        else:
            _warn_once("training", f"qcompile: a parameter requires grad and grad mode is on, so the plain graph is compiled, unquantized. For inference call the model under torch.no_grad(); to train quantized, take the option 'train' ({', '.join(TRAININGS)}).")
            return gm if _no_compiler(example_inputs) else compat.inductor(gm, example_inputs, opts.inductor)
    records = [TABLE.get(a) for a in example_inputs if isinstance(a, nn.Parameter)]  # looked at, not asked: is_released may collapse one anew, which Dynamo's guards would see
    if (opts.release or any(r is not None and r.released is not None for r in records)) and (full := compat.at_recompile_limit([compat.compiling()], more=1)):
        _warn_once(("limit", *full), f"qcompile: {limit(full)}. Eager calls read released weights, which are NaN")
    compiled = kind(gm, example_inputs, opts)
    if opts.release:
        compat.any_strides(gm, compiled.unread)  # a weight that is given back has others, for which the next call would capture all again
    return compiled


class CompiledGraph:
    """One captured graph under one plan. Callable with Dynamo's arguments."""

    pipeline: tuple[str, ...] = PIPELINE

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], options: Options, captured: fx.GraphModule | None = None) -> None:
        self.options = options
        self.steps: list[Step] = []
        self.kernel_count = 0
        self.notes: list[str] = []
        self._code = compat.compiling()
        self.captured = captured if captured is not None else capture(gm, inputs, options.root)
        self._lock = threading.RLock()
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._variants: dict[tuple[Any, ...], CompiledGraph] = {}
        self._served: dict[tuple[int, ...], CompiledGraph] = {}
        self._build(inputs)

    # --- building ----------------------------------------------------------------------------------------------------

    def _build(self, inputs: Sequence[Any]) -> None:
        context = Context(self.options, inputs, self)
        self.matched = self._run([PASSES[name] for name in self.pipeline], self.captured, context)
        planned, lowered = self._rewrite(self.matched, context)
        self.sites: dict[str, Site] = planned.meta["sites"]
        self.plan = planned.meta["plan"]
        self.signature = signature(planned)
        self._check(planned)
        self.kernels: dict[str, str | Skip] = lowered.meta["kernels"]
        self.slots: list[Slot] = lowered.meta["slots"]
        self.merged: dict[str, tuple[str, ...]] = lowered.meta["merged"]
        trace_plan(self.sites, self.plan, self.kernels)
        if self.options.dump:
            dump(self.options.dump, self.captured, self.steps, self.sites, self.plan, self.kernels)
        for message in (*refusals(self), *regroup(self.sites.values(), self.options.recipe.rules, inputs)):
            self._say(message, refused=message != GROUPED)
        stored.unfold(lowered)
        self._kept = kept = self._drop_unread_weights(lowered)
        self.unread = sorted({*range(len(inputs))} - {*kept})
        self._pin(lowered, inputs)
        self.lowered = lowered
        self._weights = sorted({site.param.index for site in self.sites.values()})  # those that keep 16 bits, too: in another layer a rule may decide otherwise
        self._first = [weakref.ref(inputs[i]) for i in self._weights]
        self._devices = {i: inputs[i].device for i in self._weights}
        packed = [n.meta["example_value"] for n in lowered.graph.find_nodes(op="placeholder") if "packed" in n.meta]
        self._inner = self._compile(lowered, [*(inputs[i] for i in kept), *packed])

    def _rewrite(self, matched: fx.GraphModule, context: Context) -> tuple[fx.GraphModule, fx.GraphModule]:
        """(the graph with all that was decided, the same with our ops in it)."""
        own = ("transform",) if any(isinstance(c, Choice) and c.smooth for c in matched.meta["plan"].values()) else ()
        self.planned = self._run([PASSES[name] for name in (*own, *self.options.passes, "merge", "attend")], matched, context)
        return self.planned, self._run([PASSES["lower"], PASSES["glu"], PASSES["factors"]], self.planned, context)

    def _run(self, passes: Sequence[Pass], gm: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Run passes; where one fails, what came before it is still dumped."""
        try:
            return run(passes, gm, context, self.steps)
        except Exception:
            if self.options.dump:
                dump(self.options.dump, self.captured, self.steps)
            raise

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.options.lower == "eager":
            return self._engine(gm)
        if problem := _no_compiler(inputs):
            self._say(f"no C++ compiler was found ({problem}); the quantized graph runs by its references, which is slow. Install g++ or clang++ to get compiled kernels.")
            return self._engine(gm)
        smooth = any(isinstance(c, Choice) and c.smooth for c in self.plan.values())
        more: dict[str, Any] = {"realize_reads_threshold": 8} if smooth else {}  # a norm that reads the residual, its weight and the vector is still one kernel with the quantization behind it
        if self.options.inductor.get("triton.cudagraphs"):
            more["triton.enable_pdl"] = True  # where launches cost the CPU nothing, kernels may begin while the one before ends
        if self.sites and all(site.dtype.itemsize < 4 for site in self.sites.values()):
            more["use_fast_math"] = True  # exp by the GPU's own instruction, less apart than 16 bits show: quantizing the rows behind a SwiGLU is bound by instructions
        patches = {"epilogue_fusion_first": True, **more, **self.options.inductor, "post_grad_custom_pre_pass": compat.graph_pass(flatten, self._key() + compat.vector_isa(inputs))}
        if self.captured.meta["creates_state"] and patches.get("triton.cudagraphs"):
            patches["triton.cudagraphs"] = False
            self.notes.append("no CUDA graph for this graph: it makes a cache that outlives the call; the graphs that read the cache have theirs")
        start = compat.kernel_count()
        compiled = compat.inductor(gm, inputs, patches, decompositions(OPS))
        self.kernel_count = compat.kernel_count() - start
        return compiled

    def _engine(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """What runs the graph without a compiler, every quantized op by its reference."""
        return gm

    def _key(self) -> bytes:
        """What of us the generated code depends on."""
        return digest(sources(), self.options.key())

    def _ready(self, args: Sequence[Any]) -> None:
        """Called before parameters that are new are bound."""

    def _drop_unread_weights(self, gm: fx.GraphModule) -> list[int]:
        """Erase placeholders of weights that nothing reads any more; returns the positions of Dynamo's arguments that stay."""
        kept = []
        replaced = {arg for slot in self.slots for arg in slot.args}
        own = [n for n in gm.graph.find_nodes(op="placeholder") if "packed" not in n.meta]
        for i, node in enumerate(own):
            if i in replaced and not node.users:
                gm.graph.erase_node(node)
            else:
                kept.append(i)
        gm.recompile()
        return kept

    def _pin(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Parameters that this graph reads in 16 bits must not be released, nor those of embeddings, which may run outside every graph."""
        for site in self.sites.values():
            if site.param.table:
                TABLE.record(inputs[site.param.index], site.param.path).pinned.add("an embedding reads it in 16 bits")
        for node in gm.graph.find_nodes(op="placeholder"):
            param = node.meta.get("param")
            if param is None or "packed" in node.meta or not node.users:
                continue
            value = inputs[param.index]
            if is_released(value):
                how = "freeze it again (requires_grad_(False)), or give it a value with qcompile.restore_weights(model) to train it" if param.trained else "load the weights again, or compile with the recipe that packed it"
                raise WeightError(f"the 16-bit weight of {param.path} was released, but this graph {'trains' if param.trained else 'reads'} it; {how}")
            if value.dim() > 1:
                TABLE.record(value, param.path).pinned.add("a compiled graph reads it in 16 bits")

    def _check(self, gm: fx.GraphModule) -> None:
        unused = gm.meta["unused_rules"]
        if missed := of_no_live_linear(unused):
            names = ", ".join(sorted(site.path for site in self.sites.values())[:8]) or "none"
            _warn_once(("rules", tuple(missed), names), f"qcompile: rules that matched no linear: {', '.join(map(repr, missed))}. Linears here: {names}, ...")
        self.unused = set(unused)
        self.notes += [f"rule {rule!r} matched nothing" for rule in unused]

    def _say(self, message: str, refused: bool = True) -> None:
        self.notes.append(message)
        if refused and self.options.strict:
            raise StrictError(message)
        _warn_once(("said", message), f"qcompile: {message}")

    def calibrate(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, dict[str, Choice]]:
        """Solve what is missing, and say so. Returns a line for the report and the choices with what was found."""
        note, choices = settle(gm, inputs, self.options)
        if "first call" in note:
            _warn_once(("calibrated", id(self)), f"qcompile: {note}. For better results calibrate on typical data: with qcompile.calibrate(fast): ...")
        return note, choices

    # --- running -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        parameters = [args[i] for i in self._weights]
        key = tuple(map(id, parameters))
        binding = self._bindings.get(key)
        if binding is None:
            variant = self._served.get(key) or self._bind(parameters, args)
            if variant is not self:
                return variant(*args)
            binding = self._bindings[key]
        if _COLLECTORS:
            for collect in _COLLECTORS:
                collect(self, args)
        return self._inner(*[args[i] for i in self._kept], *binding.get(parameters))

    def _bind(self, parameters: Sequence[Tensor], args: Sequence[Any]) -> CompiledGraph:
        """Make these parameters known and pack them, or find the variant that serves them."""
        key = tuple(map(id, parameters))
        with self._lock:
            if any(ref() is not p for ref, p in zip(self._first, parameters)):
                codes.remember(parameters, self._code)
                names = owners_of(args)
                other = self._planned_for(args, names)
                if other != self.signature:
                    return self._variant(other, key, args, names)

            def forget() -> None:
                self._bindings.pop(key, None)

            self._ready(args)
            packed = {arg for slot in self.slots for arg in slot.args}
            binding = Binding(parameters, self._fetch, forget, [i for i, arg in enumerate(self._weights) if arg in packed], self.options.release)
            binding.get(parameters)
            self._bindings[key] = binding
        return self

    def _planned_for(self, args: Sequence[Any], names: dict[int, tuple[nn.Module, str, str]]) -> tuple[str, ...]:
        """Signature of the plan of other parameters, which are calibrated where they have to be."""
        captured = self.captured if self.options.root else renamed(self.captured, args, names)
        gm = run([PASSES[name] for name in self.pipeline], captured, Context(self.options, args, self))
        gm.meta["plan"] = self._kept_out(gm.meta["sites"], gm.meta["plan"])
        self.unused &= set(gm.meta["unused_rules"])
        return signature(gm)

    def _kept_out(self, sites: Mapping[str, Site], plan: Plan) -> Plan:
        """The plan less what this kind of graph leaves alone."""
        return plan

    def _fetch(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        by_arg = dict(zip(self._weights, parameters))
        for site in self.sites.values():
            now, then = by_arg[site.param.index].device, self._devices[site.param.index]
            if now != then:
                raise WeightError(f"{site.param.path} is on {now}, and this graph was compiled for {then}: move it back, or the whole model to one device, and call torch.compiler.reset()")
        last = {arg: i for i, slot in enumerate(self.slots) for arg in slot.args}
        out: list[Tensor] = []
        released: list[Tensor] = []
        try:
            for i, slot in enumerate(self.slots):
                parameters_ = [by_arg[arg] for arg in slot.args]
                out += tensors_of(slot, *parameters_)
                for part, p in zip((slot, *slot.rest), parameters_):
                    if self.options.release and last[part.arg] == i and isinstance(p, nn.Parameter) and release(p, part.path):  # before the next one is packed
                        released.append(p)
        finally:  # also where a later weight cannot be packed
            if released:
                guard(released)
        return out

    def _renamed(self, site: Site, args: Sequence[Any], names: dict[int, tuple[nn.Module, str, str]]) -> Site:
        _, path, name = names.get(id(args[site.param.index]), (None, "", ""))
        full = stored.plain(path, name) if not self.options.root else site.param.path
        path = full.removesuffix(".weight") or site.path
        return replace(site, path=path, name=path, param=replace(site.param, path=full or site.param.path))

    def _variant(self, other: tuple[str, ...], key: tuple[int, ...], args: Sequence[Any], names: dict[int, tuple[nn.Module, str, str]]) -> CompiledGraph:
        """A compiled graph for parameters whose plan differs. Outside Dynamo no guard protects sizes, so integers among the arguments are part of its key."""
        ints = tuple(a for a in args if isinstance(a, int))
        found = self._variants.get((other, ints))
        if found is None:
            captured = renamed(self.captured, args, names)
            log.info("compiling a variant: the plan of these parameters differs from the one compiled for %s", self.signature)
            found = type(self)(self.captured, list(args), self.options, captured)
            self._variants[other, ints] = found
        if not ints:
            self._served[key] = found
            weakref.finalize(args[self._weights[0]], self._served.pop, key, None)
        return found


def _training(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Gradients may be taken: grad mode is on, or the graph turns it on, and some input requires them."""
    return (torch.is_grad_enabled() or compat.enables_grad(gm.graph)) and any(isinstance(a, Tensor) and a.requires_grad for a in inputs)


def _no_compiler(inputs: Sequence[Any]) -> str | None:
    """Why Inductor cannot compile for these inputs; None where it can."""
    tensors = [a for a in inputs if isinstance(a, Tensor)]
    return compat.has_cpp_compiler() if tensors and all(t.device.type == "cpu" for t in tensors) else None


_WARNED: set[Any] = set()


def _warn_once(key: Any, message: str) -> None:
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(message, QcompileWarning, stacklevel=3)


_COLLECTORS: list[Callable[[CompiledGraph, Sequence[Any]], None]] = []


@contextlib.contextmanager
def collecting(collect: Callable[[CompiledGraph, Sequence[Any]], None]) -> Iterator[None]:
    """Call ``collect(graph, args)`` for each compiled graph that runs inside the context."""
    _COLLECTORS.append(collect)
    try:
        yield
    finally:
        _COLLECTORS.remove(collect)


__all__ = ["CompiledGraph", "backend", "collecting", "tensors_of", "text", "view"]
