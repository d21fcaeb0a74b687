"""The demo's corpus: short sentences in five languages, spoken by espeak-ng, as shards.

    python -m data.demo FOLDER [--clips 4000] [--heldout 20] [--languages en,de,fr,ru,zh] [--seed 0]

    grammar --> sentences, voice, rate, pitch --espeak-ng--> flac, 16 kHz --> FOLDER/{train,voices,sentences}
                texts of train --> FOLDER/tokenizer

`train` has neither the voices of `voices` nor the sentences of `sentences`, so the two say how well the model
does on a stranger and on unheard sentences. Cost: about 6 ms a clip, indexing included; 4,000 clips are
80 MB. Made twice, the texts are the same and the sound nearly so: espeak-ng's breath noise differs a little.
"""

import argparse
import io
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from data.audio import SAMPLE_RATE
from data.chat import rendered_texts, transcription
from data.errors import DataError
from data.espeak import Synthesizer
from data.shards import SampleRecord, write_shards
from data.tokenizer import train_tokenizer

SPLITS = ("train", "voices", "sentences")
TRAIN_VARIANTS = ("", "f1", "f2", "f3", "f5", "m1", "m3", "m4", "m6", "m7", "Annie", "Denis")
HELDOUT_VARIANTS = ("f4", "m2", "steph")
INSTRUCTIONS = ("Transcribe.", "Write down what you hear.", "What is said?")
VOCAB_SIZE = 640


@dataclass(frozen=True)
class Grammar:
    """Counted, coloured animals in one language: "four red dogs"."""

    voice: str  # espeak-ng's name of the language
    numbers: tuple[str, ...]
    colours: tuple[str, ...]
    animals: tuple[str, ...]
    sentence: str = "{number} {colour} {animal}"
    counted: str = "{number} {animal}"
    coloured: str = "{colour} {animal}"

    def sentences(self) -> list[str]:
        """Every whole sentence, in a fixed order."""
        return self._fill(self.sentence)

    def phrases(self) -> list[str]:
        """Every pair of words of a sentence."""
        return self._fill(self.counted) + self._fill(self.coloured)

    def words(self) -> list[str]:
        """Every word alone."""
        return [*self.numbers, *self.colours, *self.animals]

    def _fill(self, template: str) -> list[str]:
        choices = itertools.product(self.numbers, self.colours, self.animals)
        return list(dict.fromkeys(template.format(number=n, colour=c, animal=a) for n, c, a in choices))


# Numbers and cases are chosen so that one form of each word fits every sentence.
GRAMMARS = {
    "en": Grammar(
        voice="en-us",
        numbers=("two", "three", "four", "five", "six"),
        colours=("red", "blue", "green", "white"),
        animals=("dogs", "cats", "birds", "horses"),
    ),
    "de": Grammar(
        voice="de",
        numbers=("zwei", "drei", "vier", "fünf", "sechs"),
        colours=("rote", "blaue", "grüne", "weiße"),
        animals=("Hunde", "Katzen", "Vögel", "Pferde"),
    ),
    "fr": Grammar(
        voice="fr",
        numbers=("deux", "trois", "quatre", "cinq", "six"),
        colours=("rouges", "bleus", "verts", "blancs"),
        animals=("chiens", "chats", "poissons", "lapins"),
        sentence="{number} {animal} {colour}",
        coloured="{animal} {colour}",
    ),
    "ru": Grammar(
        voice="ru",
        numbers=("пять", "шесть", "семь", "восемь", "девять"),
        colours=("красных", "синих", "зелёных", "белых"),
        animals=("собак", "котов", "птиц", "лошадей"),
    ),
    "zh": Grammar(
        voice="cmn",
        numbers=("两", "三", "四", "五", "六"),
        colours=("红", "蓝", "绿", "白"),
        animals=("狗", "猫", "鸟", "兔"),
        sentence="{number}只{colour}{animal}",
        counted="{number}只{animal}",
        coloured="{colour}{animal}",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What a corpus is made from; the same settings make the same sentences, voices and order."""

    clips: int = 4000
    heldout: int = 20  # clips of each language in `voices`, and as many in `sentences`
    languages: tuple[str, ...] = tuple(GRAMMARS)
    seed: int = 0
    vocab_size: int = VOCAB_SIZE


@dataclass(frozen=True)
class Utterance:
    """One clip to be spoken."""

    key: str
    split: str
    language: str
    text: str
    variant: str
    rate: int  # words a minute
    pitch: int  # 0 to 99
    instruction: str


def plan_utterances(settings: Settings) -> list[Utterance]:
    """Everything that will be spoken, languages mixed evenly."""
    if not settings.languages or settings.clips < len(settings.languages) or settings.heldout < 1:
        raise DataError("the demo needs a language, a training clip of each and at least 1 held-out clip")
    unknown = [language for language in settings.languages if language not in GRAMMARS]
    if unknown:
        raise DataError(f"--languages {','.join(unknown)}: unknown; known are {', '.join(GRAMMARS)}")
    by_language = [_plan_language(settings, language) for language in settings.languages]
    rows = itertools.chain.from_iterable(itertools.zip_longest(*by_language))
    return [utterance for utterance in rows if utterance is not None]


def make_corpus(folder: Path, settings: Settings, quiet: bool = False) -> dict[str, int]:
    """Synthesise, write and index the corpus in `folder`; returns the clips of each split.

    Does nothing where the folder already holds it. It appears under its name only when whole.
    """
    stamp = folder / "corpus.json"
    if stamp.is_file():
        made = json.loads(stamp.read_text(encoding="utf-8"))
        if made.get("settings") == json.loads(json.dumps(asdict(settings))):
            return made["clips"]
    if folder.exists():
        raise DataError(f"{folder}: exists and holds something else; delete it or choose another folder")
    utterances = plan_utterances(settings)
    train_messages = [_messages(u) for u in utterances if u.split == "train"]
    tokenizer = train_tokenizer(itertools.chain(*map(rendered_texts, train_messages)), settings.vocab_size)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = {}
    with Synthesizer(settings.seed) as espeak, tqdm(total=len(utterances), unit=" clips", disable=quiet) as bar:
        for split in SPLITS:
            bar.set_description(f"speech: {split}")
            chosen = [u for u in utterances if u.split == split]
            report = write_shards(_speak_all(espeak, chosen, bar), partial / split, tokenizer)
            if report.left_out:
                raise DataError(f"espeak-ng made unusable speech: {report.left_out[0]}")
            counts[split] = report.num_samples
    tokenizer.save(partial / "tokenizer")
    content = {"settings": asdict(settings), "clips": counts}
    (partial / stamp.name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)
    return counts


def _plan_language(settings: Settings, language: str) -> list[Utterance]:
    rng = np.random.default_rng((settings.seed, list(GRAMMARS).index(language)))
    grammar = GRAMMARS[language]
    sentences = rng.permutation(grammar.sentences()).tolist()
    unheard, heard = sentences[: settings.heldout], sentences[settings.heldout :]
    if not heard:
        raise DataError(f"--heldout {settings.heldout}: must be below the {len(sentences)} sentences of {language}")
    short = rng.permutation(grammar.phrases()).tolist(), rng.permutation(grammar.words()).tolist()
    texts = {
        "train": (heard[::2], heard[1::2] or heard, *short),  # short ones let the model find which sound is which word
        "voices": (heard,),
        "sentences": (unheard,),
    }
    place = settings.languages.index(language)
    sizes = {
        "train": settings.clips // len(settings.languages) + (place < settings.clips % len(settings.languages)),
        "voices": settings.heldout,
        "sentences": settings.heldout,
    }
    utterances = []
    for split, size in sizes.items():
        variants = HELDOUT_VARIANTS if split == "voices" else TRAIN_VARIANTS
        for i in range(size):
            turn, kind = divmod(i, len(texts[split]))
            choices = texts[split][kind]
            utterance = Utterance(
                key=f"{split}-{language}-{i:06d}",
                split=split,
                language=language,
                text=choices[turn % len(choices)],
                variant=variants[int(rng.integers(len(variants)))],
                rate=int(rng.integers(140, 211)),
                pitch=int(rng.integers(30, 71)),
                instruction=INSTRUCTIONS[int(rng.integers(len(INSTRUCTIONS)))],
            )
            utterances.append(utterance)
    return utterances


def _speak_all(espeak: Synthesizer, utterances: list[Utterance], bar: tqdm) -> Iterator[SampleRecord]:
    for utterance in utterances:
        voice = GRAMMARS[utterance.language].voice
        speaker = f"{voice}+{utterance.variant}" if utterance.variant else voice
        wave_S = espeak.speak(utterance.text, speaker, utterance.rate, utterance.pitch)
        wave_S = soxr.resample(wave_S, espeak.sample_rate, SAMPLE_RATE)
        flac = io.BytesIO()
        soundfile.write(flac, wave_S, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        bar.update()
        yield SampleRecord(
            key=utterance.key,
            messages=_messages(utterance),
            audio={"flac": flac.getvalue()},
            language=utterance.language,
            source=f"demo-{utterance.split}",
            speaker=speaker,
        )


def _messages(utterance: Utterance) -> list[dict]:
    return transcription("flac", utterance.instruction, utterance.text)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser("python -m data.demo", description="Make the demo's speech corpus.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=Settings.clips, help="training clips, all languages together")
    parser.add_argument("--heldout", type=int, default=Settings.heldout, help="clips a language in each held-out split")
    parser.add_argument("--languages", default=",".join(GRAMMARS), help="comma-separated codes")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--vocab-size", type=int, default=Settings.vocab_size)
    options = parser.parse_args(arguments)
    languages = tuple(options.languages.split(","))
    settings = Settings(options.clips, options.heldout, languages, options.seed, options.vocab_size)
    try:
        counts = make_corpus(options.folder, settings)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: " + ", ".join(f"{count} clips in {split}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
