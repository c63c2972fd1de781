"""qcompile: a ``torch.compile`` backend that makes models small and fast by quantizing them."""

from qcompile import kernels as kernels
from qcompile.calibrate import calibrate
from qcompile.core.errors import CalibrationError, OptionError, QcompileError, QcompileWarning, StrictError, WeightError
from qcompile.core.formats import FORMATS, Format
from qcompile.core.recipe import RECIPES, Recipe, Rule, find_recipe
from qcompile.core.scheme import Scheme
from qcompile.layerwise import load_weights
from qcompile.measure import explain
from qcompile.memory import refresh, release_weights, restore_weights
from qcompile.options import set_defaults
from qcompile.quantize import quantize
from qcompile.report import Report
from qcompile.sensitivity import Sensitivity, sensitivity
from qcompile.statistics import Calibration
from qcompile.train import parameters

__version__ = "0.1.0"
__all__ = [
    "FORMATS",
    "RECIPES",
    "Calibration",
    "CalibrationError",
    "Format",
    "OptionError",
    "QcompileError",
    "QcompileWarning",
    "Recipe",
    "Report",
    "Rule",
    "Scheme",
    "Sensitivity",
    "StrictError",
    "WeightError",
    "calibrate",
    "explain",
    "find_recipe",
    "load_weights",
    "parameters",
    "quantize",
    "refresh",
    "release_weights",
    "restore_weights",
    "sensitivity",
    "set_defaults",
]
