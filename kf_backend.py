#!/usr/bin/env python3
"""Report one site's outages back to the fleet's API, each with its device's name.

1. `GET /site-info/{siteId}`: the site's devices.
2. `GET /outages`: every outage of every device, filtered as it is read:
3. those that began before a date, or whose id is not one of the site's devices, are dropped;
4. the device's name is attached to each that remains.
5. `POST /site-outages/{siteId}`: the list is sent.

Environment: `KF_API_KEY` (needed), `KF_BASE_URL` (optional).
Exit codes: 0 sent; 1 not sent; 2 wrong use; 3 unknown: it may or may not have been applied; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import signal

# Until main() can say more, Ctrl-C ends the imports without a traceback.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import codecs
import contextlib
import errno
import gc
import io
import itertools
import json
import logging
import math
import os
import random
import re
import reprlib
import shutil
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Dict, NoReturn, TextIO, Tuple, TypedDict, TypeVar, cast
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import ConnectionPool
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ProtocolError, ProxyError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry, parse_url

__version__ = "1.0.0"

#: Every path below is relative to it.
BASE_URL = "https://api.krakenflex.systems/interview-tests-mock-api/v1"
SITE = "norwich-pear-tree"
#: An outage that begins at this very instant is still reported.
SINCE = "2022-01-01T00:00:00.000Z"

#: Seconds of silence (connecting, or between two pieces of an answer) after which a try is given up.
TIMEOUT = 30.0
#: Seconds for the whole run: a server that sends a byte now and then is never silent for `TIMEOUT`.
DEADLINE = 600.0
#: The API's own 429 and 500, and what the gateway before it answers by itself: the request was refused, not applied.
RETRY_STATUSES = frozenset({429, 500, 502, 503, 504})
#: Tries after the first one. With `BACKOFF` they wait at most 1 + 2 + 4 + 8 + 15 = 30 s in all.
RETRIES = 5
#: Seconds before the second try. Each later wait is twice as long, to `BACKOFF_MAX`, less up to half of it at random.
BACKOFF = 1.0
BACKOFF_MAX = 15.0
#: The longest Retry-After, in seconds, that is worth waiting for.
RETRY_AFTER_MAX = 60.0

#: What to do about a status that is not 200.
HINTS = {
    400: "the API does not take the list as it is",
    403: "check KF_API_KEY",
    404: "check --site and --base-url",
    **dict.fromkeys(range(201, 300), "the contract promises 200 alone, so check what it did before you run it again"),
    **dict.fromkeys(range(300, 400), "redirects are not followed, check --base-url"),
}
RUN_AGAIN = "run it again later"
NO_ANSWER = "check the network and --base-url, then run it again"

#: Bytes read at a time: more of them need fewer calls, but show less of how far a download is.
READ = 128 * 1024
#: The same for a compressed body: urllib3 before 2.6 decompresses each read at once, up to a thousandfold.
COMPRESSED_READ = 8 * 1024
#: Bytes decoded at a time, since the outages in them should fit into the processor's cache; and sent at a time, since
#: Python allows `TIMEOUT` for each send as a whole, and a slow uplink is not silent.
PIECE = 32 * 1024
#: Characters that one outage may take (some 130 are usual), and the whole of a site's information.
OUTAGE_MAX = 1024 * 1024
SITE_INFO_MAX = 16 * 1024 * 1024
#: Texts of times whose meaning is kept.
INSTANTS_MAX = 8 * 1024

log = logging.getLogger("kf_backend")
log.addHandler(logging.NullHandler())  # silent unless the caller turns it on

T = TypeVar("T")
#: When an outage began and ended, in seconds since 1970.
Span = Tuple[float, float]


# The shapes of the API's JSON, as on the wire.


class Outage(TypedDict):
    """An element of `GET /outages`. `id` is the device's; the times are RFC 3339 (`2022-01-01T00:00:00.000Z`)."""

    id: str
    begin: str
    end: str


class SiteOutage(Outage):
    """An element of `POST /site-outages/{siteId}`: an outage and its device's display name (`Battery 1`)."""

    name: str


class Device(TypedDict):
    """One of the `devices` of `GET /site-info/{siteId}`."""

    id: str
    name: str


class SiteInfo(TypedDict):
    """The answer of `GET /site-info/{siteId}`: the site's id (`norwich-pear-tree`), display name and devices."""

    id: str
    name: str
    devices: list[Device]


class KFError(Exception):
    """The list was not sent: the API refused, the network failed, or the API broke its contract. Safe to run again,
    unless it is an OutcomeUnknown.

    `status` is the API's last HTTP status and `message` the API's own words, where there were any.
    """

    def __init__(self, text: str, status: int | None = None, message: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.message = message


class UsageError(KFError, ValueError):
    """An argument is wrong (base URL, key, site or date): no request was made."""


class OutcomeUnknown(KFError):
    """The list went out and no answer came: it may or may not have been applied."""


# Rules: pure functions.


def plain(text: str) -> str:
    """Return `text` as one line that is safe on a terminal: what moves the cursor or cannot be printed becomes `?`."""
    if text.isprintable():
        return text
    joiners = "\u200c\u200d"  # invisible, but letters of many scripts need them
    return "".join(c if c.isprintable() or c in joiners else "?" for c in " ".join(text.split()))


def reason(error: BaseException) -> str:
    """Return in a few words why `error` came about: the innermost of the errors that requests and urllib3 wrap."""
    proxy = ""
    while True:
        proxy = "the proxy: " if isinstance(error, ProxyError) else proxy
        context = None if error.__suppress_context__ else error.__context__
        wrapped = (error.__cause__, *error.args, getattr(error, "reason", None), context)
        inner = next((one for one in wrapped if isinstance(one, BaseException)), None)
        if inner is None:
            return proxy + plain(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        error = inner


def clean_key(api_key: str) -> str:
    """Return `api_key` less the white space around it; raise UsageError, not showing it, if no header can hold it."""
    key = api_key.strip()
    if not key:
        raise UsageError("there is no API key: set KF_API_KEY")
    if not re.fullmatch(r"[!-~]+", key):
        raise UsageError("the API key has a character other than visible ASCII: check KF_API_KEY")
    return key


def clean_base_url(base_url: str) -> str:
    """Return `base_url` as urllib3 reads it, less a trailing slash; raise UsageError if the key would not be safe."""
    try:
        url = parse_url(base_url)
        (url.host or "").encode("idna")
    except (HTTPError, UnicodeError) as error:
        raise UsageError("the base URL is not a URL: check --base-url or KF_BASE_URL") from error
    local = re.fullmatch(r"localhost|127(\.\d{1,3}){3}|\[::1\]", url.host or "")
    if not url.host or not (url.scheme == "https" or (url.scheme == "http" and local)):
        raise UsageError("the base URL must be https (http only to this machine): check --base-url or KF_BASE_URL")
    if url.auth is not None or "?" in base_url or "#" in base_url:
        raise UsageError("the base URL must have no user, query or fragment: check --base-url or KF_BASE_URL")
    return url.url.rstrip("/")


def path_segment(site: str) -> str:
    """Return `site` percent-encoded whole: one segment of a path, whatever is in it (RFC 3986 section 3.3)."""
    if site in ("", ".", ".."):
        raise UsageError(f"{site!r} cannot be a site's id: check --site")
    try:
        return quote(site, safe="")
    except UnicodeEncodeError as error:
        raise UsageError(f"{site!a} is no valid text: check --site") from error


#: RFC 3339 section 5.6, and 24:00, which ISO 8601 has. Python's parsers take more, each release something else.
RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,999})?(?:[Zz]|[+-][0-9]{2}:[0-5][0-9])"
).fullmatch


def isoparse(text: str) -> datetime:
    """Return what dateutil's isoparse does, and ValueError alone on failure."""
    from dateutil import parser  # a quarter of the start-up time, for times that few runs meet

    try:
        return parser.isoparse(text)
    except OverflowError as error:  # 9999-12-31T24:00Z
        raise ValueError(str(error)) from error


def parse_time(text: str) -> datetime:
    """Return the aware datetime that an RFC 3339 time names; raise ValueError or TypeError for anything else."""
    if not RFC_3339(text):
        raise ValueError("not an RFC 3339 time")
    try:
        # twenty times faster than isoparse, and refuses what it cannot read; before Python 3.11 it knows no Z
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return isoparse(text)


class _Instants(Dict[str, float]):
    """Seconds from 1970 to what `parse_time` makes of a text, by that text. A fault that takes many devices out gives
    many outages the same times, so some are kept; a dict's own look-up is half of what `lru_cache` takes."""

    def __missing__(self, text: str) -> float:
        seconds = parse_time(text).timestamp()
        if len(self) >= INSTANTS_MAX:
            self.clear()
        self[text] = seconds
        return seconds


instants = _Instants()


def parse_since(date: str | datetime) -> datetime:
    """Return an aware datetime as it is, or what an ISO 8601 date or time names, in UTC unless it names a zone."""
    if isinstance(date, datetime):
        if date.utcoffset() is None:
            raise UsageError("the date is a datetime without a zone")
        return date
    try:
        since = parse_time(date) if RFC_3339(date) else isoparse(date)
    except ValueError as error:
        raise UsageError(f"{plain(date)!r} is no ISO 8601 date or time, such as 2022-06-01: check --since") from error
    return since if since.tzinfo else since.replace(tzinfo=timezone.utc)


def _refuse_constant(name: str) -> None:
    raise KFError(f"the API sent {name}, which is no JSON; nothing was sent")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def loads(text: str) -> Any:
    """Return what the JSON `text` (RFC 8259) holds. Raise json.JSONDecodeError where it is none, so that a broken
    download can be made again, and KFError where a second one would be no better."""
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise KFError("the API sent JSON nested too deep, or a number too long, to read; nothing was sent") from error


def read_json(pieces: Iterable[bytes]) -> Any:
    """Return what a small JSON body holds, a byte order mark or not. Raises UnicodeDecodeError, or as `loads`."""
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > SITE_INFO_MAX:
            raise KFError(f"the API sent site information of over {SITE_INFO_MAX} bytes; nothing was sent")
    return loads(body.decode("utf-8-sig"))


SEPARATOR = re.compile(r"[ \t\n\r]*[\[,][ \t\n\r]*")


def whole_objects(text: str) -> int:
    """Return where the last whole object ends in `text`, the rest of an array; 0 if there is none."""
    end = position = 0
    with contextlib.suppress(ValueError, RecursionError, KFError):  # the text stops, or is wrong: `loads` tells which
        while True:
            before = SEPARATOR.match(text, position)
            if not before:
                break
            _, position = _decoder.raw_decode(text, before.end())
            end = position if text[position - 1] == "}" else end
    return end


def read_array(pieces: Iterable[bytes]) -> Iterator[list[Any]]:
    """Decode a JSON array as its bytes come, and yield its elements in lists, in their order.

    However the bytes are cut into pieces, the lists add up to what `loads` makes of the whole; what it refuses is
    refused, with one of its errors or UnicodeDecodeError, perhaps after some lists. No more is held than a piece and an
    element: where nothing can be told apart for `OUTAGE_MAX` characters, KFError is raised.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    taken = text = ""  # `taken` stands in for the elements already yielded, `text` is all that follows them
    for piece in pieces:
        new = decode(piece)
        text += new
        if "}" in new:
            # Cut behind the last brace. If no array comes before it, that brace is inside an element, or a string.
            end = text.rfind("}") + 1
            try:
                elements = loads(taken + text[:end] + "]")
            except json.JSONDecodeError:
                end = whole_objects(text)
                elements = loads(taken + text[:end] + "]") if end else []
            if end:
                yield elements[1:] if taken else elements
                taken, text = "[{}", text[end:]
        if len(text) > OUTAGE_MAX:
            raise KFError(
                f"the API sent outages that cannot be told apart for {OUTAGE_MAX} characters; nothing was sent"
            )
    elements = loads(taken + text + decode(b"", True))
    if not isinstance(elements, list):
        raise KFError("GET /outages: the API sent something other than a list; nothing was sent")
    yield elements[1:] if taken else elements


def has_texts(value: object, *fields: str) -> bool:
    """Return whether `value` is an object of JSON whose `fields` are all there and strings."""
    return isinstance(value, dict) and all(isinstance(value.get(field), str) for field in fields)


def device_names(devices: Iterable[Device]) -> dict[str, str]:
    """Return the name of each device by its id, in the site's order; raise KFError where it is not one name."""
    names: dict[str, str] = {}
    for row, device in enumerate(devices, 1):
        if not has_texts(device, "id", "name"):
            raise KFError(f"GET /site-info: device {row} has no id or no name; nothing was sent")
        if names.setdefault(device["id"], device["name"]) != device["name"]:
            raise KFError(f"GET /site-info: device {row} is listed twice with different names; nothing was sent")
    return names


def read_site_info(answer: Any, site: str) -> SiteInfo:
    """Return an answer of `GET /site-info/{siteId}`; raise KFError if it is not `site`'s or breaks the contract."""
    if not has_texts(answer, "id", "name"):
        raise KFError("GET /site-info: the API sent no site with an id and a name; nothing was sent")
    if answer["id"] != site:
        raise KFError(f"GET /site-info: asked for {site!r}, the API sent {plain(answer['id'])!r}; nothing was sent")
    if not isinstance(answer.get("devices"), list):
        raise KFError("GET /site-info: the API sent a site without a list of devices; nothing was sent")
    device_names(answer["devices"])
    return cast(SiteInfo, answer)


def api_message(body: bytes) -> str | None:
    """Return the `message` of an error's body, `{"message": "Forbidden"}`; None where it has none."""
    try:
        answer = loads(body.decode("utf-8-sig"))
    except (ValueError, KFError):
        return None
    return answer["message"] if has_texts(answer, "message") else None


short = reprlib.Repr()
short.maxstring = 160  # a key that the API echoes is to come out whole, or it would not be recognized


def site_outages_of(outages: Iterable[Any], names: Mapping[str, str], since: float) -> Iterator[SiteOutage]:
    """Yield each outage of the devices in `names` that began at or after `since`, with its device's name.

    Order, repeated rows, the text of the times and unknown fields stay as they came; `outages` are not changed.
    KFError is raised for an outage without a string id, since nobody can tell whose it is, and for one of these
    devices whose `begin` or `end` is no RFC 3339 time, even if it began too early.
    """
    for row, outage in enumerate(outages, 1):
        try:
            device = outage["id"]
            if device not in names:
                if isinstance(device, str):
                    continue
                raise TypeError
        except (TypeError, KeyError) as error:
            raise KFError(f"GET /outages: outage {row} has no id that is a string; nothing was sent") from error
        try:
            begin = instants[outage[(field := "begin")]]
            instants[outage[(field := "end")]]
        except (KeyError, TypeError, ValueError) as error:
            held = plain(short.repr(outage[field])) if field in outage else "nothing"
            raise KFError(
                f"GET /outages: the {field} of outage {row} is no RFC 3339 time; nothing was sent; it is {held}"
            ) from error
        if begin >= since:
            site_outage: SiteOutage = outage.copy()
            site_outage["name"] = names[device]
            yield site_outage


class _Retry(Retry):
    """urllib3's Retry with the same waits on every release: jittered ones that double, from the first one on.

    A Retry-After (RFC 9110 section 10.2.3) is obeyed, ignored where it is malformed, and ends the tries where it asks
    for more than `RETRY_AFTER_MAX`. `before_wait` is called with this Retry and the seconds that it is about to wait.
    """

    RETRY_AFTER_STATUS_CODES = frozenset()  # urllib3 would add 413 to our own

    def __init__(self, *args: Any, before_wait: Callable[[Retry, float], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before_wait = before_wait

    def new(self, **kwargs: Any) -> _Retry:
        return super().new(before_wait=self.before_wait, **kwargs)

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        try:
            return super().get_retry_after(response)
        except (InvalidHeader, ValueError, OverflowError):
            return None

    def get_backoff_time(self) -> float:
        longest = min(BACKOFF_MAX, self.backoff_factor * 2 ** (len(self.history) - 1))
        return float(longest * random.uniform(0.5, 1))

    def increment(self, *args: Any, **kwargs: Any) -> _Retry:
        response = kwargs.get("response")
        asks_too_much = response is not None and (self.get_retry_after(response) or 0) > RETRY_AFTER_MAX
        retry = super(_Retry, self.new(total=0) if asks_too_much else self).increment(*args, **kwargs)
        if response is not None:
            response.close()  # its body may never end, and its connection may go stale before the next try
        return retry

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        wait = None if response is None else self.get_retry_after(response)
        wait = self.get_backoff_time() if wait is None else wait
        self.before_wait(self, wait)
        time.sleep(wait)


class _Adapter(HTTPAdapter):
    """requests' adapter, but close() closes idle connections at once: urllib3 2 leaves them to garbage collection."""

    pool: ConnectionPool | None = None

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> ConnectionPool:
        self.pool = super().get_connection_with_tls_context(*args, **kwargs)
        return self.pool

    def close(self) -> None:
        if self.pool:
            self.pool.close()
        super().close()


class _Body(io.BytesIO):
    """A request's body that calls `before_read` when any of it is about to leave."""

    def __init__(self, body: bytes, before_read: Callable[[], None]) -> None:
        super().__init__(body)
        self.before_read = before_read

    def read(self, size: int | None = -1) -> bytes:
        self.before_read()
        return super().read(PIECE)  # more than urllib3 asks for at a time, which is slow


def _stay_here(response: requests.Response, **kwargs: Any) -> None:
    """Have requests follow no redirect: the key would go along, and a POST become a GET."""
    response.headers.pop("Location", None)  # with `allow_redirects=False` it would still read the redirect's whole body


class KFClient:
    """A client of the fleet's API, for one thread at a time. `with KFClient(...) as client:` closes its session.

    `base_url` is https (http to this machine alone); `api_key` goes into the header `x-api-key`; `timeout` is the
    longest silence and `backoff` the wait before the first retry, in seconds. A `dry_run` client does all but the POST.
    `on_progress` is called with the client as `GET /outages` comes in. Raises UsageError for a wrong argument.

    After (or during) `handler`, `site_info` is what the API said of the site, `received` the bytes of the answer under
    way and `expected` their number (None where unknown), `outages_read` a count of outages, `site_outages` the list so
    far, and `sent` tells whether the API has it: False (no), True (it was accepted) or None (it went out and no answer
    came).
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout: float = TIMEOUT,
        backoff: float = BACKOFF,
        dry_run: bool = False,
        on_progress: Callable[[KFClient], None] | None = None,
    ) -> None:
        self.base_url = clean_base_url(base_url)
        self._api_key = clean_key(api_key)
        self.timeout = timeout
        self.dry_run = dry_run
        self.on_progress = on_progress
        self.site_info: SiteInfo = {"id": "", "name": "", "devices": []}
        self.received = self.outages_read = 0
        self.expected: int | None = None
        self.site_outages: list[SiteOutage] = []
        self.sent: bool | None = False

        self.session = requests.Session()
        self.session.headers.update(
            {
                "x-api-key": self._api_key,
                "User-Agent": f"kf_backend/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
            }
        )
        self.session.hooks["response"].append(_stay_here)
        self.session.auth = lambda request: request  # a ~/.netrc would add credentials
        # http is for this machine alone, and a proxy in between would see the key
        self.session.trust_env = self.base_url.startswith("https:")
        self._retry = _Retry(
            total=RETRIES,
            other=0,  # such as an untrusted certificate
            allowed_methods={"GET", "POST"},
            status_forcelist=RETRY_STATUSES,
            backoff_factor=backoff,
            raise_on_status=False,
            before_wait=self._before_wait,
        )
        # Once a POST has gone out, only an answer can tell that it was not applied.
        self._post_retry = self._retry.new(read=False)
        self._adapter = _Adapter(max_retries=self._retry)
        self.session.mount("https://", self._adapter)
        self.session.mount("http://", self._adapter)

    def __repr__(self) -> str:
        return f"KFClient({self.base_url!r})"

    def __enter__(self) -> KFClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.session.close()

    def handler(self, site: str = SITE, date: str | datetime = SINCE) -> list[SiteOutage]:
        """Report `site`'s outages that began at or after `date`, and return the list as it was sent.

        `date` is an ISO 8601 date or time, UTC unless it names a zone, or an aware datetime. Raises UsageError before
        any request, OutcomeUnknown where the list may or may not have been applied, and KFError where it was not sent.
        """
        since = parse_since(date)
        site_info = self._get_site_info(site)
        site_outages = self._get_outages(lambda outages: self._filter_outages(outages, site_info, since))
        return self._post_site_outages(site, site_outages)

    def _get_site_info(self, site: str) -> SiteInfo:
        """`GET /site-info/{siteId}`."""
        path = f"site-info/{path_segment(site)}"
        self.site_info = self._get(path, lambda pieces: read_site_info(read_json(pieces), site))
        return self.site_info

    def _get_outages(self, select: Callable[[Iterator[Any]], list[Any]] = list) -> list[Any]:
        """`GET /outages`: return what `select` makes of the outages, which it is given one by one as they come.

        If the download breaks off it is made again, and `select` called again: no part of a broken one is ever used.
        """

        def read(pieces: Iterator[bytes]) -> list[Any]:
            self.outages_read = 0
            return select(itertools.chain.from_iterable(self._counted(read_array(pieces))))

        return self._get("outages", read)

    def _counted(self, lists: Iterable[list[Any]]) -> Iterator[list[Any]]:
        for outages in lists:
            self.outages_read += len(outages)
            yield outages
            if self.on_progress:  # now that these are filtered, too
                self.on_progress(self)

    def _filter_outages(self, outages: Iterable[Any], site_info: SiteInfo, date: str | datetime) -> list[SiteOutage]:
        """Return those of the site's devices that began at or after `date`, as `site_outages_of` does."""
        self.site_outages = []
        names = device_names(site_info["devices"])
        self.site_outages.extend(site_outages_of(outages, names, parse_since(date).timestamp()))
        return self.site_outages

    def _post_site_outages(self, site: str, site_outages: list[SiteOutage]) -> list[SiteOutage]:
        """`POST /site-outages/{siteId}`: return the list once the API has accepted it (a dry run does not send it)."""
        try:
            body = json.dumps(site_outages, allow_nan=False, check_circular=False).encode()
        except (ValueError, RecursionError) as error:  # such as 1e999 in a field that is only carried along
            raise KFError("GET /outages: an outage of the site holds what is no JSON; nothing was sent") from error
        if not self.dry_run:
            start = time.monotonic()
            path = f"site-outages/{path_segment(site)}"
            self._adapter.close()  # one that went stale while idle would look like an answer that never came
            response = self._request("POST", path, self._post_retry, _Body(body, self._going_out))
            self.sent = True
            with response, contextlib.suppress(ProtocolError, KFError):
                next(self._pieces(response), None)  # hanging up on the `{}` would reset the connection
            path = response.request.path_url
            log.info("POST %s: 200 in %.2f s, %d bytes sent", path, time.monotonic() - start, len(body))
        return site_outages

    def _get(self, path: str, read: Callable[[Iterator[bytes]], T], retry: Retry | None = None) -> T:
        """GET `path` and return what `read` makes of the pieces of its body.

        urllib3 retries up to the head of an answer. A body that breaks off, or is no JSON, goes back to its Retry as
        one more error, and the whole is asked for again with what is left of the tries.
        """
        start = time.monotonic()
        response = self._request("GET", path, retry or self._retry)
        path_url = response.request.path_url
        try:
            with response:
                answer = read(self._pieces(response))
            log.info("GET %s: 200 in %.2f s, %d bytes", path_url, time.monotonic() - start, self.received)
            return answer
        except KFError as error:
            error.args = (self._clean(str(error)),)
            raise
        except ProtocolError as error:
            broken = error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            broken = ProtocolError(f"the answer is cut short or no JSON: {error}")
        try:
            retry = (response.raw.retries or self._retry).increment("GET", path_url, error=broken)
        except MaxRetryError as error:
            raise self._error("GET", response.url, f"{reason(broken)}, {RETRIES + 1} times", RUN_AGAIN) from error
        retry.sleep()
        return self._get(path, read, retry)

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        """Yield the body of an answer, decompressed, a piece at a time; raise ProtocolError where it breaks off."""
        encoding = response.headers.get("Content-Encoding") or "identity"
        if encoding.lower() not in ("identity", "gzip", "x-gzip"):  # others, or nested ones, may grow without bounds
            raise KFError(f"{response.url}: the Content-Encoding {encoding} was not asked for; nothing was sent")
        length = response.headers.get("Content-Length", "")
        self.expected = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        try:
            for read in response.iter_content(READ if encoding.lower() == "identity" else COMPRESSED_READ):
                self.received = response.raw.tell()
                for start in range(0, len(read), PIECE):
                    yield read[start : start + PIECE]
        except (OSError, HTTPError, ValueError) as error:
            raise ProtocolError(f"the answer broke off: {reason(error)}") from None

    def _request(self, method: str, path: str, retry: Retry, body: _Body | None = None) -> requests.Response:
        """Send a request, and again as `retry` says; return an answer of 200, with its body yet to be read.

        Every request goes through here. Raises OutcomeUnknown where `body` went out and was not answered, else KFError.
        """
        url = f"{self.base_url}/{path}"
        self.sent = False
        self._adapter.max_retries = retry  # requests takes it from nowhere else
        try:
            response = self.session.request(
                method,
                url,
                data=body,
                headers={"Content-Type": "application/json"} if body else None,
                timeout=self.timeout,
                stream=True,
            )
        except (OSError, HTTPError, ValueError) as error:
            raise self._error(method, url, reason(error), NO_ANSWER) from error
        if response.status_code == 200:
            return response
        if response.status_code > 199:  # the others only announce an answer
            self.sent = False
        with response:
            raise self._refusal(method, response)

    def _refusal(self, method: str, response: requests.Response) -> KFError:
        """Return the error that tells what the API answered instead of 200, and what to do about it."""
        status, wait = response.status_code, response.headers.get("Retry-After")
        hint = HINTS.get(status, RUN_AGAIN)
        if wait and status in RETRY_STATUSES:
            hint = f"run it again after the wait that it asks for, Retry-After: {wait}"
        message = None
        with contextlib.suppress(HTTPError, KFError):
            message = api_message(b"".join(itertools.islice(self._pieces(response), 8)))
        message = self._clean(message) if message else None
        said = f"answered {status}" + (f", {message!r}" if message else "")
        return self._error(method, response.url, said, hint, status, message)

    def _error(
        self, method: str, url: str, problem: str, hint: str, status: int | None = None, message: str | None = None
    ) -> KFError:
        kind, outcome = KFError, "nothing was sent" if method == "GET" else "the list was not accepted"
        if self.sent is None:
            kind, outcome = OutcomeUnknown, "the list may or may not have been applied"
            hint = "check that before you run it again"
        return kind(f"{method} {url}: {self._clean(problem)}; {outcome}: {self._clean(hint)}", status, message)

    def _clean(self, text: str) -> str:
        """Return `text` without what an API could slip into it: terminal escape codes, the key, or no end."""
        return plain(text).replace(self._api_key, "[key]")[:200]

    def _going_out(self) -> None:
        self.sent = None

    def _before_wait(self, retry: Retry, wait: float) -> None:
        self.sent = False  # it was refused, or never went out
        last, tries = retry.history[-1], len(retry.history)
        what = f"answered {last.status}" if last.error is None else self._clean(reason(last.error))
        log.warning("%s %s: %s; try %d of %d in %.1f s", last.method, last.url, what, tries + 1, RETRIES + 1, wait)


# What a person sees: text from data.


def width(text: str) -> int:
    """Return how many columns of a terminal `text` takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def fit(text: str, columns: int) -> str:
    """Return `text` cut or filled with spaces to `columns` of a terminal."""
    if width(text) > columns:
        ends = itertools.accumulate(map(width, text))
        text = "".join(c for c, end in zip(text, ends) if end < columns) + "~"
    return text + " " * (columns - width(text))


def spans_of(site_outages: Iterable[SiteOutage], devices: Iterable[str]) -> dict[str, list[Span]]:
    """Return the sorted times of the outages of each of the `devices`. One that ends before it began takes no time."""
    spans: dict[str, list[Span]] = {device: [] for device in devices}
    for outage in site_outages:
        begin, end = instants[outage["begin"]], instants[outage["end"]]
        spans[outage["id"]].append((begin, end if end > begin else begin))
    for mine in spans.values():
        mine.sort()
    return spans


def out_of_service(spans: Iterable[Span]) -> tuple[float, float]:
    """Return how many seconds lie in at least one of the sorted `spans`, and when the last of these seconds ended."""
    total, reached = 0.0, -math.inf
    for begin, end in spans:
        if end > reached:
            total += end - (begin if begin > reached else reached)
            reached = end
    return total, reached


def stamp(seconds: float) -> str:
    """Return an instant, in seconds since 1970, as `YYYY-MM-DD HH:MM` in UTC."""
    with contextlib.suppress(OverflowError):  # 9999-12-31T23:59:59-01:00
        return (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat(" ")[:16]
    return "?"


def duration(seconds: float) -> str:
    """Return a number of seconds in days and whole hours, such as `3d 4h`."""
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24}h" if hours or not seconds else "<1h"


def timeline(spans: Iterable[Span], since: float, last: float, columns: int) -> str:
    """Return the time from `since` to `last` as `columns` characters: `#` where it touches one of `spans`, else `.`."""
    line = ["."] * columns
    scale, final = columns / ((last - since) or 1), columns - 1
    for begin, end in spans:
        first, until = int((begin - since) * scale), int((end - since) * scale)
        first, until = first if first < final else final, until if until < final else final
        if first == until:
            line[first] = "#"
        else:
            line[first : until + 1] = "#" * (until + 1 - first)
    return "".join(line)


def report(
    site_info: SiteInfo, site_outages: list[SiteOutage], outages_read: int, since: float, columns: int, sent: str
) -> str:
    """Return what a person wants to know of a run, in lines of at most `columns`.

    How many of the `outages_read` are among the `site_outages` that were `sent` (a word such as "sent"), a table of the
    site's devices, in its order, and their timelines.
    """
    names = {device: plain(name) for device, name in device_names(site_info["devices"]).items()}
    spans = spans_of(site_outages, names)
    out = {device: out_of_service(mine) for device, mine in spans.items()}

    dates = 16 if columns >= 70 else 11  # a narrow terminal has no room for the time of day
    name_columns = min(max(map(width, ["Device", *names.values()])), max(columns - 2 * dates - 29, 6))
    row = f"{{}}  {{:>7}}  {{:{dates}.{dates}}}  {{:{dates}.{dates}}}  {{:>14}}".format
    names = {device: fit(name, name_columns) for device, name in names.items()}
    lines = [
        f"{plain(site_info['name'])} ({plain(site_info['id'])})",
        *textwrap.wrap(
            f"{len(site_outages):,} of {outages_read:,} outages {sent}, those of the site since {stamp(since)} UTC.",
            columns,
        ),
        "",
        row(fit("Device", name_columns), "Outages", "First begin", "Last end", "Out of service"),
    ]
    for device, name in names.items():
        mine, (total, end) = spans[device], out[device]
        first, last = (stamp(mine[0][0]), stamp(end)) if mine else ("-", "-")
        lines.append(row(name, len(mine), first, last, duration(total)))
    lines += textwrap.wrap("Times are UTC. Overlapping outages of a device are counted once.", columns)
    if site_outages:
        lines.append("")
        stop = max(end for _, end in out.values())
        cells = max(columns - name_columns - 2, 1)
        lines += [f"{name}  {timeline(spans[device], since, stop, cells)}" for device, name in names.items()]
        middle = stamp((since + stop) / 2)[:10] if cells >= 40 else ""
        scale = stamp(since)[:10] + middle.center(cells - 20) + stamp(stop)[:10]
        lines += [" " * name_columns + "  " + scale, " " * name_columns + "  # out of service"]
    return "\n".join(fit(line, columns).rstrip() for line in lines)


def progress(received: int, expected: int | None, outages_read: int, outages_kept: int) -> str:
    """Return how far a download is, in a line: bytes so far and in all (None where unknown), outages read and kept."""
    percent = f" ({received / expected:.0%})" if expected else ""
    return f"{received / 1e6:.1f} MB{percent}, {outages_read:,} outages read, {outages_kept:,} kept"


# The API behind --demo, on this machine.

DEMO_KEY = "demo-key"


def demo_answers() -> tuple[list[Outage], SiteInfo]:
    """Return made-up answers like the real ones: 108 outages sorted by id, 18 of them of the site's eight devices."""
    from uuid import UUID

    rnd = random.Random(2022)  # the same ones each time
    since = parse_since(SINCE)

    def outage(device: str, begin: datetime) -> Outage:
        end = begin + timedelta(milliseconds=rnd.randrange(60 * 86_400_000))
        begin_text, end_text = (moment.isoformat(timespec="milliseconds")[:23] + "Z" for moment in (begin, end))
        return {"id": device, "begin": begin_text, "end": end_text}

    def some_day(first: int, last: int) -> datetime:
        return since + timedelta(milliseconds=rnd.randrange(first * 86_400_000, last * 86_400_000))

    ids = [str(UUID(int=rnd.getrandbits(128), version=4)) for _ in range(98)]
    devices: list[Device] = [{"id": device, "name": f"Battery {number}"} for number, device in enumerate(ids[:8], 1)]
    outages = [outage(ids[0], since), outage(ids[0], since - timedelta(milliseconds=1))]
    outages += [outage(rnd.choice(ids[:7]), some_day(0, 300)) for _ in range(9)]
    outages += [outage(rnd.choice(ids[:8]), some_day(-300, -70)) for _ in range(7)]
    outages += [outage(device, some_day(-300, 300)) for device in ids[8:]]
    outages.sort(key=lambda outage: outage["id"])
    return outages, {"id": SITE, "name": "Norwich Pear Tree", "devices": devices}


@contextlib.contextmanager
def demo_api() -> Iterator[str]:
    """Serve the demo's answers on 127.0.0.1 in this block, and yield the base URL. One GET and one POST fail."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    outages, site_info = demo_answers()
    answers: dict[str, Any] = {
        "GET /outages": outages,
        f"GET /site-info/{SITE}": site_info,
        f"POST /site-outages/{SITE}": {},
    }
    to_fail = {"GET", "POST"}

    def answer(request: str, key: str | None, body: bytes) -> tuple[int, Any]:
        if key != DEMO_KEY:
            return 403, {"message": "Forbidden"}
        if request not in answers:
            return 404, {"message": "Site not found"}
        method = request.split(maxsplit=1)[0]
        if method in to_fail:
            to_fail.remove(method)
            return 500, {"message": "Internal Server Error"}
        if method == "POST" and not all(has_texts(row, "id", "name", "begin", "end") for row in json.loads(body)):
            return 400, {"message": "We cannot process your request because it doesn't match the required format."}
        return 200, answers[request]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = answer(f"{self.command} {self.path}", self.headers.get("x-api-key"), body)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            """Leave stderr to the client."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None:
            """Think nothing of a client that hangs up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


# The command line.

HELP = """\
environment:
  KF_API_KEY the API key (needed), KF_BASE_URL instead of --base-url;
  HTTPS_PROXY, NO_PROXY and REQUESTS_CA_BUNDLE are obeyed
exit codes:
  0 the list was sent (or printed)      1 it was not: safe to run again
  2 wrong use, no request was made      3 it may or may not have been applied
  130 stopped by Ctrl-C                 143 stopped by SIGTERM
"""


class Stopped(BaseException):
    """Raised by a signal, in the main thread. Not an Exception: no library may take it for a fault of the network."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopped_by_signals(deadline: float) -> Iterator[None]:
    """Raise Stopped at Ctrl-C, at SIGTERM and after `deadline` seconds.

    Python lets the main thread alone do that, and Windows has no alarm: there a run has no deadline.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    main_thread = threading.current_thread() is threading.main_thread()
    names = [name for name in ("SIGINT", "SIGTERM", "SIGALRM") if main_thread and hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup leaves them
    previous = {number: signal.signal(number, stop) for number in numbers}
    alarm = main_thread and hasattr(signal, "setitimer")
    if alarm:
        signal.setitimer(signal.ITIMER_REAL, deadline, 1)  # again each second, should a destructor swallow the first
    try:
        yield
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


#: Goes to the start of the terminal's line and empties it.
ERASE = "\r\033[K"


def write(text: str, stream: TextIO | None, end: str = "\n") -> OSError | None:
    """Print `text` at once; return what went wrong, if anything but the reader's going away (`| head`)."""
    if stream is None:  # it was closed before we began
        return OSError(errno.EBADF, os.strerror(errno.EBADF))
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end, flush=True)
    except OSError as error:
        # else Python would try the same again as it shuts down
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return None if isinstance(error, BrokenPipeError) else error
    return None


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        write(message, file or sys.stderr, end="")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kf_backend: {message}; --help tells more\n")


def seconds_option(text: str) -> float:
    """Return `text` as a number of seconds between 0 and a day."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, more than 0 and at most 86400")
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options in `argv`; print and exit, as argparse does, for --help, --version and wrong use."""
    parser = _Parser(
        prog="kf_backend.py",
        usage="kf_backend.py [options]",
        description="Report one site's outages back to the fleet's API, each with its device's name.",
        epilog=HELP,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=22, width=80),
        allow_abbrev=False,
    )
    add, loudness = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--site", default=SITE, help="the site's id (%(default)s)")
    add(
        "--since",
        metavar="DATE",
        default=SINCE,
        help="drop outages that began before this ISO 8601 date or time, UTC unless it names a zone (2022-01-01)",
    )
    add("--base-url", metavar="URL", help="the API's address: https, or http to this machine")
    add("--dry-run", action="store_true", help="do all but the POST; print the JSON list")
    add("--demo", action="store_true", help="use an API on this machine: no key, no network")
    add("--timeout", metavar="SECONDS", type=seconds_option, default=TIMEOUT, help="the longest silence (%(default)g)")
    add(
        "--deadline",
        metavar="SECONDS",
        type=seconds_option,
        default=DEADLINE,
        help="the longest whole run (%(default)g)",
    )
    loudness("-v", "--verbose", action="store_true", help="tell of each request, too")
    loudness("-q", "--quiet", action="store_true", help="tell of errors alone")
    add("--version", action="version", version=f"kf_backend {__version__}")
    args = parser.parse_args(argv)
    if args.demo and args.base_url is not None:
        parser.error("--demo brings an API of its own: leave out --base-url")
    return args


@contextlib.contextmanager
def progress_line(shown: bool) -> Iterator[Callable[[KFClient], None] | None]:
    """Yield what keeps a line about the download on stderr, if it is `shown` at all; the line is gone afterwards."""
    due = time.monotonic() + 0.5  # a short download needs none

    def draw(client: KFClient) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + 0.2
            line = progress(client.received, client.expected, client.outages_read, len(client.site_outages))
            write("\r" + fit(line, shutil.get_terminal_size().columns - 1), sys.stderr, end="")

    try:
        yield draw if shown else None
    finally:
        if shown:
            write(ERASE, sys.stderr, end="")


def show(args: argparse.Namespace, client: KFClient, site_outages: list[SiteOutage]) -> int:
    """Print what a finished run has to show, and return the exit code."""
    problem = write(json.dumps(site_outages, indent=2), sys.stdout) if args.dry_run else None
    if problem:
        log.error("the list could not be printed: %s", reason(problem))
        return 1
    if not args.quiet:
        columns, since = min(shutil.get_terminal_size().columns, 500), parse_since(args.since).timestamp()
        sent, stream = ("would be sent", sys.stderr) if args.dry_run else ("sent", sys.stdout)
        problem = write(report(client.site_info, site_outages, client.outages_read, since, columns, sent), stream)
        if problem:
            outcome = "printed" if args.dry_run else "sent"
            log.error("the report could not be printed: %s; the list was %s", reason(problem), outcome)
    return 0


class _StderrHandler(logging.Handler):
    """logging's own would have Python end in 120 where stderr is a full disk."""

    def emit(self, record: logging.LogRecord) -> None:
        write(self.format(record), sys.stderr)


#: By `KFClient.sent`: what to say, and the exit code of a run that was stopped by its deadline.
OUTCOMES = {
    True: ("the list was sent", 0),
    None: ("the list may or may not have been applied: check that before you run it again", 3),
    False: ("nothing was sent: run it again", 1),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: the one place where a failure becomes a line and a code."""
    args = parse(argv)
    terminal = bool(sys.stderr) and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter((ERASE if terminal else "") + "kf_backend: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING)
    client = None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(stopped_by_signals(args.deadline))
            base_url = os.environ.get("KF_BASE_URL") or BASE_URL if args.base_url is None else args.base_url
            api_key = os.environ.get("KF_API_KEY", "")
            if args.demo:
                base_url, api_key = stack.enter_context(demo_api()), DEMO_KEY
                log.warning("demo: an API of its own at %s, which fails once on a GET and once on a POST", base_url)
            with progress_line(terminal and not args.quiet) as draw:
                client = KFClient(base_url, api_key, timeout=args.timeout, dry_run=args.dry_run, on_progress=draw)
                with client:
                    site_outages = client.handler(args.site, args.since)
            return show(args, client, site_outages)
    except KFError as error:
        log.error("%s", error)
        return 2 if isinstance(error, UsageError) else 3 if isinstance(error, OutcomeUnknown) else 1
    except Stopped as stopped:
        sent = client.sent if client else False
        outcome, code = OUTCOMES[sent]
        name = signal.Signals(stopped.number).name
        if name == "SIGALRM":
            log.error("stopped after %g s (--deadline); %s", args.deadline, outcome)
            return code
        log.error("stopped by %s; %s", name, outcome)
        return 128 + stopped.number
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


if __name__ == "__main__":
    gc.freeze()  # what the imports made stays to the end: no collection need look at it again
    raise SystemExit(main())
