"""Archives, made as nobody honest would make them too, and what must hold of them."""

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

from audiocraft.data.archive import LIMITS, unpack
from tests.data.signals import sentence

SONG = (Path(__file__).parent.parent / "audio" / "real_song.ogg").read_bytes()


def listing(folder):
    """Every path below a folder but its `work`, with what an intruder could change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] != "work":
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            found[path] = (status.st_mode, status.st_mtime_ns, content)
    return found


def refused(place, source, limits=LIMITS):
    """The sentence that refuses an archive, which must leave nothing behind."""
    before = listing(place)
    message = sentence(unpack, source, place / "work", limits)
    assert listing(place) == before
    assert list((place / "work").iterdir()) == []
    assert message.startswith(source.name)
    assert "\n" not in message
    assert len(message) < 400
    return message


def unpacked(place, source, limits=LIMITS):
    """What comes out of an archive: content by name."""
    before = listing(place)
    result = unpack(source, place / "work", limits)
    assert listing(place) == before
    for file in result.files:
        assert file.path.parent.parent == place / "work"
        assert stat.S_ISREG(file.path.lstat().st_mode)
        assert not file.path.stat().st_mode & 0o7111
        assert hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256
    return {file.name: file.path.read_bytes() for file in result.files}


def make_zip(path, entries, method=zipfile.ZIP_DEFLATED):
    """A zip of names, or of ZipInfo, and contents."""
    with zipfile.ZipFile(path, "w", method) as file:
        for entry, content in entries:
            file.writestr(entry, content)
    return path


def zip_entry(name, mode=0o644):
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # the constructor would clean it
    info.external_attr = mode << 16
    return info


def tar_entry(name, kind=tarfile.REGTYPE, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def make_tar(path, entries, mode="w", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as file:
        for info, content in entries:
            file.addfile(info, io.BytesIO(content))
    return path


def patched(path, signature, offset, content):
    """Overwrite a field of the last header of a kind."""
    data = bytearray(path.read_bytes())
    at = data.rindex(signature) + offset
    data[at : at + len(content)] = content
    path.write_bytes(data)
    return path
