"""launch.report: what it reads of runs, what it draws of them, and what it says where there is nothing to read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch import report, report_metrics
from launch.arguments import guarded
from launch.report_lineage import graph
from launch.report_read import open_run
from launch.report_samples import Budget
from tests.launch import report_kit as kit
from train.checkpoint.lock import acquire


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: one, two, and a curriculum."""
    folder = tmp_path_factory.mktemp("runs")
    kit.write_run(folder / "one", 1000)
    kit.write_run(folder / "two", 800, lr=2e-3, evals=False)
    kit.write_curriculum(folder / "journey")
    return folder


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of one that a test may damage."""
    return Path(shutil.copytree(runs / "one", tmp_path / "run"))


def made(capsys, *arguments: object) -> tuple[str, dict, str]:
    """The page, its data, and what was said on stderr."""
    out = Path(str(arguments[0])).parent / "page.html"
    assert guarded(report.report, [*map(str, arguments), f"out={out}"]) == 0
    said = capsys.readouterr()
    assert str(out) in said.out
    text = out.read_text(encoding="utf-8")
    block = re.search(r"<script type=application/json id=page-data>(.*?)</script>", text, re.S)
    assert block
    return text, json.loads(block[1]), said.err


def titles(data: dict) -> list[str]:
    return [chart["title"] for chart in data["charts"]]


def sections(text: str) -> list[str]:
    return re.findall(r"<section id=(\w+)>", text)


def test_a_run_with_everything(runs, capsys):
    text, data, said = made(capsys, runs / "one")
    assert said == ""
    assert sections(text) == (
        ["overview", "events", "loss", "optimizer", "evaluation", "speech", "answers", "experts", "data", "speed"]
        + ["checkpoints", "recipes", "about"]
    )
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert [curve["name"] for curve in charts["Loss by media"]["curves"]] == ["text", "audio", "audio+image", "video"]
    assert len(charts["Loss of each codebook"]["curves"]) == kit.BOOKS and charts["Loss of each codebook"]["ordered"]
    assert [curve["name"] for curve in charts["Learning rates"]["curves"]][-1] == "code predictor"
    assert charts["Time of a step"]["area"] and charts["Word error rate"]["percent"]
    waste = charts["Packing waste"]["curves"][0]
    assert waste["x"][0] == 10 and waste["y"][0] == pytest.approx(1 - 0.955 - 0.02 * kit.wave(10, 10), abs=1e-5)
    assert {curve["name"] for curve in charts["Mixture"]["curves"] if curve["dash"]} == {
        f"{name} (asked)" for name in kit.mixture(0)
    }
    assert "Learning rate" not in charts and "Other numbers" not in text  # rates are by part; all keys are known
    assert data["runs"][0]["bounds"] == [[0, "warm"], [200, "main"]]
    assert [event[1] for event in data["runs"][0]["events"]] == [event["event"] for event in kit.EVENTS]
    for fact in ("deepspeed, bf16, 8 processes, ep=2", "8 sequences of 1,024 tokens a step", "85.5k", "step-00001000"):
        assert fact in text, fact
    assert '<span class="badge done">' in text
    marked = re.findall(r"<code>(step-\d+)</code> <span class=\"kind\">(\w+)</span>", text)
    assert marked == [("step-00000500", "best"), ("step-00001000", "latest")]


def test_the_heatmap_says_what_the_lines_say(runs, capsys):
    _, data, _ = made(capsys, runs / "one")
    thinker, talker = data["heat"]
    assert thinker["names"] == ["all", *kit.MEDIA] and talker["names"] == ["all"]
    assert (thinker["layers"], thinker["experts"]) == (4, 16) and len(thinker["frames"]) == 20
    assert [frame["step"] for frame in thinker["frames"]] == list(range(50, 1001, 50))


def test_several_runs_are_overlaid_and_compared(runs, capsys):
    text, data, _ = made(capsys, runs / "one", runs / "two")
    charts = {chart["title"]: chart for chart in data["charts"]}
    for title in (
        "Training loss",
        "Loss of each codebook: code 3",
        "Learning rates: audio",
        "Word error rate: heldout",
    ):
        assert [(curve["name"], curve["run"]) for curve in charts[title]["curves"]] == [("one", 0), ("two", 1)], title
    assert {"Time of a step: one", "Time of a step: two"} <= set(charts)
    table = text.split("<section id=differences>")[1].split("</section>")[0]
    assert re.findall(r"<tr><td><code>(.*?)</code></td>", table) == [
        "phases.warm.steps",
        "phases.main.steps",
        "optim.lr",
    ]
    assert "<code>0.001</code>" in table and "<code>0.002</code>" in table and "18 other settings are the same" in table


def test_runs_of_one_name_are_told_apart(runs, tmp_path, capsys):
    again = shutil.copytree(runs / "one", tmp_path / "b" / "one")
    shutil.copytree(runs / "one", tmp_path / "a" / "one")
    _, data, _ = made(capsys, tmp_path / "a" / "one", again, again)
    assert [each["name"] for each in data["runs"]] == ["a/one", "b/one (2)", "b/one (3)"]


def test_a_curriculum_is_its_stages_one_after_the_other(runs, capsys):
    kit.beat(runs / "journey" / "stage2")
    text, data, _ = made(capsys, runs / "journey")
    assert data["runs"][0]["bounds"] == [[0, "audio_encoder"], [300, "stage1"], [700, "stage2"], [1200, "talker"]]
    loss = data["charts"][titles(data).index("Training loss")]["curves"][0]
    assert loss["x"] == sorted(loss["x"]) and loss["x"][-1] == 1400
    assert [loss["x"][place] for place, y in enumerate(loss["y"]) if y is None] == [300, 700, 1200]
    assert '<span class="badge running">running' in text.split("<nav")[0]
    picture = text.split("<svg class=lineage")[1].split("</svg>")[0]
    assert picture.count("class=edge") == 5 and 'g class="stage waiting"' in picture
    assert "outputs/c/stage1" in text and "1.5 h" in text


def test_stages_stand_beside_what_they_do_not_follow():
    stages = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": ["nowhere"]}
    picture = graph({name: {"state": "done", "after": after} for name, after in stages.items()})
    places = dict(zip(stages, re.findall(r"translate\((\d+) (\d+)\)", picture), strict=True))
    assert places["b"][0] == places["c"][0] and places["b"][1] != places["c"][1]
    assert places["a"][0] == places["e"][0] and int(places["d"][0]) > int(places["b"][0])


@pytest.mark.parametrize(
    "body",
    [
        "", "[]", '{"stages": 3}', '{"stages": {"a": 3}}', '{"stages": {"../one": {"state": "done"}}}',
        '{"stages": {"a": {"state": 5, "after": "b", "init": 7, "began": 1, "step": "x"}}}',
        '{"stages": {"a": {"after": ["b"]}, "b": {"after": ["a"]}}}',
        '{"stages": {"b": {"began": "2026-01-01", "ended": "2026-01-01T00:00Z"}}}',
    ],
)  # fmt: skip
def test_a_lineage_of_any_shape(run, body, capsys):
    (run / "lineage.json").write_text(body)
    made(capsys, run)


def test_old_lines_and_nothing_else(tmp_path, capsys):
    """A run of an early version, with no checkpoint, no recipe and no new key."""
    folder = tmp_path / "old"
    folder.mkdir()
    lines = [{"step": s, "loss": 3 / s, "mean_loss": 3 / s, "grad_norm": 1.0, "lr": 1e-3} for s in range(10, 100, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, data, said = made(capsys, folder)
    assert sections(text) == ["overview", "loss", "optimizer", "about"] and said == ""
    assert titles(data) == ["Training loss", "Learning rate", "Gradient norm"] and data["heat"] == []


def test_a_run_that_has_just_begun(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    text, data, _ = made(capsys, tmp_path / "new")
    assert sections(text) == ["overview", "about"] and data["charts"] == []


def test_a_curriculum_of_which_nothing_has_begun(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "lineage.json").write_text(
        '{"name": "new", "stages": {"a": {"state": "waiting", "after": []}}}'
    )
    text, _, _ = made(capsys, tmp_path / "new")
    assert "No stage has begun" in text and "class=lineage" in text


def test_numbers_that_nobody_knows_are_drawn_too(run, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "loss": 1.0, "spectral_loss": 2.5}\n')
    _, data, _ = made(capsys, run)
    assert titles(data)[-1] == "spectral loss"


def test_damaged_lines_are_counted_and_the_last_may_be_half(run, capsys):
    path = run / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    bad = [b'{"step": 20, "los\n', b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "4"}\n', b'{"step": true}\n']
    bad += [b'{"step": -1}\n', b"[" * 50_000 + b"\n", b'{"step": 1e400}\n']
    path.write_bytes(b"".join([*whole[:9], *bad, b"\n", *whole[9:], whole[5][:40]]))
    text, _, said = made(capsys, run)
    assert f"{path}: {len(bad)} damaged lines, which are left out" in said
    assert f"{len(bad)} damaged lines" in text and f"{len(whole)} lines of metrics" in text
    path.write_bytes(b"".join([*whole, whole[5][:40]]))
    assert made(capsys, run)[2] == ""


def test_values_of_any_kind_in_lines(run, capsys):
    odd = [
        {"loss": float("nan"), "mean_loss": float("inf"), "terms": {"code 0": None, "x": "y", "z": 10**400}},
        {"loss": "three", "modalities": {"text": 5, "audio": {"loss": []}}, "imbalance": {"slowest": "one"}},
        {"loss": [1], "expert_load": [None, "a"], "seconds_per_step": float("nan"), "times": [], "phase": 7},
        {"experts": {"thinker": {"all": [[1, 2], [3]]}, "talker": 5, "x": {"all": "no"}}},
        {"mixture": {"a": "b"}, "asked": 4},
        {"eval": ["set"], "wer": {"deep": {"er": 0.5}}, "words": 4},
        {"event": {"no": "kind"}, "text": ["no"]},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 1010 + place, **line}) + "\n" for place, line in enumerate(odd))
    text, data, said = made(capsys, run)
    assert "1 lines with a loss that is not finite" in said and "NaN" not in json.dumps(data)
    assert "Wer.deep.er" in titles(data) and [each["decoder"] for each in data["heat"]] == ["thinker", "talker"]


def test_long_runs_make_small_pages(tmp_path, capsys, monkeypatch):
    """60,000 lines, as of 600,000 steps; the one spike among them is still there."""
    folder = tmp_path / "long"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for place in range(60_000):
            loss = 99.5 if place == 41_234 else 2 + 0.1 * kit.wave(place)
            terms = ", ".join(f'"code {book}": {loss + book:.4f}' for book in range(4))
            file.write(f'{{"step": {10 * place + 10}, "mean_loss": {loss:.5f}, "terms": {{{terms}}}}}\n')
    text, data, _ = made(capsys, folder)
    assert len(text) < 500_000 and "thinned to about 1,500 points" in text
    curve = data["charts"][0]["curves"][0]
    assert len(curve["x"]) <= 1502 and max(curve["y"]) == 99.5 and curve["x"][curve["y"].index(99.5)] == 412_350
    assert curve["x"][-1] == 600_000
    counts = [sum(x // 100_000 == part for x in curve["x"]) for part in range(6)]
    assert min(counts) > 0.8 * max(counts)  # evenly over the run


def test_there_are_not_more_curves_than_one_can_read(run, monkeypatch, capsys):
    monkeypatch.setattr(report_metrics, "MAX_SERIES", 40)
    _, _, said = made(capsys, run)
    assert "numbers of too many names" in said


def state(folder: Path) -> str:
    return open_run(folder).state


def test_states(run):
    assert state(run) == "done"
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("main: {steps: 800}", "main: {steps: 900}"))
    assert state(run) == "stopped"  # its last step is saved
    kit.beat(run)
    assert state(run) == "running"
    kit.beat(run, ago=3600)
    assert state(run) == "stopped"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1050, "loss": 1.0}\n')
    assert state(run) == "failed"  # steps were lost
    lock = acquire(run / "checkpoints", 0, "launch", 1.0)
    assert state(run) == "running"
    os.close(lock)
    assert state(run) == "failed"


class Tags(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_what_runs_say_is_text(tmp_path, capsys):
    """Hostile names everywhere: no element comes of them, and nothing of the page is loaded from elsewhere."""
    evil = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>\u2028\ud800'
    folder = kit.write_run(tmp_path / "<img src=x>&'", 100)
    (folder / "recipe.yaml").write_text(json.dumps({"name": evil, "init": evil, "data": {"shards": [evil]}}))
    lines = [
        {"loss": 1.0, "mean_loss": 1.0, "terms": {evil: 1.0}, evil: 3.0, "phase": evil},
        {"event": evil, "text": evil},
        {"eval": evil, evil: 0.5},
        {"experts": {evil: {evil: [[0.5, 0.5]]}}},
        {"mixture": {evil: 1.0}},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 110 + place, **line}) + "\n" for place, line in enumerate(lines))
    examples = [{"key": evil, "language": evil, "reference": evil, "answer": evil + "!"}]
    (folder / "eval" / "x-step00000100.json").write_text(json.dumps({evil: [{evil: evil}], "examples": examples}))
    graph = {
        evil: {"state": "done", "after": []},
        "a": {"state": "done", "after": [evil], "engine": evil, "init": [evil]},
    }
    (folder / "lineage.json").write_text(json.dumps({"stages": graph}))
    for page in (made(capsys, folder)[0], (folder / "lineage.json").unlink() or made(capsys, folder)[0]):
        tags = Tags(page).found
        assert [attrs for tag, attrs in tags if tag == "script"] == [
            {"type": "application/json", "id": "page-data"},
            {},
        ]
        assert not [attrs for _, attrs in tags if any(name.startswith("on") or name == "style" for name in attrs)]
        urls = [attrs.get("src") or attrs.get("href") or "" for _, attrs in tags]
        assert all(url.startswith(("data:", "#")) for url in urls if url)
        policy = next(str(attrs["content"]) for _, attrs in tags if attrs.get("http-equiv"))
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_media_over_the_limit_are_named(run, capsys, monkeypatch):
    monkeypatch.setattr("launch.report_samples.MEDIUM_BYTES", 10_000)  # the sounds have 24 kB
    text, _, _ = made(capsys, run)
    assert text.count("<audio") == 0 and text.count("<img") == 3 and text.count("not in the page") == 9
    assert "at most 10 kB of one file" in text and "9 beyond that are only named" in text


def test_media_stop_at_the_limit_of_the_page():
    budget = Budget(left=100)
    assert [budget.takes(size) for size in (60, 60, 40, 1)] == [True, False, True, False]
    assert (budget.num_embedded, budget.num_left_out) == (2, 2)


def test_answers_worst_and_random(runs, capsys):
    text, _, _ = made(capsys, runs / "one")
    said = text.split("<section id=answers>")[1].split("</section>")[0]
    worst, chance = said.split("<caption>random</caption>")
    assert worst.count("two &amp; two") == 6 and "<b>" not in said  # all words wrong come before one of three
    assert "four white <mark>houses</mark>" in chance
    assert "24 answers, 33% right word by word" in said


@pytest.mark.parametrize(
    "name", ["eval/heldout-step00001000.json", "recipe.yaml", "checkpoints/step-00001000/manifest.json"]
)
@pytest.mark.parametrize(
    "body", ["{", "[1, 2]", '"x"', "\0", "3", '{"examples": 4, "rows": [{}], "tensors": [], "phases": 3}']
)
def test_files_of_any_content(run, name, body, capsys):
    (run / name).write_text(body)
    text, _, said = made(capsys, run)
    if body == "{":
        assert said.startswith(f"note: {run / name}: ") and len(said.splitlines()) == 1
        assert str(run / name) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of a run: python -m launch.report RUN"),
        (["nowhere"], "nowhere: no such folder; give the folder of a run"),
        (["{run}/eval"], "eval: has neither metrics.jsonl nor lineage.json"),
        (["{run}/metrics.jsonl"], "metrics.jsonl: no such folder"),
        (["{run}", "otu=x.html"], "unknown argument 'otu=x.html', did you mean 'out'?"),
        (["{run}", "out="], "unknown argument 'out='"),
        (["{run}", "out=nowhere/x.html"], "nowhere/x.html: there is no folder nowhere"),
        (["{run}", "out={run}"], "is a folder; name a file in it"),
    ],
)
def test_wrong_arguments_are_one_line(runs, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded(report.report, [word.format(run=runs / "one") for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_the_old_page(runs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.files.os.fsync", full)
    assert guarded(report.report, [str(runs / "two"), f"out={out}"]) == 2
    assert capsys.readouterr().err == f"error: out={out}: cannot be written: No space left on device\n"
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def test_a_folder_with_an_equals_sign_is_a_run(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "two", tmp_path / "lr=2")
    assert guarded(report.report, ["lr=2"]) == 0
    assert (tmp_path / "report.html").is_file()
