"""Calls for the models of `sweep_models.py`, made from the names that `forward` takes, the configuration's sizes and `dummy_inputs`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from sweep_models import HIDDEN, LEAST, VOCABULARY, parts
from sweep_models import said as say
from torch import nn


@torch.no_grad()
def runs(model: nn.Module) -> dict[str, Any] | str:
    """The first call that eager takes and whose output is finite, or what the last one said."""
    from sweep import call

    said = ""
    for inputs in candidates(model):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = call(model, inputs)
        except Exception as error:
            said = said or say(error)
            continue
        if torch.isfinite(y).all() and y.std() > 0:
            return inputs
        said = said or "the output is not finite, or constant"
    return said or "none fit its signature"


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Calls by the names that ``forward`` takes: the main input first."""
    torch.manual_seed(0)
    signature = inspect.signature(model.forward).parameters
    names = list(signature)
    config = model.config
    size = next((v for part in parts(config) if isinstance(v := getattr(part, "image_size", None), (int, list, tuple))), 224)
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    channels = next((v for part in parts(config) if isinstance(v := getattr(part, "num_channels", None), int)), 3)
    keys = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "input_size", "feat_dim")
    mels = list(dict.fromkeys(v for part in parts(config) for k in keys if isinstance(v := getattr(part, k, None), int) and v > 1))[:3] or [80]
    frames = next((v for part in parts(config) for k in ("num_frames", "frames_per_clip") if isinstance(v := getattr(part, k, None), int)), 8)
    positions = next((2 * v for part in parts(config) if isinstance(v := getattr(part, "max_source_positions", None), int) and v <= 1500), 128)
    length = next((v for part in parts(config) if isinstance(v := getattr(part, "max_length", None), int) and v > 64), 128)
    least = min((v for part in parts(config) if isinstance(v := getattr(part, "vocab_size", None), int) and v > 8), default=VOCABULARY)
    ids = torch.randint(3, min(least, VOCABULARY - 80), (2, 12))
    values: dict[str, list[torch.Tensor]] = {
        "input_ids": [ids, ids[..., None].expand(2, 12, 8) % 64],
        "pixel_values": [torch.randn(2, channels, height, width), torch.randn(2, channels, 224, 224), torch.randn(2, frames, channels, height, width), torch.randn(2, channels, 512, 512)],
        "pixel_values_videos": [torch.randn(2, frames, channels, height, width)],
        "input_features": [torch.randn(2, *shape) for m in mels for shape in ((m, positions), (positions, m))] + [torch.randn(2, 1, 1001, 64)],
        "input_values": [torch.randn(2, 8000), torch.randn(2, length, mels[0]), torch.randn(2, 1, 8000)],
        "past_values": [torch.randn(2, 512, 1), torch.randn(2, getattr(config, "context_length", 32), getattr(config, "num_input_channels", 1))],
    }
    hidden = next((v for k in HIDDEN if isinstance(v := getattr(config, k, None), int)), LEAST)
    others = {
        "bbox": torch.zeros(2, 12, 4, dtype=torch.long), "attention_mask": torch.ones(2, 12, dtype=torch.long), "input_features_mask": torch.ones(2, positions, dtype=torch.long),
        "inputs_embeds": torch.randn(2, 12, hidden), "hidden_states": torch.randn(2, 12, hidden), "query_embeds": torch.randn(2, 12, hidden), "encoder_hidden_states": torch.randn(2, 12, getattr(config, "encoder_hidden_size", hidden)),
        "position_ids": torch.arange(12).expand(2, 12), "token_type_ids": torch.zeros(2, 12, dtype=torch.long), "decoder_input_ids": ids[:, :6], "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "grid_thw": torch.tensor([[1, 8, 8]]), "past_observed_mask": torch.ones(2, 512, 1), "input_points": torch.full((2, 1, 1, 2), 8.0),
    }  # fmt: skip
    if "grid_thw" in names:  # an image as a list of patches, flattened
        patch, deep = (next((v for part in parts(config) if isinstance(v := getattr(part, k, None), int)), d) for k, d in (("patch_size", 14), ("temporal_patch_size", 1)))
        others["hidden_states"] = torch.randn(64, channels * deep * patch * patch)
        values["pixel_values"].insert(0, others["hidden_states"])
    optional = {n: others[n] for n in ("bbox", "encoder_hidden_states", "input_points", "input_features_mask") if n in names}
    required = [n for n, p in signature.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    more = {n: others[n] for n in required if n in others}
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        more["decoder_input_ids"] = others["decoder_input_ids"]
    main = model.main_input_name if isinstance(getattr(model, "main_input_name", None), str) else "input_ids"
    order = [n for n in dict.fromkeys([main, *(n for n in required if n in values), *values]) if n in names and n in values]
    if "input_ids" in names:
        for other in (n for n in values if n in names and n != "input_ids"):
            for value in values[other]:
                yield {"input_ids": ids, other: value} | more
    for name in order:
        for value in values[name]:
            yield {name: value, **more}
    for name in order:
        yield {name: values[name][0]}
        yield {name: values[name][0]} | optional
    if more:
        yield more
        yield more | optional
    yield {k: v for k, v in getattr(model, "dummy_inputs", {}).items() if k in names} | more
