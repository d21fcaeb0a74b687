"""The Thinker's training step on packed documents of mixed lengths, text and speech, against transformers' padded ones.

    .venv/bin/python bench/model.py

The same weights and the same 24 documents (log-normal lengths, half of them with one to eight seconds of speech):
ours as one pack, transformers' as a right-padded batch, with sdpa attention and grouped experts; and, beside it, as
six batches of four documents of like length, which pads less. Forward, mean cross-entropy over next text tokens,
backward; the optimizer, equal for both, is left out. Useful tokens are those of documents. Two threads, so the time is
wall time on two free cores: run it on a quiet machine. Peak memory is what the step adds to the resident set.
Cost: about two minutes, 3 GB.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import matmul_rate, report, reset_peak, resident, void_if_drifted
from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig
from models.hf import to_released_config
from models.positions import text_audio_positions
from models.thinker import Thinker
from train.loss import cross_entropy_sum

AUDIO, VOCAB, DOCUMENTS, ROUNDS, GOAL = 5, 8192, 24, 7, 1.5
CONFIG = ThinkerConfig(
    TextConfig(VOCAB, 256, 4, 8, 2, 32, 32, 4, 128, mrope_section=(6, 5, 5)),
    AudioConfig(128, 4, 4, 512, 256, downsample_hidden_size=32),
    AUDIO,
)


@dataclass(frozen=True)
class Document:
    """Token ids with placeholders, and the log-mel frames [F, 128] of its clip, which may be none."""

    ids_T: Tensor
    mel_FM: Tensor


def documents() -> list[Document]:
    """Lengths as of real corpora: log-normal text of 20 to 800 tokens; every other document begins with speech."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for index in range(DOCUMENTS):
        length = int((torch.randn((), generator=generator) * 0.8 + 5.0).exp().clamp(20, 800))
        ids_T = torch.randint(AUDIO + 1, VOCAB, (length,), generator=generator)
        frames = 0 if index % 2 else 100 * int(torch.randint(1, 9, (), generator=generator))
        speech = torch.full((int(num_audio_tokens(frames)),), AUDIO)
        out.append(Document(torch.cat([ids_T[:3], speech, ids_T[3:]]), torch.randn(frames, 128, generator=generator)))
    return out


def transformers_thinker() -> Any:
    """Transformers' Thinker as it comes: sdpa attention, grouped_mm experts."""
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    released = to_released_config(CONFIG)
    keys = "text_config", "audio_config", "vision_config", "audio_token_id", "vision_start_token_id"
    config = Qwen3OmniMoeThinkerConfig(**{key: released[key] for key in keys})
    model: Any = modeling.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    assert model.config.text_config._experts_implementation == "grouped_mm"
    return model.train()


def same_weights(theirs: Any) -> Thinker:
    """Our Thinker with the weights of transformers'."""
    ours = Thinker(CONFIG)
    ours.model.load_state_dict(theirs.model.language_model.state_dict())
    ours.audio_tower.load_state_dict(theirs.model.audio_tower.state_dict())
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
    return ours


def labels_of(ids_T: Tensor) -> Tensor:
    """The next token where it is text, -100 elsewhere."""
    labels_T = F.pad(ids_T[1:], (0, 1), value=-100)
    return labels_T.masked_fill(labels_T == AUDIO, -100)


def our_step(model: Thinker, docs: list[Document], targets: int) -> float:
    """One pack."""
    model.zero_grad()
    lengths = tuple(len(doc.ids_T) for doc in docs)
    mels = [doc.mel_FM for doc in docs if len(doc.mel_FM)]
    hidden_TD, _ = model(
        torch.cat([doc.ids_T for doc in docs]),
        text_audio_positions(lengths),
        lengths,
        torch.cat(mels),
        tuple(map(len, mels)),
    )
    labels_T = torch.cat([labels_of(doc.ids_T) for doc in docs])
    loss = model.lm_head(hidden_TD, partial(cross_entropy_sum, labels_T=labels_T)) / targets
    loss.backward()
    return loss.item()


def their_step(model: Any, batches: list[list[Document]], targets: int) -> float:
    """Padded batches, their gradients added up."""
    model.zero_grad()
    total = 0.0
    for docs in batches:
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mels = [doc.mel_FM for doc in docs if len(doc.mel_FM)]
        media = {}
        if mels:
            mask = pad([torch.ones(len(mel), dtype=torch.long) for mel in mels])
            media = {"input_features": pad(mels).transpose(1, 2), "feature_attention_mask": mask}
        out = model(
            input_ids=pad([doc.ids_T for doc in docs]),
            attention_mask=pad([torch.ones_like(doc.ids_T) for doc in docs]),
            use_cache=False,
            **media,
        )
        labels = pad([labels_of(doc.ids_T) for doc in docs], padding_value=-100)
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total


def in_turns(works: dict[str, Callable[[], float]]) -> dict[str, tuple[float, float]]:
    """Median wall seconds and added peak GB of each, after one round of warm-up; their losses must agree."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, list[float]] = {name: [] for name in works}
    losses = {}
    for _ in range(1 + ROUNDS):
        for name, work in works.items():
            gc.collect()
            reset_peak()
            before, began = resident("VmRSS"), time.perf_counter()
            losses[name] = work()
            seconds[name].append(time.perf_counter() - began)
            peaks[name].append((resident("VmHWM") - before) / 1e9)
    first, *others = losses.values()
    assert all(abs(other - first) < 1e-5 * first for other in others), losses
    return {name: (median(seconds[name][1:]), median(peaks[name][1:])) for name in works}


def main() -> None:
    """Measure, print the table and the JSON line."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    docs, theirs = documents(), transformers_thinker()
    ours = same_weights(theirs)
    targets = sum(int((labels_of(doc.ids_T) != -100).sum()) for doc in docs)
    tokens, longest = sum(len(doc.ids_T) for doc in docs), max(len(doc.ids_T) for doc in docs)
    ordered = sorted(docs, key=lambda doc: len(doc.ids_T))
    before = matmul_rate()
    figures = in_turns(
        {
            "ours, one pack": partial(our_step, ours, docs, targets),
            "transformers, padded": partial(their_step, theirs, [docs], targets),
            "transformers, by length": partial(
                their_step, theirs, [ordered[i : i + 4] for i in range(0, len(docs), 4)], targets
            ),
        }
    )
    after = matmul_rate()
    filled = tokens / longest / len(docs)
    print(f"{len(docs)} documents, {tokens} tokens, longest {longest}: {filled:.0%} of a padded batch")
    print(f"{'':26}{'s':>8}{'tokens/s':>10}{'peak GB':>9}")
    for name, (seconds, peak) in figures.items():
        print(f"{name:26}{seconds:8.2f}{tokens / seconds:10.0f}{peak:9.2f}")
    (mine, my_peak), (padded, padded_peak), (sorted_, _) = figures.values()
    print(f"tokens/s, ours over theirs: padded {padded / mine:.2f}, by length {sorted_ / mine:.2f}")
    void = void_if_drifted(before, after)
    if void:
        print(void)
    best = min(padded, sorted_)
    met = best / mine >= GOAL and my_peak <= padded_peak and void is None
    unit = "useful tokens per second of a training step, against the faster of theirs; met asks for no more memory, too"
    report("model", ours=tokens / mine, peer=tokens / best, ratio=best / mine, unit=unit, goal=GOAL, met=met)


if __name__ == "__main__":
    main()
