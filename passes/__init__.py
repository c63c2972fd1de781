"""Floor 2: one file is one pass. Passes over the graph are functions GraphModule -> GraphModule; transforms and solvers are mathematics on the weights and statistics of one input.

The folder fills itself only under its full name (see ``kernels/__init__.py`` for why).
"""

if __name__ == "qcompile.passes":
    from . import adaround, aqas, awq, gptq, rtn, sequential_mse, smooth
    from .find_sites import find_sites
    from .infra import Pass
    from .lower import lower
    from .match import match
    from .method import Solver, Transform
    from .normalize import normalize
    from .observe import observe
    from .transform import transform

    PASSES: dict[str, Pass] = {p.name: p for p in (normalize, find_sites, match, observe, transform, lower)}
    TRANSFORMS: dict[str, Transform] = {t.name: t for t in (smooth.TRANSFORM, awq.TRANSFORM, aqas.TRANSFORM)}
    SOLVERS: dict[str, Solver] = {s.name: s for s in (rtn.SOLVER, gptq.SOLVER, adaround.SOLVER, sequential_mse.SOLVER)}
    __all__ = ["PASSES", "SOLVERS", "TRANSFORMS", "Pass"]
