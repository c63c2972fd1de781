"""Floor 1: one file is one op: its reference, its shape rule, its kernels.

With the repository root on ``sys.path`` a bare ``import kernels`` finds this folder too, and transformers probes exactly that name for another package,
so the folder fills itself only under its full name.
"""

if __name__ == "qcompile.kernels":
    from . import (
        attention,
        columns,
        dequantize,
        fake_quant,
        fp8_history,
        fp8_linear,
        frozen_grouped,
        frozen_linear,
        grouped,
        linear,
        linear_glu,
        outlier_columns,
        quantize,
        scaled_linear,
        split_linear,
        stored,
    )
    from .op import Op, install

    INFERENCE = (quantize.OP, dequantize.OP, linear.OP, scaled_linear.OP, linear_glu.OP, split_linear.OP, outlier_columns.OP, grouped.OP, columns.OP, stored.OP, attention.OP)
    FP8 = (fp8_linear.OP, fp8_linear.PRODUCT, fp8_linear.TRANSPOSE, fp8_history.SCALES, fp8_history.RECORD)
    TRAINING = (fake_quant.OP, fake_quant.MOVING, frozen_linear.OP, frozen_linear.GRAD, frozen_grouped.OP, frozen_grouped.GRAD, *FP8)
    OPS: dict[str, Op] = {op.name: op for op in (*INFERENCE, *TRAINING)}
    install(OPS)
    __all__ = ["OPS"]
