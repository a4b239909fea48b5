"""Downloads: whole or not at all, resumed where they were cut, checked against size and hash."""

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeVar

from audiocraft.assets import exchange
from audiocraft.assets.exchange import Answer, CutError, ask, pause
from audiocraft.assets.parts import SPARE, Part, open_part, writing
from audiocraft.assets.remote import (
    Received,
    Remote,
    Validators,
    parse_date,
    refusal,
    show_size,
    show_url,
)
from audiocraft.errors import AssetError, DownloadError, UnreachableError
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

RETRIES: Final = 5
"""Attempts in a row that may bring nothing."""
BACKOFF_S = 0.5
"""Seconds before the first of them; each later one waits twice as long."""
_LONGEST_WAIT_S: Final = 30.0  # that a server may ask for
_PROGRESS: Final = 2**20  # bytes that make an attempt worth it
_READ: Final = 2**20
_MB: Final = 1_000_000
_WORTH_A_LINE: Final = 10 * _MB
_REPORT_EVERY_S: Final = 5.0
_WATCH: Final = 32 * 2**20  # bytes between two looks at the disk


def download(remote: Remote, target: Path, *, keep_partial: bool = False) -> Path:
    """Fetch a file, unless it is there; several processes fetch it once.

    Args:
        remote: what to fetch.
        target: its path, where it appears when it is whole.
        keep_partial: what has come stays beside it as `.part` if this fails or is stopped, for a
            later call to go on from.

    Raises:
        AssetError: it cannot be had; `UnreachableError` within 8 s where there is no network.
    """
    with (
        writing(remote.what, target.parent),
        open_part(partial_path(target), remote.what, keep=keep_partial, done=target.exists) as part,
    ):
        if part is not None:
            transfer(remote, part)
            part.move(target)
    return target


def partial_path(target: Path) -> Path:
    """Where what has come of a file lies until it is whole."""
    return target.with_name(f"{target.name}.part")


def probe(
    remote: Remote, *, follow: Callable[[Answer, str], bool] = lambda _answer, _target: True
) -> Mapping[str, str]:
    """Headers of a file, without its content.

    Args:
        remote: the file.
        follow: see `exchange.ask`.

    Raises:
        AssetError: as for `download`.
    """

    def attempt() -> Mapping[str, str]:
        within = exchange.STALL_S if remote.answered else exchange.FIRST_ANSWER_S
        with ask("HEAD", remote.url, remote.headers, within=within, follow=follow) as answer:
            _check_status(remote, answer, expected=range(200, 400))
            return answer.headers

    return _persist(remote, attempt, lambda: 0)


def transfer(
    remote: Remote,
    part: Part,
    *,
    known: Validators | None = None,
    make_room: Callable[[int], None] = lambda _need: None,
) -> Received | None:
    """Fetch a file into a part, however many attempts it takes.

    Args:
        remote: what to fetch.
        part: takes it; what it holds already is gone on from.
        known: of content that need not be fetched again.
        make_room: is told how many bytes are about to be needed.

    Returns:
        What came; None where the content is the known one still.

    Raises:
        AssetError: it cannot be had, or is not what it should be.
    """
    run = _Transfer(remote, part, known or Validators(), make_room)
    return _persist(remote, run.attempt, lambda: part.size)


def check_space(what: str, folder: Path, need: int) -> None:
    """Refuse what does not fit.

    Args:
        what: is to be written.
        folder: on the disk in question.
        need: bytes.

    Raises:
        AssetError: the disk has less.
    """
    free = shutil.disk_usage(folder).free
    if free < need + SPARE:
        raise AssetError(
            f"{what} needs {show_size(need)} more on the disk of {folder}, which has "
            f"{show_size(max(0, free - SPARE))}; free some of it."
        )


def _persist(remote: Remote, attempt: Callable[[], _T], size: Callable[[], int]) -> _T:
    """Try again after cuts, as long as that has a prospect."""
    failures, most, answered = 0, size(), remote.answered
    while True:
        try:
            return attempt()
        except CutError as cut:
            answered = answered or cut.answered
            if not answered:
                raise UnreachableError.of(
                    remote.what,
                    f"{remote.host} cannot be reached ({cut.reason})",
                    "check the URL and the network",
                ) from cut
            now = size()
            failures = 0 if now >= most + _PROGRESS else failures + 1
            most = max(most, now)
            wait = BACKOFF_S * 2 ** max(0, failures - 1) if cut.wait is None else cut.wait
            if failures > RETRIES or wait > _LONGEST_WAIT_S:
                later = f", and asks to wait {wait:.0f} s" if wait > _LONGEST_WAIT_S else ""
                raise DownloadError.of(
                    remote.what,
                    f"{remote.host} breaks off ({cut.reason}){later}",
                    "try again later",
                ) from cut
            logger.warning(
                "%s: %s; trying again%s.",
                remote.what,
                cut.reason,
                f" in {wait:g} s" if wait else "",
            )
            pause(wait)


def _check_status(remote: Remote, answer: Answer, expected: Container[int]) -> None:
    if answer.status in {408, 429} or answer.status >= 500:  # noqa: PLR2004 - RFC 9110, 15.6
        raise CutError(
            f"it answers {answer.status}", answered=True, wait=_retry_after(answer.headers)
        )
    if answer.status not in expected:
        raise refusal(remote.what, show_url(answer.url).split("/")[2], answer.status)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    date = parse_date(text)
    return max(0.0, (date - datetime.now(UTC)).total_seconds()) if date else None


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Transfer:
    """What outlives a single attempt."""

    def __init__(
        self, remote: Remote, part: Part, known: Validators, make_room: Callable[[int], None]
    ) -> None:
        self._remote = remote
        self._part = part
        self._known = known
        self._make_room = make_room
        self._answered = remote.answered
        self._total = remote.size
        self._hash: _Hash = hashlib.sha256()
        self._hashed = 0
        self._seen = Validators()
        digest = remote.digest
        self._identity = digest.value if digest else sha256(remote.url.encode()).hexdigest()
        notes = part.notes()
        if notes.get("of") == self._identity:
            self._seen = Validators(notes.get("etag"), notes.get("last_modified"))
        elif part.size:
            part.reset()
        self._patched = part.size > 0

    def attempt(self) -> Received | None:
        """One request."""
        digest, offset = self._remote.digest, self._part.size
        # Whether pieces fit together shows in the hash; without one the server must say so.
        if offset and not digest and not self._seen:
            self._part.reset()
            offset = 0
        if digest and 0 < offset == self._total:
            return self._finish()
        headers = dict(self._remote.headers)
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if not digest:
                headers["If-Range"] = self._seen.strongest
        else:
            headers |= self._known.conditions()
        within = exchange.STALL_S if self._answered else exchange.FIRST_ANSWER_S
        with ask("GET", self._remote.url, headers, within=within) as answer:
            self._answered = True
            if answer.status == HTTPStatus.NOT_MODIFIED and self._known and not offset:
                if not self._known.contradicts(answer.headers):
                    return None
                self._known = Validators()
                raise CutError("it calls other content unchanged", answered=True, wait=0)
            self._begin(answer, offset)
            self._take(answer)
        return self._finish()

    def _begin(self, answer: Answer, offset: int) -> None:
        """Sets everything to where the answer begins."""
        if offset and answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._start_again("it has nothing more")
        if offset and answer.status == HTTPStatus.PARTIAL_CONTENT:
            total = self._continued(answer, offset)
            self._patched = True
            self._total = self._total or total
            if self._hashed != offset:
                self._hash_file(offset)
            logger.info("Going on with %s at %s.", self._remote.what, show_size(offset))
        else:
            _check_status(self._remote, answer, {HTTPStatus.OK})
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            self._part.reset()
            self._total = self._remote.size or total
            self._hash, self._hashed = self._new_hash(), 0
            self._seen = Validators.of(answer.headers)
            self._patched = False
            self._part.note({"of": self._identity, **asdict(self._seen)})
            logger.info(
                "Fetching %s from %s%s.",
                self._remote.what,
                self._remote.host,
                "" if self._total is None else f", {show_size(self._total)}",
            )
        if total is not None and total != (self._remote.size or total):
            self._refuse(f"{total} bytes are offered instead of {self._remote.size}")
        self._check_space(_WATCH if self._total is None else self._total - self._part.size)

    def _continued(self, answer: Answer, offset: int) -> int | None:
        """Bytes of the whole file, from an answer that goes on."""
        text = answer.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
        if match is None or int(match[1]) != offset:
            self._start_again("it does not go on where it was cut")
        total = None if match[2] == "*" else int(match[2])
        changed = total is not None and total != (self._total or total)
        if not self._remote.digest and (changed or self._seen.contradicts(answer.headers)):
            self._start_again("the file has changed")
        return total

    def _take(self, answer: Answer) -> None:
        done = watched = self._part.size
        total = self._total
        show = _progress(self._remote.what, done, total)
        for chunk in answer.chunks():
            self._part.file.write(chunk)
            self._hash.update(chunk)
            self._hashed = done = done + len(chunk)
            if total is None and done - watched >= _WATCH:
                watched = done
                self._check_space(_WATCH)
            if total is not None and done > total:
                self._refuse(f"more than {total} bytes came")
            show(done)
        if total is not None and done < total:
            raise CutError("it ends early", answered=True)

    def _finish(self) -> Received:
        size, digest = self._part.size, self._remote.digest
        if self._hashed != size or self._total is None:  # git's hash begins with the size
            self._total = size
            self._hash_file(size)
        value = self._hash.hexdigest()
        if digest and value != digest.value:
            if self._patched:
                self._start_again("its pieces do not fit together")
            self._refuse("its hash is wrong")
        return Received(size, value, self._seen)

    def _new_hash(self) -> _Hash:
        if self._remote.digest is None or self._remote.digest.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % (self._total or 0), usedforsecurity=False)

    def _hash_file(self, size: int) -> None:
        self._hash, self._hashed = self._new_hash(), size
        self._part.file.seek(0)
        for start in range(0, size, _READ):
            self._hash.update(self._part.file.read(min(_READ, size - start)))

    def _check_space(self, need: int) -> None:
        self._make_room(need)
        check_space(self._remote.what, self._part.path.parent, need)

    def _start_again(self, reason: str) -> NoReturn:
        self._part.reset()
        raise CutError(reason, answered=True, wait=0)

    def _refuse(self, reason: str) -> NoReturn:
        """What came is wrong and not kept."""
        self._part.reset()
        raise DownloadError.of(
            self._remote.what, f"{reason}, so what came was thrown away", "try again later"
        )


def _progress(what: str, done: int, total: int | None) -> Callable[[int], None]:
    """What is told how much has come, and logs it."""
    if total is None:
        reported = time.monotonic()

        def show(done: int) -> None:
            nonlocal reported
            if time.monotonic() - reported >= _REPORT_EVERY_S:
                reported = time.monotonic()
                logger.info("%s: %s so far", what, show_size(done))

        return show
    if total < _WORTH_A_LINE:
        return lambda _done: None
    log = ProgressLog(logger, "MB", what, scale=_MB, start=done)
    return lambda done: log.update(done, total)
