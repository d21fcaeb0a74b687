"""Ask a model about sound, pictures and video, and hear its answer, as it is made or whole.

    python -m launch.generate run=RUN --audio question.wav --text "What is said here?" --out answer.wav --stream
    python -m launch.generate model=FOLDER --image a.png --text "What is this?" --out - | aplay

RUN is a folder that training wrote, with checkpoint=latest or another one; FOLDER one of launch.convert export.
--key value, --key=value and key=value are the same. What is asked: --audio, --image, --video FILE and --text, as many
as you like, read in the order given; --system TEXT comes first. How it answers: --speaker NAME, --temperature T (0
takes the likeliest; without it the released model's sampling), --seed N, --max-seconds S, --max-new-tokens N.

The text is printed as it comes. --stream lets answer.wav grow packet by packet (--packet-frames N, 80 ms each); it is a
whole wav at every moment, and stays so after Ctrl-C. --out - streams a wav to standard output, --raw leaves its header
out (24 kHz, mono, 16 bits), and the text goes to standard error. The last line says how long the first token and the
first packet took, from when the question was there, and the real-time factor: time taken over seconds of sound.

--codec FOLDER makes the sound instead of the model's own decoder or the codec of the run's recipe, --levels N with its
first N codebooks. Others: --device, --dtype bf16|fp32, --video-sound false; a run takes settings of its recipe too.
docs/generate.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from data.types import Batch
from launch.answering import ANSWER, MODEL, Loaded, Timing, answer, open_model, settings_of
from launch.arguments import guarded, parse, whole
from launch.conversation import KINDS, Turn, conversation, read_medium
from launch.sound_file import GrowingFile, Pipe, Sink, WholeFile
from models.speak import SpeakSettings
from train.errors import RecipeError

FLAGS = ("stream", "raw", "video_sound")
KNOWN = MODEL | ANSWER | {"system": "", "out": "answer.wav", "stream": "false", "raw": "false", "video_sound": "true"}
ASKED = (*KINDS, "text")  # may be given several times


def generate(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    words = spelled(argv)
    asked = [(key, value) for key, equals, value in (word.partition("=") for word in words) if equals and key in ASKED]
    given, settings = parse([word for word in words if word.partition("=")[0] not in ASKED], KNOWN)
    if not any(value for _, value in asked):
        raise RecipeError("give text=..., audio=FILE, image=FILE or video=FILE: there is nothing to answer")
    if any("\ud800" <= letter <= "\udfff" for letter in given["system"] + "".join(value for _, value in asked)):
        raise RecipeError("text=, system= and names of files must be UTF-8")
    stream, raw, sound = (_flag(given, key) for key in FLAGS)
    sink, seed = sink_of(given["out"], stream, raw), whole(given, "seed", 0, 2**63 - 1)
    loaded = open_model(given, settings)
    how, timing = settings_of(loaded, given), Timing()
    parts = [value if key == "text" else read_medium(key, Path(value), loaded.limits) for key, value in asked]
    turns = [Turn("system", [given["system"]])] if given["system"] else []
    prompt = conversation(loaded.layout, loaded.limits, loaded.tokenizer, [*turns, Turn("user", parts)], sound)
    print(f"{len(prompt.token_ids_T)} tokens of prompt", file=sys.stderr)
    say(loaded, prompt, how, seed, sink, timing, given["out"])


def say(
    loaded: Loaded, prompt: Batch, how: SpeakSettings, seed: int, sink: Sink, timing: Timing, out: str
) -> tuple[str, float]:
    """Print the text and write the sound as they come, then how long it took. Returns the text and seconds of sound.

    Text goes to standard error where `out` is "-", and so do the figures always.
    """
    text, complete = "", False
    screen = sys.stderr if out == "-" else sys.stdout
    try:
        for piece in answer(loaded, prompt, how, seed):
            timing.note(piece)
            if isinstance(piece, Tensor):
                sink.write(piece)
                continue
            text += piece
            print(piece, end="", file=screen, flush=True)
        complete = True
    finally:
        sink.close(complete)
        print(file=screen)
        kept = timing.sound and (complete or not isinstance(sink, WholeFile))
        where = f"; written to {out}" if kept and out != "-" else "" if kept else f"; {out} was not written"
        stopped = "" if complete else "interrupted: "
        print(f"{stopped}{timing.report()}{where if loaded.sounds else ''}", file=sys.stderr)
    return text, timing.sound


def spelled(argv: Sequence[str]) -> list[str]:
    """--key value, --key=value and --flag as KEY=VALUE; other words as they are. Raises RecipeError."""
    words, found = iter(argv), []
    for word in words:
        if not word.startswith("--"):
            found.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals and key in FLAGS:
            value = "true"
        elif not equals:
            value = next(words, None)
            if value is None:
                raise RecipeError(f"{word}: give its value behind it")
        found.append(f"{key}={value}")
    return found


def sink_of(out: str, stream: bool, raw: bool) -> Sink:
    """Where the voice goes; said before the model is loaded, not after the answer. Raises RecipeError."""
    path = Path(out)
    if out == "-":
        return Pipe(raw)
    if raw and (not stream or path.suffix.lower() in (".wav", ".flac")):
        raise RecipeError(f"out={out}: raw=true is for out=- and, with stream=true, for names that end in .raw or .pcm")
    allowed = (".raw", ".pcm") if raw else (".wav",) if stream else (".wav", ".flac")
    if path.suffix.lower() not in allowed:
        why = ", because stream=true" if stream else ""
        raise RecipeError(f"out={out}: it ends in {' or '.join(allowed)}{why}; out=- is standard output")
    if not path.parent.is_dir() or path.is_dir():
        raise RecipeError(f"out={out}: its folder does not exist, or it is one")
    return GrowingFile(path, raw) if stream else WholeFile(path)


def _flag(given: dict[str, str], key: str) -> bool:
    if given[key] not in ("true", "false"):
        raise RecipeError(f"{key} must be true or false, not {given[key]!r}")
    return given[key] == "true"


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(generate, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
