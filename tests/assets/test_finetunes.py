"""The cache of fine-tuned weights, against a real server and other processes."""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from audiocraft.assets import download, exchange
from audiocraft.assets.finetunes import KEEP_FREE, FineTuneStore
from audiocraft.assets.parts import Part
from audiocraft.errors import AssetError, InputError
from tests.assets.test_exchange import run_and_cancel
from tests.http_server import File

NOW = 1_700_000_000


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "fine-tunes"


@pytest.fixture
def store(folder):
    return FineTuneStore(folder, keep_free=0)


def kept(folder):
    """Contents in the cache; nothing half lies anywhere in it."""
    assert not list(folder.rglob("*.part*"))
    assert not list(folder.rglob("*.unfinished"))
    return sorted(path.read_bytes() for path in folder.iterdir() if path.is_file())


# URLs


def test_it_lies_in_the_store_and_leaves_ten_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    assert FineTuneStore()._folder == tmp_path / "fine-tunes"
    assert FineTuneStore()._keep_free == KEEP_FREE == 10 * 1024**3


def test_a_file_is_stored_by_its_hash(server, store, folder):
    server.files["/w.safetensors"] = File(b"weights", etag='"1"')
    stored = store.get(server.url("/w.safetensors?signature=1"))
    assert stored.sha256 == sha256(b"weights")
    assert stored.path == folder / stored.sha256
    assert stored.path.read_bytes() == b"weights"
    assert kept(folder) == [b"weights"]


def test_each_call_asks_whether_it_has_changed(server, store):
    server.files["/w"] = file = File(b"old", etag='"1"')
    assert store.get(server.url("/w")).sha256 == sha256(b"old")
    assert store.get(server.url("/w")).sha256 == sha256(b"old")
    file.content, file.etag = b"new", '"2"'
    assert store.get(server.url("/w")).path.read_bytes() == b"new"
    file.content, file.etag = b"old", '"3"'
    assert store.get(server.url("/w")).sha256 == sha256(b"old")
    assert [request.status for request in server.log()] == [200, 304, 200, 200]


def test_changes_show_in_the_date_too(server, store):
    server.files["/w"] = file = File(b"old", last_modified=NOW, date=NOW + 10)
    assert store.get(server.url("/w")).sha256 == sha256(b"old")
    assert store.get(server.url("/w")).sha256 == sha256(b"old")
    file.content, file.last_modified = b"new", NOW + 5
    assert store.get(server.url("/w")).sha256 == sha256(b"new")
    file.content, file.last_modified = b"old", NOW  # an older one is put back
    assert store.get(server.url("/w")).sha256 == sha256(b"old")
    assert [request.status for request in server.log()] == [200, 304, 200, 304, 200]


@pytest.mark.parametrize(
    "file",
    [
        File(b"one"),
        File(b"one", etag='W/"1"'),
        File(b"one", last_modified=NOW, date=NOW + 1),  # two changes may bear that date
    ],
    ids=["nothing", "weak", "fresh"],
)
def test_without_a_validator_it_is_fetched_each_time(server, store, file):
    server.files["/w"] = file
    store.get(server.url("/w"))
    file.content = b"two"
    assert store.get(server.url("/w")).sha256 == sha256(b"two")


def test_equal_names_of_different_urls_are_different_files(server, store):
    server.files["/w.safetensors?a"] = File(b"a", etag='"1"')
    server.files["/w.safetensors?b"] = File(b"b", etag='"1"')
    server.files["/x/w.safetensors"] = File(b"c", etag='"1"')
    for _ in range(2):
        assert store.get(server.url("/w.safetensors?a")).sha256 == sha256(b"a")
        assert store.get(server.url("/w.safetensors?b")).sha256 == sha256(b"b")
        assert store.get(server.url("/x/w.safetensors")).sha256 == sha256(b"c")


def test_equal_contents_of_different_urls_are_one_file(server, store, folder):
    server.files["/a"] = server.files["/b"] = File(b"weights", etag='"1"')
    first, second = store.get(server.url("/a")), store.get(server.url("/b"))
    assert first == second
    assert kept(folder) == [b"weights"]


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": 3, "etag": "\\"1\\""}', '{"etag": []}'])
def test_a_broken_mapping_is_ignored(server, store, folder, text):
    server.files["/w"] = File(b"weights", etag='"1"')
    store.get(server.url("/w"))
    (mapping,) = (folder / "urls").iterdir()
    mapping.write_text(text)
    assert store.get(server.url("/w")).sha256 == sha256(b"weights")


def test_a_mapping_leads_nowhere_else(server, store, folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    server.files["/w"] = File(b"weights", etag='"1"')
    store.get(server.url("/w"))
    (mapping,) = (folder / "urls").iterdir()
    mapping.write_text(json.dumps({"sha256": "../secret", "etag": '"1"', "last_modified": None}))
    assert store.get(server.url("/w")).sha256 == sha256(b"weights")


@pytest.mark.parametrize("content", [b"weight", b"weighty", b""])
def test_a_file_that_was_damaged_is_not_served(server, folder, content, caplog):
    server.files["/w"] = File(b"weights", etag='"1"')
    FineTuneStore(folder, keep_free=0).get(server.url("/w")).path.write_bytes(content)
    stored = FineTuneStore(folder, keep_free=0).get(server.url("/w"))
    assert stored.path.read_bytes() == b"weights"
    assert "is broken and is removed" in caplog.text
    stored.path.write_bytes(content[:3])  # within a process its size tells
    assert FineTuneStore(folder, keep_free=0).get(server.url("/w")).sha256 == sha256(b"weights")


def test_a_cut_is_resumed_and_a_failure_leaves_nothing(server, store, folder):
    content = os.urandom(300_000)
    server.files["/w"] = file = File(content, etag='"1"', cuts=[100_000])
    assert store.get(server.url("/w")).sha256 == sha256(content)
    assert server.sent("/w") == len(content)
    file.etag, file.cuts = '"2"', [100_000] + [0] * download.RETRIES
    with pytest.raises(AssetError, match="breaks off"):
        store.get(server.url("/w"))
    assert kept(folder) == [content]


def test_cancelation_leaves_nothing(server, store, folder):
    server.files["/w"] = File(os.urandom(300_000), etag='"1"', stall_after=100_000)
    took = run_and_cancel(lambda: store.get(server.url("/w")), lambda: server.sent("/w") == 100_000)
    assert took < 3
    assert kept(folder) == []


def test_what_a_killed_process_left_is_removed(server, store, folder):
    (folder / "incoming").mkdir(parents=True)
    (folder / "incoming/old.part").write_bytes(b"x")
    server.files["/w"] = File(b"weights")
    store.get(server.url("/w"))
    assert kept(folder) == [b"weights"]


def test_secrets_are_not_shown(server, store, caplog):
    server.files["/w"] = File(b"weights", cuts=[3])
    with caplog.at_level(logging.DEBUG, "audiocraft"):
        store.get(server.url("/w?signature=SECRET"))
    with pytest.raises(AssetError, match=re.escape(server.url("/none"))) as caught:
        store.get(server.url("/none?signature=SECRET"))
    assert "SECRET" not in str(caught.value) + caplog.text
    # Callers put the name of an input in front.
    assert str(type(caught.value)(f"replicate_weights: {caught.value}")).startswith("replicate_")


def test_no_answer_is_told(store, monkeypatch):
    monkeypatch.setattr(exchange, "FIRST_ANSWER_S", 0.5)
    with pytest.raises(AssetError, match=r"http://nowhere\.invalid/w could not be fetched: nowh"):
        store.get("http://nowhere.invalid/w?x")


# Other sources


def test_data_urls(store, folder):
    text = base64.b64encode(b"weights>>>?").decode()
    url = f"data:application/octet-stream;base64,{text}"
    assert store.get(url).path.read_bytes() == b"weights>>>?"
    assert store.get(url.replace("+", "%2B").replace("=", "%3D")).sha256 == sha256(b"weights>>>?")
    assert kept(folder) == [b"weights>>>?"]


@pytest.mark.parametrize("url", ["data:,x", "data:text/plain,AAAA", "data:x;base64,AAA", "data:"])
def test_bad_data_urls(store, url):
    with pytest.raises(InputError, match=r"base64"):
        store.get(url)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/w", "s3://bucket/w"])
def test_other_schemes(store, url):
    with pytest.raises(InputError, match=rf"^{url.partition('/')[0]}// is not supported; give"):
        store.get(url)


def test_a_local_file_is_used_where_it_is(store, tmp_path, folder):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    stored = store.get(str(path))
    assert (stored.path, stored.sha256) == (path, sha256(b"weights"))
    store.release(stored)
    assert path.exists()
    assert not folder.exists()


def test_a_local_file_is_hashed_again_when_it_may_have_changed(store, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    before = path.stat()
    assert store.get(str(path)).sha256 == sha256(b"old")
    path.write_bytes(b"new")  # of the same size, perhaps within the clock's tick
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.get(str(path)).sha256 == sha256(b"new")
    assert store._hashes == {}  # too young for times to tell


def test_a_local_file_that_is_old_is_hashed_once(store, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3)
    assert store.get(str(path)).sha256 == sha256(b"weights")
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert store.get(str(path)).sha256 == sha256(b"weights")


@pytest.mark.parametrize("name", ["none", "", "a\0b"])
def test_what_is_no_file_is_named(store, tmp_path, name):
    with pytest.raises(InputError, match=r"cannot be read \(.*\); give the path of a file"):
        store.get(f"{tmp_path}/{name}")


# Room


@pytest.fixture
def disk(folder, monkeypatch):
    """A disk of its own for the cache; returns what sets its size in bytes."""
    monkeypatch.setattr(download, "SPARE", 0)
    size = [10_000]

    def usage(_folder):
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.parent.name != "urls")
        used -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_dir())
        return type("Usage", (), {"free": size[0] - used})

    monkeypatch.setattr("shutil.disk_usage", usage)
    return lambda value: size.__setitem__(0, value)


def get_all(store, server, *names, size=1000):
    """Fetches files, each used a second after the last."""
    for number, name in enumerate(names):
        server.files[f"/{name}"] = File(name.encode() * size, etag=f'"{name}"')
        stored = store.get(server.url(f"/{name}"))
        os.utime(stored.path, (NOW + number, NOW + number))
        store.release(stored)


def names(folder):
    return "".join(sorted(content[:1].decode() for content in kept(folder)))


def test_what_was_used_longest_ago_makes_room(server, folder, disk):
    store = FineTuneStore(folder, keep_free=7000)
    get_all(store, server, *"abc")
    assert names(folder) == "abc"
    store.release(store.get(server.url("/a")))  # is now used last
    get_all(store, server, "d")
    assert names(folder) == "acd"
    assert len(list((folder / "urls").iterdir())) == 3
    disk(9000)
    store.release(store.get(server.url("/c")))
    assert len(kept(folder)) == 2


@pytest.mark.usefixtures("disk")
def test_room_is_made_before_a_file_comes(server, folder):
    store = FineTuneStore(folder, keep_free=0)
    get_all(store, server, *"abc")
    get_all(store, server, "d", size=8500)
    assert names(folder) == "cd"


@pytest.mark.usefixtures("disk")
def test_a_file_that_leaves_too_little_serves_and_goes(server, folder):
    store = FineTuneStore(folder, keep_free=7000)
    get_all(store, server, *"ab")
    server.files["/d"] = File(b"d" * 4000, etag='"d"')
    stored = store.get(server.url("/d"))
    assert stored.path.read_bytes() == b"d" * 4000
    assert names(folder) == "d"
    store.release(stored)
    store.release(stored)
    assert names(folder) == ""


@pytest.mark.usefixtures("disk")
def test_a_file_that_does_not_fit_is_refused_and_removes_nothing(server, folder):
    store = FineTuneStore(folder, keep_free=7000)
    get_all(store, server, *"ab")
    server.files["/d"] = File(b"d" * 11_000)
    with pytest.raises(AssetError, match=r"/d needs 11\.0 kB more on the disk of .* free some"):
        store.get(server.url("/d"))
    data = base64.b64encode(b"d" * 11_000).decode()
    with pytest.raises(AssetError, match=r"The content of the data: URL needs 11\.0 kB more"):
        store.get(f"data:;base64,{data}")
    assert names(folder) == "ab"


@pytest.mark.usefixtures("disk")
def test_nothing_is_removed_for_a_file_that_what_is_in_use_leaves_no_room_for(server, folder):
    store = FineTuneStore(folder, keep_free=0)
    server.files["/a"] = File(b"a" * 5000, etag='"a"')
    store.pin(store.get(server.url("/a")))
    get_all(store, server, "b", size=3000)
    server.files["/d"] = File(b"d" * 6000)
    with pytest.raises(AssetError, match=r"/d needs 6\.0 kB more on the disk of .* free some"):
        store.get(server.url("/d"))
    assert names(folder) == "ab"


@pytest.mark.usefixtures("disk")
def test_what_a_url_had_before_makes_room_for_what_it_has(server, folder):
    store = FineTuneStore(folder, keep_free=0)
    get_all(store, server, "a", size=6000)
    server.files["/a"] = File(b"b" * 7000, etag='"b"')
    assert store.get(server.url("/a")).path.read_bytes() == b"b" * 7000
    assert names(folder) == "b"


HOLD = """
import sys
from pathlib import Path
from audiocraft.assets.finetunes import FineTuneStore
store = FineTuneStore(Path(sys.argv[1]), keep_free=0)
store.pin(store.get(sys.argv[2]))
print("held", flush=True)
sys.stdin.readline()
"""


def test_what_another_process_serves_is_not_removed(server, folder, disk):
    get_all(FineTuneStore(folder, keep_free=0), server, "a")
    command = [sys.executable, "-c", HOLD, str(folder), server.url("/a")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        store = FineTuneStore(folder, keep_free=9500)
        get_all(store, server, *"bc")
        assert names(folder) == "a"
        process.communicate("\n")
    get_all(store, server, "d")
    assert names(folder) == ""
    disk(20_000)


@pytest.mark.usefixtures("disk")
def test_a_pinned_file_stays(server, folder):
    store = FineTuneStore(folder, keep_free=9500)
    server.files["/a"] = File(b"a" * 1000, etag='"a"')
    pinned = store.get(server.url("/a"))
    store.pin(pinned)
    again = store.get(server.url("/a"))
    store.release(again)
    store.release(pinned)
    get_all(store, server, "b")
    assert names(folder) == "a"


FETCH = """
import logging, sys
from pathlib import Path
from audiocraft.assets.finetunes import FineTuneStore
logging.basicConfig(level=logging.INFO, format="%(message)s")
print("ready", flush=True)
sys.stdin.readline()
print(FineTuneStore(Path(sys.argv[1]), keep_free=0).get(sys.argv[2]).sha256)
"""


def test_two_processes_fetch_once(server, folder):
    content = os.urandom(300_000)
    server.files["/w"] = File(content, etag='"1"', delay=0.03)
    command = [sys.executable, "-c", FETCH, str(folder), server.url("/w?x")]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[0].strip() for process in both] == [
        sha256(content)
    ] * 2
    assert [request.status for request in server.log()] == [200, 304]
    assert kept(folder) == [content]


@pytest.mark.parametrize("kind", ["url", "data"])
def test_whoever_waited_finds_the_file_as_soon_as_it_has_its_name(
    server, store, folder, monkeypatch, kind
):
    content = b"weights"
    server.files["/w"] = File(content, etag='"1"')
    data = f"data:;base64,{base64.b64encode(content).decode()}"
    source = server.url("/w") if kind == "url" else data
    move = Part.move
    moved = []
    found = []
    second = threading.Thread(
        target=lambda: found.append(FineTuneStore(folder, keep_free=0).get(source))
    )

    def move_and_let_the_second_one_on(part, target):
        move(part, target)
        moved.append(target)
        if len(moved) == 1:
            second.start()
            second.join(0.5)  # it waits for the lock of the file by now

    monkeypatch.setattr(Part, "move", move_and_let_the_second_one_on)
    first = store.get(source)
    second.join(60)
    assert moved == [first.path] == [found[0].path]
    assert [request.status for request in server.log()] == [200, 304] * (kind == "url")
    assert kept(folder) == [content]
