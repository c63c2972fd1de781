"""Floor 1: one file is one op: its reference, its shape rule, its kernels.

With the repository root on ``sys.path`` a bare ``import kernels`` finds this folder too, and transformers probes exactly that name for another package,
so the folder fills itself only under its full name.
"""

if __name__ == "qcompile.kernels":
    from . import attention, columns, dequantize, fake_quant, fp8_history, fp8_linear, grouped, linear, linear_glu, quantize, scaled_linear, stored
    from .op import Op, install

    OPS: dict[str, Op] = {op.name: op for op in (quantize.OP, dequantize.OP, linear.OP, scaled_linear.OP, linear_glu.OP, grouped.OP, columns.OP, stored.OP, attention.OP, fake_quant.OP, fake_quant.MOVING, fp8_linear.OP, fp8_linear.PRODUCT, fp8_linear.TRANSPOSE, fp8_history.SCALES, fp8_history.RECORD)}
    install(OPS)
    __all__ = ["OPS"]
