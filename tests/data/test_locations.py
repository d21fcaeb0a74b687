"""What names a shard, what is refused, and the settings of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import DataError
from data.locations import expand
from data.store import StoreSettings


def no_remote(pattern: str) -> list[str]:
    raise AssertionError(pattern)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("s3://b/x-{008..011}.tar", [f"s3://b/x-{n}.tar" for n in ("008", "009", "010", "011")]),
        ("http://h:80/{a,b}/{9..10}.tar", [f"http://h:80/{n}.tar" for n in ("a/9", "a/10", "b/9", "b/10")]),
        ("x-{0..2}.tar", ["x-0.tar", "x-1.tar", "x-2.tar"]),
        ("https://h/a:b@c.tar", ["https://h/a:b@c.tar"]),
        ("s3://b/what?.tar", ["s3://b/whatX.tar"]),
    ],
)
def test_locations(text: str, expected: list[str]) -> None:
    assert expand([text], lambda pattern: [pattern.replace("?", "X")]) == expected


def test_local_globs_and_names_with_magic(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c{1}.tar", "d[1].tar"):
        (tmp_path / name).touch()
    assert expand([f"{tmp_path}/?.tar"], no_remote) == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand([f"{tmp_path}/{{b,a}}.tar"], no_remote) == [f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"]
    exact = [f"{tmp_path}/c{{1}}.tar", f"{tmp_path}/d[1].tar"]
    assert expand(exact, no_remote) == exact


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("pipe:cat x", '"pipe:cat x" is neither a path nor'),
        ("|cat x", '"|cat x" is neither'),
        ("-x", '"-x" is neither'),
        ("file:///x.tar", '"file:///x.tar" is neither'),
        ("gs://b/x.tar", '"gs://b/x.tar" is neither'),
        ("S3://b/x.tar", '"S3://b/x.tar" is neither'),
        ("simplecache::s3://b/x.tar", '"simplecache::s3://b/x.tar" is neither'),
        ("http://h/x.tar\nHost: y", "'http://h/x.tar\\nHost: y' is neither"),
        ("", '"" is neither'),
        ("https://ada:pw@h/x.tar", '"https://***@h/x.tar": no user name or password in an address'),
        ("s3://key:secret@b/x.tar", '"s3://***@b/x.tar": no user name or password'),
        ("gs://key:secret@b/x.tar", '"gs://***@b/x.tar": no user name or password'),
        ("https://h/x.tar?sig=secret", '"https://h/x.tar?***": no queries'),
        ("https://h/x.tar#secret", '"https://h/x.tar?***": no queries'),
        ("http://h/x-*.tar", '"http://h/x-*.tar": http cannot list files; write a range such as x-{000..099}.tar'),
        ("http:///x.tar", "names no file; needed is http://SERVER_OR_BUCKET/PATH"),
        ("s3://bucket", "names no file"),
        ("s3://bucket/", "names no file"),
        ("s3://*/x.tar", "must be written out"),
        ("x-{1..}.tar", "{1..} is neither {first..last} nor {one,two}"),
        ("x-{9..1}.tar", "{9..1} must count up"),
        ("x-{0..99999999999}.tar", "must count up, by at most 1000000"),
        ("{0..9999}{0..9999}", "names more than 1000000 shards"),
        ("nothing-*.tar", 'no file matches "nothing-*.tar"'),
    ],
)
def test_refused_locations(text: str, line: str) -> None:
    with pytest.raises(DataError) as caught:
        expand([text], no_remote)
    message = str(caught.value)
    assert message.startswith("data.shards: ") and line in message and "\n" not in message
    assert "secret" not in message.replace("may be secret", "") and "pw" not in message


def test_nothing_and_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.shards is empty"):
        expand([], no_remote)
    with pytest.raises(DataError, match="s3://b/x1 is listed twice"):
        expand(["s3://b/x{1,2}", "s3://b/x1"], no_remote)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(DataError, match="link is listed twice"):
        expand([f"{tmp_path}/x", f"{tmp_path}/link"], no_remote)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"cache_gb": -1}, "data.store.cache_gb=-1: must be 0 or more"),
        ({"cache_gb": float("nan")}, "data.store.cache_gb=nan: must be 0 or more"),
        ({"cache_gb": 0.01}, "data.store.cache_gb=0.01: must hold 16 blocks of data.store.block_mb=4"),
        ({"block_mb": 0}, "data.store.block_mb=0: must be 1 to 256"),
        ({"timeout_s": 0}, "data.store.timeout_s=0: must be above 0"),
        ({"retry_s": -1}, "data.store.retry_s=-1: must be 0 or more"),
        ({"cache": "s3://b/cache"}, "data.store.cache='s3://b/cache': must be a local folder"),
    ],
)
def test_settings_that_cannot_be_used(values: dict[str, float], line: str) -> None:
    with pytest.raises(DataError) as caught:
        StoreSettings(**values).validate()
    assert str(caught.value).startswith(line)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    StoreSettings().validate()
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert StoreSettings().folder == Path("/home/ada/.cache/omniloom/shards")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert StoreSettings().folder == Path("/scratch/omniloom/shards")
    assert StoreSettings(cache="~/x").folder == Path("/home/ada/x")
