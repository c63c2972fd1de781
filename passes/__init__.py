"""Floor 2: one file is one pass is one function GraphModule -> GraphModule.

The folder fills itself only under its full name (see ``kernels/__init__.py`` for why).
"""

if __name__ == "qcompile.passes":
    from .find_sites import find_sites
    from .infra import Pass
    from .lower import lower
    from .match import match
    from .normalize import normalize
    from .observe import observe

    PASSES: dict[str, Pass] = {p.name: p for p in (normalize, find_sites, match, observe, lower)}
    __all__ = ["PASSES", "Pass"]
