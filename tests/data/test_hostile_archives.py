import gzip
import lzma
import random
import stat
import struct
import tarfile
import time
import zipfile

import pytest

from audiocraft.data.archive import ArchiveError, Limits, unpack
from audiocraft.errors import InputError
from tests.data.archives import (
    SONG,
    make_tar,
    make_zip,
    patched,
    refused,
    tar_entry,
    unpacked,
    zip_entry,
)


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.wav", "leads out of its folder"),
        ("songs/../../victim.wav", "leads out of its folder"),
        ("songs\\..\\..\\victim.wav", "leads out of its folder"),
        ("../notes.pdf", "leads out of its folder"),
        ("/srv/evil.wav", "absolute path"),
        ("C:\\Windows\\evil.wav", "absolute path"),
        ("\\\\server\\share\\evil.wav", "absolute path"),
    ],
)
def test_names_that_lead_out_are_refused(place, make, name, reason):
    def entry(name, content):
        if make is make_zip:
            return zip_entry(name), content
        return tar_entry(name, content=content)

    source = make(place / "songs", [entry("good.wav", SONG), entry(name, b"evil")])
    message = refused(place, source)
    assert reason in message
    assert repr(name) in message


TAR_TRAPS = [
    (tar_entry("a.wav", tarfile.SYMTYPE, linkname="../victim.wav"), "a symbolic link, 'a.wav'"),
    (tar_entry("a", tarfile.SYMTYPE, linkname="/"), "a symbolic link, 'a'"),
    (tar_entry("a.wav", tarfile.SYMTYPE, linkname="b.wav"), "a symbolic link, 'a.wav'"),
    (tar_entry("a.wav", tarfile.LNKTYPE, linkname="../victim.wav"), "a hard link, 'a.wav'"),
    (tar_entry("a.wav", tarfile.CHRTYPE, devmajor=1, devminor=5), "a device, 'a.wav'"),
    (tar_entry("a.wav", tarfile.BLKTYPE, devmajor=8), "a device, 'a.wav'"),
    (tar_entry("a.wav", tarfile.FIFOTYPE), "a named pipe, 'a.wav'"),
    (tar_entry("a.wav", content=SONG, mode=0o4755), "'a.wav' with a set-id bit"),
    (tar_entry("a.wav", content=SONG, mode=0o2755), "'a.wav' with a set-id bit"),
    (tar_entry("a.wav", tarfile.GNUTYPE_SPARSE, content=bytes(512)), "a sparse file, 'a.wav'"),
    (
        tar_entry("a.wav", content=b"1\n0\n1\n", pax_headers={"GNU.sparse.major": "1"}),
        "a sparse file, 'a.wav'",
    ),
]


@pytest.mark.parametrize(("trap", "reason"), TAR_TRAPS, ids=[reason for _, reason in TAR_TRAPS])
def test_what_is_no_plain_file_is_refused_in_a_tar(place, trap, reason):
    behind = tar_entry("a/evil.wav", content=b"evil")
    source = make_tar(place / "songs.tar", [tar_entry("b.wav", content=SONG), trap, behind])
    assert refused(place, source).startswith(f"songs.tar holds {reason}; ")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (stat.S_IFLNK | 0o777, "a symbolic link, 'a.wav'"),
        (stat.S_IFCHR | 0o666, "a device, 'a.wav'"),
        (stat.S_IFIFO | 0o666, "a named pipe, 'a.wav'"),
        (stat.S_IFREG | 0o4755, "'a.wav' with a set-id bit"),
    ],
)
def test_what_is_no_plain_file_is_refused_in_a_zip(place, mode, reason):
    entries = [("b.wav", SONG), (zip_entry("a.wav", mode), b"../victim.wav")]
    assert f"holds {reason}; " in refused(place, make_zip(place / "songs.zip", entries))


def test_set_id_bits_of_folders_say_nothing_of_files(place):
    """Folders that a group shares have them, and no folder is made."""
    entries = [tar_entry("a", tarfile.DIRTYPE, mode=0o2775), tar_entry("a/b.wav", content=SONG)]
    assert unpacked(place, make_tar(place / "songs.tar", entries)) == {"a/b.wav": SONG}


@pytest.mark.parametrize("make", ["zip", "tar.gz", "tar.bz2", "tar.xz", "gz", "xz"])
def test_a_bomb_stops_early(place, make):
    zeros = bytes(10**8)
    source = place / f"bomb.{make}"
    if make == "zip":
        make_zip(source, [("zeros.wav", zeros)])
    elif make in {"gz", "xz"}:
        source.write_bytes({"gz": gzip, "xz": lzma}[make].compress(zeros))
    else:
        make_tar(source, [tar_entry("zeros.wav", content=zeros)], f"w:{make[4:]}")
    message = refused(place, source)
    assert "expands to more than 32 MB" in message
    assert "bomb" in message


def test_a_bomb_of_what_is_not_needed_stops_as_well(place):
    """An entry of a tar has to be expanded even to be left out."""
    entries = [tar_entry("zeros.bin", content=bytes(10**8))]
    source = make_tar(place / "bomb.tar.gz", entries, "w:gz")
    assert "expands to more than 32 MB" in refused(place, source)


def test_a_zip_within_itself_is_not_unpacked(place):
    inner = make_zip(place / "inner.zip", [("zeros.wav", bytes(10**6))]).read_bytes()
    source = make_zip(place / "outer.zip", [("inner.zip", inner), ("a.wav", SONG)])
    assert unpacked(place, source) == {"a.wav": SONG}
    (left,) = unpack(source, place / "work").left_out
    assert (left.name, left.reason) == (
        "inner.zip",
        "an archive within the dataset; unpack it first",
    )


def overlapping_zip(path, count, size):
    """`count` entries in the table of contents that are all the same one."""
    make_zip(path, [("a.wav", bytes(size))])
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    table = data[start:end] * count
    tail = data[end : end + 8] + struct.pack("<HHII", count, count, len(table), start) + b"\0\0"
    path.write_bytes(data[:start] + table + tail)
    return path


def test_entries_that_share_their_bytes_count_each(place):
    source = overlapping_zip(place / "bomb.zip", 200, 10**6)
    assert "expands to more than 32 MB" in refused(place, source)


@pytest.mark.parametrize("size", [100, 10**6])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_lies_about_sizes_is_refused(place, size, method):
    """Smaller than it is, so that a sum of sizes looks harmless; and larger."""
    source = make_zip(place / "songs.zip", [("a.wav", SONG)], method)
    patched(source, b"PK\1\2", 24, struct.pack("<I", size))
    assert "is broken or cut off" in refused(place, source)


def test_a_zip_of_a_claimed_terabyte_is_refused_before_it_is_read(place):
    source = make_zip(place / "songs.zip", [("a.wav", SONG)])
    patched(source, b"PK\1\2", 24, struct.pack("<I", 2**32 - 2))
    assert "expands to more than 32 MB" in refused(place, source)


@pytest.mark.parametrize("size", [100, 10**6, 8**11 - 1])
def test_a_tar_that_lies_about_sizes_is_refused(place, size):
    source = make_tar(place / "songs.tar", [tar_entry("a.wav", content=SONG)])
    header = bytearray(source.read_bytes())
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    source.write_bytes(header)
    assert "is broken or cut off" in refused(place, source)


@pytest.mark.parametrize("size", ["-512", "9" * 30, "x", "1" * 5000])
def test_a_tar_with_a_senseless_size_is_refused(place, size):
    entries = [tar_entry("a.wav", content=SONG, pax_headers={"size": size})]
    assert "is broken or cut off" in refused(place, make_tar(place / "songs.tar", entries))


@pytest.mark.parametrize(("field", "size"), [(b"%011o\0" % 2**30, 2**30), (b"-0000001000\0", -512)])
def test_a_tar_with_endless_extensions_is_refused(place, field, size):
    """A name of a gigabyte, which is not there, must not be allocated, nor one read backwards."""
    source = make_tar(
        place / "songs.tar", [tar_entry("n" * 300, content=SONG)], form=tarfile.GNU_FORMAT
    )
    header = bytearray(source.read_bytes())
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    source.write_bytes(header)
    assert f"header 1: an extension of {size} bytes" in refused(place, source)


def test_a_name_that_no_system_holds_is_refused(place):
    source = make_tar(place / "songs.tar", [tar_entry("n" * 5000 + ".wav", content=SONG)])
    assert "holds a name of 5004 characters" in refused(place, source)


def encrypted_zip(path):
    """As Info-ZIP writes it with a password: 12 bytes more, and a flag in both headers."""
    make_zip(path, [("secret song.wav", bytes(12) + SONG)], zipfile.ZIP_STORED)
    patched(path, b"PK\3\4", 6, b"\1")
    return patched(path, b"PK\1\2", 8, b"\1")


def test_an_encrypted_zip_is_named(place):
    message = refused(place, encrypted_zip(place / "songs.zip"))
    expected = "songs.zip is encrypted ('secret song.wav'); pack it without a password."
    assert message == expected


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_an_unusual_method_is_named(place, method):
    message = refused(place, make_zip(place / "songs.zip", [("a.wav", SONG)], method))
    assert f"by the method {tarball_method(method)}" in message
    assert message.endswith("pack it as an ordinary zip (deflate).")


def tarball_method(method):
    return {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}[method]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_tar_is_named(place, mode, share):
    entries = [tar_entry(f"{number}.wav", content=SONG) for number in range(3)]
    source = make_tar(place / "songs.tar", entries, mode)
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    message = refused(place, source)
    assert message.startswith("songs.tar is broken or cut off (")
    assert message.endswith("; download it again, or pack it again.")


def test_a_tar_that_was_cut_between_two_files_is_not_taken_for_whole(place):
    source = make_tar(place / "songs.tar", [tar_entry("a.wav", content=bytes(1024))])
    source.write_bytes(source.read_bytes()[: 512 + 1024])
    assert "its end is missing" in refused(place, source)


def test_damage_in_a_tar_is_named(place):
    entries = [tar_entry(f"{number}.wav", content=bytes(512)) for number in range(3)]
    source = make_tar(place / "songs.tar", entries)
    data = bytearray(source.read_bytes())
    data[1024 + 5] ^= 1
    source.write_bytes(data)
    assert "header 2 is damaged" in refused(place, source)


def test_a_wrong_checksum_of_gzip_is_named(place):
    source = make_tar(place / "songs.tgz", [tar_entry("a.wav", content=SONG)], "w:gz")
    data = bytearray(source.read_bytes())
    data[-6] ^= 1
    source.write_bytes(data)
    assert "incorrect data check" in refused(place, source)


@pytest.mark.parametrize("share", [0.0005, 0.5, 0.999])
def test_a_truncated_zip_is_named(place, share):
    source = make_zip(place / "songs.zip", [("a.wav", SONG), ("b.wav", SONG)])
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    assert "is broken or cut off" in refused(place, source)


def test_an_offset_before_the_beginning_is_named(place):
    source = make_zip(place / "songs.zip", [("a.wav", SONG)])
    patched(source, b"PK\5\6", 16, struct.pack("<I", 2**31))
    assert "songs.zip is broken or cut off" in refused(place, source)


def test_damage_in_a_zip_is_named(place):
    source = make_zip(place / "songs.zip", [("a.wav", SONG)], zipfile.ZIP_STORED)
    data = bytearray(source.read_bytes())
    data[5000] ^= 1
    source.write_bytes(data)
    assert "Bad CRC-32 for file 'a.wav'" in refused(place, source)


@pytest.mark.parametrize("make", ["zip", "tar", "tgz"])
def test_no_damage_ends_in_anything_but_a_sentence(place, make):
    """A hundred archives, each with three bytes changed at random places of its structure."""
    source = place / f"songs.{make}"
    if make == "zip":
        make_zip(source, [("a/", b""), ("a/one.wav", b"1" * 500), ("ü.wav", b"2" * 700)])
    else:
        entries = [tar_entry("a" * 120 + "/ü.wav", content=b"1" * 500), tar_entry("b.wav")]
        make_tar(source, entries, "w" if make == "tar" else "w:gz")
    whole = source.read_bytes()
    draw = random.Random(make)  # noqa: S311 - not for secrets
    outcomes = set()
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(3):
            data[draw.randrange(len(data) if make != "tar" else 2048)] = draw.randrange(256)
        source.write_bytes(data)
        try:
            unpack(source, place / "work")
            outcomes.add("unpacked")
        except InputError as error:
            outcomes.add(type(error))
    assert ArchiveError in outcomes
    assert {path.name for path in place.iterdir()} == {source.name, "victim.wav", "work"}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_the_number_of_entries_is_bounded(place, make):
    names = [f"{number}.bin" for number in range(101)]
    entries = [(name, b"") if make is make_zip else tar_entry(name) for name in names]
    message = refused(place, make(place / "songs", entries), Limits(entries=100))
    assert message == ("songs holds more than 100 entries; pack the music alone, or give a folder.")


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_hundred_thousand_entries_are_refused_soon(place, make):
    names = [f"{number}.wav" for number in range(100_000)]
    source = make(
        place / "songs",
        [(name, b"") if make is make_zip else tar_entry(name) for name in names],
    )
    begin = time.perf_counter()
    assert "holds more than 50000 entries" in refused(place, source)
    assert time.perf_counter() - begin < 60


def test_a_table_of_contents_of_any_length_is_not_read(place):
    """Of 40 MB here, all zeros; a zip of 1 GB could name 20 million entries."""
    source = place / "songs.zip"
    length = 40 * 10**6
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65534, 65534, length, 30, 0)
    with source.open("wb") as file:
        file.write(b"PK\3\4" + bytes(26))
        file.truncate(30 + length)
        file.seek(30 + length)
        file.write(end)
    assert "table of contents of more than 16 MiB" in refused(place, source)


def test_a_name_in_a_message_shows_its_control_characters(place):
    source = make_tar(place / "songs.tar", [tar_entry("\x1b[2J\n" + "x" * 200, tarfile.FIFOTYPE)])
    message = refused(place, source)
    assert r"'\x1b[2J\nxxx" in message
    assert "xxx...'" in message
