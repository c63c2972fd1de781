"""Floor 0: formats, schemes, quantized tensors, recipes. Plain torch; no fx, no triton, no graph."""
