"""Answers of a trained model: labels are scored, replies are generated. Neither depends on the batch.

Shapes: B examples, T positions of the padded prompt, E width, V vocabulary, K labels, N nodes of the label trie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from data.loading.examples import Example
from model.runtime.device import on_device
from model.speech_llm.label_trie import LabelTrie
from model.speech_llm.language_model import head_at_positions
from model.speech_llm.packing import is_packing, pack
from model.speech_llm.speech_llm import SpeechLLM, pad_left


@torch.no_grad()
def label_scores(model: SpeechLLM, examples: Sequence[Example]) -> Tensor:
    """Score every label: the log-probability (nats) of its text followed by EOS.

    One forward pass reads the prompts, and a second one the trie of all labels, which scores them together. Prompts
    that are packed are read together with the trie.

    Args:
        model: in evaluation mode.
        examples: of one task.

    Returns:
        scores_BK, in the order of the task's labels.
    """
    trie = model.tries[examples[0].task]
    with model.autocast():
        logits_BNV = trie_logits(model.llm, model.prompts(examples), model.embed(trie.nodes), trie)
    logp_BNV = logits_BNV.float().log_softmax(-1)
    columns = [torch.stack([logp_BNV[:, node + 1, target] for node, target in path]).sum(0) for path in trie.paths]
    return torch.stack(columns, dim=1)


def trie_logits(llm: PreTrainedModel, prompts: Sequence[Tensor], nodes_NE: Tensor, trie: LabelTrie) -> Tensor:
    """Return the logits after each prompt and after each node of a trie that follows it.

    Args:
        llm: the causal language model.
        prompts: their embeddings, [T_i, E].
        nodes_NE: embeddings of the trie's nodes.
        trie: whose nodes see the prompt and their ancestors.

    Returns:
        logits [B, 1 + N, V].
    """
    if is_packing(llm):
        return _packed_trie_logits(llm, prompts, nodes_NE, trie)
    embeddings_BTE, mask_BT, positions_BT = pad_left(prompts)
    cache = DynamicCache(config=llm.config)
    first_B1V = llm(
        inputs_embeds=embeddings_BTE,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    batch, nodes = len(prompts), len(trie.nodes)
    ancestors_NN = on_device(trie.ancestors, mask_BT.device)
    visible_BNX = torch.cat(
        [mask_BT.bool()[:, None].expand(-1, nodes, -1), ancestors_NN.expand(batch, -1, -1)], dim=-1
    )  # X = T + N
    lowest = torch.finfo(embeddings_BTE.dtype).min
    bias_BNX = torch.zeros(visible_BNX.shape, dtype=embeddings_BTE.dtype, device=mask_BT.device)
    bias_BNX.masked_fill_(~visible_BNX, lowest)
    depth_N = ancestors_NN.sum(-1) - 1
    rest_BNV = llm(
        inputs_embeds=nodes_NE.expand(batch, -1, -1),
        attention_mask=bias_BNX[:, None],
        position_ids=mask_BT.sum(-1, keepdim=True) + depth_N,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return torch.cat([first_B1V, rest_BNV], dim=1)


def _packed_trie_logits(llm: PreTrainedModel, prompts: Sequence[Tensor], nodes_NE: Tensor, trie: LabelTrie) -> Tensor:
    """Return the same in one pass over a row of prompts, each of which is followed by the trie; nothing is cached."""
    count = len(trie.nodes)
    packed = pack([torch.cat([prompt_TE, nodes_NE]) for prompt_TE in prompts], [trie] * len(prompts))
    lengths_B = torch.tensor([len(prompt_TE) for prompt_TE in prompts])
    first_B = torch.tensor(packed.starts) + lengths_B - 1
    columns_P = on_device((first_B[:, None] + torch.arange(count + 1)).flatten(), nodes_NE.device)
    with head_at_positions(llm.get_output_embeddings(), torch.zeros_like(columns_P), columns_P):
        logits_PV: Tensor = llm(**packed.inputs(), use_cache=False).logits
    return logits_PV.reshape(len(prompts), count + 1, -1)


def decide(model: SpeechLLM, task: str, scores_BK: Tensor) -> Tensor:
    """Return the scores that labels are chosen by: unchanged, or with the labels' shares in training divided out.

    The latter is optimal for the balanced error (logit adjustment, Menon et al., 2021, arXiv 2007.07314).
    """
    if model.config.priors == "as-is":
        return scores_BK
    counts_K = (
        torch.tensor(model.tasks[task].counts, dtype=torch.float64) + 1
    )  # so that a label that never occurs has a share
    return scores_BK - on_device((counts_K / counts_K.sum()).log(), scores_BK.device, scores_BK.dtype)


@dataclass(frozen=True)
class Reply:
    """A generated text."""

    text: str
    ended: bool  # by EOS; otherwise it was cut at the limit


@torch.no_grad()
def generate(model: SpeechLLM, examples: Sequence[Example]) -> list[Reply]:
    """Generate greedy replies; prompts are padded on the left, since replies would depend on padding on the right."""
    tokenizer = model.prompt_builder.tokenizer.hf
    eos = tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=model.config.max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    with model.autocast():
        embeddings_BTE, mask_BT, _ = pad_left(model.prompts(examples))
        ids_BT = model.llm.generate(
            inputs_embeds=embeddings_BTE, attention_mask=mask_BT, generation_config=settings, use_cache=True
        )
    replies = []
    for row in ids_BT.tolist():
        ended = eos in row
        tokens = row[: row.index(eos)] if ended else row
        replies.append(Reply(tokenizer.decode(tokens, skip_special_tokens=True).strip(), ended))
    return replies
