"""Ask a model about sound, pictures and video, and hear its answer.

    python -m launch.speak model=FOLDER text="What is said here?" audio=question.flac out=answer.wav speaker=ethan

`audio=`, `image=` and `video=` may be given several times; they come before the text in the order given. The text of
the answer is printed as it comes, the voice is written to `out`; the last line says how long the first token and the
first packet of sound took. A model without a Talker answers by text alone. `temperature=0` makes all choices the
likeliest; otherwise `seed` repeats them.

A Talker that was trained on codes of a codec without a decoder in the model is heard through `codec=FOLDER`, with
`levels=N` through its first N codebooks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from data.codec import Codec, open_codec
from data.errors import DataError
from data.kmeans_codec import KMeansCodec
from data.tokenizer import IM_END, Tokenizer, load_tokenizer
from data.types import Batch
from launch.arguments import guarded, number, parse, whole
from launch.loading import load_model
from launch.prompt import KINDS, Medium, conversation
from models.generate import TextDecoding
from models.omni import Omni
from models.sampling import Sampling
from models.speak import SpeakSettings, Spoken, speak
from train.errors import RecipeError

SAMPLE_RATE, FRAME_RATE = 24_000, 12.5
MOST = 65_536  # tokens, and frames: caches are made for the limit
KNOWN = {
    "model": None,
    "text": "",
    "system": "",
    "out": "answer.wav",
    "speaker": "",
    "max_new_tokens": "256",
    "max_seconds": "60",
    "temperature": "",
    "seed": "0",
    "dtype": "",
    "device": "cpu",
    "video_sound": "true",
    "codec": "",
    "levels": "",
}


def ask(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    media = [Medium(kind, Path(path)) for kind, _, path in (word.partition("=") for word in argv) if kind in KINDS]
    given, rest = parse([word for word in argv if word.partition("=")[0] not in KINDS], KNOWN)
    if rest:
        raise RecipeError(f"unknown argument {rest[0]!r}")
    if not given["text"] and not media:
        raise RecipeError("give text=..., audio=FILE, image=FILE or video=FILE: there is nothing to answer")
    if any("\ud800" <= letter <= "\udfff" for letter in given["text"] + given["system"]):
        raise RecipeError("text= and system= must be UTF-8")
    out, seed, folder = _wav(given["out"]), whole(given, "seed", 0, 2**63 - 1), Path(given["model"])
    omni = load_model(folder, given["dtype"] or None, given["device"])
    codec = codec_of(omni, given)
    tokenizer = load_tokenizer(folder)
    sound = _flag(given, "video_sound")
    prompt = conversation(omni.config, tokenizer, given["text"], media, given["system"], sound).to(given["device"])
    print(f"{len(prompt.token_ids_T)} tokens of prompt", file=sys.stderr)
    answer(omni, tokenizer, prompt, settings_of(omni, given), out, seed, codec)


def codec_of(omni: Omni, given: dict[str, str]) -> Codec | None:
    """What makes sound of the Talker's codes where the model's own decoder does not; None where it does.

    Raises RecipeError for a codec whose codes are not what this Talker says.
    """
    if not given["codec"]:
        if given["levels"]:
            raise RecipeError("levels= is for codec=FOLDER: the model's own decoder takes all codebooks")
        return None
    codec = open_codec(given["codec"], whole(given, "levels", 1, 64) if given["levels"] else None, given["device"])
    talker = omni.config.talker
    if talker is None:
        raise RecipeError("codec= is given, but this model has no talker to make codes")
    groups, size = talker.num_code_groups, talker.code_predictor.vocab_size
    if (codec.num_codebooks, codec.codebook_size) != (groups, size):
        raise RecipeError(
            f"codec={given['codec']} has {codec.num_codebooks} codebooks of {codec.codebook_size} codes, "
            f"and this Talker says {groups} of {size}"
        )
    return codec


def settings_of(omni: Omni, given: dict[str, str]) -> SpeakSettings:
    """Limits and sampling from the command line; without `temperature` the released model's."""
    talker = omni.config.talker
    known = sorted(talker.speaker_id) if talker is not None else []
    speaker = given["speaker"].lower() or ("ethan" if "ethan" in known or not known else known[0])
    tokens = whole(given, "max_new_tokens", 1, MOST)
    frames = int(number(given, "max_seconds", 0.08, MOST / FRAME_RATE) * FRAME_RATE + 1e-6)
    if not given["temperature"]:
        return SpeakSettings(speaker, tokens, frames)
    same = Sampling(number(given, "temperature", 0, 100), top_k=50)
    return SpeakSettings(speaker, tokens, frames, text=same, first_code=same, residual_codes=same)


def answer(
    omni: Omni,
    tokenizer: Tokenizer,
    prompt: Batch,
    settings: SpeakSettings,
    out: Path,
    seed: int,
    codec: Codec | None = None,
) -> tuple[str, Tensor]:
    """Print the text as it comes, write the voice, say how long it took. Returns both.

    With a `codec` it makes the sound: packet by packet where it can, else at the end.
    """
    stream = codec.stream() if isinstance(codec, KMeansCodec) else None
    codes = []
    generator = torch.Generator(prompt.token_ids_T.device).manual_seed(seed)
    began, first_token, first_packet = time.monotonic(), 0.0, 0.0
    tokens: list[int] = []
    waves, shown = [torch.empty(0)], ""
    if omni.talker is not None:
        pieces = speak(omni, prompt, settings, generator=generator)
    else:
        pieces = _text_only(omni, prompt, settings, generator, tokenizer.id(IM_END))
    for piece in pieces:
        now = time.monotonic() - began
        if piece.token is not None:
            first_token = first_token or now
            tokens.append(piece.token)
            text = tokenizer.decode(tokens).rstrip("\ufffd")  # half a character waits for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
        elif codec is not None and piece.codes_GT is not None:
            if stream is None:
                codes.append(piece.codes_GT.cpu())
                continue
            waves.append(stream.push(piece.codes_GT.cpu()))
            first_packet = first_packet or time.monotonic() - began
        elif piece.wave_S is not None:
            first_packet = first_packet or now
            waves.append(piece.wave_S.float().cpu())
    if codec is not None:
        waves.append(stream.finish() if stream else codec.decode(torch.cat(codes, 1)) if codes else torch.empty(0))
        first_packet = first_packet or time.monotonic() - began
    total, wave_S = time.monotonic() - began, torch.cat(waves)
    print()
    report = f"time to first token {first_token:.2f} s" if tokens else "no answer"
    if len(wave_S):
        try:
            soundfile.write(out, wave_S.numpy(), SAMPLE_RATE)
        except (OSError, soundfile.LibsndfileError) as error:
            raise DataError(f"out={out}: cannot be written: {error}") from None
        seconds = len(wave_S) / SAMPLE_RATE
        report += f", to first packet {first_packet:.2f} s; {seconds:.1f} s of sound in {out}, made in {total:.1f} s"
    elif omni.code2wav is not None or codec is not None:
        report += f"; no sound, {out} was not written"
    print(report, file=sys.stderr)
    return shown, wave_S


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


def _wav(text: str) -> Path:
    """Where the voice goes; said before the model is loaded, not after the answer."""
    out = Path(text)
    if out.suffix.lower() not in (".wav", ".flac"):
        raise RecipeError(f"out={text}: it ends in .wav or .flac")
    if not out.parent.is_dir() or out.is_dir():
        raise RecipeError(f"out={text}: its folder does not exist, or it is one")
    return out


def _flag(given: dict[str, str], key: str) -> bool:
    if given[key] not in ("true", "false"):
        raise RecipeError(f"{key} must be true or false, not {given[key]!r}")
    return given[key] == "true"


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(ask, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
