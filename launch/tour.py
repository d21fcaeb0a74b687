"""The whole curriculum on a laptop: a tiny omni model learns to hear, see, answer and speak three languages.

    python -m launch.tour [KEY=VALUE ...] [STAGE.KEY=VALUE ...]        settings of recipes/curriculum_demo.yaml

    espeak-ng, numpy --data.demo--> outputs/demo_data: pictures, films, sounds and speech of a small world
      --train.py recipe=curriculum_demo--> outputs/demo/{audio_encoder,foundation,stage1,stage2,stage3}
      --data.fit_codec, data.codes--> at the same time: speech codec, codes of the spoken answers
      --train.py recipe=curriculum_demo--> talker, sft
      --launch.evaluate suite=tts--> the Thinker of stage3, which never heard the Talker, writes down what it says
      --> a table of what was learnt, five wav files, and a report in HTML

Interrupted, it goes on where it was; what is done is kept. Remove outputs/demo or outputs/demo_data to make one again.
Two cores are used.
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
from launch import evaluate, report
from launch.arguments import guarded
from launch.tour_report import report as tables
from train.curriculum import load_curriculum
from train.errors import RecipeError
from train.main import main as train

DATA, RUN = Path("outputs/demo_data"), Path("outputs/demo")
LISTENER, MODEL = RUN / "stage3", RUN / "sft"
LANGUAGES = "en,de,zh"
CORPUS = [str(DATA), "--samples", "30000", "--heldout", "100", "--languages", LANGUAGES, "--vocab-size", "640"]
CORPUS += ["--tasks", ",".join(("transcription", *SMALL)), "--workers", "2"]
CODEC = ["codebooks=6", "codebook_size=256", "vocoder_steps=600", "max_seconds=1200", "answers=1"]
HELDOUT = f"shards={DATA}/sentences/*.tar,{DATA}/scenes/*.tar"
SPEECH = [f"run={MODEL}", "suite=tts", f"recogniser={LISTENER}", HELDOUT, "instruction=Transcribe.", "temperature=0"]
TEACH = ["recipe=curriculum_demo"]
SILENT = "to=stage3"  # these stages need no codec
CODEC_LOG = DATA / "codec.log"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, that of the part that failed, or 130 where it was stopped as asked."""
    began = time.monotonic()
    try:
        load_curriculum([*TEACH, *argv])  # a misspelt setting is told before a corpus is made
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"corpus in {DATA}: pictures, films, sounds and speech; English, German, Mandarin")
    if status := corpus.main(CORPUS):  # a corpus that is there already is kept
        return status
    with codec_beside() as codec:
        if status := train([*TEACH, SILENT, *argv], stopped=130):
            return status
        if codec.wait():
            print(f"error: the speech codec could not be made: {CODEC_LOG} says why", file=sys.stderr)
            return 2
    if status := train([*TEACH, *argv], stopped=130) or guarded(evaluate.evaluate, SPEECH):
        return status
    try:
        print(tables(MODEL, MODEL))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if status := guarded(report.report, [str(RUN), f"out={RUN}/report.html"]):
        return status
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
