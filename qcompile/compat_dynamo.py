"""The part of ``compat`` that speaks to Dynamo: what it compiles at this moment, what it keeps, what it guards. Reached through ``qcompile.compat``, like everything that is private in torch."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

_COMPILING_FOR: list[Any] = []


@contextlib.contextmanager
def compiling_for(code: Any) -> Iterator[None]:
    """Inside, ``compiling`` gives this code object: what is compiled now was captured from it earlier."""
    _COMPILING_FOR.append(code)
    try:
        yield
    finally:
        _COMPILING_FOR.pop()


def compiling() -> Any:
    """The code object that Dynamo compiles at this moment: not always a function of the model, for torch's own modules run through a wrapper. None where it does not say."""
    if _COMPILING_FOR:
        return _COMPILING_FOR[-1]
    with contextlib.suppress(AttributeError):
        return torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx.f_code
    return None


def guard_parameters() -> None:
    """From the guards on that are built next, Dynamo looks at a parameter's dtype, strides and ``requires_grad`` on every call, as it does by itself from torch 2.12 on.

    Before, it skips the tensors of a module whose dictionaries have not changed: after ``requires_grad_(True)`` a graph without that gradient ran, after ``p.data = p.data.t()`` one with other
    strides. A call takes longer for it, as it does under 2.13.
    """
    from torch._dynamo import config

    if torch.__version__.startswith("2.11."):
        config.skip_tensor_guards_with_matching_dict_tags = config.use_recursive_dict_tags_for_guards = False


def any_strides(gm: fx.GraphModule, places: Iterable[int]) -> None:
    """The guards that Dynamo builds behind the backend's return take the graph's inputs at these places with any strides. Outside of its compilation nothing happens."""
    with contextlib.suppress(AttributeError):
        known: dict[Any, Any] = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.input_source_to_sizes_strides
        inputs = gm.graph.find_nodes(op="placeholder")
        for place in places:
            if (found := known.get(getattr(inputs[place], "_dynamo_source", None))) is not None:
                found["stride"] = (None,) * len(found["size"])


def is_wrapper(code: Any) -> bool:
    """Whether a code object is Dynamo's own, through which it runs torch's modules: one for all of them."""
    return code.co_filename.startswith(os.path.dirname(torch._dynamo.__file__))  # type: ignore[no-any-return]


def reset_code(code: Any) -> None:
    """Drop Dynamo's compiled entries of one function's code, and of what follows its graph breaks, so that its next call captures again."""
    torch._C._dynamo.eval_frame.reset_code(code)
    for later in torch._dynamo.resume_execution.ContinueExecutionCache.cache.get(code, {}).values():
        reset_code(later)


def original(fast: Any) -> Any:
    """What ``torch.compile`` was given: the module, or the function or bound method; the object itself where it is not compiled."""
    from torch._dynamo.eval_frame import innermost_fn

    return fast._orig_mod if isinstance(fast, torch._dynamo.OptimizedModule) else innermost_fn(fast)


def backend_name(fast: Any) -> str | None:
    """Name of the backend that something is compiled with: "" where it cannot be told, None where the object is not compiled."""
    from torch._dynamo.eval_frame import innermost_backend

    context = fast.dynamo_ctx if isinstance(fast, torch._dynamo.OptimizedModule) else None
    if context is None and isinstance(fast, torch.nn.Module):
        fast = fast._compiled_call_impl
    if context is None and not hasattr(fast, "_torchdynamo_orig_callable"):
        return None
    cells = {} if context is not None else dict(zip(fast.__code__.co_freevars, fast.__closure__ or ()))
    callback = context.callback if context is not None else cells["callback"].cell_contents if "callback" in cells else None
    wrapper = innermost_backend(callback) if callable(callback) else None
    fn = getattr(wrapper, "compiler_fn", wrapper)
    if getattr(fn, "__module__", "").partition(".")[0] == "qcompile":
        return "qcompile"
    return str(getattr(wrapper, "compiler_name", getattr(fn, "__name__", "")))


def recompile_limit() -> int:
    """How many graphs Dynamo keeps of one function."""
    return int(torch._dynamo.config.recompile_limit)


def at_recompile_limit(functions: Iterable[Any], more: int = 0) -> list[str]:
    """Names of functions (or code objects) for which Dynamo holds as many graphs as it may, or will with ``more``: a call that needs another one runs eagerly."""
    limit = recompile_limit()
    codes = {code for fn in functions if hasattr(code := getattr(fn, "__code__", fn), "co_qualname")}
    return sorted(code.co_qualname for code in codes if graphs(code) + more >= limit)


def dynamo_is_off() -> str | None:
    """Why Dynamo captures nothing at all, or None."""
    from torch._dynamo import config, eval_frame

    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    return "TORCHDYNAMO_DISABLE is set" if config.disable else f"torch.compiler.set_stance({stance!r}) is active" if stance != "default" else None


_COMPILED = itertools.count()


def graphs(code: Any) -> int:
    """How many graphs Dynamo holds of a code object."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(code))


def compile_in_place(modules: Iterable[nn.Module], **how: Any) -> Any:
    """Compile each of these in its place, as ``nn.Module.compile`` does, but through one function that is theirs alone: a graph serves all that are alike, and others take no room in what Dynamo keeps
    of a function. (It keeps eight graphs, and of ``nn.Module.compile`` all modules of a class share them; of torch's own classes it captures nothing that way.) Returns the function's code."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"{call.__name__}_{next(_COMPILED)}")
    fast = torch.compile(call, **how)
    for module in modules:
        module._compiled_call_impl = functools.partial(fast, module)
    return call.__code__


def on_first_call(module: nn.Module, before: Callable[[], None]) -> None:
    """Run ``before`` ahead of the first call of a module that ``compile_in_place`` compiled, outside of what Dynamo captures; ahead of the next one again where it raised. It may compile the module
    anew."""
    compiled: Any = module._compiled_call_impl

    def first(*args: Any, **kwargs: Any) -> Any:
        before()
        if module._compiled_call_impl is first:
            module._compiled_call_impl = compiled
        now: Any = module._compiled_call_impl
        return now(*args, **kwargs)

    module._compiled_call_impl = first
