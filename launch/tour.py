"""The whole path on a laptop: a tiny omni model learns to hear, see, answer and speak three languages.

    python -m launch.tour [KEY=VALUE ...]        settings of recipes/demo.yaml

    espeak-ng, numpy --data.demo--> outputs/demo_data: pictures, films, sounds and speech of a small world
      --train.py recipe=demo--> outputs/demo: audio encoder, alignment, multimodal pretraining    } at the same time
      --data.fit_codec, data.codes--> speech codec, codes of the spoken answers                   }
      --train.py recipe=demo_talker--> outputs/demo_talker: the Talker
      --launch.evaluate suite=tts--> the Thinker, which never heard the Talker, writes down what it says
      --> a table of what was learnt, and five wav files

Interrupted, it goes on where it was; what is done is kept. Remove outputs/demo, outputs/demo_talker or
outputs/demo_data to make one again. Two cores are used.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data import demo as corpus
from data.demo_small import SMALL
from data.errors import DataError
from launch import evaluate
from launch.arguments import guarded
from launch.tour_report import report
from train.errors import RecipeError
from train.main import main as train
from train.recipe import load_recipe

DATA, THINKER, TALKER = Path("outputs/demo_data"), Path("outputs/demo"), Path("outputs/demo_talker")
LANGUAGES = "en,de,zh"
CORPUS = [str(DATA), "--samples", "30000", "--heldout", "100", "--languages", LANGUAGES, "--vocab-size", "640"]
CORPUS += ["--tasks", ",".join(("transcription", *SMALL)), "--workers", "2"]
CODEC = ["codebooks=6", "codebook_size=256", "vocoder_steps=600", "max_seconds=1200", "answers=1"]
HELDOUT = f"shards={DATA}/sentences/*.tar,{DATA}/scenes/*.tar"
SPEECH = [f"run={TALKER}", "suite=tts", f"recogniser={THINKER}", HELDOUT, "instruction=Transcribe.", "temperature=0"]
TEACH = ["recipe=demo_talker"]
CODEC_LOG = DATA / "codec.log"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, that of the part that failed, or 130 where it was stopped as asked."""
    began = time.monotonic()
    try:
        load_recipe(["recipe=demo", *argv])  # a misspelt setting is told before a corpus is made
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"corpus in {DATA}: pictures, films, sounds and speech; English, German, Mandarin")
    if status := corpus.main(CORPUS):  # a corpus that is there already is kept
        return status
    with codec_beside() as codec:
        if status := train(["recipe=demo", *argv], stopped=130):
            return status
        if codec.wait():
            print(f"error: the speech codec could not be made: {CODEC_LOG} says why", file=sys.stderr)
            return 2
    if status := train(TEACH, stopped=130) or guarded(evaluate.evaluate, SPEECH):
        return status
    try:
        print(report(THINKER, TALKER))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"took {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


@contextmanager
def codec_beside() -> Iterator[subprocess.Popen[bytes]]:
    """Make codec and codes in a process of its own; what is done is kept. It ends with the block at the latest."""
    command = [sys.executable, "-m", "launch.own_codec", str(DATA), *CODEC]
    with CODEC_LOG.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
