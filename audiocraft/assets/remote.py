"""What is fetched, what tells its contents apart, and why it may not come."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final, Literal, Self
from urllib.parse import urlsplit

from audiocraft.errors import DownloadError

_OLD_ENOUGH_S: Final = 2.0
_MEANING: Final = {
    400: "it does not understand the URL",
    401: "it asks for a login",
    403: "it forbids access",
    404: "there is no such file",
    410: "the file is gone",
}


def show_url(url: str) -> str:
    """Scheme, host and path: a query or a password may be a secret and is never shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def show_size(size: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} bytes"


def refusal(what: str, host: str, status: int) -> DownloadError:
    """The error for a status that no other attempt mends."""
    reason = f"{host} answers {status} ({_MEANING.get(status, 'it refuses')})"
    closed = status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
    remedy = "give a URL that may be read without a login" if closed else "check the URL"
    return DownloadError.of(what, reason, remedy, status)


@dataclass(frozen=True)
class Digest:
    """The hash that a file must have.

    Attributes:
        kind: `sha256`, or `git` for SHA-1 of `blob <size>`, a zero byte and the content.
        value: in hexadecimal.
    """

    kind: Literal["sha256", "git"]
    value: str

    @classmethod
    def of_hub(cls, etag: str | None) -> Self | None:
        """From an ETag of the hub: SHA-256 for large files, git's for others."""
        value = (etag or "").removeprefix("W/").strip('"').lower()
        if re.fullmatch("[0-9a-f]{64}", value):
            return cls("sha256", value)
        return cls("git", value) if re.fullmatch("[0-9a-f]{40}", value) else None


@dataclass(frozen=True)
class Validators:
    """What tells one content of a URL from the next (RFC 9110, section 8.8).

    Attributes:
        etag: a strong one.
        last_modified: only where it was old enough to tell two changes apart.
    """

    etag: str | None = None
    last_modified: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Self:
        """From the headers of an answer."""
        etag, modified = headers.get("ETag"), headers.get("Last-Modified")
        since, now = parse_date(modified), parse_date(headers.get("Date"))
        old = since and now and (now - since).total_seconds() >= _OLD_ENOUGH_S
        return cls(etag if etag and etag.startswith('"') else None, modified if old else None)

    def __bool__(self) -> bool:
        return self.etag is not None or self.last_modified is not None

    @property
    def strongest(self) -> str:
        """The one to send, empty if there is none."""
        return self.etag or self.last_modified or ""

    def conditions(self) -> dict[str, str]:
        """Headers that ask for content other than this."""
        name = "If-Modified-Since" if self.etag is None else "If-None-Match"
        return {name: self.strongest} if self else {}

    def contradicts(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer is about other content, such as an older file put back."""
        pairs = (("ETag", self.etag), ("Last-Modified", self.last_modified))
        return any(own and headers.get(name, own) != own for name, own in pairs)


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        url: http(s).
        what: its name in messages.
        headers: to send; an `Authorization` goes to the URL's own host only.
        size: bytes, if known.
        digest: the hash, if known.
        answered: its server has answered before: silence is a cut, no missing network.
    """

    url: str = field(repr=False)
    what: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int | None = None
    digest: Digest | None = None
    answered: bool = False

    @property
    def host(self) -> str:
        """Where it comes from."""
        return show_url(self.url).split("/")[2]


@dataclass(frozen=True)
class Received:
    """What came.

    Attributes:
        size: bytes.
        hash: in hexadecimal, of the kind that was asked for, else SHA-256.
        validators: to ask with whether it has changed.
    """

    size: int
    hash: str
    validators: Validators


def parse_date(text: str | None) -> datetime | None:
    """A date as HTTP writes it; None for anything else."""
    try:
        date = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
