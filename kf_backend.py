#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.32.4,<3", "urllib3>=2.2.2,<3", "python-dateutil>=2.9.0.post0,<5"]
# ///
"""Report one site's outages back to the KrakenFlex API, with device names.

1. GET /outages: all outages of all devices.
2. GET /site-info/{siteId}: the site's devices.
3. Drop outages that began before a given date or belong to another site.
4. Add the device's display name to each remaining outage.
5. POST /site-outages/{siteId}: send the list.

environment variables:
  KF_API_KEY     API key (required)
  KF_BASE_URL    API base URL, if --base-url is not given
  HTTPS_PROXY, ALL_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE    used by requests
exit codes:
  0  sent, or printed (--dry-run)      1  not sent; safe to rerun
  2  usage error; no request was made  3  unknown; may have been applied
  130, 143, 129  interrupted by SIGINT, SIGTERM, SIGHUP
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and hasattr(signal, "pthread_sigmask"):  # not available on Windows
    # Hold these signals (except any already ignored, as under nohup) until main() can report the outcome.
    _stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, [stop for stop in _stops if signal.getsignal(stop) != signal.SIG_IGN])

import argparse
import codecs
import contextlib
import datetime as dt
import functools
import io
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import select
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http.client import responses
from typing import IO, Any, ContextManager, NoReturn, TextIO, Tuple, TypedDict, Union, cast
from unicodedata import category, east_asian_width
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidSchema, InvalidURL
from urllib3.exceptions import ConnectTimeoutError, HTTPError, InvalidHeader, MaxRetryError, ProtocolError, ProxyError
from urllib3.util import Retry, parse_url

# Constants
__version__ = "2.0.0"
BASE_URL = "https://api.krakenflex.systems/interview-tests-mock-api/v1"
SITE = "norwich-pear-tree"
SINCE = "2022-01-01T00:00:00.000Z"  # outages that began exactly then are included
TIMEOUT = 30.0  # seconds without data before an attempt is abandoned
DEADLINE = 600.0  # seconds for the whole run: a server that trickles data never triggers TIMEOUT
RETRIES = 5  # attempts after the first; unless the API sends Retry-After, the waits total at most 30 seconds
BACKOFF, BACKOFF_MAX = 1.0, 15.0  # first and longest wait in seconds; waits double on each retry, less up to 50% jitter
RETRY_AFTER_MAX = 60.0  # the longest Retry-After to honor, in seconds
CHUNK = 64 * 1024  # bytes read at a time: small enough for the decoded outages to fit in the CPU cache
MEMORY_MAX = 2 * 1024 * 1024  # bytes of a response kept in memory; a larger response goes to a temporary file
OUTAGES_MAX = 1024 * 1024 * 1024  # maximum size of the response to GET /outages, in bytes
SITE_INFO_MAX = 16 * 1024 * 1024  # maximum size of the response to GET /site-info, in bytes
OUTAGE_MAX = 1024 * 1024  # maximum length of an outage (usually about 130), and of a response to POST or an error
RETRY_STATUSES = frozenset({429, 500, 502, 503, 504})  # from the API or its gateway; the request counts as not applied
ADVICE: dict[int, tuple[str, ...]] = {  # by status: what to do, and the arguments to check
    **dict.fromkeys(range(300, 400), ("redirects are not followed; check the base URL", "base_url")),
    **dict.fromkeys((408, 425, *RETRY_STATUSES, *range(520, 530)), ("try again later",)),
    **dict.fromkeys((401, 403), ("check the API key", "api_key")),
    **dict.fromkeys((405, 410), ("check the base URL", "base_url")),
    400: ("the API rejected the format of the request",),
    413: ("the list is too large",),
    404: ("check the site ID and the base URL", "site", "base_url"),
}
log = logging.getLogger("kf_backend")
log.addHandler(logging.NullHandler())  # silent unless the application configures logging


# JSON types used by the API. Times are RFC 3339 (`2022-01-01T00:00:00.000Z`).
class SiteOutage(TypedDict):  # sent by `POST /site-outages/{siteId}`; outages from `GET /outages` have no name
    id: str  # the device's ID
    name: str  # its display name (`Battery 1`)
    begin: str
    end: str


class SiteInfo(TypedDict):  # the response to `GET /site-info/{siteId}`
    id: str
    name: str
    devices: list[dict[str, str]]  # each with its id and display name


# Errors and safe output
api_keys: set[str] = set()  # those in use, never to be shown


def safe(text: str, limit: int = 500) -> str:
    """Return `text` as one line of at most `limit` characters, without API keys or control characters."""
    for key in sorted(api_keys, key=len, reverse=True):  # one may start with another
        for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1], quote(key, safe="", errors="replace")):
            text = text.replace(form, "[key]") if len(key) >= 4 else text  # shorter ones occur in ordinary words
    joiners = "\u200c\u200d"  # not printable, but many languages need them
    text = "".join(c if c.isprintable() or c in joiners else "?" for c in " ".join(text.split()))
    return text if len(text) <= limit else text[:limit] + "..."


class KFError(Exception):
    """The list was not sent: the API rejected a request, the network failed, or the API returned invalid data. `advice`
    says what to do, `check` lists arguments to check, `status` is the last HTTP status, `message` the API's message.
    """

    outcome = "Nothing was sent"

    def __init__(
        self, problem: str, *check: str, advice: str = "", status: int | None = None, message: str | None = None
    ) -> None:
        super().__init__(safe(problem))
        self.check, self.advice, self.status, self.message = check, advice, status, message


class UsageError(KFError, ValueError):
    """An argument is invalid (base URL, API key, site or date). No request was made."""


class OutcomeUnknown(KFError):
    """The list was sent but no usable response arrived. Rerunning is not safe."""

    outcome = "The list may or may not have been applied; check before rerunning"


#: For each value of `KFClient.sent`: the outcome to report, and the exit code unless an error determines it.
OUTCOMES = {False: (KFError.outcome, 1), None: (OutcomeUnknown.outcome, 3), True: ("The list was sent", 0)}


def root_cause(error: BaseException) -> tuple[str, bool]:
    """Return a short description of what caused `error`, and whether it shows that no connection was made."""
    chain = [error]
    for one in chain:  # the loop appends to it
        chain += [inner for inner in (one.__cause__, *one.args) if isinstance(inner, BaseException)][:1]
    short = None if getattr(chain[-1], "filename", None) else getattr(chain[-1], "strerror", None)
    text = str(short or chain[-1]) or type(chain[-1]).__name__  # includes the file name, if any
    text = re.sub(r"IncompleteRead\((.*)\)", r"response cut off (\1)", text)
    refused = type(chain[-1]) is OSError and text.startswith("Tunnel")  # by the proxy, as http.client puts it
    proxy = refused or any(isinstance(one, ProxyError) for one in chain)
    if isinstance(error, (InvalidURL, InvalidSchema)):  # the proxy's (ours is valid), which may contain a password
        proxy, text = True, "invalid URL" if isinstance(error, InvalidURL) else "SOCKS needs the package PySocks"
    unconnected = proxy or any(isinstance(one, ConnectTimeoutError) for one in chain)
    return (f"proxy (HTTPS_PROXY or ALL_PROXY): {text}" if proxy else text), unconnected


# Rules: pure functions
def clean_key(api_key: str) -> str:
    """Return `api_key` stripped; raise UsageError (without showing the key) if it is not a valid header value."""
    api_key = api_key.strip() if isinstance(api_key, str) else ""
    if not re.fullmatch("[!-~]+", api_key):
        problem = "the API key contains invalid characters (only visible ASCII is allowed)"
        raise UsageError(problem if api_key else "no API key", "api_key")
    return api_key


def clean_base_url(base_url: str) -> str:
    """Return `base_url` as normalized by requests, without a trailing slash; raise UsageError if it is not safe."""
    try:
        url = parse_url(str(requests.Request("GET", base_url.strip()).prepare().url))
        host = (url.host or "").encode("idna").decode().strip("[]")
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError("the base URL is not a valid URL", "base_url") from error
    if url.auth is not None or "?" in base_url or "#" in base_url:
        raise UsageError("the base URL must not contain credentials, a query or a fragment", "base_url")
    with contextlib.suppress(ValueError):  # not an IP address
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    if url.scheme != "https" and (url.scheme, host) != ("http", "localhost"):
        raise UsageError("the base URL must use https (http is allowed only for localhost)", "base_url")
    return url.url.rstrip("/")


def path_segment(site: str) -> str:
    """Return `site` percent-encoded as a single path segment (RFC 3986 section 3.3)."""
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        if site not in ("", ".", ".."):
            return quote(site, safe="")
    raise UsageError(f"invalid site ID {site!a}", "site")


Instant = Tuple[int, str]  # seconds since 1970, and the fraction's digits without trailing zeros: exact and sortable
Date = Union[str, dt.date, dt.datetime]
RFC_3339 = re.compile(  # section 5.6; Python's own parsers accept more, and differ by version
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]+))?([Zz]|[+-][0-9]{2}:[0-5][0-9])"
).fullmatch


@functools.lru_cache(maxsize=8192)
def parse_time(text: str) -> Instant:
    """Return the instant of an RFC 3339 time; raise ValueError, OverflowError or TypeError for anything else."""
    if not (match := RFC_3339(text)):
        raise ValueError("not an RFC 3339 time")
    day, clock, fraction, offset = match.groups("")
    try:
        moment = dt.datetime.fromisoformat(f"{day}T{clock}{'+00:00' if offset in 'Zz' else offset}")
    except ValueError:
        from dateutil.parser import isoparse  # accepts 24:00, but is much slower, as is its import

        moment = isoparse(text)
    return int(moment.timestamp()), fraction.rstrip("0")


def parse_since(date: Date) -> Instant:
    """Return the instant of an aware datetime, or of an ISO 8601 calendar date or time (UTC if it has no offset)."""
    if isinstance(date, dt.datetime) and date.utcoffset() is None:
        raise UsageError("the datetime has no time zone; pass an aware datetime", "date")
    with contextlib.suppress(ValueError, OverflowError):
        text = str(date.astimezone(dt.timezone.utc) if isinstance(date, dt.datetime) else date).strip()
        text = re.sub("^([0-9]{4})([0-9]{2})([0-9]{2})$", r"\1-\2-\3", text)  # 20220601
        text = re.sub("([Tt ][0-9]{2}:[0-9]{2})(?!:)", r"\1:00", text)  # 2022-06-01T12:00
        return parse_time(next((text + end for end in ("T00:00:00Z", "Z") if RFC_3339(text + end)), text))
    raise UsageError(f"'{safe(str(date), 50)}' is not an ISO 8601 date or time (for example, 2022-06-01)", "date")


def whole_objects(text: str) -> int:
    """Return the index just after the last complete object in `text` (the start of an array), or 0 if there is none."""
    decoder, separator = json.JSONDecoder(), re.compile(r"[ \t\n\r]*[\[,][ \t\n\r]*")
    end = position = 0
    with contextlib.suppress(ValueError):  # the text ends or is invalid
        while before := separator.match(text, position):
            _, position = decoder.raw_decode(text, before.end())
            end = position if text[position - 1] == "}" else end
    return end


def read_array(chunks: Iterable[bytes]) -> Iterator[list[Any]]:
    """Yield the items of a JSON array (RFC 8259) in lists that together equal `json.loads` of the whole body, wherever
    chunks are split. Raise ValueError or RecursionError as it does, KFError if no object ends within `OUTAGE_MAX`.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, yielded = "", 0  # once items were yielded, one `{}` stands for all of them
    for chunk in chunks:
        new = decode(chunk)
        text += new
        if "}" in new:
            end = text.rfind("}") + 1  # unless this completes an array, the brace is inside an item or a string
            try:
                items = json.loads(text[:end] + "]")
            except json.JSONDecodeError:
                end = whole_objects(text)
                items = json.loads(text[:end] + "]") if end else []
            if len(items) > yielded:
                yield items[yielded:]
                text, yielded = "[{}" + text[end:], 1
        if len(text) > OUTAGE_MAX:
            raise KFError(f"GET /outages: an outage longer than {OUTAGE_MAX:,} characters")
    yield json.loads(text + decode(b"", True))[yielded:]


def device_names(site_info: SiteInfo) -> dict[str, str]:
    """Return each device's name by its ID, in the site's order; raise KFError unless each has exactly one."""
    names: dict[str, str] = {}
    for row, device in enumerate(site_info["devices"], 1):
        if not isinstance(device, dict) or not all(isinstance(device.get(field), str) for field in ("id", "name")):
            raise KFError(f"GET /site-info: device {row} has no id or name")
        if names.setdefault(device["id"], device["name"]) != device["name"]:
            raise KFError(f"GET /site-info: device {row} is listed twice with different names")
    return names


def site_outages_of(outages: Iterable[Any], names: Mapping[str, str], since: Instant) -> Iterator[SiteOutage]:
    """Yield the outages of the devices in `names` that began at or after `since`, unchanged except that the device's
    name is added. Raise KFError if an outage has no string ID, or if one of these devices' has a time not in RFC 3339.
    """
    for row, outage in enumerate(outages, 1):
        try:
            device = outage[(field := "id")]
            if device not in names:
                if isinstance(device, str):
                    continue
                raise TypeError
            begin = parse_time(outage[(field := "begin")])
            parse_time(outage[(field := "end")])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            held = safe(json.dumps(outage[field]), 100) if isinstance(outage, dict) and field in outage else "missing"
            raise KFError(f"GET /outages: outage {row} has an invalid {field}: {held}") from error
        if begin >= since:
            yield cast(SiteOutage, {**outage, "name": names[device]})


def api_error(body: bytes) -> str | None:
    """Return the API's error message (such as `{"message": "Forbidden"}`), if any; raise ValueError if not JSON."""
    answer = json.loads(body.decode("utf-8-sig"))
    keys = ("message", "errorMessage", "errorType") if isinstance(answer, dict) else ()
    return next((safe(str(answer[key]), 200) or key for key in keys if key in answer), None)


# Client
class _Retry(Retry):
    """urllib3's Retry, but it waits by calling `wait(self, seconds in Retry-After)` (RFC 9110 section 10.2.3)."""

    RETRY_AFTER_STATUS_CODES = frozenset()  # otherwise urllib3 would also retry a 413
    wait: Callable[[Retry, float], None]

    def get_retry_after(self, response: Any) -> float:
        with contextlib.suppress(InvalidHeader, ValueError, OverflowError, IndexError):
            return (super().get_retry_after(response) if response else None) or 0
        return 0  # malformed

    def increment(self, *args: Any, **kwargs: Any) -> _Retry:
        dropped = getattr(kwargs.get("error"), "original_error", None)  # of a ProxyError
        if isinstance(dropped, ConnectionError):  # urllib3 blames the proxy even for a reset by the API
            kwargs["error"] = ProtocolError("Connection aborted.", dropped)
        retry, response = super().increment(*args, **kwargs), kwargs.get("response")
        retry.wait = self.wait
        if self.get_retry_after(response) > RETRY_AFTER_MAX:  # too long to wait
            raise MaxRetryError(cast(Any, kwargs.get("_pool")), "")
        if response:
            response.close()  # its body may never end, and each attempt uses a new connection
        return retry

    def sleep(self, response: Any = None) -> None:
        self.wait(self, self.get_retry_after(response))


class KFClient(ContextManager["KFClient"]):
    """A client for the KrakenFlex API. Not thread-safe. Use it as a context manager to close its session.

    base_url: must be https (http is allowed only for localhost). api_key: sent as `x-api-key`.
    timeout: seconds without data before an attempt is abandoned; also the time limit for sending the list.
    backoff: seconds before the first retry. dry_run: do everything except the POST.
    session: the `requests.Session`. site_info: the response to `GET /site-info/{siteId}`.
    outages_read: the number of outages received from the API.
    sent: whether the API has the list: False (no), True (accepted), None (it may or may not have been applied).
    lock: held while `sent` is set to None; holding it keeps the list from being sent.
    on_progress: called during `GET /outages` with bytes received and expected (None if unknown); equal at the end.
    """

    def __init__(
        self, base_url: str, api_key: str, *, timeout: float = TIMEOUT, backoff: float = BACKOFF, dry_run: bool = False
    ) -> None:
        self.base_url, self.timeout, self.backoff, self.dry_run = clean_base_url(base_url), timeout, backoff, dry_run
        self.site_info: SiteInfo = {"id": "", "name": "", "devices": []}
        self.sent: bool | None = False
        self.on_progress: Callable[[int, int | None], object] = lambda received, expected: None
        self.session, self.lock, self.outages_read = requests.Session(), threading.Lock(), 0
        api_keys.add(api_key := clean_key(api_key))
        # Each request uses a new connection: a reused one may be stale, or hold an unsolicited response.
        self.session.headers.update({"Accept": "application/json", "Accept-Encoding": "gzip", "Connection": "close"})
        self.session.headers.update({"x-api-key": api_key, "User-Agent": f"kf_backend/{__version__}"})
        # A redirect would forward the key and make the POST a GET; `allow_redirects=False` would still read its body.
        self.session.hooks["response"].append(lambda response, **kwargs: response.headers.update(Location=""))
        self.session.auth = lambda request: request  # ignore ~/.netrc
        self.session.trust_env = self.base_url.startswith("https:")  # over http, a proxy would see the key
        self._retry = _Retry(RETRIES, other=0, status_forcelist=RETRY_STATUSES, raise_on_status=False)
        # A POST may have been applied unless a response says otherwise, or no connection was made.
        post_retry = self._retry.new(allowed_methods={"POST"}, read=False)
        self._retry.wait = post_retry.wait = self._wait
        self._gets = HTTPAdapter(max_retries=self._retry)
        self.session.mount("https://", self._gets)
        self.session.mount("http://", self._gets)
        self.session.mount(f"{self.base_url}/site-outages/", HTTPAdapter(max_retries=post_retry))

    def __exit__(self, *exc_info: object) -> None:
        self.session.close()

    def handler(self, site: str = SITE, date: Date = SINCE) -> list[SiteOutage]:
        """Report `site`'s outages that began at or after `date`, and return the list that was sent. `date` is ISO 8601
        text (UTC if it has no offset), a date in UTC or an aware datetime. Raise UsageError, OutcomeUnknown or KFError.
        """
        self.sent = False
        path_segment(site)  # this and the next raise UsageError before any request
        parse_since(date)
        outages = self._get_outages()
        site_info = self._get_site_info(site)
        site_outages = self._filter_outages(outages, site_info, date)
        return self._post_site_outages(site, site_outages)

    def _get_outages(self) -> Iterator[Any]:
        """`GET /outages`: receive the whole response, and return an iterator that decodes the outages."""
        self.outages_read = 0
        lists = self._get("outages", b"[]")
        return itertools.chain(next(lists), itertools.chain.from_iterable(lists))  # `next` makes the request

    def _get_site_info(self, site: str) -> SiteInfo:
        """`GET /site-info/{siteId}`."""
        [info] = next(self._get(f"site-info/{path_segment(site)}", b"{}"))
        if not isinstance(info.get("name"), str) or not isinstance(info.get("devices"), list):
            raise KFError("GET /site-info: expected a site with an id, a name and devices")
        if info.get("id") != site:
            raise KFError(f"GET /site-info: requested site '{site}' but got '{safe(str(info.get('id')), 100)}'")
        self.site_info = info
        return self.site_info

    def _get(self, path: str, ends: bytes) -> Iterator[list[Any]]:
        """GET `path`, and yield the items of an array (if `ends` is `[]`) in lists, or an object (`{}`) in a list."""
        try:
            with tempfile.SpooledTemporaryFile(max_size=MEMORY_MAX) as body:
                self._request("GET", path, body, ends)
                chunks = iter(lambda: body.read(CHUNK), b"")
                for items in read_array(chunks) if ends == b"[]" else [[json.loads(str(body.read(), "utf-8-sig"))]]:
                    self.outages_read += len(items) if ends == b"[]" else 0
                    yield items
        except OSError as error:  # closing the file writes what it still buffers
            raise KFError(f"GET /{path}: temporary file: {root_cause(error)[0]}") from error
        except (ValueError, RecursionError) as error:
            raise KFError(f"GET /{path}: the response is not valid JSON ({error})") from error

    def _filter_outages(self, outages: Iterable[Any], site_info: SiteInfo, date: Date) -> list[SiteOutage]:
        """Return the outages of the site's devices since `date`, with device names (see `site_outages_of`)."""
        return list(site_outages_of(outages, device_names(site_info), parse_since(date)))

    def _post_site_outages(self, site: str, site_outages: list[SiteOutage]) -> list[SiteOutage]:
        """`POST /site-outages/{siteId}`: return the list once the API has accepted it (a dry run does not send it)."""
        try:
            body = json.dumps(site_outages, allow_nan=False).encode()
        except ValueError as error:  # NaN in a field that is passed through
            raise KFError(f"GET /outages: a site outage is not valid JSON ({error})") from error
        if not self.dry_run:
            answer, problem = io.BytesIO(), "got 200 with a non-JSON response"
            self._request("POST", f"site-outages/{path_segment(site)}", answer, data=body)
            with contextlib.suppress(ValueError, RecursionError):
                message = api_error(answer.getvalue()) if answer.getvalue().strip() else None
                problem = "" if message is None else f'got 200 with the message "{message}"'
            if problem:
                raise self._error(problem)
            self.sent = True
        return site_outages

    def _request(self, method: str, path: str, body: IO[bytes], ends: bytes = b"", data: bytes | None = None) -> None:
        """Send a request and write the body of its 200 response to `body`. Raise OutcomeUnknown if `data` may have been
        applied. Also retry a GET if its body is incomplete (`ends` are its first and last characters).
        """
        start, url = time.monotonic(), f"{self.base_url}/{path}"
        retry: Retry = self._retry
        headers = {"Content-Type": "application/json"} if method == "POST" else None
        while True:
            self._doing, self._attempt, reply = f"{method} /{path}", len(retry.history) + 1, None
            self._gets.max_retries = retry  # requests accepts it only here
            self.session.close()  # some servers keep a connection open all the same
            with self.lock:
                self.sent = None if method == "POST" else False
            try:
                reply = self.session.request(method, url, data=data, headers=headers, timeout=self.timeout, stream=True)
                with reply:
                    if reply.status_code != 200:
                        raise self._rejection(reply)
                    self._receive(reply, body, ends)
                break
            except (OSError, HTTPError, ValueError) as error:
                problem, unconnected = root_cause(error)
                self.sent = False if unconnected else self.sent
                if reply is None or method == "POST":
                    raise self._error(problem, "check the network and the base URL", "base_url") from error
                try:
                    retry = (reply.raw.retries or retry).increment("GET", path, error=ProtocolError(problem))
                except MaxRetryError:
                    raise self._error(problem, "try again later") from error
            retry.sleep()
        log.info("%s: 200 in %.2f s, %d bytes", self._doing, time.monotonic() - start, len(data or b"") or body.tell())
        body.seek(0)

    def _wait(self, retry: Retry, asked: float) -> None:  # a POST gets here only if it was rejected or never sent
        self.sent, self._attempt, last = False, len(retry.history) + 1, retry.history[-1]
        wait = max(asked, min(BACKOFF_MAX, self.backoff * 2 ** (self._attempt - 2)) * random.uniform(0.5, 1))
        why = f"got {last.status}" if last.error is None else safe(root_cause(last.error)[0])
        log.warning("%s: %s; retrying in %.1f s (attempt %d of %d)", self._doing, why, wait, self._attempt, RETRIES + 1)
        time.sleep(wait)
        with self.lock:
            self.sent = None if last.method == "POST" else False

    def _receive(self, response: requests.Response, body: IO[bytes], ends: bytes = b"") -> None:
        encoding = (response.headers.get("Content-Encoding") or "identity").lower()
        if encoding not in ("identity", "gzip", "x-gzip"):  # others, or nested ones, may expand without limit
            raise self._error(f"unexpected Content-Encoding: {encoding}")
        expected = response.raw.length_remaining if encoding == "identity" else None
        on_progress = self.on_progress if ends == b"[]" else lambda *numbers: None  # only this one takes long
        first, last, limit = b"", b"", {b"[]": OUTAGES_MAX, b"{}": SITE_INFO_MAX}.get(ends, OUTAGE_MAX)
        body.seek(0)
        body.truncate()
        # urllib3 before 2.6 decompresses each read in one go, which may expand it a thousandfold
        for chunk in response.iter_content(CHUNK if encoding == "identity" else CHUNK // 8):
            try:
                size = body.tell() + body.write(chunk)
            except OSError as error:
                raise self._error(f"temporary file: {root_cause(error)[0]}") from error
            if size > limit:
                raise self._error(f"the response is longer than {limit:,} bytes")
            first = first or chunk.lstrip(b"\xef\xbb\xbf \t\n\r")[:1]  # a byte order mark may come before it
            last = chunk.rstrip(b" \t\n\r")[-1:] or last
            on_progress(size, expected)
        if ends not in (b"", first + last):
            raise ProtocolError(f"expected a complete JSON {'array' if ends == b'[]' else 'object'}")
        on_progress(body.tell(), body.tell())

    def _rejection(self, response: requests.Response) -> KFError:
        status, posting, message = response.status_code, self.sent is None, None
        self.sent = None if posting and not (300 <= status < 500 or status in RETRY_STATUSES) else False
        with contextlib.suppress(OSError, HTTPError, ValueError, RecursionError, KFError):
            self._receive(response, body := io.BytesIO())
            message = api_error(body.getvalue())
        phrase, advice = responses.get(status, ""), ADVICE.get(status, ("",))
        problem = f"got {status} {phrase}".rstrip() + (f' ("{message}")' if message and message != phrase else "")
        if status in RETRY_STATUSES and self._retry.get_retry_after(response.raw) > RETRY_AFTER_MAX:
            wait = safe(response.headers["Retry-After"], 100)
            advice = (f"try again after the requested delay (Retry-After: {wait})",)
        error = self._error(problem, *advice, status=status, message=message)
        error.outcome = "The list was not accepted" if posting and self.sent is False else error.outcome
        return error

    def _error(self, problem: str, advice: str = "", *check: str, **details: Any) -> KFError:
        problem = f"{self._doing}: {problem}" + (f" ({self._attempt} attempts)" if self._attempt > 1 else "")
        if self.sent is None:
            return OutcomeUnknown(problem, **details)
        return KFError(problem, *check, advice=advice, **details)


# Report formatting
def width(text: str) -> int:
    """Return how many terminal columns `text` takes up: two per wide character, none per combining character."""
    none = {"Mn": 0, "Me": 0, "Cf": 0}
    return len(text) if text.isascii() else sum(none.get(category(c), 1 + (east_asian_width(c) in "WF")) for c in text)


def fit(text: str, columns: int) -> str:
    """Return `text` cut or padded with spaces to fill `columns` terminal columns."""
    if width(text) > columns:
        text = "".join(c for c, end in zip(text, itertools.accumulate(map(width, text))) if end < columns) + "~"
    return text + " " * (columns - width(text))


def report(site_info: SiteInfo, site_outages: list[SiteOutage], since: int, columns: int) -> str:
    """Return the report as lines of at most `columns` columns. Overlapping outages count once towards downtime."""
    names = {device: safe(name) for device, name in device_names(site_info).items()}
    spans: dict[str, list[tuple[int, int]]] = {}
    for outage in site_outages:
        begin, end = parse_time(outage["begin"])[0], parse_time(outage["end"])[0]
        spans.setdefault(outage["id"], []).append((begin, end if end > begin else begin))
    last = max((end for mine in spans.values() for _, end in mine), default=since)
    days = (min(max(at // 86_400, -719_162), 2_932_896) for at in (since, last))  # within the years 1 to 9999
    first_day, last_day = (str(dt.date(1970, 1, 1) + dt.timedelta(day)) for day in days)
    room = max(min(max((width(names[device]) for device in spans), default=0), columns // 3), 6)
    cells = max(columns - room - 23, 0)
    axis = first_day + last_day.rjust(cells - 10) if cells > 20 else ""
    lines = [f"Outages since {first_day}: {safe(site_info['name'])} ({safe(site_info['id'])})"]
    lines += ["", f"{fit('Device', room)}  Outages  Downtime    {axis}"] if spans else []
    for device in (device for device in names if device in spans):
        downtime, reached, line, scale = 0, since, ["."] * cells, cells / (last - since + 1)
        for begin, end in sorted(spans[device]):
            if end > reached:
                downtime += end - (begin if begin > reached else reached)
                reached = end
            start, stop = int((begin - since) * scale), int((end - since) * scale) + 1
            line[start:stop] = "#" * (stop - start)
        hours, minutes = divmod(round(downtime / 60), 60)
        spell = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        spell = f"{hours // 24} d {hours % 24} h" if hours >= 24 else spell
        lines.append(f"{fit(names[device], room)}  {len(spans[device]):7}  {spell:10}  {''.join(line[:cells])}")
    rest = [name for device, name in names.items() if device not in spans]
    listed = f"No outages: {', '.join(rest)}"
    lines += [listed if width(listed) <= columns else f"No outages: {len(rest)} devices"] if rest else []
    return "\n".join(fit(line, columns).rstrip() for line in lines)


# Mock API for --demo
@contextlib.contextmanager
def demo_api() -> Iterator[str]:
    """Serve sample outages on 127.0.0.1 and yield the base URL. The first GET and the first POST fail with 500."""
    import socketserver  # imported here because they load slowly
    from http.server import BaseHTTPRequestHandler

    ids = [f"{number * 2654435761 % 2**32:08x}" for number in range(98)]  # the first eight are the site's
    owners = [ids[number**2 % 11 % 8] for number in range(18)] + ids[8:]
    days = [0, -0.001 / 86_400, *range(14, 290, 33), *range(-290, -70, 33), *range(-270, 270, 6)]  # from 2022-01-01
    begins = [dt.datetime(2022, 1, 1) + dt.timedelta(day) for day in days]
    spans = [(begin, begin + dt.timedelta(begin.day)) for begin in begins]
    times = [[f"{moment.isoformat(timespec='milliseconds')}Z" for moment in span] for span in spans]
    outages = [{"id": id, "begin": begin, "end": end} for id, (begin, end) in sorted(zip(owners, times))]
    devices = [{"id": id, "name": f"Battery {number}"} for number, id in enumerate(ids[:8], 1)]
    site_info = {"id": SITE, "name": "Norwich Pear Tree", "devices": devices}
    answers = {"GET /outages": outages, f"GET /site-info/{SITE}": site_info, f"POST /site-outages/{SITE}": {}}
    asked: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = answers.get(f"{self.command} {self.path}", {"message": "Site not found"})
            self.send_response(500 if self.command not in asked else 404 if "message" in answer else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())
            asked.add(self.command)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            """Leave stderr to the client."""

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:  # HTTPServer would look up the host name
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


# Command line
FLAGS = {"api_key": "KF_API_KEY", "base_url": "--base-url or KF_BASE_URL", "site": "--site", "date": "--since"}


def write(text: str, stream: TextIO | None) -> None:
    """Print and flush `text`. Ignore a closed pipe (`| head`), and any failure to write to stderr."""
    try:
        print(text, file=stream or io.StringIO(), end="", flush=True)  # None if it was closed at startup
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if stream is sys.stdout else 2)  # else it fails again on exit
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise


class Screen(logging.Handler):
    """Log to stderr: one line per message, and a download progress line that the next message erases."""

    def __init__(self) -> None:
        super().__init__()
        terminal = bool(sys.stderr) and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.erase, self.due, self.drawn = "\r\033[K" if terminal else "", time.monotonic() + 0.5, False

    def emit(self, record: logging.LogRecord) -> None:
        write(f"{self.erase}kf_backend: {safe(record.getMessage())}\n", sys.stderr)

    def progress(self, received: int, expected: int | None) -> None:  # a few times a second; not for short downloads
        wanted = self.erase and time.monotonic() >= self.due and log.isEnabledFor(logging.WARNING)
        if self.drawn if received == expected else wanted:
            self.due, self.drawn = time.monotonic() + 0.2, received != expected
            total = f" of {expected / 1e6:.1f} MB ({100 * received // expected}%)" if expected else " MB"
            line = f"Downloading outages: {received / 1e6:.1f}{total}"[: shutil.get_terminal_size().columns - 1]
            write(self.erase + (line if self.drawn else ""), sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        shown = r"(unrecognized arguments(?:: --[a-z-]+(?![^= ]))?|ignored explicit argument).*"
        log.error("%s (see --help)", re.sub(shown, r"\1", safe(message)))  # the rest may be an API key
        raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options in `argv`; exit, as argparse does, after --help, --version or a usage error."""
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser("kf_backend.py", "%(prog)s [options]", __doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    volume, target = (parser.add_mutually_exclusive_group().add_argument for _ in range(2))
    add("--site", default=SITE, help="site ID (default: %(default)s)")
    since = "drop outages that began before this ISO 8601 date or time (UTC if it has no offset; default: %(default)s)"
    add("--since", metavar="DATE", default=SINCE, help=since)
    target("--base-url", metavar="URL", help=f"API base URL; must be https, or http to localhost (default: {BASE_URL})")
    add("--dry-run", action="store_true", help="send nothing; print the JSON that would be sent")
    target("--demo", action="store_true", help="use a mock API on this machine; needs no API key or network")
    seconds = functools.partial(add, metavar="SECONDS", type=float)
    timeout = "end an attempt after this many seconds without data, or if sending takes longer (default: %(default)g)"
    seconds("--timeout", default=TIMEOUT, help=timeout)
    seconds("--deadline", default=DEADLINE, help="stop the whole run after this many seconds (default: %(default)g)")
    volume("-v", "--verbose", action="store_true", help="log each request's duration (with retries) and size")
    volume("-q", "--quiet", action="store_true", help="print only errors (for cron)")
    add("--version", action="version", version=f"kf_backend {__version__}")
    args = parser.parse_args(argv)
    if not (0 < args.timeout <= 86_400 and 0 < args.deadline <= 86_400):
        parser.error("--timeout and --deadline must be more than 0 and at most 86400 seconds")
    return args


def end_early(client: KFClient, deadline: float) -> threading.Timer:
    """Start and return a timer. When it or a signal ends the process, one line says whether the list was sent."""

    def end(number: int = 0, frame: object = None) -> NoReturn:
        expired = f"stopped: the {deadline:g} s --deadline expired"
        client.lock.acquire(timeout=2)  # never released: from here on, no list is sent and main() cannot return
        outcome, code = OUTCOMES[client.sent]
        why = f"interrupted by {signal.Signals(number).name}" if number else expired
        with contextlib.suppress(OSError, ValueError):
            if sys.stderr and (os.name == "nt" or select.select([], [2], [], 0.5)[1]):  # do not block if it is full
                os.write(2, f"{chr(13) * sys.stderr.isatty()}kf_backend: {why}. {outcome}\n".encode())
        os._exit(128 + number if number else code)  # raising could hang on a urllib3 lock, or be swallowed

    timer = threading.Timer(deadline, end)
    timer.daemon = True
    timer.start()
    if os.name == "nt":
        signal.signal(signal.SIGINT, end)
    elif blocked := signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
        threading.Thread(target=lambda: end(signal.sigwait(blocked)), daemon=True).start()
    return timer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: the only place that turns errors into messages and exit codes."""
    start, screen, client, stack = time.monotonic(), Screen(), None, contextlib.ExitStack()
    api_keys.add(api_key := os.environ.get("KF_API_KEY", "").strip())
    log.addHandler(screen)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may not support a device name
    try:
        args = parse(argv)
        log.setLevel(logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING)
        base_url = args.base_url if args.base_url is not None else os.environ.get("KF_BASE_URL") or BASE_URL
        if args.demo:
            base_url, api_key = stack.enter_context(demo_api()), "demo-key"
            log.warning("demo: mock API at %s (its first GET and first POST will fail)", base_url)
        client = stack.enter_context(KFClient(base_url, api_key, timeout=args.timeout, dry_run=args.dry_run))
        client.on_progress = screen.progress
        stack.callback(end_early(client, args.deadline).cancel)
        stack.callback(client.lock.acquire)  # main() does not return while a signal ends the run
        site_outages = client.handler(args.site.strip(), args.since)
        share, stream = f"{len(site_outages):,} of {client.outages_read:,} outages", sys.stdout
        verdict = f"Sent {share} to {safe(client.base_url)} in {time.monotonic() - start:.1f} s."
        if args.dry_run:
            write(json.dumps(site_outages, indent=2) + "\n", sys.stdout)
            verdict, stream = f"Dry run: {share} would be sent.", sys.stderr
        if not args.quiet:
            columns = shutil.get_terminal_size().columns or 80  # 0 if unknown
            table = report(client.site_info, site_outages, parse_since(args.since)[0], columns)
            write(f"{table}\n\n{verdict}\n", stream)
        return 0
    except KFError as error:
        names = ", ".join(FLAGS[name] for name in error.check if not args.demo or name in ("site", "date"))
        advice = f"; {error.advice}{f' ({names})' if names else ''}" if error.advice else names and f"; check {names}"
        log.error("%s. %s%s", error, error.outcome, advice)
        return 2 if isinstance(error, UsageError) else 3 if isinstance(error, OutcomeUnknown) else 1
    except Exception as error:
        if client is None or (client.sent is False and not isinstance(error, OSError)):
            raise  # a bug, before anything was sent
        outcome, code = OUTCOMES[client.sent]
        log.error("%s. %s", root_cause(error)[0], outcome)
        return code
    finally:
        stack.close()  # only now: the deadline covers the lines above, too
        log.removeHandler(screen)
        log.setLevel(logging.NOTSET)


if __name__ == "__main__":
    raise SystemExit(main())
