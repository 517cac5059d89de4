#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = [
#   "requests>=2.32.4,<3",
#   "urllib3>=2.2.2,<3",
#   "python-dateutil>=2.9.0.post0,<5",
# ]
# ///
"""Report one site's outages back to the KrakenFlex API, with device names.

1. GET /outages: all outages of all devices.
2. GET /site-info/{siteId}: the site's devices.
3. Drop the outages that began before a given date or belong to other sites.
4. Add the device's display name to each remaining outage.
5. POST /site-outages/{siteId}: send the list.

environment variables:
  KF_API_KEY     API key (required, except with --demo)
  KF_BASE_URL    API base URL, if --base-url is not given (default:
                 https://api.krakenflex.systems/interview-tests-mock-api/v1)
  HTTPS_PROXY, ALL_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE
                 used by the requests library

exit codes:
  0    the list was accepted, or printed (--dry-run)
  1    no outages were reported; safe to rerun
  2    usage error; no request was made
  3    unknown: the list may or may not have been applied; it is on stdout
  130  interrupted by SIGINT (Ctrl-C)
  143  interrupted by SIGTERM
  129  interrupted by SIGHUP
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from time import monotonic, sleep
from typing import IO, Any, ContextManager, NamedTuple, Tuple, TypedDict, Union
from urllib.parse import quote

from requests import Request, RequestException, Response, Session
from requests.adapters import HTTPAdapter
from requests.exceptions import ContentDecodingError, InvalidURL, SSLError
from urllib3 import BaseHTTPResponse, Retry
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError, ProxyError

__version__ = "3.0.0"

log = logging.getLogger("kf_backend")
log.addHandler(logging.NullHandler())  # silent unless the application sets up logging

# Constants

BASE_URL = "https://api.krakenflex.systems/interview-tests-mock-api/v1"
SITE = "norwich-pear-tree"

#: Outages that began before this time are dropped. One that began exactly then is kept.
SINCE = "2022-01-01T00:00:00.000Z"

#: Give up on an attempt after this many seconds without data.
TIMEOUT = 30.0

#: Stop the whole run after this many seconds. A server that trickles data never
#: triggers TIMEOUT.
DEADLINE = 600.0

#: A request is retried after these statuses, which are usually temporary.
RETRY_STATUSES = frozenset({429, 500, 502, 503, 504})

#: A POST is not retried after these. They come from a gateway that gave up on the API
#: behind it, which may have applied the POST.
GATEWAY_STATUSES = frozenset({502, 504})

#: How many times a request is retried. The waits are 0, 2, 4, 8 and 16 seconds, and up
#: to a second more at random (except for the first).
RETRIES = 5

#: The unit of these waits, in seconds. It is also the most that is added at random.
BACKOFF = 1.0

#: The longest wait that the API can ask for in Retry-After, in seconds.
RETRY_AFTER_MAX = 60.0

#: The maximum number of downloads, if a response keeps breaking off.
DOWNLOAD_ATTEMPTS = 3

#: How many bytes to read at a time. (Of a compressed response, only an eighth as many:
#: they may expand a thousandfold.) A prime number, so that the pieces do not all end at
#: the same place in an outage.
READ_SIZE = 65_521

#: Seconds between messages about a long download.
PROGRESS = 5.0

#: A response of up to this many bytes is kept in memory, a longer one in a file.
MEMORY_MAX = 2**21  # 2 MiB

#: The maximum size of a response, in bytes after decompression.
BODY_MAX = 2**30  # 1 GiB

#: The most text to decode at once, in characters: a batch of outages (about 130 each).
#: Also the maximum size of a site's information, in bytes (about 70 per device).
TEXT_MAX = 2**23  # 8 MiB

#: What to say about a rejected request, by status. By default, check the base URL.
ADVICE = {
    400: "the API rejected the format of the request",
    401: "check the API key",
    403: "check the API key and the base URL",
    404: "check the site ID and the base URL",
    413: "the list is too long",
    429: "try again later",
    500: "try again later",
    502: "try again later",
    503: "try again later",
    504: "try again later",
}


# Shapes: JSON as the API sends and receives it. All fields are required, and all times
# are RFC 3339 (`2022-01-01T00:00:00.000Z`).


class Outage(TypedDict):
    """An item in the response to `GET /outages`. Its `id` is that of its device."""

    id: str
    begin: str
    end: str


class SiteOutage(Outage):
    """An item in `POST /site-outages/{siteId}`: an outage with its device's name."""

    name: str


class Device(TypedDict):
    """A device of a site. Its `name` is for display (`Battery 1`)."""

    id: str
    name: str


class SiteInfo(TypedDict):
    """The response to `GET /site-info/{siteId}`."""

    id: str
    name: str
    devices: list[Device]


#: A date as text or as a `date` object. A `datetime` is one, too.
Date = Union[str, date]


# Outcomes and errors


class Outcome(NamedTuple):
    """What happened to the list, in words and as an exit code."""

    sentence: str
    exit_code: int


NOT_REPORTED = Outcome("No outages were reported", 1)
UNKNOWN = Outcome(
    "The list may or may not have been applied; check before rerunning", 3
)
REPORTED = Outcome("The list was accepted", 0)


class KFError(Exception):
    """The API rejected a request, the network failed, or the API's data is invalid.

    `outcome` is what happened to the list: no outages were reported, unless the error
    is an OutcomeUnknown.
    """

    outcome = NOT_REPORTED


class UsageError(KFError):
    """The API key, the base URL, the site or the date is invalid.

    No request was made.
    """

    outcome = Outcome(NOT_REPORTED.sentence, 2)


class OutcomeUnknown(KFError):
    """The list was sent, but the API did not confirm it. Rerunning is not safe.

    `site_outages` is the list that was sent.
    """

    outcome = UNKNOWN

    def __init__(self, problem: str, site_outages: list[SiteOutage]) -> None:
        super().__init__(problem)
        self.site_outages = site_outages


def one_line(text: str, limit: int = 300) -> str:
    """Return untrusted text as one printable line of at most `limit` characters."""
    text = " ".join(text.split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text[:limit]


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and the errors that it wraps, the innermost last.

    The requests and urllib3 libraries keep them as `__cause__` or in `args`.
    """
    yield error
    for inner in (error.__cause__, *error.args):
        if isinstance(inner, BaseException):
            yield from causes(inner)
            break


def never_connected(error: BaseException) -> bool:
    """Return whether this attempt sent nothing, because no connection was made.

    Refused connections and unknown hosts are kinds of ConnectTimeoutError to urllib3.
    """
    return any(isinstance(cause, ConnectTimeoutError) for cause in causes(error))


def reason(error: BaseException) -> str:
    """Return a description of the root cause of `error`, on one line."""
    chain = list(causes(error))
    root = chain[-1]
    text = one_line(str(root), READ_SIZE) or type(root).__name__
    if isinstance(error, InvalidURL):
        # Our own URL was checked, so this is the proxy's. It may contain a password.
        return "proxy: invalid URL"
    if any(isinstance(cause, ProxyError) for cause in chain):
        return f"proxy: {text}"
    return text


@contextmanager
def valid_json(source: str) -> Iterator[None]:
    """Turn what the `json` module raises into a KFError that names the source."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise KFError(f"{source}: not valid JSON ({error})") from error


# Rules


def clean_key(api_key: str) -> str:
    """Return the API key without surrounding white space.

    Raise UsageError, without showing the key, if it is empty or not visible ASCII.
    """
    api_key = api_key.strip()
    if not api_key:
        raise UsageError("no API key; set KF_API_KEY")
    if not re.fullmatch(r"[!-~]+", api_key):
        raise UsageError("the API key may contain only visible ASCII characters")
    return api_key


#: A base URL that keeps the API key safe: https, or http to this machine. It has no
#: credentials, query or fragment.
SAFE_URL = re.compile(
    r"(https://[^/?#@\s]+|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?)(/[^?#\s]*)?",
    re.IGNORECASE,
)


def clean_base_url(base_url: str) -> str:
    """Return the base URL as requests normalizes it, without trailing slashes.

    Raise UsageError if it is invalid, or if the API key would not be safe with it.
    """
    base_url = base_url.strip()
    if SAFE_URL.fullmatch(base_url):
        with suppress(ValueError):
            return str(Request("GET", base_url).prepare().url).rstrip("/")
    raise UsageError(
        "the base URL must begin with https:// (http:// only for this machine),"
        " and have no credentials, query or fragment"
    )


def path_segment(site: str) -> str:
    """Return the site ID percent-encoded as one path segment (RFC 3986, section 3.3).

    Raise UsageError if that is impossible.
    """
    segment = ""
    with suppress(TypeError, UnicodeEncodeError):
        segment = quote(site, safe="")
    if segment in ("", ".", ".."):
        raise UsageError(f"invalid site ID: {site!a}")
    return segment


#: RFC 3339, section 5.6. Python's parsers accept more, and disagree with one another:
#: some read 24:00 as the next day.
RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ](?!24)\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:[0-5]\d)",
    re.ASCII,
)

#: A calendar date with or without a time. The groups are the year, a hyphen or nothing,
#: the month, the day, the hour and minute, the second and its fraction, and the offset.
ISO_8601 = re.compile(
    r"(\d{4})(-?)(\d\d)\2(\d\d)"
    r"(?:[Tt ](\d\d:\d\d)(:\d\d(?:\.\d+)?)?([Zz]|[+-]\d\d:\d\d)?)?",
    re.ASCII,
)


def parse_time(text: str) -> datetime:
    """Return the aware datetime of an RFC 3339 time (`2022-01-01T00:00:00Z`).

    It is exact to the microsecond. Raise ValueError or TypeError for anything else.
    """
    if not RFC_3339.fullmatch(text):
        raise ValueError("not an RFC 3339 time")
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        # fromisoformat never reads a lowercase z, and before Python 3.11, it only reads
        # fractions of 3 or 6 digits.
        from dateutil.parser import isoparse  # imported here because it loads slowly

        return isoparse(text)


def parse_since(date: Date) -> datetime:
    """Return `date` as an aware datetime: in UTC, unless it has an offset of its own.

    `date` is ISO 8601 text (a calendar date, with or without a time), or a `date` or
    `datetime` object. Raise UsageError for anything else.
    """
    match = ISO_8601.fullmatch(str(date).strip())
    if match:
        year, _, month, day, clock, second, offset = match.groups()
        time = f"{clock or '00:00'}{second or ':00'}{offset or 'Z'}"
        with suppress(ValueError):  # such as February 30
            return parse_time(f"{year}-{month}-{day}T{time}")
    raise UsageError(
        f"expected an ISO 8601 date or time like 2022-06-01, but got {str(date)!a:.50}"
    )


def device_names(site_info: SiteInfo) -> dict[str, str]:
    """Return the names of the site's devices by device ID, in the site's order.

    Raise KFError if a device has two names.
    """
    names: dict[str, str] = {}
    for device in site_info["devices"]:
        name = names.setdefault(device["id"], device["name"])
        if name != device["name"]:
            raise KFError(f"GET /site-info: device {device['id']!a:.50} has two names")
    return names


def check_site_info(site_info: Any, site: str) -> None:
    """Raise KFError if this is not complete information about `site`."""
    try:
        if not isinstance(site_info["devices"], list):
            raise TypeError
        names = device_names(site_info)
        # All of these have to be text, or join() raises TypeError.
        "".join([site_info["id"], site_info["name"], *names, *names.values()])
    except (KeyError, TypeError) as error:
        raise KFError(
            "GET /site-info: missing or invalid id, name or devices"
        ) from error
    if site_info["id"] != site:
        raise KFError(
            f"GET /site-info: asked for site {site!a} but got {site_info['id']!a:.100}"
        )


def select(
    outages: Iterable[Any], names: dict[str, str], since: datetime
) -> Iterator[Any]:
    """Yield the outages of the devices in `names` that began at `since` or later.

    `names` maps each device's ID to its name, which is added to the outage. Raise
    KFError if any outage's ID is missing or not text, or if an outage of one of these
    devices has an invalid time. In outages of other devices, nothing else is checked.
    """
    for row, outage in enumerate(outages, 1):
        field = "id"
        try:
            device_id = outage["id"]
            if device_id not in names:
                if isinstance(device_id, str):
                    continue
                raise TypeError
            field = "begin"
            begin = parse_time(outage["begin"])
            field = "end"
            end = parse_time(outage["end"])
        except (KeyError, TypeError, ValueError) as error:
            held = one_line(json.dumps(outage))
            problem = f"GET /outages: outage {row} has an invalid {field}: {held}"
            raise KFError(problem) from error
        if begin < since:
            continue
        if end < begin:
            log.warning(f"GET /outages: outage {row} ends before it begins")
        yield {**outage, "name": names[device_id]}


def read_array(file: IO[bytes]) -> Iterator[list[Any]]:
    """Yield the items of the JSON array (RFC 8259) in `file`, in batches.

    Together, the batches are what `json.loads` returns for the whole file, but only one
    of them is in memory at a time. Raise ValueError or RecursionError if `json.loads`
    would, or if a batch would be longer than TEXT_MAX.

    The file is read piece by piece, and a piece may end anywhere:

        [{"id": "a"}, {"id": "b"}, {"i

    Up to its last closing brace, this lacks only a `]` to be an array, so `json.loads`
    can decode two items at once. What follows the brace is kept for the next batch,
    with `[0 ` before it, where 0 stands for the items that have been yielded:

        [0 , {"id": "c"}, {"id": "d"}]

    Hence, `text` always begins like an array, and `json.loads` finds whatever is wrong
    between two batches, too. If it fails because that brace is inside an item, the next
    piece is added before it tries again.
    """
    text = ""
    skipped = 0  # how many items of `text` to leave out: 1 once it begins with `[0`
    pieces = iter(lambda: file.read(READ_SIZE), b"")
    for piece in codecs.iterdecode(pieces, "utf-8-sig"):
        text += piece
        if len(text) > TEXT_MAX:
            raise ValueError(f"no outage ends within {TEXT_MAX:,} characters")
        end = text.rfind("}") + 1
        try:
            items = json.loads(text[:end] + "]")
        except json.JSONDecodeError:
            continue  # with the next piece added
        yield items[skipped:]
        skipped = 1
        text = "[0 " + text[end:]
    yield json.loads(text)[skipped:]


# Client

#: What the requests library, urllib3 and the temporary file raise if a request fails.
FAILURES = (OSError, HTTPError, ValueError)


class APIRetry(Retry):
    """When a request is retried: urllib3's Retry, with these differences.

    A POST is not retried after a status in GATEWAY_STATUSES. A malformed Retry-After is
    ignored, and one that is too long ends the retries. Each wait is logged.
    """

    RETRY_AFTER_STATUS_CODES = frozenset()  # urllib3 would also retry a 413

    def is_retry(
        self, method: str, status_code: int, has_retry_after: bool = False
    ) -> bool:
        if method == "POST" and status_code in GATEWAY_STATUSES:
            return False
        return super().is_retry(method, status_code, has_retry_after)

    def get_retry_after(self, response: BaseHTTPResponse) -> float:
        """Return the seconds in the response's Retry-After, or 0 (RFC 9110, 10.2.3)."""
        with suppress(*FAILURES, OverflowError, IndexError):
            return super().get_retry_after(response) or 0
        return 0

    def increment(self, *args: Any, **kwargs: Any) -> APIRetry:
        retry = super().increment(*args, **kwargs)
        response = kwargs.get("response")
        if response:
            if self.get_retry_after(response) > RETRY_AFTER_MAX:
                # urllib3 catches this, as `raise_on_status` is False, and returns the
                # response instead of retrying.
                raise MaxRetryError(kwargs["_pool"], "")
            response.close()  # Otherwise, urllib3 would read all of it.
        return retry

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        wait = self.get_backoff_time()
        if response:
            wait = max(wait, self.get_retry_after(response))
        last = self.history[-1]
        problem = reason(last.error) if last.error else f"got {last.status}"
        plan = f"retry {len(self.history)} of {RETRIES} in {wait:.0f} s"
        log.warning(f"{last.method} {last.url}: {problem}; {plan}")
        sleep(wait)


def is_response_lost(error: BaseException | None) -> bool:
    """Return whether `error` means that a response was lost or is incomplete."""
    if not isinstance(error, RequestException):
        return False  # another status than 200, a response too long, a full disk
    if isinstance(error, (SSLError, ValueError)):
        return False  # an untrusted certificate, or an invalid proxy URL (a ValueError)
    return not never_connected(error)


def hide_redirect(response: Response, **kwargs: Any) -> None:
    """Stop the requests library from following a redirect, or reading all of its body.

    Following it would pass on the API key and turn the POST into a GET.
    """
    response.headers.pop("Location", None)


def pieces_of(response: Response) -> Iterator[bytes]:
    """Return the body of a response, decompressed, in pieces that fit in memory."""
    size = READ_SIZE
    if "Content-Encoding" in response.headers:
        size //= 8
    return response.iter_content(size)


def beginning_of(response: Response) -> bytes:
    """Return the body of a response, or its beginning if it is over READ_SIZE."""
    body = b""
    for piece in pieces_of(response):
        body += piece
        if len(body) > READ_SIZE:
            break
    return body


class KFClient(ContextManager["KFClient"]):
    """A client for the KrakenFlex API, for use in one thread.

    Use it as a context manager, or call `session.close()` when done.

    base_url: must be https (http only for this machine).
    api_key: sent with each request as `x-api-key`.
    timeout: give up on an attempt after this many seconds without data, or if sending
        takes longer.
    backoff: the unit of the waits before retries, in seconds.
    dry_run: do everything except the POST.

    Attributes to read:

    session: the `requests.Session`.
    outcome: what happened to the list: NOT_REPORTED, UNKNOWN or REPORTED.
    outages_received: the number of outages that the API has sent.
    site_info: the response to `GET /site-info/{siteId}`, or None.
    site_outages: the list that is sent to the API (empty in a dry run).
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout: float = TIMEOUT,
        backoff: float = BACKOFF,
        dry_run: bool = False,
    ) -> None:
        self.base_url = clean_base_url(base_url)
        self._api_key = clean_key(api_key)
        self.timeout = timeout
        self.backoff = backoff
        self.dry_run = dry_run
        self.outcome = NOT_REPORTED
        self.outages_received = 0
        self.site_info: SiteInfo | None = None
        self.site_outages: list[SiteOutage] = []
        retry = APIRetry(
            RETRIES,
            allowed_methods=None,  # all
            # If a response is lost, the request may have been applied. (Behind a proxy,
            # urllib3 counts a lost response as `other`.)
            read=False,
            other=0,
            status_forcelist=RETRY_STATUSES,
            raise_on_status=False,  # The last response says why it failed.
            backoff_factor=backoff,
            backoff_jitter=backoff,
        )
        adapter = HTTPAdapter(max_retries=retry)
        session = Session()
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        session.headers.update(
            {
                "Accept-Encoding": "gzip",
                "User-Agent": f"kf_backend/{__version__}",
                "x-api-key": self._api_key,
            }
        )
        session.hooks["response"].append(hide_redirect)
        session.auth = lambda request: request  # no password from ~/.netrc
        # Over plain http, a proxy would see the API key.
        session.trust_env = self.base_url.startswith("https:")
        self.session = session

    def __exit__(self, *exc_info: object) -> None:
        self.session.close()

    def handler(self, site: str = SITE, date: Date = SINCE) -> list[SiteOutage]:
        """Report the outages of `site` that began at `date` or later.

        `date` is anything that `parse_since` accepts. Return the list. Raise
        UsageError, OutcomeUnknown or another KFError.
        """
        self.outcome = NOT_REPORTED
        path_segment(site)  # A usage error is raised before any request is made.
        parse_since(date)
        outages = self._get_outages()
        site_info = self._get_site_info(site)
        site_outages = self._filter_outages(outages, site_info, date)
        return self._post_site_outages(site, site_outages)

    def _get_outages(self) -> Iterator[Any]:
        """`GET /outages`: return an iterator of all outages.

        The whole response is downloaded first, but decoded only as the iterator
        advances.
        """
        # `[]` is how the body must begin and end.
        batches = self._decode_outages(self._get("outages", b"[]"))
        # Once started, the generator closes the file even if it is not read to the end.
        first = next(batches)
        return itertools.chain(first, itertools.chain.from_iterable(batches))

    def _decode_outages(self, body: IO[bytes]) -> Iterator[list[Any]]:
        self.outages_received = 0
        with body, valid_json("GET /outages"):
            for outages in read_array(body):
                self.outages_received += len(outages)
                yield outages

    def _get_site_info(self, site: str) -> SiteInfo:
        """`GET /site-info/{siteId}`: return the site's name and devices."""
        path = f"site-info/{path_segment(site)}"
        with self._get(path, b"{}") as body, valid_json(f"GET /{path}"):
            site_info: SiteInfo = json.loads(str(body.read(TEXT_MAX), "utf-8-sig"))
        check_site_info(site_info, site)
        self.site_info = site_info
        return site_info

    def _filter_outages(
        self, outages: Iterable[Any], site_info: SiteInfo, date: Date
    ) -> list[SiteOutage]:
        """Return the site's outages since `date`, with device names; see `select`."""
        return list(select(outages, device_names(site_info), parse_since(date)))

    def _post_site_outages(
        self, site: str, site_outages: list[SiteOutage]
    ) -> list[SiteOutage]:
        """`POST /site-outages/{siteId}`: return the list once the API has accepted it.

        A dry run does not send it.
        """
        path = f"site-outages/{path_segment(site)}"
        with valid_json("GET /outages"):  # NaN in a field that we pass on unchecked
            body = json.dumps(site_outages, allow_nan=False).encode()
        if self.dry_run:
            return site_outages
        self.site_outages = site_outages
        self.outcome = UNKNOWN  # until a final response, or no connection
        with self._request(
            "POST", path, data=body, headers={"Content-Type": "application/json"}
        ) as response:
            answer = beginning_of(response)
        if len(answer) > READ_SIZE or b"".join(answer.split()) not in (b"", b"{}"):
            raise self._error(f"POST /{path}: got 200 ({self._said(answer)})")
        self.outcome = REPORTED
        return site_outages

    def _get(self, path: str, ends: bytes) -> IO[bytes]:
        """GET `path` and return the response body as a JSON file.

        `ends` is the first and last characters of the JSON. If a response is lost
        or incomplete, make the whole request again.
        """
        download = 1
        while True:
            body = tempfile.SpooledTemporaryFile(max_size=MEMORY_MAX)
            try:
                with self._request("GET", path) as response:
                    self._receive(response, body, ends)
                    body.seek(0)
                return body
            except KFError as error:
                with suppress(OSError):  # on a full disk
                    body.close()
                if download == DOWNLOAD_ATTEMPTS or not is_response_lost(
                    error.__cause__
                ):
                    raise
                download += 1
                log.warning(f"{error}; download {download} of {DOWNLOAD_ATTEMPTS}")
            sleep(self.backoff)

    def _receive(self, response: Response, file: IO[bytes], ends: bytes) -> None:
        """Write the body of a response to `file`.

        Raise one of FAILURES if it is longer than BODY_MAX, or if it does not begin and
        end with the characters in `ends`.
        """
        first = last = b""
        next_message = monotonic() + PROGRESS
        for piece in pieces_of(response):
            file.write(piece)
            size = file.tell()
            if size > BODY_MAX:
                raise ValueError(f"the response is longer than {BODY_MAX:,} bytes")
            text = piece.strip(b" \t\n\r\xef\xbb\xbf")  # a byte order mark, too
            first = first or text[:1]
            last = text[-1:] or last
            if monotonic() > next_message:
                next_message += PROGRESS
                log.info(f"{response.url}: {size / 1e6:.1f} MB received")
        if first + last != ends:
            # For the caller, this is a response that broke off.
            raise ContentDecodingError("incomplete, or not JSON")

    @contextmanager
    def _request(self, method: str, path: str, **options: Any) -> Iterator[Response]:
        """Send a request, and yield its response with the body still unread.

        Raise KFError if its status is not 200. Turn each of FAILURES into a KFError,
        even if the `with` block raises it.
        """
        start = monotonic()
        url = f"{self.base_url}/{path}"
        self.session.close()  # A connection that was kept open may be dead by now.
        try:
            with self.session.request(
                method, url, timeout=self.timeout, stream=True, **options
            ) as response:
                if response.status_code != 200:
                    raise self._rejection(f"{method} /{path}", response)
                yield response
        except FAILURES as error:
            if never_connected(error):
                self.outcome = NOT_REPORTED
            why = reason(error).replace(self._api_key, "[key]")
            problem = f"{method} /{path}: {one_line(why)}"
            if isinstance(error, SSLError):
                environment = self.session.merge_environment_settings(
                    url, {}, None, None, None
                )
                problem += f" (CA bundle: {environment['verify']})"
            # A broken response may contain the key. The cause would show it.
            cause = None if "[key]" in why else error
            raise self._error(problem) from cause
        log.debug(
            f"{method} /{path}: 200 in {monotonic() - start:.2f} s,"
            f" {response.raw.tell()} bytes"
        )

    def _rejection(self, request: str, response: Response) -> KFError:
        """Return the error for a response whose status is not 200."""
        status = response.status_code
        # 4xx, 500 and 503: the API says that it refused the request. (502 and 504 come
        # from a gateway.)
        if 400 <= status < 500 or status in RETRY_STATUSES - GATEWAY_STATUSES:
            self.outcome = NOT_REPORTED
        said = str(response.reason).encode()
        with suppress(*FAILURES):
            said = beginning_of(response) or said
        problem = f"{request}: got {status} ({self._said(said)})"
        if self.outcome is NOT_REPORTED:
            problem += f"; {ADVICE.get(status, 'check the base URL')}"
        return self._error(problem)

    def _error(self, problem: str) -> KFError:
        """Return the error that matches the outcome."""
        if self.outcome is UNKNOWN:
            return OutcomeUnknown(problem, self.site_outages)
        return KFError(problem)

    def _said(self, body: bytes) -> str:
        """Return what the API says in a body, without the API key.

        This is its `message`, or its `Message`, or else the beginning of the body.
        """
        text = body[:READ_SIZE].decode("utf-8", "replace")
        with suppress(ValueError, RecursionError, AttributeError):
            answer = json.loads(text)
            text = str(answer.get("message") or answer.get("Message") or text)
        return one_line(text.replace(self._api_key, "[key]"))


# Report

#: The beginning and the end of an outage.
Span = Tuple[datetime, datetime]


def downtime(spans: list[Span], since: datetime) -> timedelta:
    """Return how long a device was down. Overlapping outages are counted once."""
    total = timedelta()
    counted_until = since
    for begin, end in sorted(spans):
        begin = max(begin, counted_until)
        if begin < end:
            total += end - begin
            counted_until = end
    return total


def duration(time: timedelta) -> str:
    """Return a duration in its two largest units: `3 d 4 h`, `3 h 20 min`, `40 min`."""
    minutes = round(time.total_seconds() / 60)
    hours = minutes // 60
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min"


def timeline(spans: list[Span], since: datetime, last: datetime, width: int) -> str:
    """Return a timeline from `since` to `last` in `width` cells.

    A cell is `#` if the device was down in it, even for a moment, or else `.`.
    """
    cells = ["."] * width
    # A microsecond more, so that `last` is in the last cell rather than after it.
    cell = (last - since) / width + timedelta(microseconds=1)
    for begin, end in spans:
        for index in range((begin - since) // cell, (end - since) // cell + 1):
            cells[index] = "#"
    return "".join(cells)


def report(
    site_info: SiteInfo, site_outages: list[SiteOutage], since: datetime, columns: int
) -> str:
    """Return a table of the outages, in lines of at most `columns` characters."""
    last = since
    spans: dict[str, list[Span]] = defaultdict(list)
    for outage in site_outages:
        span = parse_time(outage["begin"]), parse_time(outage["end"])
        spans[outage["id"]].append(span)
        last = max(last, span[1])

    names = device_names(site_info)
    longest = max(map(len, ["Device", *names.values()]))
    name_width = min(longest, columns // 3)
    width = max(columns - name_width - 25, 1)  # 25 for the columns between the two
    title = f"{site_info['name']} ({site_info['id']}): outages since {since.date()}"
    heading = f"{'Device':{name_width}}  Outages      Downtime"
    if width > 20:
        heading += f"  {since.date()}{last.date()!s:>{width - 10}}"
    lines = [one_line(title), "", heading]
    for device_id, name in names.items():
        name = one_line(name, name_width)
        device_spans = spans[device_id]
        down = duration(downtime(device_spans, since))
        line = timeline(device_spans, since, last, width)
        count = len(device_spans)
        lines.append(f"{name:{name_width}}  {count:7}  {down:>12}  {line}")
    return "\n".join(line[:columns].rstrip() for line in lines)


# Demo: the API behind --demo

#: What it returns. Ten of the site's outages began at SINCE or later.
DEMO_REPLIES = {
    "GET /outages": b"""[
 {"id": "b-1", "begin": "2021-12-31T23:59:59.999Z", "end": "2022-01-03T23:59:59.999Z"},
 {"id": "b-1", "begin": "2022-01-01T00:00:00.000Z", "end": "2022-01-02T12:00:00.000Z"},
 {"id": "b-2", "begin": "2020-11-27T00:00:00.000Z", "end": "2020-12-07T00:00:00.000Z"},
 {"id": "b-2", "begin": "2022-02-12T00:00:00.000Z", "end": "2022-02-24T00:00:00.000Z"},
 {"id": "b-2", "begin": "2022-04-30T00:00:00.000Z", "end": "2022-05-01T00:00:00.000Z"},
 {"id": "b-2", "begin": "2022-07-30T00:00:00.000Z", "end": "2022-07-30T00:28:48.000Z"},
 {"id": "b-3", "begin": "2021-12-01T00:00:00.000Z", "end": "2021-12-03T00:00:00.000Z"},
 {"id": "b-4", "begin": "2022-03-22T00:00:00.000Z", "end": "2022-04-21T00:00:00.000Z"},
 {"id": "b-4", "begin": "2022-05-11T00:00:00.000Z", "end": "2022-05-31T06:00:00.000Z"},
 {"id": "b-5", "begin": "2022-01-15T00:00:00.000Z", "end": "2022-01-29T00:00:00.000Z"},
 {"id": "b-5", "begin": "2022-08-02T00:00:00.000Z", "end": "2022-08-07T00:00:00.000Z"},
 {"id": "b-6", "begin": "2022-04-11T00:00:00.000Z", "end": "2022-05-12T00:00:00.000Z"},
 {"id": "b-6", "begin": "2022-07-10T00:00:00.000Z", "end": "2022-07-30T00:00:00.000Z"},
 {"id": "b-7", "begin": "2021-10-03T00:00:00.000Z", "end": "2022-04-21T00:00:00.000Z"},
 {"id": "b-8", "begin": "2021-06-15T00:00:00.000Z", "end": "2021-06-16T00:00:00.000Z"},
 {"id": "b-21", "begin": "2021-11-29T00:00:00.000Z", "end": "2021-12-04T00:00:00.000Z"},
 {"id": "b-22", "begin": "2022-01-21T00:00:00.000Z", "end": "2022-01-23T00:00:00.000Z"},
 {"id": "b-23", "begin": "2022-05-31T00:00:00.000Z", "end": "2022-06-03T00:00:00.000Z"},
 {"id": "b-24", "begin": "2022-09-18T00:00:00.000Z", "end": "2022-09-27T12:00:00.000Z"}
]""",
    f"GET /site-info/{SITE}": b"""{
 "id": "norwich-pear-tree", "name": "Norwich Pear Tree", "devices": [
  {"id": "b-1", "name": "Battery 1"},
  {"id": "b-2", "name": "Battery 2"},
  {"id": "b-3", "name": "Battery 3"},
  {"id": "b-4", "name": "Battery 4"},
  {"id": "b-5", "name": "Battery 5"},
  {"id": "b-6", "name": "Battery 6"},
  {"id": "b-7", "name": "Battery 7"},
  {"id": "b-8", "name": "Battery 8"}
]}""",
    f"POST /site-outages/{SITE}": b"{}",
}


@contextmanager
def demo_api() -> Iterator[str]:
    """Serve the demo's API from a thread, and yield its base URL.

    It has the default site, with eight devices. Its first GET and first POST fail.
    """
    failed = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            status = 200
            if self.command not in failed:
                failed.add(self.command)
                status = 500
            self.send_response(status)
            self.end_headers()
            reply = DEMO_REPLIES[f"{self.command} {self.path}"]
            self.wfile.write(reply)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            """Leave stderr to the client."""

    with TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a process limit, or an old container runtime
            raise KFError("--demo cannot start the thread that it needs") from None
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


# Command line


def seconds(text: str) -> float:
    """Return the value of an option that is a number of seconds."""
    number = float(text)
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 86400")
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options in `argv`.

    After --help or a usage error, exit as argparse does.
    """
    about, heading, details = (__doc__ or "").partition("environment variables:")
    parser = argparse.ArgumentParser(
        description=about,
        epilog=heading + details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--site", default=SITE, help="site ID (default: %(default)s)")
    parser.add_argument(
        "--since",
        default=SINCE,
        help="drop outages that began before this date or time, as in ISO 8601"
        " (UTC if it has no offset; default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="do not send the list; print it as JSON",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--base-url",
        default=os.environ.get("KF_BASE_URL") or BASE_URL,
        help="API base URL; must be https, or http to this machine",
    )
    target.add_argument(
        "--demo",
        action="store_true",
        help="use a mock API on this machine; needs no API key or network",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=TIMEOUT,
        help="give up on an attempt if no data arrives for this many seconds,"
        " or if sending takes longer than that (default: %(default)g)",
    )
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=DEADLINE,
        help="stop the whole run after this many seconds"
        " (default: %(default)g; ignored on Windows)",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="log how long each successful request took, and its size",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print no report or warnings"
    )
    args = parser.parse_args(argv)
    if args.demo and args.site != SITE:
        parser.error(f"--demo has only the site {SITE}")
    return args


def columns_of(stream: Any) -> int:
    """Return the number of columns of `stream`'s terminal, or 80 if it is not one."""
    with suppress(AttributeError, OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def show(text: str, stream: Any) -> None:
    """Write `text` to a standard stream. Raise OSError if that fails (on a full disk).

    If nobody reads the stream (`| head`), or it is closed, drop the text.
    """
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # Python flushes the stream again when it exits, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def drop_unwritten_messages() -> None:
    """Drop what could not be written to stderr, so that Python can exit normally."""
    with suppress(OSError):
        show("", sys.stderr)


def as_json(site_outages: list[SiteOutage]) -> str:
    """Return the list as the user sees it."""
    return json.dumps(site_outages, indent=2) + "\n"


#: The signals that end a run. Windows has no SIGHUP.
SIGNALS = [signal.SIGINT, signal.SIGTERM]

#: Whether this system has SIGHUP, and timers for the deadline.
IS_UNIX = hasattr(signal, "SIGALRM")

if IS_UNIX:
    SIGNALS.append(signal.SIGHUP)


def write_now(text: str, stream: Any) -> None:
    """Write `text` from a signal handler, when Python's buffers may be in use."""
    with suppress(AttributeError, OSError, ValueError):
        os.write(stream.fileno(), text.encode())


def write_outcome(why: str, outcome: Outcome) -> None:
    """Write the last line of a run that ends early. Further signals are ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if IS_UNIX:  # If nobody reads what we write, do not wait forever.
        signal.signal(signal.SIGALRM, lambda *args: os._exit(outcome.exit_code))
        signal.alarm(2)
    write_now(f"kf_backend: {why}. {outcome.sentence}.\n", sys.stderr)


def end_on_signals(client: KFClient, stack: ExitStack) -> None:
    """Let signals end the process, after a line that says what happened to the list.

    Signals that are ignored (as under nohup) stay ignored. `stack` restores the
    previous handlers.
    """

    def end(number: int, frame: object) -> None:
        write_outcome(f"interrupted by {signal.Signals(number).name}", client.outcome)
        if IS_UNIX:
            # If a shell runs us in a loop, this ends the loop. An exit code would not.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os._exit(128 + number)  # on Windows, or as the first process in a container

    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler != signal.SIG_IGN:
            signal.signal(number, end)
            stack.callback(signal.signal, number, handler)


def end_at_deadline(client: KFClient, deadline: float, stack: ExitStack) -> None:
    """Let a timer end the process after `deadline` seconds, with the outcome's code.

    `stack` undoes these changes.
    """

    def end(number: int, frame: object) -> None:
        outcome = client.outcome
        write_outcome(f"the --deadline of {deadline:g} s has passed", outcome)
        if outcome is UNKNOWN:
            write_now(as_json(client.site_outages), sys.stdout)
        os._exit(outcome.exit_code)

    handler = signal.signal(signal.SIGALRM, end)
    stack.callback(signal.signal, signal.SIGALRM, handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
    signal.setitimer(signal.ITIMER_REAL, deadline)
    stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)


def new_client(args: argparse.Namespace, stack: ExitStack) -> KFClient:
    """Return a client for these options, to be closed by `stack`. May raise KFError."""
    api_key = os.environ.get("KF_API_KEY", "")
    if args.demo:
        api_key = "demo-key"
        args.base_url = stack.enter_context(demo_api())
        log.warning(f"demo: mock API at {args.base_url} (first GET and POST fail)")
    return stack.enter_context(
        KFClient(args.base_url, api_key, timeout=args.timeout, dry_run=args.dry_run)
    )


def run(client: KFClient, args: argparse.Namespace) -> None:
    """Report the site's outages, and show what was reported."""
    start = monotonic()
    try:
        site_outages = client.handler(args.site.strip(), args.since)
    finally:
        if client.outcome is UNKNOWN:  # Whoever has to check needs the list.
            show(as_json(client.site_outages), sys.stdout)
    counts = f"{len(site_outages):,} outages (of {client.outages_received:,} received)"
    verdict = f"Sent {counts} to {client.base_url} in {monotonic() - start:.1f} s."
    stream = sys.stdout
    if args.dry_run:
        show(as_json(site_outages), stream)
        verdict = f"Dry run: {counts} would be sent."
        stream = sys.stderr
    if client.site_info and not args.quiet:
        since = parse_since(args.since)
        table = report(client.site_info, site_outages, since, columns_of(stream))
        show(f"{table}\n\n{verdict}\n", stream)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Apart from argparse, signals and the deadline, only this turns errors into exit
    codes. A bug keeps its traceback, but not once the list may have been sent: then it
    matters more to say what happened to the list.
    """
    args = parse_arguments(argv)
    log_level = logging.INFO
    if args.verbose:
        log_level = logging.DEBUG
    if args.quiet:
        log_level = logging.ERROR
    screen = logging.StreamHandler()
    screen.setFormatter(logging.Formatter("kf_backend: %(message)s"))
    log.addHandler(screen)
    log.setLevel(log_level)
    client = None
    with ExitStack() as stack:
        stack.callback(drop_unwritten_messages)
        stack.callback(log.removeHandler, screen)
        try:
            client = new_client(args, stack)
            if threading.current_thread() is threading.main_thread():
                end_on_signals(client, stack)
                if IS_UNIX:
                    end_at_deadline(client, args.deadline, stack)
            run(client, args)
            return 0
        except KFError as error:
            log.error(f"{error}. {error.outcome.sentence}.")
            return error.outcome.exit_code
        except Exception as error:
            outcome = client.outcome if client else NOT_REPORTED
            if outcome is NOT_REPORTED and not isinstance(error, OSError):
                raise  # a bug: keep the traceback
            log.error(f"{reason(error)}. {outcome.sentence}.")
            return outcome.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
