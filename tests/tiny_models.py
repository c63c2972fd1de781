"""Tiny random Hugging Face models, one per architecture, for tests that need a real graph.

    model, inputs = tiny("llama")              # eval mode, deterministic weights
    model(**inputs)

Two layers, hidden size 64 to 112. Most linears have N and K that are multiples of 16; each family has
a few that are not (an intermediate size of 100, a vocabulary of 131), and routers and gates have N < 16,
because those are what a quantizer trips over. Biases and norms are not left at their zeros and ones, or a pass
that drops one would still pass its test.
"""

import torch

BATCH, LENGTH = 2, 10


def text(config):
    return {"input_ids": torch.randint(3, config.get_text_config().vocab_size, (BATCH, LENGTH))}


def padded_text(config):
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    return text(config) | {"attention_mask": mask}


def text_pair(config):
    return text(config) | {"decoder_input_ids": torch.randint(3, config.vocab_size, (BATCH, 6))}


def image(config):
    return {"pixel_values": torch.randn(BATCH, config.num_channels, config.image_size, config.image_size)}


def image_and_text(config):
    size = config.vision_config.image_size
    ids = torch.randint(3, config.text_config.vocab_size - 1, (BATCH, LENGTH))
    ids[:, -1] = config.text_config.eos_token_id  # CLIP pools the text at its end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(BATCH, 3, size, size)}


def audio(config):
    return {
        "input_features": torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions),
        "decoder_input_ids": torch.randint(3, config.vocab_size, (BATCH, 6)),
    }


# Sizes that most decoders share, under the names that most configurations use.
DECODER = dict(vocab_size=128, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENCODER = dict(vocab_size=131, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4,
               max_position_embeddings=64, pad_token_id=0)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)

# name -> (configuration class, model class, inputs, what the configuration is given)
TINY = {
    # dense decoders
    "llama": ("LlamaConfig", "LlamaForCausalLM", text, DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", padded_text, DECODER | dict(
        intermediate_size=100, head_dim=32, sliding_window=8)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", text, DECODER | dict(head_dim=16, tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", text, DECODER | dict(
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", text, DECODER | dict(intermediate_size=100, vocab_size=131)),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", text, dict(
        vocab_size=131, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
    "opt": ("OPTConfig", "OPTForCausalLM", text, dict(
        vocab_size=128, hidden_size=64, word_embed_proj_dim=48, ffn_dim=112, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=False)),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", text, dict(
        vocab_size=131, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64)),
    "falcon": ("FalconConfig", "FalconForCausalLM", text, dict(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        new_decoder_architecture=False, parallel_attn=True, bias=False)),
    "bloom": ("BloomConfig", "BloomForCausalLM", text, dict(vocab_size=131, hidden_size=64, n_layer=2, n_head=4)),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", text, dict(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, expand=2, head_dim=16, num_heads=8, state_size=16,
        n_groups=2, conv_kernel=4, chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    # mixtures of experts
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", text, DECODER | dict(
        num_local_experts=4, num_experts_per_tok=2, intermediate_size=48)),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", text, DECODER | EXPERTS | dict(
        shared_expert_intermediate_size=80)),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", text, DECODER | EXPERTS | dict(head_dim=16)),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", text, DECODER | dict(
        num_key_value_heads=4, moe_intermediate_size=48, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16)),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", text, DECODER | dict(
        num_local_experts=4, num_experts_per_tok=2, head_dim=16, intermediate_size=48, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"])),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", text, DECODER | dict(
        num_local_experts=4, num_experts_per_tok=1, intermediate_size=48, intermediate_size_mlp=112, head_dim=16,
        interleave_moe_layer_step=2, attention_chunk_size=32)),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", text, dict(
        vocab_size=128, hidden_size=64, layers_block_type=["attention", "moe"], num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=112, moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
        mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2)),
    # encoders
    "bert": ("BertConfig", "BertForMaskedLM", padded_text, ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", padded_text, ENCODER | dict(
        pad_token_id=1, bos_token_id=0, eos_token_id=2)),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", padded_text, ENCODER | dict(
        intermediate_size=80, global_attn_every_n_layers=2, local_attention=8, reference_compile=False, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2)),
    # encoder and decoder
    "t5": ("T5Config", "T5ForConditionalGeneration", text_pair, dict(
        vocab_size=131, d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0)),
    "bart": ("BartConfig", "BartForConditionalGeneration", text_pair, dict(
        vocab_size=131, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=112, decoder_ffn_dim=100, max_position_embeddings=64)),
    # pictures and sound
    "vit": ("ViTConfig", "ViTForImageClassification", image, dict(
        hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        num_labels=10)),
    "clip": ("CLIPConfig", "CLIPModel", image_and_text, dict(
        projection_dim=48,
        text_config=dict(vocab_size=128, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=32, projection_dim=48, eos_token_id=127,
                         bos_token_id=1, pad_token_id=0),
        vision_config=dict(hidden_size=80, intermediate_size=112, num_hidden_layers=2, num_attention_heads=5,
                           image_size=32, patch_size=8, projection_dim=48))),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", audio, dict(
        vocab_size=131, num_mel_bins=16, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=112, decoder_ffn_dim=112, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None)),
}

LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_layers"}
"""What the number of layers is called where it is not num_hidden_layers."""
EQUAL = ("llama", "mistral", "qwen3", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "bloom", "mixtral", "bert", "roberta", "vit")
"""Architectures of which all layers are equal."""


def one_layer(name):
    """Changes for `tiny`, where a second layer shows nothing that the first did not."""
    return {LAYERS.get(name, "num_hidden_layers"): 1}


def few_layers(name):
    """One layer where all are equal, else as many as there are."""
    return one_layer(name) if name in EQUAL else {}


@torch.no_grad()
def tiny(name, dtype=torch.float32, seed=0, **changes):
    """A model of the architecture `name` in eval mode and inputs for it; `changes` go to its configuration
    (`experts_implementation="batched_mm"`, `attn_implementation="eager"`, `vocab_size=256`)."""
    import transformers

    if name not in TINY:
        raise KeyError(f"no tiny model {name!r}; there are {', '.join(TINY)}")
    config_class, model_class, inputs, settings = TINY[name]
    config = getattr(transformers, config_class)(**settings | changes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = getattr(transformers, model_class)(config).eval()
        for parameter in model.parameters():  # a tied one comes once
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        batch = inputs(config)
    finally:
        torch.set_rng_state(state)
    floats = {key: value.to(dtype) for key, value in batch.items() if value.is_floating_point()}
    if name in ("t5", "bart", "whisper") and torch.__version__ < "2.13":  # whose Dynamo does not take the deepcopy with which transformers makes their cache
        floats["use_cache"] = False
    return model.to(dtype), batch | floats
