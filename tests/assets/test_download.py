"""Downloads against a real server: cuts, wrong bytes, conditions, the disk, two processes."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from audiocraft.assets import download as module
from audiocraft.assets import exchange
from audiocraft.assets.download import download, transfer
from audiocraft.assets.parts import open_part, writing
from audiocraft.assets.remote import Digest, Validators, show_size
from audiocraft.errors import AssetError, DownloadError
from tests.assets.conftest import left
from tests.http_server import File, git_hash

CONTENT = os.urandom(300_000)
SHA256 = Digest("sha256", hashlib.sha256(CONTENT).hexdigest())


# Cuts


def test_a_download_that_is_cut_twice_sends_only_what_is_missing(remote, server, target, caplog):
    server.files["/f"] = File(CONTENT, etag='"1"', cuts=[100_000, 100_000])
    with caplog.at_level(logging.INFO):
        assert download(remote(), target) == target
    assert target.read_bytes() == CONTENT
    assert server.sent("/f") == len(CONTENT)
    first, second, third = server.log()
    assert "range" not in first.headers
    assert (second.headers["range"], second.headers["if-range"]) == ("bytes=100000-", '"1"')
    assert (third.headers["range"], third.status) == ("bytes=200000-", 206)
    assert left(target) == ["file.bin"]
    assert "Going on with The file at 200.0 kB." in caplog.messages


def test_a_known_hash_stands_in_for_a_validator(remote, server, target):
    server.files["/f"] = File(CONTENT, cuts=[100_000])
    download(remote(digest=SHA256), target)
    assert server.sent("/f") == len(CONTENT)
    assert "if-range" not in server.log()[1].headers


@pytest.mark.parametrize(
    "file",
    [
        File(CONTENT, etag='"1"', ranges=False, cuts=[100_000]),
        File(CONTENT, etag='W/"1"', cuts=[100_000]),  # two contents may share a weak one
        File(CONTENT, cuts=[100_000]),
    ],
    ids=["no ranges", "weak validator", "no validator"],
)
def test_what_cannot_be_resumed_starts_anew(remote, server, target, file):
    server.files["/f"] = file
    download(remote(), target)
    assert target.read_bytes() == CONTENT
    assert server.sent("/f") == len(CONTENT) + 100_000


@pytest.mark.parametrize("careless", [False, True], ids=["200", "206 all the same"])
def test_content_that_changes_between_cut_and_resumption_is_not_mixed(
    remote, server, target, careless
):
    new = os.urandom(250_000)
    file = File(CONTENT, etag='"1"', cuts=[100_000], careless=careless)

    def change():
        if len(server.log()) == 2:
            file.content, file.etag = new, '"2"'

    file.hook = change
    server.files["/f"] = file
    download(remote(), target)
    assert target.read_bytes() == new
    assert [request.status for request in server.log()] == (
        [200, 206, 200] if careless else [200, 200]
    )


def test_partial_content_outlives_the_process_when_asked(remote, server, target):
    server.files["/f"] = File(CONTENT, etag='"1"', cuts=[100_000] + [0] * module.RETRIES)
    with pytest.raises(DownloadError, match=r"breaks off .* try again later"):
        download(remote(), target, keep_partial=True)
    assert left(target) == ["file.bin.part", "file.bin.part.json"]
    assert (target.parent / "file.bin.part").stat().st_size == 100_000
    download(remote(), target, keep_partial=True)
    assert server.sent("/f") == len(CONTENT)
    assert target.read_bytes() == CONTENT
    assert left(target) == ["file.bin"]


@pytest.mark.parametrize("notes", ["", "[]", json.dumps({"of": "other"})])
def test_a_partial_of_something_else_is_not_gone_on_from(remote, server, target, notes):
    server.files["/f"] = File(CONTENT, etag='"1"')
    target.parent.mkdir()
    (target.parent / "file.bin.part").write_bytes(b"x" * 1000)
    (target.parent / "file.bin.part.json").write_text(notes)
    download(remote(), target, keep_partial=True)
    assert target.read_bytes() == CONTENT


def test_a_partial_that_was_whole_is_only_checked(remote, server, target):
    server.files["/f"] = File(CONTENT)
    target.parent.mkdir()
    (target.parent / "file.bin.part").write_bytes(CONTENT)
    (target.parent / "file.bin.part.json").write_text(json.dumps({"of": SHA256.value}))
    download(remote(digest=SHA256, size=len(CONTENT)), target, keep_partial=True)
    assert server.requests == []
    assert target.read_bytes() == CONTENT


def test_a_damaged_partial_is_fetched_again(remote, server, target):
    server.files["/f"] = File(CONTENT)
    target.parent.mkdir()
    (target.parent / "file.bin.part").write_bytes(b"x" * 1000)
    (target.parent / "file.bin.part.json").write_text(json.dumps({"of": SHA256.value}))
    download(remote(digest=SHA256), target, keep_partial=True)
    assert [request.status for request in server.log()] == [206, 200]
    assert target.read_bytes() == CONTENT


def test_a_failed_download_leaves_nothing(remote, server, target):
    server.files["/f"] = File(CONTENT, etag='"1"', cuts=[100_000] + [0] * module.RETRIES)
    with pytest.raises(DownloadError):
        download(remote(), target)
    assert left(target) == []


def test_a_stall_counts_as_a_cut(remote, server, target, monkeypatch):
    monkeypatch.setattr(exchange, "STALL_S", 1.0)
    server.files["/f"] = file = File(CONTENT, etag='"1"', stall_after=100_000)

    def go_on():
        file.stall_after = None if server.log()[1:] else file.stall_after

    file.hook = go_on
    download(remote(), target)
    assert server.sent("/f") == len(CONTENT)


# Refusals


@pytest.mark.parametrize(
    "digest", [Digest("sha256", "0" * 64), Digest("git", "0" * 40)], ids=["sha256", "git"]
)
def test_a_wrong_hash_is_refused_and_removed(remote, server, target, digest):
    server.files["/f"] = File(CONTENT)
    with pytest.raises(DownloadError, match="The file could not be fetched: its hash is wrong"):
        download(remote(digest=digest), target, keep_partial=True)
    assert left(target) == []


def test_git_hashes_are_understood(remote, server, target):
    server.files["/f"] = File(CONTENT, cuts=[100_000])
    download(remote(digest=Digest.of_hub(f'"{git_hash(CONTENT)}"')), target)
    server.files["/g"] = File(CONTENT, length=False)
    again = target.with_name("again")
    download(remote("/g", digest=Digest("git", git_hash(CONTENT))), again)
    assert again.read_bytes() == target.read_bytes() == CONTENT


def test_an_etag_that_is_no_hash_says_nothing():
    assert Digest.of_hub('"abc"') is None
    assert Digest.of_hub(None) is None


@pytest.mark.parametrize("length", [True, False])
def test_a_wrong_size_is_refused(remote, server, target, length):
    server.files["/f"] = File(CONTENT, length=length)
    with pytest.raises(DownloadError, match=r"300000 bytes are offered|more than 299999 bytes"):
        download(remote(size=len(CONTENT) - 1), target)
    assert left(target) == []


def test_an_empty_file_is_a_file(remote, server, target):
    server.files["/f"] = File(b"")
    download(remote(), target)
    assert target.read_bytes() == b""


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(remote, server, target, status):
    server.files["/f"] = File(CONTENT, errors=[(status, {"Retry-After": "0"})] * 2)
    download(remote(), target)
    assert len(server.log()) == 3


def test_a_server_that_is_busy_for_long_is_left_alone(remote, server, target):
    server.files["/f"] = File(CONTENT, errors=[(503, {"Retry-After": "3600"})])
    with pytest.raises(DownloadError, match=r"answers 503\), and asks to wait 3600 s; try again"):
        download(remote(), target)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "give a URL that may be read without a login"),
        (403, "give a URL that may be read without a login"),
        (404, "check the URL"),
        (410, "check the URL"),
        (418, "check the URL"),
    ],
)
def test_a_refusal_is_final(remote, server, target, status, remedy):
    server.files["/f"] = File(errors=[(status, {})] * 2)
    host = rf"127\.0\.0\.1:{server.port}"
    with pytest.raises(DownloadError, match=rf"{host} answers {status} \(.*\); {remedy}\.$"):
        download(remote(), target)
    assert len(server.log()) == 1


# Conditions


def unless_changed(remote, folder, known):
    with open_part(folder / "x.part", "x") as part:
        received = transfer(remote(), part, known=known)
        return received and (received.validators, part.path.read_bytes())


def test_a_condition_is_answered_from_one_request(remote, server, tmp_path):
    server.files["/f"] = File(b"old", etag='"1"')
    validators, content = unless_changed(remote, tmp_path, Validators())
    assert (validators, content) == (Validators(etag='"1"'), b"old")
    assert unless_changed(remote, tmp_path, validators) is None
    server.files["/f"] = File(b"new", etag='"2"')
    assert unless_changed(remote, tmp_path, validators)[1] == b"new"
    assert [request.status for request in server.log()] == [200, 304, 200]
    assert list(tmp_path.iterdir()) == []


def test_a_date_counts_only_when_it_is_old_enough(remote, server, tmp_path):
    now = 1_700_000_000
    server.files["/f"] = file = File(b"old", last_modified=now - 1, date=now)
    assert unless_changed(remote, tmp_path, Validators())[0] == Validators()
    file.date = now + 1
    validators, _ = unless_changed(remote, tmp_path, Validators())
    assert validators.last_modified
    assert unless_changed(remote, tmp_path, validators) is None
    file.last_modified = now + 1
    assert unless_changed(remote, tmp_path, validators)[1] == b"old"


def test_an_older_file_put_back_is_a_change(remote, server, tmp_path):
    now = 1_700_000_000
    server.files["/f"] = file = File(b"new", last_modified=now, date=now + 10)
    validators, _ = unless_changed(remote, tmp_path, Validators())
    file.content, file.last_modified = b"old", now - 100
    assert unless_changed(remote, tmp_path, validators)[1] == b"old"
    assert [request.status for request in server.log()] == [200, 304, 200]


# The disk


def fake_disk(monkeypatch, free):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _folder: usage)


def test_what_does_not_fit_is_refused_before_the_first_byte(remote, server, target, monkeypatch):
    fake_disk(monkeypatch, module.SPARE + 200_000)
    server.files["/f"] = File(CONTENT)
    with pytest.raises(AssetError, match=r"needs 300\.0 kB more .* which has 200\.0 kB; free"):
        download(remote(), target)
    assert left(target) == []


def test_the_disk_is_watched_where_the_size_is_unknown(remote, server, target, monkeypatch):
    monkeypatch.setattr(module, "_WATCH", 50_000)
    looks = iter([10**9] * 3)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": next(looks, 0)})
    )
    server.files["/f"] = File(CONTENT, length=False)
    with pytest.raises(AssetError, match="which has 0 bytes; free some"):
        download(remote(), target)
    assert left(target) == []


def test_a_folder_that_cannot_be_written_is_named(remote):
    with pytest.raises(AssetError, match=r"cannot be kept in /dev/null/x .*AUDIOCRAFT_CACHE_DIR"):
        download(remote(), Path("/dev/null/x/y"))
    with (
        pytest.raises(AssetError, match=r"The file does not fit on the disk of /dev; free some"),
        writing("The file", Path("/dev")),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(CONTENT)


def test_sizes_read_well():
    assert [show_size(n) for n in (0, 999, 1000, 3_677_668_599)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "3.7 GB",
    ]


# Several processes


FETCH = """
import logging, sys
from pathlib import Path
from audiocraft.assets import exchange
from audiocraft.assets.download import download
from audiocraft.assets.remote import Remote
exchange.FIRST_ANSWER_S = 60.0
logging.basicConfig(level=logging.INFO, format="%(message)s")
print("ready", flush=True)
sys.stdin.readline()
download(Remote(sys.argv[1], "The file"), Path(sys.argv[2]), keep_partial=True)
"""


def test_two_processes_fetch_once(server, target, tmp_path):
    logs = [tmp_path / "first.log", tmp_path / "second.log"]

    def waited():
        return "".join(log.read_text() for log in logs).count(
            "Another process is fetching The file; waiting for it."
        )

    def hold():
        """The answer comes once the other process has seen that somebody asks."""
        deadline = time.monotonic() + 30
        while not waited() and time.monotonic() < deadline:
            time.sleep(0.01)

    server.files["/f"] = File(CONTENT, etag='"1"', hook=hold)
    command = [sys.executable, "-c", FETCH, server.url("/f"), str(target)]
    both = []
    for log in logs:
        with log.open("w") as file:
            both.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
            )
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=120)
    assert [process.returncode for process in both] == [0, 0]
    assert len(server.log()) == 1
    assert target.read_bytes() == CONTENT
    assert waited() == 1
    assert left(target) == ["file.bin"]


def test_what_is_whole_leaves_no_notes_whatever_comes_then(remote, server, target):
    server.files["/f"] = File(CONTENT)
    target.parent.mkdir()

    def stop_at_the_end():
        with open_part(target.with_name("file.bin.part"), "x", keep=True) as part:
            transfer(remote(), part)
            part.move(target)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_at_the_end()
    assert left(target) == ["file.bin"]


def test_a_second_call_asks_nothing(remote, server, target):
    server.files["/f"] = File(CONTENT)
    download(remote(), target)
    download(remote(), target)
    assert len(server.requests) == 1
