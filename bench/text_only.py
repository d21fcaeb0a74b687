"""Does training on all modalities cost any text? Two runs that read as many text tokens, and their held-out loss.

    python -m bench.text_only [seeds=1] [KEY=VALUE of both recipes ...]

    data.demo --> outputs/text_data
      --train.py recipe=demo_text_only | demo_text_omni--> loss of unseen documents, nats a token

The Qwen3-Omni report claims for 30B that it does not; here the Thinker has 2.8 million parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data import demo
from train.main import main as train

DATA = Path("outputs/text_data")
CORPUS = [str(DATA), "--tasks", "text,transcription,picture_text,picture_voice,sound_text,film_text", "--workers", "2"]
CORPUS += ["--samples", "9000", "--heldout", "100", "--languages", "en,de,fr,ru,zh", "--vocab-size", "2048"]
RECIPES = ("demo_text_only", "demo_text_omni")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or that of the part that failed."""
    seeds = next((int(word[6:]) for word in argv if word.startswith("seeds=")), 1)
    settings = [word for word in argv if not word.startswith("seeds=")]
    if status := demo.main(CORPUS):
        return status
    found = []
    for seed in range(seeds):
        for recipe in RECIPES:
            run = Path(f"outputs/{recipe}_{seed}")
            if status := train([f"recipe={recipe}", f"run={run}", f"seed={seed}", *settings]):
                return status
        curves = [losses(Path(f"outputs/{recipe}_{seed}")) for recipe in RECIPES]
        print(f"seed {seed}\n  {'step':>6}{'text alone':>12}{'omni':>12}{'omni / text':>14}")
        for step, alone in curves[0].items():
            print(f"  {step:>6}{alone:>12.4f}{curves[1][step]:>12.4f}{curves[1][step] / alone:>14.4f}")
        found.append(curves[1][max(curves[1])] / curves[0][max(curves[0])])
    print(json.dumps({"bench": "text_only", "ratios": found, "met": all(abs(ratio - 1) <= 0.01 for ratio in found)}))
    return 0


def losses(run: Path) -> dict[int, float]:
    """Loss of the held-out documents by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if line.get("eval") == "text"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
