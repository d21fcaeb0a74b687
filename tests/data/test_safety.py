"""Nothing in a shard, its index or a list of shards is ever run, unpickled or followed out of the tar."""

import ast
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus import Corpus
from data.costs import Sizing
from data.errors import DataError
from data.index import build_index
from data.plan import Plan, PlanSettings
from data.reader import Reader
from tests.data.corpus_kit import members_of, spoken, tokenizer, write_tar, written
from tests.data.layouts import layout_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tokenizer()


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def canaries(path: Path) -> dict[str, bytes]:
    """Members that run code, each creating `path`, where a loader decodes by extension."""
    pickled = pickle.dumps(Canary(path))
    code = f"open({str(path)!r}, 'w').close()".encode()
    return {f"a.{name}": pickled for name in ("pkl", "pickle", "pth", "pt", "pyd", "npy", "ckpt", "bin", "cls")} | {
        "a.py": code,
        "a.so": code,
        "a.yaml": f"!!python/object/apply:pathlib.Path.touch [{path}]".encode(),
    }


def test_canaries_work(tmp_path: Path) -> None:
    pickle.loads(canaries(tmp_path / "sung")["a.pkl"])
    assert (tmp_path / "sung").exists()


def test_members_that_carry_code_are_dead_weight(tmp_path: Path) -> None:
    canary = tmp_path / "sung"
    tar = write_tar(tmp_path / "x.tar", members_of(spoken("a")) | canaries(canary))
    build_index(tar, TOKENIZER)
    corpus = Corpus.open([str(tar)])
    layout = layout_of(TOKENIZER)
    plan = Plan(corpus, PlanSettings(500, 1), seed=0, sizing=Sizing(layout))
    batch = Reader(corpus, TOKENIZER, seed=0, layout=layout).batch(plan.step(0)[0])
    assert batch.keys == ("x.tar:a",) and not canary.exists()
    assert set(corpus.index(0).read(0)) == {"json", "wav"}  # the others are not even indexed


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pth", "npy", "flac.pkl", "", "../../etc/passwd", "/etc/x.wav"])
def test_audio_of_another_kind_is_not_opened(tmp_path: Path, extension: str) -> None:
    canary = tmp_path / "sung"
    asks = spoken("a", kind="wav").to_json().replace(b'"audio": "wav"', f'"audio": "{extension}"'.encode())
    members = members_of(written("b")) | {"a.json": asks} | canaries(canary)
    index = build_index(write_tar(tmp_path / "x.tar", members), TOKENIZER)
    assert index.num_samples == 1 and not canary.exists()
    (line,) = index.about["left_out"]
    assert line.startswith(f'x.tar:a: audio names member "{extension}"; known are wav, flac, ')


@pytest.mark.parametrize("url", ["pipe:touch {}", "|touch {}", "-touch {}", "file:///x.tar", "gs://bucket/x.tar"])
def test_commands_and_other_addresses_are_not_shards(tmp_path: Path, url: str) -> None:
    canary = tmp_path / "sung"
    url = url.format(canary)
    with pytest.raises(DataError, match="data.shards: "):
        Corpus.open([url])
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../x.json", "a/../../x.json", "/etc/x.json", "..", "a\\..\\x.json"])
def test_paths_out_of_the_tar_are_refused(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "x.tar", members_of(written("a")) | {name: b"{}"})
    with pytest.raises(DataError) as caught:
        build_index(tar, TOKENIZER)
    assert str(caught.value) == f"{tar}: refused: member {name!r} has a path outside the shard"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    tar = write_tar(tmp_path / "x.tar", members_of(written("a")))
    with tarfile.open(tar, "a") as file:
        info = tarfile.TarInfo("b.wav")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)
    with pytest.raises(DataError) as caught:
        build_index(tar, TOKENIZER)
    assert str(caught.value) == f"{tar}: refused: member 'b.wav' is a link or a device, not a file"


def test_a_clip_that_claims_a_billion_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(16_000), 16_000, subtype="PCM_16")
    payload = bytearray(path.read_bytes())
    fields = int.from_bytes(payload[18:26], "big") >> 36 << 36 | 10**9  # the 36 bits of STREAMINFO's total samples
    payload[18:26] = fields.to_bytes(8, "big")
    record = spoken("bomb", kind="wav")
    members = members_of(written("b")) | {
        "bomb.json": record.to_json().replace(b'"audio": "wav"', b'"audio": "flac"'),
        "bomb.flac": bytes(payload),
    }
    index = build_index(write_tar(tmp_path / "x.tar", members), TOKENIZER)
    (line,) = index.about["left_out"]
    assert line.startswith("x.tar:bomb: audio claims 1000000000 samples, the limit is 536870912")


def test_a_member_that_claims_more_than_the_tar_holds_is_refused(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.json")
    info.size = 8 << 30
    tar.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(DataError, match="claims 8589934592 bytes|truncated"):
        build_index(tar, TOKENIZER)


def test_no_source_of_ours_can_run_data() -> None:
    """No pickle, eval, exec, shell or webdataset reader is named anywhere in data/."""
    forbidden_calls = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "import_module"}
    forbidden_imports = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "subprocess", "yaml", "joblib"}
    for path in sorted((ROOT / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                owner = getattr(getattr(node.func, "value", None), "id", "")
                assert name not in forbidden_calls or owner == "re", f"{path}:{node.lineno}: {name}"
                assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno}: shell"
                assert (owner, name) not in {("torch", "load"), ("np", "load")}, f"{path}:{node.lineno}: {name}"
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in forbidden_imports, f"{path}:{node.lineno}: {name}"
                assert not name.startswith("webdataset") or name == "webdataset.writer", f"{path}:{node.lineno}: {name}"
