"""Causal language models of many families, tiny and untrained: the settings in which each differs from Llama."""

from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from model.tiny import fixed_seed, tiny_tokenizer

LAYERS, EXPERTS = 2, 4
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # its draws would differ from the scores
HEAD = {"head_dim": 8}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
SHARED = {**MOE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 16}
LATENT = {
    **MOE,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
LINEAR = {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 2))}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": HEAD,
    "qwen2": {},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "phi": {},
    "phi3": {},
    "gpt2": GPT2 | NO_DROPOUT,
    "gptj": GPT2 | {"rotary_dim": 8},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "falcon": {"alibi": False},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "smollm3": {},
    "starcoder2": {},
    "nemotron": {},
    "glm4": HEAD,
    "exaone4": {},
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": SHARED,
    "qwen3_moe": SHARED | HEAD,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": HEAD | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
UNPACKED = {"gemma2", "gpt_oss", "nemotron", "stablelm"}  # refused for train.packing=on, and padded with auto
NO_POSITIONS = "takes no positions or no embeddings"
NO_EMBEDDINGS = "does not compute from embeddings, which clips are"
NOT_CAUSAL = "lets a token see padding or what follows it"
NO_TRIE = "cannot score labels that share a cached prompt"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-alibi": (NO_TRIE, {"alibi": True}),
    "bloom": (NO_POSITIONS, {"n_layer": LAYERS, "n_head": 4}),
    "mpt": (NO_POSITIONS, {"d_model": 32, "n_layers": LAYERS, "n_heads": 4}),
    "mamba": (NO_POSITIONS, {"state_size": 4}),
    "recurrent_gemma": (NO_TRIE, {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    "jamba": (NO_TRIE, {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "bamba": (NO_TRIE, MAMBA | {"attn_layer_indices": [1]}),
    "lfm2": (NO_TRIE, {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (NO_TRIE, MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 2}),
    "qwen3_next": (NO_TRIE, SHARED | HEAD | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
    "gemma3n_text": (NO_EMBEDDINGS, HEAD | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}),
    "gemma4_text": (NO_EMBEDDINGS, HEAD),
    "bert": (NOT_CAUSAL, {"is_decoder": False}),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def make(family: str, folder: Path) -> Path:
    """Save a tiny model of a family with the usual tokenizer."""
    changed = SUPPORTED[family] if family in SUPPORTED else REFUSED[family][1]
    size = len(tokenizer()) + 8  # some families' tokenizers add a token when they are loaded
    sizes = {"vocab_size": size, "vocab_size_per_layer_input": size}
    with fixed_seed(5):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family.removesuffix("-alibi"), **COMMON | sizes | changed)
        )
    model.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
