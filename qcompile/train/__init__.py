"""Training through the backend: losses of distillation, an 8-bit optimizer, an 8-bit all-reduce of gradients."""
