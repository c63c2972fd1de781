"""Floor 2: one file is one pass, or one method of quantizing well.

 * Passes over the graph, ``PASSES``: functions GraphModule -> GraphModule.
 * Transforms and solvers, ``TRANSFORMS`` and ``SOLVERS``: mathematics on the weights that share an input and on the statistics of that input (``method``). They know no graph, and are steps of a
   recipe by their names, with arguments: ``"smooth(alpha=0.5)"``.
 * Training recipes, ``TRAININGS``: passes that stand where the solvers do when a model trains, by the names that ``options["train"]`` takes.
 * ``outliers`` and ``bias`` are steps, too, whose wiring is in ``lower``.

A new one is its file, its name in the line of imports and in the table here, and its test; ``options["passes"]``, the checks of arguments and ``python -m qcompile methods`` read these tables.
The folder fills itself only under its full name (see ``kernels/__init__.py`` for why).
"""

if __name__ == "qcompile.passes":
    from . import adaround, aqas, awq, fake_quant, fp8, frozen, gptq, lloyd_max, rtn, sequential_mse, smooth
    from .attend import attend
    from .checkpoints import checkpoints
    from .factors import factors
    from .find_sites import find_sites
    from .glu import glu
    from .infra import Pass
    from .lower import lower
    from .match import match
    from .merge import merge
    from .method import Solver, Transform
    from .normalize import normalize
    from .observe import observe
    from .training import Training
    from .transform import transform

    PASSES: dict[str, Pass] = {p.name: p for p in (checkpoints, normalize, find_sites, match, observe, transform, merge, attend, lower, glu, factors)}
    TRANSFORMS: dict[str, Transform] = {t.name: t for t in (smooth.TRANSFORM, awq.TRANSFORM, aqas.TRANSFORM)}
    SOLVERS: dict[str, Solver] = {s.name: s for s in (rtn.SOLVER, gptq.SOLVER, adaround.SOLVER, sequential_mse.SOLVER, lloyd_max.SOLVER)}
    TRAININGS: dict[str, Training] = {t.name: t for t in (fake_quant.TRAINING, fp8.TRAINING, frozen.TRAINING)}
    __all__ = ["PASSES", "SOLVERS", "TRAININGS", "TRANSFORMS", "Pass"]
