"""A checkpoint that one talks to: opened from a run or an exported folder, it answers in text and voice as they come.

    run=RUN | model=FOLDER --open_model--> Loaded: model, tokenizer, limits of media, what makes sound of codes
    Loaded, prompt --answer: models/speak.py, codec--> "text", wave [S], "text", wave [S], ...

The pieces of a stream, joined, are the whole: `launch.generate` with and without --stream write the same sound. What
makes the sound: `codec=` where it is given; else the model's own waveform decoder, if it has one that was trained; else
the codec of the run's recipe, which the Talker's codes are of.

Cost: as models/speak.py has it, and the codec's: 90 ms of one core a second of sound where it is decoded in packets.
Letters: S samples, G codebooks, T frames.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from data.codec import Codec, open_codec
from data.document import MediaLimits
from data.kmeans_codec import KMeansCodec
from data.tokenizer import IM_END, Tokenizer, load_tokenizer
from data.types import Batch
from launch.arguments import number, whole
from launch.loading import load_model
from launch.run_engine import open_run
from launch.weights import PRECISION
from models.generate import TextDecoding
from models.init import init_scale, init_tensor
from models.omni import Omni
from models.omni_config import OmniConfig
from models.sampling import Sampling
from models.say import speaker_id
from models.speak import SpeakSettings, Spoken, speak
from models.thinker import Thinker
from train.engines.local import LocalEngine
from train.errors import RecipeError
from train.feed import model_layout
from train.layout import ModelLayout

SAMPLE_RATE, FRAME_RATE = 24_000, 12.5
MOST = 65_536  # tokens, and frames: caches are made for the limit
MODEL = {"run": "", "checkpoint": "", "model": "", "codec": "", "levels": "", "dtype": "", "device": ""}
ANSWER = {
    "speaker": "",
    "temperature": "",
    "seed": "0",
    "max_seconds": "60",
    "max_new_tokens": "256",
    "packet_frames": "4",
}


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and all that an answer needs beside it."""

    name: str  # its folder
    omni: Omni
    tokenizer: Tokenizer
    layout: ModelLayout
    limits: MediaLimits
    codec: Codec | None  # None: the model's own decoder, or no sound at all
    device: torch.device

    @property
    def speakers(self) -> list[str]:
        """Names of its voices; none where it does not speak."""
        talker = self.omni.config.talker
        return sorted(talker.speaker_id) if talker is not None else []

    @property
    def sounds(self) -> bool:
        """Whether its answers can be heard."""
        return self.omni.talker is not None and (self.codec is not None or self.omni.code2wav is not None)

    @property
    def codebooks(self) -> int:
        """How many codebooks one may choose from; 0 where all are always decoded."""
        return self.codec.num_codebooks if isinstance(self.codec, KMeansCodec) else 0

    def at_levels(self, levels: int) -> Codec | None:
        """The codec, decoding the first `levels` codebooks. Raises RecipeError where it has not so many."""
        if not isinstance(self.codec, KMeansCodec) or not 1 <= levels <= self.codebooks:
            most = f"1 to {self.codebooks}" if self.codebooks else "nothing to choose: all codebooks are decoded"
            raise RecipeError(f"levels={levels}: {most}")
        codec = copy.copy(self.codec)  # shares the weights
        codec.levels = levels
        return codec


def open_model(given: Mapping[str, str], settings: Sequence[str]) -> Loaded:
    """The model of `given`, keys as in MODEL; `settings` KEY=VALUE change a run's recipe.

    Raises this project's errors.
    """
    if bool(given["run"]) == bool(given["model"]):
        raise RecipeError("give run=FOLDER of a training run, or model=FOLDER as launch.convert exports it")
    if given["dtype"] and given["dtype"] not in PRECISION:
        raise RecipeError(f"dtype must be {' or '.join(PRECISION)}, not {given['dtype']!r}")
    loaded = _open_run(given, settings) if given["run"] else _open_folder(given, settings)
    loaded.omni.train(False).requires_grad_(False)
    return loaded


def _open_folder(given: Mapping[str, str], settings: Sequence[str]) -> Loaded:
    if settings or given["checkpoint"]:
        raise RecipeError(f"{[*settings, 'checkpoint=...'][0]} is for run=FOLDER: an exported model has no recipe")
    folder, device = Path(given["model"]), given["device"] or "cpu"
    omni = load_model(folder, given["dtype"] or None, device)
    tokenizer = load_tokenizer(folder)
    if given["levels"] and not given["codec"]:
        raise RecipeError("levels= is for codec=FOLDER: the model's own decoder takes all codebooks")
    codec = _codec(omni, given["codec"], given, "codec") if given["codec"] else None
    layout = model_layout(omni.config, tokenizer)
    return Loaded(str(folder), omni, tokenizer, layout, MediaLimits(), codec, torch.device(device))


def _open_run(given: Mapping[str, str], settings: Sequence[str]) -> Loaded:
    device = [f"engine.device={given['device']}"] if given["device"] else []
    opened = open_run(Path(given["run"]), [*settings, *device])
    engine, _ = opened.engine(given["checkpoint"] or "latest")
    assert isinstance(engine, LocalEngine)
    omni = _whole(engine.objective.model)
    trained = omni.code2wav is not None and _is_trained(omni.code2wav, opened.recipe.seed)
    if not trained:
        omni.code2wav = None
    codec = None
    if given["codec"]:
        codec = _codec(omni, given["codec"], given, "codec")
    elif omni.talker is not None and not trained and opened.recipe.data.codec:
        codec = _codec(omni, opened.recipe.data.codec, given, "data.codec")
    elif given["levels"]:
        raise RecipeError("levels= is for a codec: the model's own decoder takes all codebooks")
    engine.close()
    if given["dtype"]:
        omni = omni.to(PRECISION[given["dtype"]])
    layout = model_layout(opened.model, opened.tokenizer)
    return Loaded(given["run"], omni, opened.tokenizer, layout, opened.recipe.data.limits, codec, opened.device)


def _whole(model: nn.Module) -> Omni:
    """A run's model as a whole one; a Thinker that was trained alone has neither Talker nor decoder."""
    if isinstance(model, Omni):
        return model
    if not isinstance(model, Thinker):
        raise RecipeError("this run is of an audio encoder alone: python -m launch.evaluate run=RUN asks it")
    with torch.device("meta"):
        omni = Omni(OmniConfig(model.config))
    omni.thinker = model
    return omni


def _is_trained(code2wav: nn.Module, seed: int) -> bool:
    """Whether a waveform decoder has other weights than a run of this seed begins with: random ones make noise.

    A recipe may have a decoder that only another one, or a later phase, trains.
    """
    config, name = code2wav.config, "code2wav.code_embedding.weight"
    weight: Tensor = code2wav.get_parameter("code_embedding.weight")
    first = torch.empty_like(weight, dtype=torch.float32)
    init_tensor(name, first, seed, init_scale(config, name))  # pyright: ignore[reportArgumentType]
    return not torch.equal(first.to(weight.dtype), weight)


def _codec(omni: Omni, folder: str, given: Mapping[str, str], key: str) -> Codec:
    """A codec whose codes are what this Talker says. Raises RecipeError for another one."""
    device = given["device"] or "cpu"
    codec = open_codec(folder, whole(given, "levels", 1, 64) if given["levels"] else None, device)
    talker = omni.config.talker
    if talker is None:
        raise RecipeError(f"{key}= is given, but this model has no talker to make codes")
    groups, size = talker.num_code_groups, talker.code_predictor.vocab_size
    if (codec.num_codebooks, codec.codebook_size) != (groups, size):
        raise RecipeError(
            f"{key}={folder} has {codec.num_codebooks} codebooks of {codec.codebook_size} codes, "
            f"and this Talker says {groups} of {size}"
        )
    return codec


def settings_of(loaded: Loaded, given: Mapping[str, str]) -> SpeakSettings:
    """Limits and sampling, keys as in ANSWER; without `temperature` the released model's. Raises RecipeError."""
    known, talker = loaded.speakers, loaded.omni.config.talker
    speaker = given["speaker"] if given["speaker"] in known else given["speaker"].lower()
    speaker = speaker or ("ethan" if "ethan" in known or not known else known[0])
    if talker is not None:
        speaker_id(talker, speaker)  # before the model has read anything
    frames = int(number(given, "max_seconds", 0.08, MOST / FRAME_RATE) * FRAME_RATE + 1e-6)
    limits = whole(given, "max_new_tokens", 1, MOST), frames, whole(given, "packet_frames", 1, MOST)
    if not given["temperature"]:
        return SpeakSettings(speaker, *limits)
    same = Sampling(number(given, "temperature", 0, 100), top_k=50)
    return SpeakSettings(speaker, *limits, text=same, first_code=same, residual_codes=same)


def answer(
    loaded: Loaded, prompt: Batch, settings: SpeakSettings, seed: int, codec: Codec | None = None
) -> Iterator[str | Tensor]:
    """The answer's text and sound (float32 [S] at 24 kHz, on the CPU), in the order in which they are made.

    A `codec` instead of the model's own; one that cannot decode in packets (Mimi) makes its sound at the end.
    """
    codec, omni = codec or loaded.codec, loaded.omni
    prompt = prompt.to(loaded.device)
    generator = torch.Generator(loaded.device).manual_seed(seed)
    stream = codec.stream() if isinstance(codec, KMeansCodec) else None
    codes: list[Tensor] = []
    tokens: list[int] = []
    shown = ""
    if omni.talker is not None:
        pieces = speak(omni, prompt, settings, generator=generator)
    else:
        pieces = _text_only(omni, prompt, settings, generator, loaded.tokenizer.id(IM_END))
    for piece in pieces:
        if piece.token is not None:
            tokens.append(piece.token)
            text = loaded.tokenizer.decode(tokens).rstrip("\ufffd")  # half a character waits for the rest
            yield text[len(shown) :]
            shown = text
        elif stream is not None and piece.codes_GT is not None:
            yield stream.push(piece.codes_GT.cpu())
        elif codec is not None and piece.codes_GT is not None:
            codes.append(piece.codes_GT.cpu())
        elif piece.wave_S is not None:
            yield piece.wave_S.float().cpu()
    if stream is not None:
        yield stream.finish()
    elif codec is not None and codes:
        yield codec.decode(torch.cat(codes, 1))


def _text_only(
    omni: Omni, prompt: Batch, settings: SpeakSettings, generator: torch.Generator, stop_id: int
) -> Iterator[Spoken]:
    decoding = TextDecoding(omni.thinker, prompt, settings.max_new_tokens)
    for _ in range(settings.max_new_tokens):
        ids_N = settings.text.choose(decoding.logits(), None, generator)
        if int(ids_N) == stop_id:
            return
        yield Spoken(token=int(ids_N))
        decoding.feed(ids_N)


@dataclass
class Timing:
    """How long an answer takes, in seconds from when the question lies there, its media still to be decoded."""

    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    first_packet: float | None = None
    sound: float = 0.0  # seconds of it so far

    def note(self, piece: str | Tensor) -> None:
        """A piece has come."""
        now = time.monotonic() - self.began
        if isinstance(piece, str):
            self.first_token = now if self.first_token is None else self.first_token
        elif len(piece):
            self.first_packet = now if self.first_packet is None else self.first_packet
            self.sound += len(piece) / SAMPLE_RATE

    def figures(self) -> dict[str, float]:
        """Those that there are; `factor` is the real-time factor: time taken over seconds of sound, to now."""
        found = {"total": time.monotonic() - self.began, "sound": self.sound}
        found |= {} if self.first_token is None else {"first_token": self.first_token}
        if self.first_packet is not None:
            found |= {"first_packet": self.first_packet, "factor": found["total"] / self.sound}
        return {name: round(value, 4) for name, value in found.items()}

    def report(self) -> str:
        """One line."""
        found = self.figures()
        if self.first_token is None:
            return "no answer"
        line = f"time to first token {found['first_token']:.2f} s"
        if self.first_packet is None:
            return f"{line}; no sound"
        return (
            f"{line}, to first packet {found['first_packet']:.2f} s; {self.sound:.1f} s of sound made in "
            f"{found['total']:.1f} s, real-time factor {found['factor']:.2f}"
        )
