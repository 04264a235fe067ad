"""Python that loads a merged model with plain transformers and scores labels, for its model card."""

import json
from collections.abc import Mapping

from data.loading.examples import Example
from data.loading.tasks import TASKS
from model.checkpoints.audio_llms import audio_family
from model.encoders.audio_llms import Projector
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.whisper import WhisperEncoder
from model.speech_llm.adapter import Adapter
from model.speech_llm.prompt import CLIP, CLS, END, PromptBuilder, answer_text
from model.speech_llm.speech_llm import SpeechLLM
from model.speech_llm.tokenizer import CachedTokenizer

TURNS = (("therapist", "how was your week"), ("client", "so so"))  # of the dialogue that the lines read
PIECE = 10**9  # numbers from here on stand for pieces of text, beyond the ids of any tokenizer
VECTORS = {CLIP: "clip", END: "end_of_audio", CLS: "cls"}
READ_WAVE = 'wave, _ = soundfile.read("clip.wav", dtype="float32")  # mono, 16 kHz'
RUNS = "runs = [frames[i * len(frames) // count : (i + 1) * len(frames) // count] for i in range(count)]"
HALF = ".half().float()"  # features of a frozen encoder are rounded, see `model/encoders/frozen_features.py`


class _PieceTokenizer(CachedTokenizer):
    """Gives each piece of text a number in place of its tokens, to write a prompt as text."""

    def __init__(self, tokenizer: CachedTokenizer) -> None:
        super().__init__(tokenizer.hf)
        self.pieces: list[str] = []

    def ids(self, text: str) -> list[int]:
        """Return the number of a piece; none for an empty one."""
        if not text:
            return []
        self.pieces.append(text)
        return [PIECE + len(self.pieces) - 1]

    def special_ids(self, ids: list[int]) -> list[int]:
        """Return the number of the text that special tokens are written as."""
        return self.ids(self.hf.decode(ids)) if ids else []

    def chat_template_ids(self, instruction: str | None) -> tuple[list[int], list[int]]:
        """Return the numbers of the text before and after the dialogue."""
        before, after = super().chat_template_ids(instruction)
        return self.special_ids(before), self.special_ids(after)


def merged_lines(model: SpeechLLM) -> list[str]:
    """Return lines that score the labels of the first task with labels, or else write a reply, for one dialogue."""
    labelled = [task for task, answers in model.tasks.items() if answers.labels]
    task = next(iter(labelled or model.tasks))
    vectors = {name: f'speech["{name}"][None]' for name in ("end_of_audio", "cls") if getattr(model, name) is not None}
    audio, own = model.encoder is not None, isinstance(model.adapter, Projector)
    adapted = audio and not own
    kind = "AutoModelForMultimodalLM" if own else "AutoModelForCausalLM"
    loads = ["AutoProcessor"] if own else ["AutoFeatureExtractor", "AutoModel"] if audio else []
    queries = _load_queries(model)
    lines = [
        *(["import sys", ""] if queries else []),
        *(["import soundfile"] if audio else []),
        "import torch",
        *(["import torch.nn.functional as F"] if adapted else []),
        *(["from safetensors.torch import load_file"] if adapted or vectors else []),
        f"from transformers import {', '.join(sorted([*loads, kind, 'AutoTokenizer']))}",
        "",
        'folder = "."',
        *(["sys.path.append(folder)", "from queries import Queries  # noqa: E402", ""] if queries else []),
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"llm = {kind}.from_pretrained(folder)",
        *(_load_encoder(model) if adapted else []),
        *(_load_processor(model) if own else []),
        *(['speech = load_file(f"{folder}/speech.safetensors")'] if adapted or vectors else []),
        *queries,
        "",
        "",
        "def ids(text):",
        "    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)",
        "",
        "",
        "def embed(text):",
        "    return llm.get_input_embeddings()(ids(text))",
        "",
        "",
        f"with torch.no_grad(){_autocast(model)}:",
    ]
    clip = _own_clip(model) if own else _clip(model) if audio else []
    body = [*clip, *(f"{name} = {vector}" for name, vector in vectors.items())]
    body += ["pieces = [", *(f"    {piece}," for piece in _prompt(model, task)), "]", "prompt = torch.cat(pieces)"]
    if labelled:
        body += _score(model, task, vectors)
    else:
        settings = f"max_new_tokens={model.config.max_new_tokens}, do_sample=False"
        body += [
            f"reply = llm.generate(inputs_embeds=prompt[None], {settings})",
            "print(tokenizer.decode(reply[0], skip_special_tokens=True))",
        ]
    return [*lines, *(f"    {line}" for line in body)]


def _autocast(model: SpeechLLM) -> str:
    return ', torch.autocast("cpu", torch.bfloat16)' if model.config.precision == "bfloat16" else ""


def _load_encoder(model: SpeechLLM) -> list[str]:
    """Return the lines that load the encoder; frozen lower layers hand rounded frames to those that train."""
    lines = [
        'extractor = AutoFeatureExtractor.from_pretrained(f"{folder}/encoder")',
        'encoder = AutoModel.from_pretrained(f"{folder}/encoder")',
    ]
    if model.frozen_layers:
        assert model.encoder is not None
        inside = model.frozen_layers < len(model.encoder.transformer.layers)
        layer = f"layers[{model.frozen_layers}]" if inside else "layer_norm"
        rounded = f"lambda _, inputs: (inputs[0]{HALF}, *inputs[1:])"
        lines.append(f"encoder.encoder.{layer}.register_forward_pre_hook({rounded})")
    return lines


def _load_processor(model: SpeechLLM) -> list[str]:
    """Return the lines that load the processor of an audio LLM and keep what its projector computes."""
    family = audio_family(model.config.llm.path)
    assert family is not None
    assert model.encoder is not None
    lines = [
        "processor, clips = AutoProcessor.from_pretrained(folder), []",
        f'projector = llm.get_submodule("model.{family.projector}")',
        "projector.register_forward_hook(lambda module, inputs, output: clips.append(output[0]))",
    ]
    if model.encoder_is_frozen:
        lines.append(f"projector.register_forward_pre_hook(lambda module, inputs: (inputs[0]{HALF},))")
    if model.frozen_layers:
        layer = f'llm.get_submodule("model.{family.encoder}.layers.{model.frozen_layers - 1}")'
        lines.append(f"{layer}.register_forward_hook(lambda module, inputs, output: output{HALF})")
    return lines


def _own_clip(model: SpeechLLM) -> list[str]:
    """Return the lines with which an audio LLM turns a clip into embeddings."""
    family = audio_family(model.config.llm.path)
    assert family is not None
    return [
        READ_WAVE,
        f'heard = processor(text="{family.placeholder}", audio=[wave], return_tensors="pt")',
        "llm(**heard)",
        "clip = clips[0][: (heard.input_ids == llm.config.audio_token_id).sum()]",
    ]


def _clip(model: SpeechLLM) -> list[str]:
    """Return the lines that turn a clip into embeddings.

    Features of a frozen encoder are rounded where the cache would keep them: behind the average of an adapter that
    pools, before anything else that the adapter does.
    """
    encoder, adapter, config = model.encoder, model.adapter, model.config.adapter
    assert encoder is not None
    assert isinstance(adapter, Adapter)
    pools, rounded = config.kind == "pool", HALF if model.encoder_is_frozen else ""
    layers = []
    if adapter.layer_weights is not None:
        weights = 'speech["adapter.layer_weights"].softmax(0)[:, None]'
        states = f"unflatten(-1, ({len(adapter.layer_weights)}, -1))"
        name = "windows" if pools else "frames"
        layers = [f"{name} = ({name}.{states} * {weights}).sum(-2)"]
    pad = [f"frames = F.pad(frames, (0, 0, 0, max(0, {config.window} - len(frames))))"] if config.has_windows else []
    reduced = _windows(adapter)
    reduce = [*pad, *reduced[:-1], f"{reduced[-1]}{rounded}", *layers] if pools else [*layers, *pad, *reduced]
    project = ['clip = F.linear(windows, speech["adapter.linear.weight"], speech["adapter.linear.bias"])']
    if adapter.out is not None:
        project.append('clip = F.linear(F.gelu(clip), speech["adapter.out.weight"], speech["adapter.out.bias"])')
    return [
        READ_WAVE,
        f'heard = extractor(wave, sampling_rate=16_000, return_tensors="pt").{encoder.input_name}',
        *_frames(model, encoder, "" if pools else rounded),
        *reduce,
        *project,
    ]


def _windows(adapter: Adapter) -> list[str]:
    """Return the lines that reduce frames to windows; the last one is an assignment."""
    config = adapter.config
    count = f"count = int(len(frames) * {config.rate / adapter.frame_rate:.9g} + 1e-9)"
    conv = f'speech["adapter.conv.weight"], speech["adapter.conv.bias"], {config.stride}'
    read = "[queries(run[None], torch.ones(1, len(run), dtype=torch.bool))[0] for run in runs]"
    return {
        "pool": [f"windows = F.avg_pool1d(frames.T, {config.window}, {config.stride}).T"],
        "stack": [f"windows = frames.unfold(0, {config.window}, {config.stride}).transpose(1, 2).flatten(1)"],
        "conv": [f"windows = F.gelu(F.conv1d(frames.T, {conv})).T"],
        "merge": [
            count,
            "units = F.normalize(frames, dim=-1)",
            "ends = (units[1:] * units[:-1]).sum(-1).argsort(stable=True)[: count - 1].sort().values + 1",
            "windows = torch.stack([run.mean(0) for run in frames.tensor_split(ends.tolist())])",
        ],
        "queries": [
            *(["runs = [frames]"] if config.queries else [count, RUNS]),
            f"windows = torch.cat({read})",
        ],
    }[config.kind]


def _load_queries(model: SpeechLLM) -> list[str]:
    """Return the lines that load the learned queries, whose layers are in a file of the folder."""
    if not isinstance(model.adapter, Adapter) or (queries := model.adapter.queries) is None:
        return []
    start = "adapter.queries."
    return [
        f"queries = Queries({', '.join(map(str, queries.sizes))})",
        f'named = {{name.removeprefix("{start}"): speech[name] for name in speech if name.startswith("{start}")}}',
        "queries.load_state_dict(named)",
    ]


def _frames(model: SpeechLLM, encoder: SpeechEncoder, rounded: str) -> list[str]:
    """Return the lines that compute the frames of a clip: hidden states of one or several layers side by side."""
    call, cut, count = "encoder", "[0]", list[str]()
    if isinstance(encoder, WhisperEncoder):
        count = [f"n = -(-len(wave) // {encoder.samples_per_frame})  # of a clip of up to {encoder.window} samples"]
        call, cut = "encoder.encoder", "[0, :n]"
    compute = [f"output = {call}(heard.to(encoder.dtype), output_hidden_states=True)"]
    states, final = "output.hidden_states[{}]", "output.last_hidden_state"
    if encoder.states == (OUTPUT,):
        compute, final = [], f"{call}(heard.to(encoder.dtype)).last_hidden_state"
    if isinstance(encoder, WhisperEncoder) and encoder.context == "clip":
        compute = [
            "hidden = F.gelu(encoder.encoder.conv1(heard.to(encoder.dtype)[:, :, : 2 * n + 1]))[:, :, : 2 * n]",
            "hidden = F.gelu(encoder.encoder.conv2(hidden)).transpose(1, 2)",
            "states = [hidden + encoder.encoder.embed_positions.weight[:n]]",
            "for layer in encoder.encoder.layers:",
            "    states.append(layer(states[-1], None))",
        ]
        states, final = "states[{}]", "encoder.encoder.layer_norm(states[-1])"
    heard = [
        (final if state == OUTPUT else states.format(state))
        + cut
        + (HALF if OUTPUT != state <= model.frozen_layers else "")
        for state in encoder.states
    ]
    frames = heard[0] if len(heard) == 1 else f"torch.cat([{', '.join(heard)}], -1)"
    return [*count, *compute, f"frames = {frames}.float(){rounded}"]


def _prompt(model: SpeechLLM, task: str) -> list[str]:
    """Return the pieces of a prompt, as the model tokenises them, as Python expressions."""
    pieces = _PieceTokenizer(model.prompt_builder.tokenizer)
    builder = PromptBuilder(pieces, model.config)
    builder.start = pieces.special_ids(model.prompt_builder.start)
    begin, end = map(pieces.special_ids, model.prompt_builder.clip_frame)
    builder.clip_frame = (begin, end)
    turns = TURNS if TASKS[task].reads == "turn" else TURNS[:1]
    example = Example(
        id="example",
        task=task,
        conversation="example",
        speaker=TURNS[-1][0],
        answer="",
        subset=None,
        turns=turns,
        audio_turn=len(turns) - 1,
        pcm=None,
    )
    ids = builder.prompt(example).ids
    return [f"embed({json.dumps(pieces.pieces[token - PIECE])})" if token >= 0 else VECTORS[token] for token in ids]


def _score(model: SpeechLLM, task: str, vectors: Mapping[str, str]) -> list[str]:
    """Return the lines that compute the log-probability of each label."""
    lead = "" if model.config.prompt.format == "chat" else " "
    answers = {label: lead + answer_text(task, label) for label in model.tasks[task].labels}
    after = ", cls" if model.config.cls == "after" else ""
    lines = [
        "scores = {}",
        f"for label, text in {json.dumps(answers)}.items():",
        f"    answer = torch.cat([prompt, embed(text){after}])",
        "    logits = llm(inputs_embeds=answer[None]).logits[0, len(prompt) - 1 :].float().log_softmax(-1)",
        "    scores[label] = logits[range(len(ids(text))), ids(text)].sum() + logits[-1, tokenizer.eos_token_id]",
    ]
    if model.config.priors == "balanced":
        counts = [count + 1 for count in model.tasks[task].counts]
        shares = {
            label: round(count / sum(counts), 6) for label, count in zip(model.tasks[task].labels, counts, strict=True)
        }
        lines.append(f"    scores[label] -= torch.tensor({json.dumps(shares)}[label]).log()  # model.priors balanced")
    return [*lines, "print(max(scores, key=scores.get))"]
