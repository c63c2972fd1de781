"""Floor 1: one file is one op: its reference, its shape rule, its kernels.

With the repository root on ``sys.path`` a bare ``import kernels`` finds this folder too, and transformers probes exactly that name for another package,
so the folder fills itself only under its full name.
"""

if __name__ == "qcompile.kernels":
    from . import attention, columns, dequantize, fake_quant, frozen_grouped, frozen_linear, grouped, linear, linear_glu, quantize, scaled_linear, stored
    from .op import Op, install

    TRAINING = (fake_quant.OP, fake_quant.MOVING, frozen_linear.OP, frozen_linear.GRAD, frozen_grouped.OP, frozen_grouped.GRAD)
    OPS: dict[str, Op] = {op.name: op for op in (quantize.OP, dequantize.OP, linear.OP, scaled_linear.OP, linear_glu.OP, grouped.OP, columns.OP, stored.OP, attention.OP, *TRAINING)}
    install(OPS)
    __all__ = ["OPS"]
