"""Check that an LLM's family can be used, before anything is trained.

Clips are embeddings among tokens, batches are padded or packed, and all labels are scored in one pass over a cached
prompt. Some families do this in another way than they read plain text, most of them without an error: a recurrent state
does not follow the attention mask of a trie, for example. So a random model of the family computes everything in both
ways. It has the settings of the LLM, whose flags decide (positions, causality, kinds of layers), with small sizes.
"""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from data.errors import ConfigError, reason
from model.checkpoints.fingerprint import IGNORED
from model.config import LLMConfig, ModelConfig, Packing
from model.evaluation.scoring import trie_logits
from model.objectives.losses import student_outputs
from model.speech_llm.label_trie import LabelTrie
from model.speech_llm.language_model import load_base
from model.speech_llm.packing import has_flash_attention, set_packing
from model.speech_llm.prompt import Answer

TOLERANCE = 1e-4  # relative; rounding makes about 1e-6 of difference in most families, and a fault 1e-3 or more
PROMPTS = ((5, 9, 4, 7, 6, 3, 8), (4, 8, 5))  # token ids of different lengths
TRIE = LabelTrie(nodes=(6, 7, 9), parents=(-1, 0, 0), paths=())  # two labels that begin alike
MOST_PARAMETERS = 4 * 10**8  # of the random model; larger ones take too long
HEAD_WIDTHS = (8, 4)  # of an attention head of the random model; the first that makes it small enough
VOCABULARY = 128
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Sizes in the configurations of transformers; all are divided by the same number, so their ratios stay the same.
WIDTHS = frozenset(
    """hidden_size n_embd d_model embedding_size word_embed_proj_dim intermediate_size intermediate_size_mlp ffn_dim
    n_inner d_inner d_ff dff ffn_hidden_size shared_intermediate_size moe_intermediate_size block_ff_dim
    shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_hidden_size head_dim global_head_dim
    swa_head_dim swa_v_head_dim v_head_dim kv_channels rotary_dim attention_head_dim attention_hidden_size q_lora_rank
    kv_lora_rank qk_rope_head_dim qk_nope_head_dim index_head_dim lru_width conv_dim conv_dim_out mamba_d_head
    mamba_d_ssm mamba_d_state mamba_dt_rank mamba_head_dim state_size ssm_state_size linear_key_head_dim
    linear_value_head_dim hidden_size_per_layer_input""".split()
)
AT_MOST = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
}
# What a family may not do.
EMBEDDINGS = "does not compute from embeddings, which clips are, what it computes from tokens"
CAUSALITY = "lets a token see padding or what follows it"
SCORING = "cannot score labels that share a cached prompt: some of its layers do not follow the attention mask"


@dataclass(frozen=True)
class Findings:
    """What a family can do."""

    problem: str | None  # empty: there is none; None: it could not be checked
    packs: bool = False  # whether packed examples are computed as each one alone


_results: dict[str, Findings] = {}  # by the LLM's settings


def check_llm(config: LLMConfig) -> bool:
    """Refuse an LLM whose family does not compute what training and evaluation rely on. Loads no weights.

    Returns:
        Whether the family could be checked: sizes that a family names in its own way cannot be made small.

    Raises:
        ConfigError: names the family and what it does not do.
    """
    findings, family = _findings(config)
    if findings.problem:
        raise ConfigError(
            f"model.llm.path: {config.path} is a {family} model, which {findings.problem}; use a model such as Llama, "
            "Qwen, Gemma or Mistral"
        )
    return findings.problem is not None


def resolve_packing(config: ModelConfig, packing: Packing, device: str) -> bool:
    """Return whether examples are packed. Loads no weights.

    With `auto` they are where attention over a row is one kernel, which needs a GPU and half precision. On a CPU
    little is left to gain: `micro_batches` pads less than `PADDING` there.

    Args:
        config: of the model.
        packing: the setting.
        device: "cpu", "cuda" or "meta".

    Raises:
        ConfigError: they have to be, and the LLM's family cannot, as a random model of it shows.
    """
    if config.llm.attention not in ("auto", "sdpa"):
        if packing == "on":
            raise ConfigError(
                "train.packing: on computes attention by itself, and model.llm.attention is "
                f"{config.llm.attention}; set it to auto, or train.packing=auto"
            )
        return False
    in_one_kernel = device == "cuda" and "bfloat16" in (config.precision, config.llm.dtype) and has_flash_attention()
    if packing == "off" or (packing == "auto" and not in_one_kernel):
        return False
    findings, family = _findings(config.llm)
    if packing == "on" and not findings.packs:
        raise ConfigError(
            f"train.packing: on needs an LLM that computes packed examples as it computes each alone, and the {family} "
            f"model {config.llm.path} does not; set train.packing=auto"
        )
    return findings.packs


def _findings(config: LLMConfig) -> tuple[Findings, str]:
    """Return what an LLM's family can do, and its name."""
    llm = load_base(config, "meta")
    settings = {name: value for name, value in llm.config.to_dict().items() if name not in IGNORED}
    key = json.dumps([type(llm).__name__, settings], sort_keys=True, default=str)
    if key not in _results:
        _results[key] = examine(type(llm), llm.config)
    return _results[key], llm.config.model_type


def examine(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Findings:
    """Return what a family can do.

    Args:
        kind: the class of the model.
        config: of the model.
    """
    found = _examine(kind, config, torch.float32)
    if not found.problem:
        return found
    # Layers may amplify rounding until it looks like a fault, as those of gpt-oss do; in float64 they do not.
    exact = _examine(kind, config, torch.float64)
    return exact if exact.problem == "" else found


def _examine(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> Findings:
    """Return what a family can do in a precision."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            llm = _random_model(kind, config, dtype)
            clip_E = torch.randn(llm.get_input_embeddings().weight.shape[1], dtype=dtype)
        tokens = [_alone(llm, ids=torch.tensor(prompt)) for prompt in PROMPTS]
    except Exception as error:  # whatever a family raises for sizes that do not go together
        logging.getLogger(__name__).debug("no small %s: %s", kind.__name__, reason(error))
        return Findings(None)
    return _compare(llm, tokens, clip_E) if all(logits.isfinite().all() for logits in tokens) else Findings(None)


def _compare(llm: PreTrainedModel, tokens: Sequence[Tensor], clip_E: Tensor) -> Findings:
    """Return what a model computes in another way from embeddings, in a batch, over a cache, or packed."""
    prompts = [_embed(llm, prompt) for prompt in PROMPTS]
    mixed = [torch.cat([prompt_TE, clip_E[None], prompt_TE[-2:]]) for prompt_TE in prompts]
    problem = EMBEDDINGS
    try:
        if not _same(tokens, [_alone(llm, embeddings_TE=prompt_TE) for prompt_TE in prompts]):
            return Findings(problem)
        expected = [_alone(llm, embeddings_TE=prompt_TE) for prompt_TE in mixed]
        for problem, compute in ((CAUSALITY, _train), (SCORING, _score)):
            if not _same(expected, compute(llm, mixed)):
                return Findings(problem)
    except Exception as error:  # the error that a trial would raise
        return Findings(f"{problem} ({reason(error)})")
    try:
        set_packing(llm, packs=True)
        return Findings("", packs=all(_same(expected, compute(llm, mixed)) for compute in (_train, _score)))
    except Exception as error:  # whatever a family raises for a keyword that it does not know
        logging.getLogger(__name__).debug("%s does not pack: %s", type(llm).__name__, reason(error))
        return Findings("")


def _random_model(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a random model with small sizes.

    Raises:
        ValueError: it would still be large.
    """
    for head_width in HEAD_WIDTHS:
        small = small_config(config, head_width)
        with torch.device("meta"):
            skeleton = kind._from_config(copy.deepcopy(small))
        if (size := sum(parameter.numel() for parameter in skeleton.parameters())) <= MOST_PARAMETERS:
            break
    else:
        raise ValueError(f"{size} parameters")
    llm = kind._from_config(small, dtype=dtype, experts_implementation="eager").eval().requires_grad_(False)
    for parameter in llm.parameters():  # gates and scales that start as 0 or 1 would hide a fault
        if parameter.ndim < 2 or not parameter.any():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return llm


def small_config(config: PreTrainedConfig, head_width: int) -> PreTrainedConfig:
    """Return a copy of a configuration with all flags and layers, a small vocabulary, and small sizes.

    Args:
        config: of the model.
        head_width: of an attention head; other sizes are in proportion to it.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    # Not by `getattr`, which refuses sizes that differ by layer.
    names = (text.attribute_map.get(name, name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    heads, width, former = map(vars(text).get, names)
    _shrink(text, max(1, (former or width // (heads or 1)) // head_width))
    return config


def _shrink(config: PreTrainedConfig, factor: int) -> None:
    """Divide the sizes of a configuration, and of those inside it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, factor)
        elif name in SPECIAL:
            setattr(config, name, SPECIAL[name])
        elif name == "initializer_range":
            config.initializer_range = 0.1  # so that no layer is lost beside the residual stream
        elif isinstance(value, dict):  # scales of rotary positions, one for each pair of dimensions
            for scales in ("short_factor", "long_factor"):
                if isinstance(value.get(scales), list):
                    value[scales] = value[scales][: max(1, len(value[scales]) // factor)]
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in WIDTHS and value > 0:
                setattr(config, name, max(2, value // factor))
            elif name in AT_MOST:
                setattr(config, name, min(value, AT_MOST[name]))


@torch.no_grad()
def _alone(llm: PreTrainedModel, ids: Tensor | None = None, embeddings_TE: Tensor | None = None) -> Tensor:
    """Return the logits [1 + N, V] after one prompt and after each node of the trie: one pass for each label."""
    rows = []
    for path in ((0, 1), (0, 2)):
        answer = tuple(TRIE.nodes[node] for node in path)
        if ids is not None:
            logits_TV = llm(input_ids=torch.cat([ids, torch.tensor(answer)])[None], use_cache=False).logits[0]
        else:
            assert embeddings_TE is not None
            read_TE = torch.cat([embeddings_TE, _embed(llm, answer)])
            logits_TV = llm(inputs_embeds=read_TE[None], use_cache=False).logits[0]
        rows.append(logits_TV[-len(path) - 1 :])
    return torch.cat([rows[0], rows[1][-1:]])


@torch.no_grad()
def _train(llm: PreTrainedModel, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the same for the first label, as a step of the training computes it."""
    first, second = TRIE.nodes[:2]
    sequences = [torch.cat([prompt_TE, _embed(llm, (first, second))]) for prompt_TE in prompts]
    answers = [Answer((first, second), (first, second, 2))] * len(prompts)
    return list(student_outputs(llm, sequences, answers, hidden=False).logits_PV.split(3))


@torch.no_grad()
def _score(llm: PreTrainedModel, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the same for both labels, as an evaluation computes it."""
    return list(trie_logits(llm, prompts, _embed(llm, TRIE.nodes), TRIE))


@torch.no_grad()
def _embed(llm: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    embedded_TE: Tensor = llm.get_input_embeddings()(torch.tensor(ids))
    return embedded_TE


def _same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Compare logits relative to the largest; those of later nodes may be missing."""
    return all(
        bool((logits - reference[: len(logits)]).abs().max() <= TOLERANCE * reference.abs().max())
        for logits, reference in zip(found, expected, strict=True)
    )
