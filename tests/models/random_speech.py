"""Random Talkers, conversations with speech, and transformers' models of the same shapes and weights."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from models.omni_config import CodePredictorConfig, OmniConfig, TalkerConfig
from models.talker import Talker
from tests.models import random_model as r

IM_START, IM_END, SYSTEM, USER, ASSISTANT, TTS_PAD, TTS_BOS, TTS_EOS = range(12, 20)
NEW_LINE = 20
CONTROLS = 1024  # transformers never predicts the last 1,024 ids of the codec vocabulary but for the end


def random_talker_config(seed: int, thinker_hidden_size: int = 24, layers: int = 1) -> TalkerConfig:
    rng = random.Random(seed)
    codes = rng.choice([16, 24])
    text = r.random_text_config(
        rng, vocab_size=codes + CONTROLS, shared_expert_intermediate_size=rng.choice([8, 20]), rope_theta=1e4
    )
    heads = rng.choice([1, 2])
    predictor = CodePredictorConfig(
        vocab_size=codes,
        hidden_size=text.hidden_size,
        intermediate_size=rng.choice([16, 28]),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=heads * rng.choice([1, 2]),
        num_key_value_heads=heads,
        head_dim=rng.choice([8, 12]),
        num_code_groups=rng.choice([2, 3, 5, 8]),
        rope_theta=rng.choice([1e4, 1e6]),
    )
    controls = ("codec_pad_id", "codec_bos_id", "codec_eos_token_id")
    controls += "codec_nothink_id", "codec_think_bos_id", "codec_think_eos_id"
    ids = {name: codes + 3 + index for index, name in enumerate(controls)}
    speakers = {"ethan": codes + 20, "chelsie": codes + 21}
    return TalkerConfig(text, predictor, thinker_hidden_size, rng.randint(1, layers), **ids, speaker_id=speakers)


def reference_talker_shapes(config: TalkerConfig) -> dict[str, Any]:
    """The Talker's shapes under transformers' names."""
    predictor = asdict(config.code_predictor)
    rope = {"rope_type": "default", "rope_theta": predictor.pop("rope_theta")}
    shapes = {name: value for name, value in asdict(config).items() if name not in ("text", "code_predictor")}
    return shapes | {
        "text_config": r.to_reference(config.text) | {"intermediate_size": config.thinker_hidden_size},
        "code_predictor_config": predictor | {"rope_parameters": rope},
        "num_code_groups": config.num_code_groups,
        "spatial_merge_size": 2,
        "image_token_id": r.IMAGE,
        "video_token_id": r.VIDEO,
        "audio_token_id": r.AUDIO,
        "vision_start_token_id": r.VISION_START,
        "audio_start_token_id": r.AUDIO_START,
        "position_id_per_seconds": 13,
    }


def reference_talker(config: TalkerConfig, seed: int) -> Any:
    """Transformers' Talker; it leaves its experts unset, so every weight is drawn here."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    shapes = configuration.Qwen3OmniMoeTalkerConfig(**reference_talker_shapes(config))
    reference = modeling.Qwen3OmniMoeTalkerForConditionalGeneration(shapes)
    r.randomize(reference, seed)
    return reference.train()


def talker_like(reference: Any, config: TalkerConfig) -> Talker:
    """Ours with the same weights: the names are the same, every one."""
    talker = Talker(config)
    talker.load_state_dict(reference.state_dict(), strict=True)
    return talker


def random_omni_config(seed: int) -> OmniConfig:
    thinker = r.random_thinker_config(seed)
    return OmniConfig(
        thinker,
        random_talker_config(seed, thinker.text.hidden_size, thinker.text.num_hidden_layers),
        im_start_token_id=IM_START,
        im_end_token_id=IM_END,
        system_token_id=SYSTEM,
        user_token_id=USER,
        assistant_token_id=ASSISTANT,
        tts_pad_token_id=TTS_PAD,
        tts_bos_token_id=TTS_BOS,
        tts_eos_token_id=TTS_EOS,
        audio_start_token_id=r.AUDIO_START,
        audio_end_token_id=r.AUDIO_END,
        vision_start_token_id=r.VISION_START,
        vision_end_token_id=r.VISION_END,
    )


def reference_omni(config: OmniConfig, seed: int) -> Any:
    """Transformers' whole model; its waveform decoder is the smallest one and has no part in the comparison."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    assert config.talker is not None
    wave = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 16}
    wave |= {"num_hidden_layers": 1, "decoder_dim": 16, "codebook_size": config.talker.code_predictor.vocab_size}
    ids = {name: value for name, value in asdict(config).items() if name.endswith("_token_id")}
    shapes = configuration.Qwen3OmniMoeConfig(
        thinker_config=r.reference_thinker(config.thinker, seed).config.to_dict(),
        talker_config=reference_talker_shapes(config.talker),
        code2wav_config=wave | {"num_quantizers": config.talker.num_code_groups},
        **ids,
    )
    reference = modeling.Qwen3OmniMoeForConditionalGeneration(shapes)
    r.randomize(reference, seed)
    # its position ids read the audio encoder's shapes, which the Talker's configuration lacks
    reference.talker.config.audio_config = reference.config.thinker_config.audio_config
    return reference.eval()


def turn(role: int, *body: int) -> list[int]:
    return [IM_START, role, NEW_LINE, *body, IM_END, NEW_LINE]


def random_text(rng: random.Random, most: int = 6) -> list[int]:
    return [rng.randrange(r.FIRST_TEXT + 1, r.VOCAB) for _ in range(rng.randint(1, most))]


def random_conversation(seed: int, config: OmniConfig, kinds: str) -> r.Sample:
    """A prompt that ends where the answer begins.

    A system prompt or none, an earlier exchange or none, then a user's turn with media of `kinds`.
    """
    rng = random.Random(seed)
    ids = turn(SYSTEM, *random_text(rng)) if rng.random() < 0.5 else []
    if rng.random() < 0.5:
        ids += turn(USER, *random_text(rng)) + turn(ASSISTANT, *random_text(rng))
    sample = r.random_sample(seed, config.thinker, kinds) if kinds else r.Sample(ids=random_text(rng))
    sample.ids = [*ids, *turn(USER, *sample.ids), IM_START, ASSISTANT, NEW_LINE]
    return sample
