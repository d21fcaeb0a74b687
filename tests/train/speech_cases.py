"""A tiny model that speaks, spoken answers, and what the processes of its contract test run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.types import Batch, SpeechPairs
from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig
from models.init import init_weights
from models.omni import Omni
from models.omni_config import CodePredictorConfig, OmniConfig, TalkerConfig
from models.say import media_states, user_positions
from models.talker_inputs import TalkerPlan, join, plan_document
from tests.train.engine_cases import LINEAR, MELS, State, told
from train import ranks
from train.config import EngineConfig, LossConfig, OptimConfig, Phase
from train.engines import VALUE, Engine
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.preference import PreferenceConfig
from train.watch import Look

WORDS, AUDIO, START, END, SYSTEM, USER, ASSISTANT, LINE, PAD, BOS, EOS = 40, *range(50, 60)
CODES, GROUPS, STEPS = 16, 3, 3
FRAMES = {0: 130, 3: 60}  # mel frames of the questions that are spoken
SPLITS = (
    (((0, 1), (2,)), ((3,), (4,))),
    (((0, 1, 2, 3, 4),), ((),)),
    (((1,), (), (0, 4)), ((2,), (3,), ())),
)
PREFERENCE = PreferenceConfig(beta=0.01, residual_weight=0.5, sft_weight=0.2)
LAYOUTS = {f"zero{zero}-ep{ep}": (zero, ep) for zero in (1, 2, 3) for ep in (1, 2)}
WAYS = ("frozen", "live", "off", "cached", "preference")


def config() -> OmniConfig:
    """Two layers each; the Talker reads what the Thinker's first one gives."""
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    thinker = TextConfig(64, 32, 2, 4, 2, 8, mrope_section=(2, 1, 1), **moe)
    audio = AudioConfig(16, 1, 2, 32, output_dim=32, downsample_hidden_size=8, num_mel_bins=MELS)
    moe = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8}
    talker = TextConfig(CODES + 20, 16, 2, 4, 2, 8, mrope_section=(2, 1, 1), shared_expert_intermediate_size=8, **moe)
    predictor = CodePredictorConfig(CODES, 16, 16, 1, 2, 1, 8, num_code_groups=GROUPS)
    names = ("pad_id", "bos_id", "eos_token_id", "nothink_id", "think_bos_id", "think_eos_id")
    controls = {f"codec_{name}": CODES + place for place, name in enumerate(names)}
    ids = {"im_start": START, "im_end": END, "system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tts_pad": PAD}
    ids |= {"tts_bos": BOS, "tts_eos": EOS, "audio_start": 60, "audio_end": 61, "vision_start": 62, "vision_end": 63}
    return OmniConfig(
        ThinkerConfig(thinker, audio, AUDIO),
        TalkerConfig(talker, predictor, 32, 1, **controls, speaker_id={"one": CODES + 10, "two": CODES + 11}),
        **{f"{name}_token_id": value for name, value in ids.items()},
    )


def setup(name: str, way: str, zero: int = 2, ep: int = 1, **engine: Any) -> EngineSetup:
    return EngineSetup(
        model=config(),
        engine=EngineConfig(name=name, device="cpu", zero=zero, ep=ep, **engine),
        optim=OptimConfig(**LINEAR),
        loss=LossConfig(balance=0.1, max_logits=800, text=0.5, preference=PREFERENCE),
        phase=Phase(steps=STEPS, speech=way),
        phase_name="all",
        seed=0,
        device=torch.device("cpu"),
    )


def document(step: int, index: int) -> tuple[Tensor, Tensor, Tensor, TalkerPlan, TalkerPlan]:
    """Token ids, labels and mel of a question and its answer, and two ways in which the answer is spoken."""
    generator = torch.Generator().manual_seed(100 * step + index)

    def words(count: int) -> Tensor:
        return torch.randint(0, WORDS, (count,), generator=generator)

    frames = FRAMES.get(index, 0)
    heard = torch.full((int(num_audio_tokens(frames)) if frames else 0,), AUDIO)
    question = torch.cat([torch.tensor([START, USER, LINE]), heard, words(3 + index), torch.tensor([END, LINE])])
    answer = torch.cat([torch.tensor([START, ASSISTANT, LINE]), words(2 + index), torch.tensor([END, LINE])])
    ids_S = torch.cat([question, answer])
    labels_S = torch.full_like(ids_S, -100)
    labels_S[len(question) + 2 : -2] = ids_S[len(question) + 3 : -1]
    codes_GF = torch.randint(0, CODES, (GROUPS, 4 + 2 * index), generator=generator)
    position_ids_3S = torch.arange(len(ids_S)).float().expand(3, -1)
    model = config()
    places_3U = user_positions(model, ids_S, position_ids_3S)
    plan = plan_document(model, ids_S, places_3U, CODES + 10 + index % 2, codes_GF)
    mel_FM = torch.randn(frames, MELS, generator=generator)
    other_GF = torch.randint(0, CODES, (GROUPS, 9 - 2 * index), generator=generator)
    return ids_S, labels_S, mel_FM, plan, plan_document(model, ids_S, places_3U, CODES + 10 + index % 2, other_GF)


def pack(step: int, indices: Sequence[int], way: str = "live") -> Batch:
    if not indices:
        return Batch.empty(MELS)
    ids, labels, mels, plans, others = zip(*(document(step, index) for index in indices), strict=True)
    lengths = tuple(len(ids_S) for ids_S in ids)
    return replace(
        Batch.empty(MELS),
        token_ids_T=torch.cat(ids),
        labels_T=torch.cat(labels),
        position_ids_3T=torch.cat([torch.arange(length).float() for length in lengths]).expand(3, -1),
        doc_lengths=lengths,
        mel_FM=torch.cat(mels),
        mel_lengths=tuple(len(mel_FM) for mel_FM in mels if len(mel_FM)),
        keys=tuple(f"{step}:{index}" for index in indices),
        speech=join(plans, GROUPS) if way != "preference" else in_pairs(plans, others),
    )


def cached(pack: Batch, omni: Omni) -> Batch:
    """The same with what the Talker reads of the Thinker instead of media."""
    if not pack.doc_lengths:
        return pack
    return replace(pack, mel_FM=pack.mel_FM[:0], mel_lengths=(), media_RH=media_states(omni, pack))


def in_pairs(chosen: Sequence[TalkerPlan], rejected: Sequence[TalkerPlan]) -> SpeechPairs:
    """With the log-probabilities of a reference that nobody has, as each document's length has it."""
    ways = [way for both in zip(chosen, rejected, strict=True) for way in both]
    frames_N = torch.tensor([float(way.codes_GF.shape[1]) for way in ways])
    return SpeechPairs((join(ways, GROUPS),), torch.stack([-2.5 * frames_N - 3, -5.5 * frames_N], 1))


def train(engine: Engine, first: int = 0, last: int = STEPS) -> list[list[float]]:
    """Loss, every term, balance loss, gradient norm, counts and expert shares of each step."""
    rows, omni = [], Omni(config())
    init_weights(omni, 0)
    way = engine.setup.phase.speech  # type: ignore[attr-defined]
    for step in range(first, last):
        halves = SPLITS[step % len(SPLITS)]
        mine = halves[engine.shard.index] if engine.shard.count > 1 else halves[0] + halves[1]
        packs = [pack(step, indices, way) for indices in mine]
        packs = [cached(pack, omni) for pack in packs] if way == "cached" else packs
        stats = engine.train_step(packs, LINEAR["lr"], Look(norms=True, experts=True))
        counts = [stats.num_tokens, stats.num_targets]
        shares = [share for name in sorted(stats.expert_shares) for share in stats.expert_shares[name].flatten()]
        terms = [stats.terms[name] for name in sorted(stats.terms)]
        rows.append(
            [stats.loss, *terms, stats.balance_loss, stats.grad_norm, *counts, *map(float, shares), *told(stats)]
        )
    return rows


def gather(engine: Engine) -> State:
    """Every rank's fragments put together; asserts that they cover what they cover exactly once."""
    objective = engine.objective  # type: ignore[attr-defined]
    sizes = {name: p.numel() for name, p in Omni(config()).named_parameters()}
    sizes |= {routers.name: routers.layers * routers.experts for routers in objective.routers}
    keys = [f"{kind}|{name}" for name in sizes for kind in ("weight", "exp_avg", "exp_avg_sq", VALUE)]
    held = {key: torch.zeros(2, sizes[key.split("|")[1]], dtype=torch.float64) for key in keys}
    for fragment in engine.fragments():
        if fragment.replicated and not engine.is_main:
            continue
        for kind, tensor in fragment.tensors.items():
            part = held[f"{kind}|{fragment.name}"][:, fragment.start : fragment.start + fragment.length]
            part[0] = tensor
            part[1] += 1
    flat = ranks.total(torch.cat([pair.flatten() for pair in held.values()]))
    state = State()
    for key, values in zip(held, flat.split([pair.numel() for pair in held.values()]), strict=True):
        whole, times = values.view(2, -1)
        assert times[0] in (0, 1) and (times == times[0]).all(), f"{key} is held {times.unique()} times"
        if times[0]:
            state[key] = whole.float()
    return state


def two_processes() -> dict[str, Any]:
    """Rows and final weights of every layout and way, and rows after a restore into the next layout."""
    out: dict[str, Any] = {}
    for way in WAYS:
        state = None
        for name, (zero, ep) in LAYOUTS.items():
            engine = build_engine(setup("deepspeed", way, zero, ep, recompute_layers=zero == 3 and ep == 2))
            rows = train(engine)
            now = gather(engine)
            restored = []
            if state is not None and way != "cached":  # which restores what frozen does
                engine.restore(state, optimizer_step=STEPS)
                assert not state.differs(gather(engine)), (way, name)
                restored = train(engine, STEPS, STEPS + 1)
            weights = {
                key: value.tolist() for key, value in now.items() if key.startswith("weight|talker.model.layers.0")
            }
            out[f"{way}-{name}"] = {"rows": rows, "restored": restored, "weights": weights}
            engine.close()
            state = now
    ranks.stop()
    return out
