"""The command data.inspect: files it cannot write, early ends, and the steps of a recipe."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.corpus import Corpus
from data.inspect import main, read_step
from data.plan import Plan
from data.tokenizer import load_tokenizer
from tests.run_kit import TINY, write_corpus
from train.feed import open_feed
from train.opening import model_config
from train.recipe import as_yaml, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PHASES = "phases={first: {steps: 3}, second: {steps: 4, mixture: {weights: {speech: 3, text: 1}}}}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write to, with the corpus beside it, where the command runs."""
    (tmp_path / "train").symlink_to(made / "train")
    (tmp_path / "tokenizer").symlink_to(made / "tokenizer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(*settings: str) -> list[str]:
    """A recipe of a tiny model on the corpus, two phases, the second with a mixture of its own."""
    sizes = [
        f"model.{part}.{key}={json.dumps(value)}" for part, values in TINY.items() for key, value in values.items()
    ]
    data = ["shards=[train/*.tar]", "tokenizer=tokenizer", "sequence_length=96", "sequences_per_step=3", "window=32"]
    return ["recipe=transcribe", *sizes, *(f"data.{word}" for word in data), PHASES, *settings]


def documents(shown: str) -> list[tuple[int, str, int]]:
    """(number in its sequence, key, tokens) of every document that a step's tables list."""
    rows = re.findall(r"^ +(\d+)  (\S+\.tar:\S+) +\d+ +(\d+) ", shown, re.MULTILINE)
    return [(int(number), key, int(tokens)) for number, key, tokens in rows]


def refuse(*_: object) -> None:
    """Open nothing."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# Files


@pytest.mark.parametrize("option", ["--json", "--page", "--picture"])
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("none/x", "none/x: there is no folder none"),
        ("train", "train: is a folder; name a file in it"),
        ("tokenizer/tokenizer.json/x", "there is no folder tokenizer/tokenizer.json"),
        ("x" * 300, "cannot be written: File name too long"),
        ("/dev/null", "/dev/null: is a device or a pipe; name a file"),
        ("train/shard-000000.tar", "would replace a shard; name another file"),
        ("locked/x", "locked/x: cannot be written: Permission denied"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_counted(
    folder: Path, option: str, path: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.startswith("locked"):
        (folder / "locked").mkdir()
        monkeypatch.setattr("data.files.open", refuse, raising=False)  # root may write everywhere
    monkeypatch.setattr("data.inspect.survey", lambda *_, **__: pytest.fail("the corpus was counted"))
    assert main(["train/*.tar", "tokenizer=tokenizer", "--pack", "0", option, path]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and why in err and err.count("\n") == 1 and not out


def test_the_check_of_a_file_leaves_it_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.json").write_text("old")
    assert main(["none.tar", "--json", "x.json"]) == 2
    assert (folder / "x.json").read_text() == "old" and len(list(folder.iterdir())) == 3
    assert main(["train/*.tar", "--json", "x.json", "--page", "./x.json"]) == 2
    assert "--page x.json: is the file of --json too; name another" in capsys.readouterr().err
    assert main(["train/*.tar", "--picture", "x.png"]) == 2
    assert "--picture x.png: is of a step; name it with --pack STEP" in capsys.readouterr().err


# Early ends


def test_a_reader_that_leaves_costs_no_file(folder: Path) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)  # as `| head` does when it has enough
    arguments = [f"{folder}/train/*.tar", "--page", f"{folder}/x.html", "--json", f"{folder}/x.json"]
    command = [sys.executable, "-m", "data.inspect", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=ours, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folder / "x.json").read_text())["shards"] == 3
    assert (folder / "x.html").read_bytes().endswith(b"</html>\n")


def test_letters_that_the_terminal_lacks_cost_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from data.terminal import say

    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    say("a \u6e90 b")
    assert terminal.buffer.getvalue() == b"a ? b\n"  # type: ignore[attr-defined]


def test_a_long_walk_has_a_bar_and_packs_no_window_twice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, pack_window = [], Plan._pack_window

    def counted(self: Plan, mark):
        packed.append(mark.state.window)
        return pack_window(self, mark)

    monkeypatch.setattr(Plan, "_pack_window", counted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sizes = ["--sequence-length", "96", "--sequences-per-step", "2", "--window", "20"]
    assert main(["train/*.tar", "tokenizer=tokenizer", "--pack", "200", *sizes]) == 0
    out, err = capsys.readouterr()
    assert "plan:   0%" in err and "| 0/200 [" in err and "read:   0%" in err
    assert packed == list(range(len(packed))) and len(packed) > 20
    assert "step 200: 2 sequences of 96 tokens, seed 0" in out


def test_ctrl_c_in_a_long_walk_is_one_line(folder: Path) -> None:
    words = [f"{folder}/train/*.tar", f"tokenizer={folder}/tokenizer", "--pack", "1000000000", "--window", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data.inspect", *words, "--json", f"{folder}/x.json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline().startswith("shards")  # it counts, and walks next
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted: what is written is whole\n")
    assert not (folder / "x.json").exists()


def test_ctrl_c_waits_until_a_sequence_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def interrupted(self, pack):
        signal.raise_signal(signal.SIGINT)
        read.append(pack)

    monkeypatch.setattr("data.reader.Reader.batch", interrupted)
    assert main(["train/*.tar", "tokenizer=tokenizer", "--pack", "0"]) == 130
    assert len(read) == 1 and capsys.readouterr().err == "interrupted: what is written is whole\n"


# Steps of a recipe


@pytest.mark.parametrize("step", [0, 2, 3, 6])
def test_a_step_of_a_recipe_is_what_training_reads(folder: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = recipe_of("data.speeds=[0.8,1.0]", "seed=3")
    assert main([*words, "--pack", str(step), "--picture", "x.png"]) == 0
    shown = capsys.readouterr().out
    recipe = load_recipe(words)
    tokenizer = load_tokenizer("tokenizer")
    course = open_feed(recipe, tokenizer, model_config(recipe, tokenizer)).courses["first" if step < 3 else "second"]
    packs = course.plan.step(step % 3 if step < 3 else step - 3)
    corpus, expected = Corpus.open(["train/*.tar"]), []
    for pack in packs:
        keys = [corpus.name(sample) for sample in pack.samples.tolist()]
        expected += zip(range(1, len(keys) + 1), keys, pack.tokens.tolist(), strict=True)
    assert documents(shown) == expected and len(packs) == 3
    assert f"step {step}, phase {'first' if step < 3 else 'second'}: 3 sequences of 96 tokens, seed 3" in shown
    for pack in packs:
        works = (pack.work, pack.audio_work, pack.vision_work)
        assert "work in decoder tokens: {:,.0f} decoder, {:,.0f} audio encoder, {:,.0f} vision".format(*works) in shown
    assert "images become  no tokens: the model has no vision encoder" in shown


def test_a_run_shows_its_own_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(as_yaml(load_recipe(recipe_of())))
    shown = []
    for words in (recipe_of("data.window=20"), ["data.window=20", "run=run"]):
        assert main([*words, "--pack", "4"]) == 0
        shown.append(documents(capsys.readouterr().out))
    assert shown[0] == shown[1] and shown[0]
    assert (folder / "pack-4.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipe=demmo"], "unknown recipe 'demmo', did you mean 'demo'?"),
        (["run=none"], "none/recipe.yaml: no such file; give the folder of a run"),
        (["recipe=transcribe", "train/*.tar"], "cannot read 'train/*.tar': settings are KEY=VALUE"),
        (["recipe=transcribe", "data.window=x"], "data.window"),
        (["recipe=transcribe", "tokenizer=tokenizer"], "unknown setting 'tokenizer'"),
        ([*recipe_of(), "--pack", "7"], "--pack 7: the recipe's steps are 0 to 6"),
        ([*recipe_of(), "--pack", "0", "--seed", "1"], "--seed: a recipe says it itself; change it by seed=VALUE"),
        ([*recipe_of(), "--window", "9"], "--window: a recipe says it itself; change it by data.window=VALUE"),
        ([*recipe_of("model.text.vocab_size=10"), "--pack", "0"], "model.text.vocab_size=10 is less than"),
        ([*recipe_of("data.sequence_length=9"), "--pack", "0"], "above data.sequence_length=9"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line(
    folder: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert not list(folder.glob("*.png"))


def test_a_step_is_read_from_the_plan(folder: Path) -> None:
    from argparse import Namespace

    from data.inspect import view_recipe

    options = Namespace(arguments=recipe_of(), pack=5, seed=None, sequence_length=None, sequences_per_step=None)
    view = view_recipe(Namespace(**vars(options), window=None, too_long=None))
    assert view.step and view.step.step == 2
    packs, batches = read_step(view.step)
    assert [sum(batch.doc_lengths) for batch in batches] == [int(pack.tokens.sum()) for pack in packs]
