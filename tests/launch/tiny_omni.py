"""A folder with a tiny whole model of random weights and its tokenizer, as `launch.convert` would leave it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from data.tokenizer import ROLES, Tokenizer, train_tokenizer
from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from models.hf import released_state
from models.hf_config import omni_to_released
from models.init import init_weights
from models.omni import Omni
from models.omni_config import Code2WavConfig, CodePredictorConfig, OmniConfig, TalkerConfig

CODES, GROUPS = 64, 4
CONTROL = {  # of the text tokenizer, by field
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "tts_pad_token_id": "<tts_pad>",
    "tts_bos_token_id": "<tts_text_bos>",
    "tts_eos_token_id": "<tts_text_eod>",
    "audio_start_token_id": "<|audio_start|>",
    "audio_end_token_id": "<|audio_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def tiny_tokenizer() -> Tokenizer:
    tokenizer = train_tokenizer(["hello world, what is said here? one two three four"] * 3, 400)
    assert all(len(tokenizer.encode(word)) == 1 for word in (*ROLES, "\n"))  # or the Talker reads shifted turns
    return tokenizer


def tiny_config(tokenizer: Tokenizer) -> OmniConfig:
    text = TextConfig(tokenizer.vocab_size, 64, 3, 4, 2, 16, 8, 2, 32, mrope_section=(4, 2, 2))
    audio = AudioConfig(32, 2, 2, 64, 64, downsample_hidden_size=8)
    vision = VisionConfig(2, 32, 64, 2, 64, (0, 1))
    media = (tokenizer.id(f"<|{kind}_pad|>") for kind in ("audio", "image", "video"))
    audio_id, image_id, video_id = media
    thinker = ThinkerConfig(text, audio, audio_id, vision, image_id, video_id)
    talk = TextConfig(
        CODES + 1024, 48, 2, 4, 2, 16, 8, 2, 24, mrope_section=(4, 2, 2), shared_expert_intermediate_size=40
    )
    predictor = CodePredictorConfig(CODES, 48, 96, 2, 4, 2, 16, GROUPS)
    talker = TalkerConfig(talk, predictor, 64, 2, *range(CODES, CODES + 6), speaker_id={"ethan": CODES + 10})
    wave = Code2WavConfig(CODES, GROUPS, 32, 64, 2, 2, 2, decoder_dim=32, sliding_window=8)
    ids = {field: tokenizer.id(name) for field, name in CONTROL.items()}
    roles = {f"{role}_token_id": tokenizer.encode(role)[0] for role in ROLES}
    return OmniConfig(thinker, talker, wave, **ids, **roles)


def write_omni(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    omni = Omni(tiny_config(tokenizer))
    init_weights(omni, seed=0)
    assert omni.talker is not None and omni.config.talker is not None
    omni.talker.codec_head.weight.data[omni.config.talker.codec_eos_token_id] = 0  # it talks to its limit
    folder.mkdir(parents=True)
    weights = {name: tensor.contiguous().clone() for name, tensor in released_state(omni)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(omni_to_released(omni.config)))
    tokenizer.save(folder)
    return folder
