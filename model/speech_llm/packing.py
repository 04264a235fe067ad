"""Packing: sequences end to end in one row, without padding, each of which attends to itself alone.

    sequences   a0 a1 a2 │ b0 b1 │ c0 c1 c2 c3
    row         a0 a1 a2   b0 b1   c0 c1 c2 c3
    positions    0  1  2    0  1    0  1  2  3

All layers but attention compute positions one by one, so only attention has to know the sequences. `packed_attention`
is an implementation of attention in transformers' registry, as `sdpa` is; a forward pass gives it the `Row` as a
keyword. There is no mask over the whole row, whose size would be the square of its length. `model.evaluation.llm_check`
finds out by computation whether a family of LLMs passes the keyword on and keeps nothing else from one position to the
next.

Shapes: S sequences of T_i positions, of which the last N_i may be nodes of a trie; E width of the LLM; Q heads; D width
of a head; R = sum of all T_i, the positions of the row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from model.compat import attention_of
from model.runtime.device import on_device
from model.speech_llm.label_trie import LabelTrie

PACKED = "packed"  # in transformers' registry of attention
_as_loaded = WeakKeyDictionary[PreTrainedModel, str]()  # the implementation of attention of LLMs that pack
MOST_HEAD_WIDTH = 256  # of flash attention


@dataclass(frozen=True)
class Nodes:
    """The nodes of the tries in a row, and what they see: a batch of queries and keys for each sequence."""

    positions_P: Tensor  # of all nodes in the row
    places_P: Tensor  # of the same nodes among the queries, flattened
    queries_SN: Tensor  # positions in the row; N is the largest trie, shorter ones are padded
    keys_ST: Tensor  # the same for all positions of each sequence
    visible_S1NT: Tensor


@dataclass(frozen=True)
class Row:
    """Where the sequences of a row begin and end."""

    lengths: list[int]  # T_i
    nodes: Nodes | None  # of the tries that end the sequences
    bounds: Tensor | None  # [S + 1], int32 on a GPU: where each sequence begins, and the end of the row


@dataclass(frozen=True)
class Packed:
    """The arguments of a forward pass over a row."""

    embeddings: Tensor  # [1, R, E]
    positions: Tensor  # [1, R]
    row: Row
    starts: list[int]  # of each sequence in the row

    def inputs(self) -> dict[str, object]:
        """Return the keywords of the LLM's forward pass.

        The mask is a placeholder: transformers makes none where it gets one of four dimensions.
        """
        return {
            "inputs_embeds": self.embeddings,
            "position_ids": self.positions,
            "attention_mask": self.embeddings.new_zeros(1, 1, 1, 1),
            "packed": self.row,
        }


def set_packing(llm: PreTrainedModel, packs: bool) -> None:
    """Let an LLM compute packed rows, beside padded batches, or let it compute these alone, as it was loaded."""
    if packs and not is_packing(llm):
        _as_loaded[llm] = attention_of(llm)
        llm.set_attn_implementation(PACKED)
    elif is_packing(llm) and not packs:
        llm.set_attn_implementation(_as_loaded[llm])


def is_packing(llm: PreTrainedModel) -> bool:
    """Return whether an LLM computes packed rows."""
    return attention_of(llm) == PACKED


def pack(sequences: Sequence[Tensor], tries: Sequence[LabelTrie] | None = None) -> Packed:
    """Lay sequences end to end.

    Args:
        sequences: embeddings, [T_i, E].
        tries: whose nodes are the last positions of each sequence. A node sees what precedes the trie, and its
            ancestors; its position is that of a sequence which consists of these.
    """
    lengths, device = list(map(len, sequences)), sequences[0].device
    *starts, end = itertools.accumulate(lengths, initial=0)
    positions = list(map(torch.arange, lengths))
    for length, positions_T, trie in zip(lengths, positions, tries or (), strict=tries is not None):
        first = length - len(trie.nodes)
        positions_T[first:] = torch.tensor([first - 1 + sum(row) for row in trie.ancestors], dtype=torch.long)
    return Packed(
        embeddings=torch.cat(list(sequences))[None],
        positions=on_device(torch.cat(positions)[None], device),
        row=Row(
            lengths=lengths,
            nodes=_nodes(starts, lengths, tries, device) if tries and any(trie.nodes for trie in tries) else None,
            bounds=on_device([*starts, end], device, torch.int32) if device.type == "cuda" else None,
        ),
        starts=starts,
    )


def _nodes(starts: Sequence[int], lengths: Sequence[int], tries: Sequence[LabelTrie], device: torch.device) -> Nodes:
    """Return where the nodes of tries are in a row, and what they see."""
    most, longest = max(len(trie.nodes) for trie in tries), max(lengths)
    positions, places = list[int](), list[int]()
    queries_SN = torch.zeros(len(tries), most, dtype=torch.long)
    keys_ST = torch.zeros(len(tries), longest, dtype=torch.long)
    visible_SNT = torch.zeros(len(tries), most, longest, dtype=torch.bool)
    visible_SNT[..., 0] = True  # a padded query without any key would have no number
    for index, (start, length, trie) in enumerate(zip(starts, lengths, tries, strict=True)):
        count, first = len(trie.nodes), length - len(trie.nodes)
        positions += range(start + first, start + length)
        places += range(index * most, index * most + count)
        queries_SN[index, :count] = torch.arange(start + first, start + length)
        keys_ST[index, :length] = torch.arange(start, start + length)
        visible_SNT[index, :count, :first] = True
        if count:
            visible_SNT[index, :count, first:length] = torch.tensor(trie.ancestors)
    values = (positions, places, queries_SN, keys_ST, visible_SNT[:, None])
    return Nodes(*(on_device(value, device) for value in values))


def packed_attention(
    module: nn.Module,
    query_BQTD: Tensor,
    key_BQTD: Tensor,
    value_BQTD: Tensor,
    attention_mask: Tensor | None,
    packed: Row | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Compute attention within each sequence of a row, or, without a row, as `sdpa` does.

    Args:
        module: the attention layer.
        query_BQTD: its queries; of a row, B is 1 and T is R.
        key_BQTD: its keys, perhaps with fewer heads.
        value_BQTD: its values.
        attention_mask: of padded batches.
        packed: the row.
        dropout: on the weights of attention.
        scaling: of the scores; by default 1 / sqrt(D).
        options: of a family; they reach `sdpa`, which knows or ignores them.

    Returns:
        The outputs [B, T, Q, D].
    """
    states, options = [query_BQTD, key_BQTD, value_BQTD], options | {"dropout": dropout, "scaling": scaling}
    if packed is None:
        return _attend(module, states, attention_mask, options), None
    if packed.bounds is not None and not dropout and (dtype := flash_dtype(query_BQTD)) is not None:
        states = [heads.to(dtype) for heads in states]
        outputs_BTQD = _flash_attention(states, packed.bounds, max(packed.lengths), scaling)
    else:
        sequences = zip(*(heads.split(packed.lengths, dim=2) for heads in states), strict=True)
        outputs_BTQD = torch.cat([_attend(module, sequence, None, options) for sequence in sequences], dim=1)
    if (nodes := packed.nodes) is None:
        return outputs_BTQD, None
    # Attention that is causal lets the labels of a trie see each other: the nodes are computed again.
    indices = (nodes.queries_SN, nodes.keys_ST, nodes.keys_ST)
    batches = [heads[0][:, index].transpose(0, 1) for heads, index in zip(states, indices, strict=True)]
    outputs_SNQD = _attend(module, batches, nodes.visible_S1NT, options)
    outputs_PQD = outputs_SNQD.flatten(0, 1)[nodes.places_P]
    return outputs_BTQD.index_copy(1, nodes.positions_P, outputs_PQD[None]), None


def _attend(module: nn.Module, states: Sequence[Tensor], mask: Tensor | None, options: dict[str, object]) -> Tensor:
    query, key, value = states
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return output


def has_flash_attention() -> bool:
    """Return whether the GPU of this process computes packed rows in one kernel, in half precision."""
    return torch.cuda.get_device_capability() >= (8, 0)


def flash_dtype(query_BQTD: Tensor) -> torch.dtype | None:
    """Return the type in which flash attention computes a row on this GPU; None: it cannot."""
    device = query_BQTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_BQTD.dtype
    fits = query_BQTD.shape[-1] <= MOST_HEAD_WIDTH and dtype in (torch.bfloat16, torch.float16)
    return dtype if fits and has_flash_attention() else None


def _flash_attention(states: Sequence[Tensor], bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """Compute the attention of all sequences in one kernel, which waits for nothing from the host."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (heads[0].transpose(0, 1) for heads in states)  # [R, Q, D]
    grouped, causal = query.shape[1] != key.shape[1], (-1, 0)
    output_RQD = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=causal, enable_gqa=grouped
    )
    assert isinstance(output_RQD, Tensor)
    return output_RQD[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
