"""Tiny random models of every type that transformers has, for `sweep.py`: configurations are shrunk by rules on the names of their fields; `sweep_inputs.py` makes the calls.

The rules are a means to have many graphs, not knowledge that the library uses. Where a shrunk model does not run, the next way is tried: only fewer layers and a smaller vocabulary, then the sizes that transformers gives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

LIMIT = 1 << 30
HEADS = (
    "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "ZERO_SHOT_IMAGE_CLASSIFICATION", "CTC", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION", "VIDEO_CLASSIFICATION", "DEPTH_ESTIMATION", "ZERO_SHOT_OBJECT_DETECTION", "TIME_SERIES_PREDICTION", "PRETRAINING", "MULTIMODAL_LM", "TEXT_TO_WAVEFORM",
)  # fmt: skip
"""Tables of models with heads, by preference; after them the plain models, then any table that has the type."""
VOCABULARY, LEAST, MOST = 512, 64, 512
WAYS = {"all": 16, "all, heads of 128": 128, "all, heads of 64": 64, "layers": None, "nothing": None}
"""Ways to shrink, in the order in which they are tried -> the width of a head, where widths shrink. Some models hold how a head is split (into three rotary parts) to be a constant."""

HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim")
DEPTHS = ("depths", "num_block_repeats", "stage_num_blocks", "stage_numb_of_layers", "blocks_per_stage", "num_blocks", "depth", "layers")
LAYERS = re.compile(r"^(?!.*(conv|lstm|adapter|norm|feat_extract|shared|share|nextn|residual))(.*_)?(n_layers?|num_layers|layers|num_hidden_layers|num_blocks|depth|num_encoder_blocks|max_window_layers)$")
HEAD_COUNT = re.compile(r"(heads?|n_head)$")
HEAD_DIM = re.compile(r"(head_?dim|d_kv|dim_head|d_head|kv_channels|attention_key_size)$")
EXPERTS = re.compile(r"(num|n)_(local_|routed_)?experts$")
GROUPS = re.compile(r"^(n_group|topk_group|(num_)?expert_groups?|num_expert_group|num_groups_topk)$")
CHOSEN = re.compile(r"(experts_per_tok(en)?|topk|top_k|moe_k)$")
WIDTH = re.compile(r"(size|dim|dims|width|rank|channels|embd|ffn|inner|d_model|d_ff|hidden|units|features|filters)$|^(dim|hidden)_")
NO_WIDTH = re.compile(r"image|patch|window|kernel|chunk|vocab|block|batch|codebook|context|position|crop|grid|stride|num_|conv|state|memory_size|^input_size|feature_size|group|step|sample|pool")
PERIOD = re.compile(r"(layer_period|layer_offset|interval|layer_step|sparse_step|every_n_layers|every_n|layer_freq)$")
POSITIONS = re.compile(r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|max_seq_length)$")
TOKENS = re.compile(r"token_(id|index)s?$")


def said(error: BaseException) -> str:
    """The beginning of a message, without paths of this machine."""
    return f"{type(error).__name__}: {' '.join(word for word in str(error).split() if '/' not in word)[:160]}"


class TooLarge(Exception):
    pass


class NotBuilt(Exception):
    pass


@dataclass
class Running:
    """A model in eval mode, a call that eager takes, and how it was shrunk."""

    model: nn.Module
    inputs: dict[str, Any]
    how: str


# --- which -----------------------------------------------------------------------------------------------------------


def _tables() -> dict[str, dict[str, Any]]:
    from transformers.models.auto import modeling_auto

    found = {name: dict(value) for name, value in vars(modeling_auto).items() if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)}
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS] + ["MODEL_MAPPING_NAMES"]
    first = [name for name in first if name in found]
    return {name: found[name] for name in (*first, *sorted(set(found) - set(first)))}


def kinds() -> list[str]:
    """Every model type that some AutoModel table has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted({kind for table in _tables().values() for kind in table if kind in CONFIG_MAPPING_NAMES})


def class_names(kind: str) -> list[str]:
    """The preferred class with a head, and the plain model."""
    tables = _tables()
    found = [table[kind] for table in tables.values() if kind in table]
    first = [found[0], *(table[kind] for table in [tables["MODEL_MAPPING_NAMES"]] if kind in table)]
    return list(dict.fromkeys(str(name[0] if isinstance(name, (tuple, list)) else name) for name in first))


# --- configurations --------------------------------------------------------------------------------------------------


def parts(config: Any) -> Iterator[Any]:
    """A configuration and all that it holds."""
    from transformers import PretrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def numbers(config: Any) -> dict[str, int]:
    return {k: v for k, v in vars(config).items() if isinstance(v, int) and not isinstance(v, bool)}


def shrink(config: Any, head: int | None) -> Any:
    """Fewer layers and tokens; with ``head``, the width of heads, smaller matrices, too, by one factor for all parts, so that equal sizes stay equal."""
    config = copy.deepcopy(config)
    hidden = [v for part in parts(config) for k, v in numbers(part).items() if k in HIDDEN and v >= LEAST]
    ratio = min(LEAST / min(hidden, default=LEAST), MOST / max(hidden, default=MOST))
    tokens: dict[int, int] = {}
    for part in list(parts(config)):
        if getattr(getattr(part, "backbone_config", None), "model_type", None) == "timm_backbone":
            put(part, "backbone_config", _resnet(part.backbone_config))
    for part in parts(config):
        staged = any(isinstance(v, (list, tuple)) and k in ("depths", "hidden_sizes", "embed_dims", "dims", "conv_dim", "num_heads", "block_configs", "upsampling_ratios") for k, v in vars(part).items())
        _layers(part)
        _tokens(part, tokens)
        if head is not None and not staged:
            _widths(part, ratio, head)
    return config


def _resnet(timm: Any) -> Any:
    """A backbone of transformers' own with as many outputs, for timm is another package."""
    from transformers import ResNetConfig

    return ResNetConfig(depths=[1, 1, 1, 1], layer_type="basic", hidden_sizes=[64, 64, 128, 128], out_indices=list(timm.out_indices or [4]))


def _layers(part: Any) -> None:
    """Two layers, or one of each kind where lists tell the kinds of layers apart; lists of one value a layer are cut alike."""
    old = {k: v for k, v in numbers(part).items() if LAYERS.search(k) and v > 1}
    lists = {k: v for k, v in vars(part).items() if isinstance(v, (list, tuple)) and len(v) > 2 and len(v) in old.values() and "ratio" not in k}
    depth = max(map(len, lists.values()), default=0)
    kinds = list(zip(*(v for v in lists.values() if len(v) == depth))) if depth else []
    picked = sorted({repr(kind): i for i, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    picked = picked if len(picked) > 1 else [0, 1]
    stages = getattr(part, "stage_names", None) or []
    if len(stages) - 1 in old.values():  # a backbone that hands out some of its layers: as many layers as that
        picked = list(range(max(2, len(part.out_indices))))
        depth = len(stages) - 1
        for name, value in (("stage_names", stages[: len(picked) + 1]), ("_out_indices", [i + 1 for i in picked][-len(part.out_indices) :])):
            put(part, name, value)
        put(part, "_out_features", [part.stage_names[i] for i in part.out_indices])
    for k, v in lists.items():
        put(part, k, type(v)(v[i] for i in picked) if len(v) == depth else v[:2])
    for k, v in old.items():
        put(part, k, len(picked) if v == depth else min(v, 2))
    for k, v in list(vars(part).items()):
        if k in DEPTHS and isinstance(v, (list, tuple)):
            put(part, k, type(v)(min(d, 2) if isinstance(d, int) else d for d in v))
        elif k == "depth_coefficient":
            put(part, k, 1.0)
    for k in [k for k, v in vars(part).items() if v is None]:
        if CHOSEN.search(k) or EXPERTS.search(k) or k == "prediction_length":
            put(part, k, 2 if CHOSEN.search(k) else 4)
        elif k == "attn_layer_indices":
            put(part, k, [1])
        elif k == "n_shared_experts":
            put(part, k, 1)
        elif k in ("layer_types", "mlp_layer_types"):
            put(part, k, ["full_attention" if k == "layer_types" else "sparse"] * len(picked))
    for k, v in list(vars(part).items()):
        if isinstance(v, list) and v and all(kind == "mamba" for kind in v):
            put(part, k, [*v[:-1], "attention"])
    for k, v in numbers(part).items():
        if PERIOD.search(k) and v > 1:
            put(part, k, 1 if "offset" in k else 2)
        elif k in ("first_k_dense_replace", "num_dense_layers", "num_kv_shared_layers", "num_nextn_predict_layers", "moe_layer_start_index"):
            put(part, k, min(v, 0 if "shared" in k or "nextn" in k else 1))
        elif EXPERTS.search(k) and v > 4:
            put(part, k, 4)
        elif CHOSEN.search(k) and v > 2:
            put(part, k, 2)
        elif GROUPS.search(k) and v > 1:
            put(part, k, 1)


def _tokens(part: Any, tokens: dict[int, int]) -> None:
    """A vocabulary of 512; special tokens beyond it get its last ids, equal ones the same."""

    def smaller(v: Any) -> Any:
        if isinstance(v, (list, tuple)):
            return type(v)(map(smaller, v))
        return v if not isinstance(v, int) or v < VOCABULARY - 64 else tokens.setdefault(v, VOCABULARY - 1 - len(tokens))

    if getattr(part, "vocab_size", 0) is None:
        put(part, "vocab_size", VOCABULARY)
    if getattr(part, "pad_token_id", None) is None:
        put(part, "pad_token_id", 0)
    for k, v in list(vars(part).items()):
        if TOKENS.search(k) and isinstance(v, (int, list, tuple)) and not isinstance(v, bool):
            put(part, k, smaller(v))
        elif k.endswith("vocab_size") and isinstance(v, int) and v > VOCABULARY:
            put(part, k, VOCABULARY)
        elif POSITIONS.search(k) and isinstance(v, int):
            put(part, k, min(v, 512))
        elif k == "image_size" and isinstance(v, int) and v > 256:
            patch = getattr(part, "patch_size", 32)
            put(part, k, max(1, 224 // patch) * patch if isinstance(patch, int) else 224)


def _widths(part: Any, ratio: float, head: int) -> None:
    before, unit = numbers(part), max(LEAST, 2 * head)

    def scaled(v: int) -> int:
        return v if v < LEAST else max(unit, round(v * ratio / unit) * unit)

    for k, v in before.items():
        if k == "rotary_dim":
            put(part, k, min(v, head))
        elif WIDTH.search(k) and not NO_WIDTH.search(k) and not HEAD_DIM.search(k):
            put(part, k, scaled(v))
        elif HEAD_DIM.search(k) and (v > 16 or "mamba" in k):
            put(part, k, head * (2 if k == "qk_head_dim" else 1))
        elif k == "max_source_positions":
            put(part, k, 64)
        elif k == "image_size" and isinstance(before.get("patch_size"), int) and v % before["patch_size"] == 0:
            put(part, k, min(v, 8 * before["patch_size"]))
    if vars(part).get("head_dim", 0) is None:
        put(part, "head_dim", head)
    width = next((numbers(part)[k] for k in HIDDEN if k in before), unit)
    expand = next((v for k, v in vars(part).items() if k in ("expand", "mamba_expand") and isinstance(v, int)), 1)
    if isinstance(getattr(part, "mamba_d_ssm", None), int):
        put(part, "mamba_d_ssm", expand * width)
    heads = next((v for k, v in before.items() if HEAD_COUNT.search(k) and not re.search("key_value|kv|linear|mamba|index", k)), 1)
    for k, v in before.items():
        if not HEAD_COUNT.search(k) or HEAD_DIM.search(k) or v <= 1:
            continue
        if "mamba" in k or (expand > 1 and k == "num_heads"):
            put(part, k, expand * width // head)
        elif re.search("key_value|kv|key_heads", k) and v != heads:
            put(part, k, width // head // 2)
        elif "linear" in k or "index" in k:
            put(part, k, 4)
        else:
            put(part, k, width // head)
    for k, v in list(vars(part).items()):
        rope = v if isinstance(v, dict) else {}
        if isinstance(section := rope.get("mrope_section"), (list, tuple)):
            half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
            cut = [max(1, int(s * half / sum(section))) for s in section]
            put(part, k, rope | {"mrope_section": [cut[0] + half - sum(cut), *cut[1:]]})


def put(part: Any, name: str, value: Any) -> None:
    try:
        setattr(part, name, value)
    except Exception:
        vars(part)[name] = value  # a check of the whole configuration, which half of the changes does not pass


# --- models and inputs -----------------------------------------------------------------------------------------------


def running(kind: str) -> Running:
    """The first way to shrink the type in which eager runs it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        default = getattr(transformers, CONFIG_MAPPING_NAMES[kind])()
    except Exception as error:
        raise NotBuilt(f"the default configuration: {said(error)}") from error
    why: list[str] = []
    large: list[str] = []
    for name in class_names(kind):
        before: list[str] = []
        for how, head in WAYS.items():
            stuck = bool(before) and before.count(before[-1]) >= 3
            if head and stuck:
                continue  # no question of sizes
            config = default if how == "nothing" else shrink(default, head)
            for own in (False, True) if head else (False,):
                found = attempt(name, config, head is not None, own, LIMIT // 2 if stuck else LIMIT)
                if isinstance(found, Running):
                    return replace(found, how=how)
                if "not finite" not in found:
                    break
            before.append(re.sub(r"\d+", "", found))
            (large if found.startswith("too large") else why).append(f"{name}, {how}: {found}")
    if large and not why:
        raise TooLarge(large[0])
    raise NotBuilt(why[0])


def attempt(name: str, config: Any, shrunk: bool, own: bool, limit: int) -> Running | str:
    """A model of at most so many bytes that runs, or why there is none."""
    import transformers
    from sweep_inputs import runs

    try:
        model = build(getattr(transformers, name), config, shrunk, own, limit)
    except TooLarge as error:
        return f"too large: {error}"
    except Exception as error:
        return said(error)
    inputs = runs(model)
    return Running(model, inputs, "") if isinstance(inputs, dict) else inputs


@torch.no_grad()
def build(model_class: Any, config: Any, shrunk: bool, own: bool, limit: int) -> nn.Module:
    """In eval mode, with weights of which none is zero or one, or the model's ``own``, for those in which these overflow."""
    size = 0
    try:
        with torch.device("meta"):
            size = sum(p.nbytes for p in model_class(copy.deepcopy(config)).parameters())
    except Exception:
        if not shrunk:
            raise
    if size > limit:
        raise TooLarge(f"{size / 2**30:.1f} GiB")
    torch.manual_seed(0)
    model: nn.Module = model_class(copy.deepcopy(config)).float().eval()
    if sum(p.nbytes for p in model.parameters()) > limit:
        raise TooLarge(f"{sum(p.nbytes for p in model.parameters()) / 2**30:.1f} GiB")
    for p in () if own else model.parameters():
        if p.dim() >= 2:
            p.normal_(0, min(0.1, max(1, p[0].numel()) ** -0.5))
        else:
            p.add_(0.1 * torch.randn_like(p))
    return model
