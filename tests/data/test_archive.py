import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import pytest

from audiocraft.assets import download
from audiocraft.data import archive, tarball
from audiocraft.data.archive import unpack
from audiocraft.errors import AssetError
from tests.data.archives import (
    SONG,
    make_tar,
    make_zip,
    refused,
    tar_entry,
    unpacked,
    zip_entry,
)
from tests.data.signals import sentence

SONGS = {"album/one.ogg": SONG, "album/one.txt": b"a song", "other/one.ogg": SONG[:1000]}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_kind_are_unpacked_by_content(place, mode, form):
    entries = [tar_entry("album", tarfile.DIRTYPE)]
    entries += [tar_entry(name, content=content) for name, content in SONGS.items()]
    source = make_tar(place / "upload.bin", entries, mode, form)
    assert unpacked(place, source) == SONGS


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_are_unpacked_by_content(place, method):
    source = make_zip(place / "upload", [("album/", b""), *SONGS.items()], method)
    assert unpacked(place, source) == SONGS


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read(place, form):
    folder = place / "source"
    name = "lang/" * 15 + ("ä" * 40 if form in {"oldgnu", "gnu", "posix"} else "a") + ".wav"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(SONG)
    source = place / "music.tgz"
    arguments = ["tar", "-C", folder, f"--format={form}", "-czf", source, "lang"]
    subprocess.run(arguments, check=True)
    assert unpacked(place, source) == {name: SONG}


def test_a_tar_with_large_numbers_and_names_is_read(place):
    """GNU writes numbers in binary and names of any length; pax a record for each."""
    long = "folder/" * 100 + "song.wav"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        entry = tar_entry(long, content=b"x", uid=2**30, mtime=1.5 if form else 2)
        source = make_tar(place / f"{form}.tar", [entry], form=form)
        assert unpacked(place, source) == {long: b"x"}


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_a_bare_compressed_file_is_one_file_whatever_its_name(place, suffix, compress):
    source = place / f"My song.ogg{suffix}"
    source.write_bytes(compress(SONG))
    assert unpacked(place, source) == {"My song.ogg": SONG}
    source = source.rename(place / "download")
    shutil.rmtree(place / "work")
    assert unpacked(place, source) == {"download": SONG}


def test_a_file_compressed_in_parts_is_whole(place):
    """As pigz and bgzip write it, and padded to a tape's block."""
    source = place / "song.wav.gz"
    source.write_bytes(gzip.compress(SONG[:5000]) + gzip.compress(SONG[5000:]) + bytes(512))
    assert unpacked(place, source) == {"song.wav": SONG}


def test_a_first_part_may_be_short(place):
    content = SONG[:100] + bytes(10**6)
    source = place / "song.wav.gz"
    source.write_bytes(gzip.compress(content[:100]) + gzip.compress(content[100:]))
    assert unpacked(place, source) == {"song.wav": content}


def test_a_tar_whose_first_name_begins_like_bzip2_is_a_tar(place):
    source = make_tar(place / "songs.tar", [tar_entry("BZh.wav", content=SONG)])
    assert unpacked(place, source) == {"BZh.wav": SONG}


@pytest.mark.parametrize("content", [SONG, b"RIFF\x10\0\0\0WAVEfmt ", b"", b"hello" * 500])
def test_what_is_no_archive_is_used_in_place(place, content):
    source = place / "song.zip"
    source.write_bytes(content)
    assert unpack(source, place / "work") is None
    assert source.read_bytes() == content
    assert list((place / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("magic", "name"), [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07\x01\0", "RAR")]
)
def test_other_archives_are_named(place, magic, name):
    source = place / "music.zip"
    source.write_bytes(magic + bytes(100))
    assert (
        refused(place, source) == f"music.zip is a {name} archive, which is not read; send a .zip."
    )


def test_duplicates_are_one_file_and_the_last_one_counts(place):
    entries = [tar_entry("a.wav", content=b"first"), tar_entry("./a.wav", content=b"second")]
    source = make_tar(place / "songs.tar", entries)
    assert unpacked(place, source) == {"a.wav": b"second"}
    result = unpack(source, place / "work")
    assert [(left.name, left.reason) for left in result.left_out] == [
        ("a.wav", "a later entry has the same name")
    ]
    assert len(list(result.files[0].path.parent.iterdir())) == 2  # the file and the index


def test_names_that_differ_by_case_or_folder_do_not_collide(place):
    songs = {"Song.wav": b"1", "song.wav": b"2", "SONG.WAV": b"3", "a/song.wav": b"4"}
    source = make_zip(place / "songs.zip", songs.items())
    assert unpacked(place, source) == songs
    names = [file.path.name.casefold() for file in unpack(source, place / "work").files]
    assert names == [f"{number:06d} song.wav" for number in range(1, 5)]


def test_names_from_elsewhere_are_kept(place):
    songs = {"Música/Ñandú 🎵.wav": b"1", "日本/曲.wav": b"2", "Mu\u0308ller.wav": b"3"}
    source = make_zip(place / "songs.zip", songs.items())
    assert unpacked(place, source) == songs
    names = {file.path.name for file in unpack(source, place / "work").files}
    assert names == {"000001 Ñandú 🎵.wav", "000002 曲.wav", "000003 Müller.wav"}


def unmarked_zip(path, name):
    """A zip with a name in any bytes, which does not say that they are UTF-8."""
    placeholder = "x" * (len(name) - 4) + ".wav"
    make_zip(path, [(placeholder, SONG)])
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), name))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"M\x81ller \x84.wav", "Müller ä.wav"),  # cp437, as Windows and DOS write it
        ("Müller ä.wav".encode(), "Müller ä.wav"),  # UTF-8, as macOS does
        ("曲.wav".encode("cp932"), "ï╚.wav"),  # nobody can know, but nothing breaks
    ],
)
def test_names_without_a_declared_encoding_are_read(place, name, expected):
    assert unpacked(place, unmarked_zip(place / "songs.zip", name)) == {expected: SONG}


def test_a_tar_with_names_that_are_no_utf8_is_read(place):
    entry = tar_entry("caf\udce9.wav", content=SONG)
    source = make_tar(place / "songs.tar", [entry], form=tarfile.GNU_FORMAT)
    assert unpacked(place, source) == {"café.wav": SONG}


ODD = [
    "new\nline.wav",
    "bell\a and \x1b[31mred.wav",
    "zero\0byte.wav",
    "\u202egnp.wav",  # written from right to left
    "x" * 300 + ".wav",
    "ü" * 300 + ".wav",
    "con.wav",
    "a:b*c?d.wav",
    "entries.json",
    "-rf.wav",
    ".hidden.wav",
    "trailing .wav",
    "%n%d.wav",
]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_odd_names_are_made_safe_and_reported_as_they_are(place, make):
    names = [name for name in ODD if make is make_zip or "\0" not in name]
    entries = [
        (zip_entry(name), name.encode())
        if make is make_zip
        else tar_entry(name, content=name.encode())
        for name in names
    ]
    source = make(place / "songs", entries)
    assert unpacked(place, source) == {name: name.encode() for name in names}
    for file in unpack(source, place / "work").files:
        assert file.path.name.isprintable()
        assert len(os.fsencode(file.path.name)) < 120
        assert file.path.name[:7].strip().isdigit()
        assert not set(file.path.name) & set('\\/:*?"<>|%')


def test_what_nobody_needs_is_counted_and_not_written(place):
    entries = {
        "a/song.wav": SONG,
        "a/song.txt": b"text",
        "a/song.json": b"{}",
        "a/.DS_Store": b"x",
        "__MACOSX/a/._song.wav": b"x",
        "a/__MACOSX/song.wav": b"x",
        "a/._song.wav": b"x",
        "a/cover.jpg": b"x",
        "a/run.sh": b"x",
        "README": b"x",
    }
    source = make_zip(place / "songs.zip", entries.items())
    assert set(unpacked(place, source)) == {"a/song.wav", "a/song.txt", "a/song.json"}
    reasons = {left.name: left.reason for left in unpack(source, place / "work").left_out}
    mac, other = "housekeeping of macOS", "not a file of music by its name"
    assert reasons == {
        "a/.DS_Store": mac,
        "__MACOSX/a/._song.wav": mac,
        "a/__MACOSX/song.wav": mac,
        "a/._song.wav": mac,
        "a/cover.jpg": other,
        "a/run.sh": other,
        "README": other,
    }


def test_equal_content_is_unpacked_once(place):
    source = make_zip(place / "songs.zip", SONGS.items())
    first = unpack(source, place / "work")
    copy = place / "copy.zip"
    copy.write_bytes(source.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in (place / "work").rglob("*")}
    assert unpack(copy, place / "work") == first
    assert {path: path.stat().st_mtime_ns for path in (place / "work").rglob("*")} == before
    # what is not whole any more is made again
    first.files[0].path.unlink()
    assert unpack(copy, place / "work") == first
    assert first.files[0].path.read_bytes() == SONG


class Canceled(BaseException):
    """As Cog's own, which no `except Exception` sees."""


@pytest.mark.parametrize("make", ["zip", "tar"])
def test_a_cancelation_leaves_nothing_and_the_next_call_all(place, monkeypatch, make):
    if make == "zip":
        source = make_zip(place / "songs", SONGS.items())
    else:
        entries = [tar_entry(name, content=content) for name, content in SONGS.items()]
        source = make_tar(place / "songs", entries)
    original, calls = archive._Output._new_file, []

    def cancel(self, name, **keywords):
        calls.append(name)
        if len(calls) == 2:
            raise Canceled
        return original(self, name, **keywords)

    monkeypatch.setattr(archive._Output, "_new_file", cancel)
    with pytest.raises(Canceled):
        unpack(source, place / "work")
    assert list((place / "work").iterdir()) == []
    assert unpacked(place, source) == SONGS


def test_what_a_killed_process_left_is_replaced(place):
    source = make_zip(place / "songs.zip", SONGS.items())
    name = hashlib.sha256(source.read_bytes()).hexdigest()
    other = hashlib.sha256(b"another archive").hexdigest()
    for leftover in (f"{name}.new", name, f"{other}.new"):
        (place / "work" / leftover).mkdir()
        (place / "work" / leftover / "000001 half.wav").write_bytes(b"half")
    for part in (name, other):
        (place / "work" / f"{part}.part").touch()
    assert unpacked(place, source) == SONGS
    assert [path.name for path in (place / "work").iterdir()] == [name]
    assert not list((place / "work").rglob("*half*"))


def test_a_disk_that_is_too_small_is_named_before_and_while_it_is_written(place, monkeypatch):
    content = bytes(3 * 10**6)
    spare = download.SPARE
    free = [spare + 10**6]
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free[-1]))
    source = make_zip(place / "songs.zip", [("a.wav", content)], zipfile.ZIP_STORED)
    with pytest.raises(AssetError, match=r"Unpacking songs\.zip needs 3\.0 MB more on the disk of"):
        unpack(source, place / "work")
    monkeypatch.setattr(archive, "_WATCH", 10**6)
    tar = make_tar(place / "songs.tar", [tar_entry("a.wav", content=content)])
    free.append(spare)
    with pytest.raises(AssetError, match=r"Unpacking songs\.tar needs 1\.0 MB more"):
        unpack(tar, place / "work")
    assert list((place / "work").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(place, monkeypatch, number):
    def full(*_arguments, **_keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(archive, "write_json", full)
    source = make_zip(place / "songs.zip", SONGS.items())
    with pytest.raises(AssetError) as caught:
        unpack(source, place / "work")
    assert str(caught.value) == (
        f"What is in songs.zip does not fit on the disk of {place / 'work'}; free some of it."
    )
    assert list((place / "work").iterdir()) == []


def test_another_error_of_the_disk_is_named(place, monkeypatch):
    def broken(*_arguments, **_keywords):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(archive, "write_json", broken)
    message = sentence(unpack, make_zip(place / "songs.zip", SONGS.items()), place / "work")
    assert os.strerror(errno.EIO) in message


def test_a_missing_file_is_named(place):
    message = sentence(unpack, place / "nothing.zip", place / "work")
    assert message.endswith("nothing.zip is not a file; give the path of an archive.")


def test_an_ascii_locale_takes_names_from_elsewhere(place):
    """The file system then knows no other characters; the report still does."""
    source = make_zip(place / "songs.zip", [("曲.wav", SONG)])
    code = (
        "import json, sys; from pathlib import Path; from audiocraft.data.archive import unpack;"
        "(file,) = unpack(Path(sys.argv[1]), Path(sys.argv[2])).files;"
        "print(json.dumps([file.name, file.path.name, file.path.stat().st_size]))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, source, place / "work"],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        check=True,
        capture_output=True,
    )
    assert json.loads(done.stdout) == ["曲.wav", "000001.wav", len(SONG)]


def test_zlib_keeps_nothing_back():
    """Blocks are bounded, and together they are the whole."""
    data = zlib.compress(b"", 9, wbits=31) + zlib.compress(bytes(10**6), 9, wbits=31)
    blocks = list(tarball.expand(io.BytesIO(data), "x"))
    assert b"".join(blocks) == bytes(10**6)
    assert max(map(len, blocks)) <= tarball.BLOCK


@pytest.mark.slow
def test_a_gigabyte_takes_a_few_megabytes_of_memory(place):
    noise = os.urandom(10**7)
    with zipfile.ZipFile(place / "songs.zip", "w", zipfile.ZIP_STORED) as file:
        for number in range(100):
            file.writestr(f"{number}.wav", noise)
    code = (
        "import json, sys; from pathlib import Path;"
        "from audiocraft.data.archive import unpack;"
        "from tests.memory import peak_mb;"
        "before = peak_mb(); found = unpack(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print(json.dumps([len(found.files), peak_mb() - before]))"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, place / "songs.zip", place / "work"],
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - begin
    files, more = json.loads(done.stdout)
    print(f"1 GB: {seconds:.1f} s, {more:.1f} MB more")
    assert files == 100
    assert more < 20
    assert seconds < 120
