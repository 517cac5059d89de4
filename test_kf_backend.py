"""Tests of kf_backend.py, in its own order: rules, client, report, demo, command line, README.

`API` is a real server on 127.0.0.1, with a thread for each connection. It is told what to answer: `self.api(info=[...],
outages=[...], post=[...])` gives each of the three requests its replies, one after the other, and the healthy answer
when they are used up. A reply is bytes, after which the connection is kept, or a function of the socket for what is
less polite (`then_close`, `then_reset`, `then_stall`, `then_drip`), after which it is closed. What was asked for is in
`api.requests`. Waits are made tiny by `backoff=...`, or by `Retry-After: 0` where `main` makes the client.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import gzip
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import unittest
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union
from unittest import mock

from requests import RequestException, Session
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse, Retry
from urllib3.exceptions import MaxRetryError, ProtocolError

import kf_backend as kf

SCRIPT = Path(kf.__file__)
KEY = "s3cret-key!~"
INFO, OUTAGES, POST = f"GET /site-info/{kf.SITE}", "GET /outages", f"POST /site-outages/{kf.SITE}"
#: The name of each request among the replies of `self.api`.
REQUESTS = (("info", INFO), ("outages", OUTAGES), ("post", POST))
REDIRECTS = (301, 302, 303, 307, 308)
AGAIN = {"Retry-After": "0"}
#: Its third letter joins two others, and takes no column.
FARSI = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
NO_LENGTH = {"Content-Length": None}
UNKNOWN = "the list may or may not have been applied: check that before you run it again"
#: Vouches for 127.0.0.1 until 2120, to those who trust it. Its key is for these tests alone.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBcTCCARegAwIBAgIUAvH9xUU2k6hhgl9NMBoukCLGWk8wCgYIKoZIzj0EAwIw
DTELMAkGA1UEAwwCa2YwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBa
MA0xCzAJBgNVBAMMAmtmMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEkp+qvaud
AlvwS9stU0gGIC4XiBaabFIwOEVGjoizbXDRs2ePqHnA4Pr520g4BMnOgpN/pAyK
ADuqldL7borL66NTMFEwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQw
HQYDVR0OBBYEFCcP/QGUxiHcDiKPHBugL1E6rrVyMA8GA1UdEQQIMAaHBH8AAAEw
CgYIKoZIzj0EAwIDSAAwRQIgb32qhlyRuN7CrbudEmy24cDLFY/Kc0ex/x+EFq5W
VtsCIQDAeFhvpTTU4MW191+wJsViYY/uj9fhlnuVK6PcXoUi5Q==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRC1prJNykci/ZkR1
TsXzHhqGq+7gVSbMDKT38kFAd1yhRANCAASSn6q9q50CW/BL2y1TSAYgLheIFpps
UjA4RUaOiLNtcNGzZ4+oecDg+vnbSDgEyc6Ck3+kDIoAO6qV0vtuisvr
-----END PRIVATE KEY-----
"""

Reply = Union[bytes, Callable[[socket.socket], None]]


def outage(device: str, begin: Any = "2022-05-01T00:00:00.000Z", end: Any = "2022-05-02T00:00:00.000Z") -> Any:
    return {"id": device, "begin": begin, "end": end}


def site_info(names: Mapping[str, str], site: str = kf.SITE, name: str = "Norwich Pear Tree") -> Any:
    return {"id": site, "name": name, "devices": [{"id": id, "name": name} for id, name in names.items()]}


NAMES = {"b1": "Battery 1", "b2": "Batterie №2"}
SITE_INFO = site_info(NAMES)
#: As `GET /outages` has them: one begins at the date, and one, which ends after it, a millisecond before it.
ALL = [
    outage("b2", "2022-03-01T00:00:00.000Z", "2022-03-04T04:00:00.000Z"),
    outage("another", "10", "yesterday"),
    outage("b1", "2021-12-31T23:59:59.999Z", "2022-06-01T00:00:00.000Z"),
    outage("b1", "2022-01-01T00:00:00.000Z", "2022-01-11T12:00:00.000Z"),
]
#: What is not to be posted.
GHOST = [outage("b1", "2022-02-02T00:00:00.000Z"), *ALL]
DUE = [{**ALL[0], "name": "Batterie №2"}, {**ALL[3], "name": "Battery 1"}]
REPORT = """\
Norwich Pear Tree (norwich-pear-tree)
2 of 4 outages sent, those of the site since 2022-01-01 00:00 UTC.

Device       Outages  First begin       Last end          Out of service
Battery 1          1  2022-01-01 00:00  2022-01-11 12:00         10d 12h
Batterie №2        1  2022-03-01 00:00  2022-03-04 04:00           3d 4h
Times are UTC. Overlapping outages of a device are counted once.

Battery 1    ############.......................................................
Batterie №2  ...............................................................####
             2022-01-01                   2022-02-01                  2022-03-04
             # out of service
"""


def words(text: str) -> list[str]:
    return text.split()


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def answer(
    status: int = 200, json: Any = None, headers: Mapping[str, str | None] = AGAIN, body: bytes | None = None
) -> bytes:
    """Return an answer of JSON, or of `body`. A header of None is left out."""
    body = dumps(json) if body is None else body
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def then_close(said: bytes) -> Reply:
    return lambda sock: sock.sendall(said)


def then_reset(said: bytes) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        time.sleep(0.01 if said else 0)  # a reset overtakes what the client has not read
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(sock.detach())

    return reply


def then_stall(said: bytes, stalling: threading.Event | None = None) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        if stalling:
            stalling.set()
        sock.recv(1)  # until the client hangs up

    return reply


def then_drip(said: bytes, drop: bytes, seconds: float = 0.02) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        while True:  # until the client hangs up
            sock.sendall(drop)
            time.sleep(seconds)

    return reply


class Request(NamedTuple):
    line: str  # such as "GET /outages"
    headers: Message
    body: bytes
    nth: int  # on its connection


class Connection(socketserver.StreamRequestHandler):
    timeout = 30
    disable_nagle_algorithm = True
    server: API

    def setup(self) -> None:
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        for nth in itertools.count(1):
            line = self.rfile.readline().decode("latin-1").rpartition(" ")[0]
            if not line:
                return
            headers = http.client.parse_headers(self.rfile)
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            reply = self.server.reply(Request(line, headers, body, nth))
            if not isinstance(reply, bytes):
                reply(self.connection)
                break
            self.connection.sendall(reply)

    def finish(self) -> None:
        super().finish()
        self.request.close()


class API(socketserver.ThreadingTCPServer):
    """The API. Before it is `listening` its port refuses connections."""

    request_queue_size = 50

    def __init__(self, script: Mapping[str, Iterable[Reply]], tls: ssl.SSLContext | None, listening: bool) -> None:
        super().__init__(("127.0.0.1", 0), Connection, bind_and_activate=False)
        self.server_bind()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.address}"
        self.tls = tls
        self.script = {line: iter(replies) for line, replies in script.items()}
        self.healthy = {OUTAGES: answer(json=ALL), INFO: answer(json=SITE_INFO), POST: answer(json={})}
        self.requests: list[Request] = []
        self.connections = 0
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.003,))
        if listening:
            self.listen()

    def listen(self) -> None:
        self.server_activate()
        self.thread.start()

    def __exit__(self, *exc_info: object) -> None:
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
        self.server_close()

    def reply(self, request: Request) -> Reply:
        with self.lock:
            self.requests.append(request)
            healthy = self.healthy.get(request.line, answer(404, {"message": "Site not found"}))
            return next(self.script.get(request.line, iter(())), healthy)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.connections += 1
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client may hang up
            super().handle_error(request, client_address)

    @property
    def lines(self) -> list[str]:
        return [request.line for request in self.requests]

    @property
    def posted(self) -> list[Any]:
        return [json.loads(request.body) for request in self.requests if request.line.startswith("POST")]


class Listener(logging.Handler):
    """Has `call` called with each record."""

    def __init__(self, call: Callable[[logging.LogRecord], object], level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.call = call

    def emit(self, record: logging.LogRecord) -> None:
        self.call(record)


class TestCase(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        """Leave nothing of the caller's environment, and collect what is logged."""
        ours = r"(?i)KF_.*|.*_PROXY|COLUMNS|LINES|NETRC|NO_COLOR|(REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_.*|PYTHON(?!PATH).*"
        kept = {name: value for name, value in os.environ.items() if not re.fullmatch(ours, name)}
        patch = mock.patch.dict(os.environ, {**kept, "COLUMNS": "80"}, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.records: list[logging.LogRecord] = []
        collector, root = Listener(self.records.append), logging.getLogger()
        self.addCleanup(root.setLevel, root.level)
        self.addCleanup(root.removeHandler, collector)
        root.setLevel(logging.DEBUG)
        root.addHandler(collector)
        self.opened = contextlib.ExitStack()
        self.addCleanup(lambda: self.opened.close())

    def tearDown(self) -> None:
        self.assertNotIn(KEY, "\n".join(record.getMessage() for record in self.records))

    @contextlib.contextmanager
    def subTest(self, *case: Any, **values: Any) -> Iterator[None]:
        """Run a case as unittest does, and close at its end what it opened."""
        outer = self.opened
        with super().subTest(*case, **values), contextlib.ExitStack() as self.opened:
            yield
        self.opened = outer

    @property
    def warned(self) -> list[str]:
        """The warnings of the library so far, with their waits as `N`."""
        warnings = [record for record in self.records if record.name == "kf_backend" and record.levelname == "WARNING"]
        return [re.sub(r"[0-9.]+ s$", "N s", record.getMessage()) for record in warnings]

    def api(self, tls: Any = None, listening: Any = True, **replies: Any) -> API:
        return self.opened.enter_context(API({dict(REQUESTS)[name]: replies[name] for name in replies}, tls, listening))

    def tls(self) -> tuple[ssl.SSLContext, str]:
        """Return what a server of https needs, and the file by which a client trusts it."""
        descriptor, file = tempfile.mkstemp(suffix=".pem")
        self.addCleanup(os.remove, file)
        os.write(descriptor, CERTIFICATE.encode())
        os.close(descriptor)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context, file

    def client(self, url: str, **options: Any) -> kf.KFClient:
        client = kf.KFClient(url, KEY, **{"backoff": 0.0002, "timeout": 10, **options})
        self.opened.callback(client.session.close)
        return client

    def handle(self, api: API, **options: Any) -> list[Any]:
        return list(self.client(api.url, **options).handler())

    def failure(self, kind: type[kf.KFError], call: Callable[..., Any], *args: Any, **options: Any) -> kf.KFError:
        """Return the error that `call` raises, of just that kind. The key must not show in it nor in its traceback."""
        with self.assertRaises(kf.KFError) as caught:
            call(*args, **options)
        error = caught.exception
        self.assertIs(type(error), kind, error)
        shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.assertNotIn(KEY, f"{shown}{error!r}{vars(error)}")
        return error

    def run_main(self, *argv: str, **environ: str | None) -> tuple[int, str, str]:
        """Return the exit code, stdout and stderr of `main`. An environment variable of None is left out."""
        values = {name: value for name, value in {"KF_API_KEY": KEY, **environ}.items() if value is not None}
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, values))
            stdout = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            try:
                code: Any = kf.main(argv)
            except SystemExit as stop:
                code = stop.code
        self.assertNotIn(KEY, stdout.getvalue() + stderr.getvalue())
        return code, stdout.getvalue(), stderr.getvalue()

    def spawn(self, url: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start the script in a process of its own."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        environ = {**os.environ, "KF_BASE_URL": url, "KF_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-X", "dev", "-W", "error", str(SCRIPT), *argv]
        return subprocess.Popen(command, env=environ, encoding="utf-8", **streams)

    def finished(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        stdout, stderr = process.communicate(timeout=60)
        self.assertNotIn(KEY, f"{stdout}{stderr}")
        return process.returncode, stdout, stderr


class RulesTests(TestCase):
    NEW_YEAR = datetime(2022, 1, 1, tzinfo=timezone.utc)
    NO_TIMES = (
        *("", " 2022-01-01T00:00:00Z", "2022-01-01T00:00:00Z\n", "2022-01-01T00:00:00 Z"),
        *words("10 May 02/03/2022 2022-01-01 2022-01-01T00:00Z 2022-01-01T00:00:00 2022-01-01_00:00:00Z"),
        *words("20220101T000000Z 2022-W01-1T00:00:00Z 2022-001T00:00:00Z +02022-01-01T00:00:00Z 0000-01-01T00:00:00Z"),
        *words("2021-12-31T23:59:60Z 2022-13-01T00:00:00Z 2022-02-29T00:00:00Z \uff12022-01-01T00:00:00Z"),
        *words("2022-01-01T25:00:00Z 2022-01-01T24:00:01Z 2022-01-01T00:60:00Z 9999-12-31T24:00:00Z"),
        *words("2022-01-01T00:00:00+24:00 2022-01-01T00:00:00+00:60 2022-01-01T00:00:00+01 2022-01-01T00:00:00+0100"),
        *words("2022-01-01T00:00:00PST 2022-01-01T00:00:00Z+01:00 2022-01-01T00:00:00.Z 2022-01-01T00:00:00,5Z"),
    )

    def test_plain_leaves_nothing_that_moves_the_cursor(self) -> None:
        for case, given, expected in (
            ("an escape code", "a\x1b[31mb", "a?[31mb"),
            ("one of 8 bits", "a\x9b31mb", "a?31mb"),
            ("lines", " a\r\n\t b\u2028c\v", "a b c"),
            ("a bell and a backspace", "a\a\b", "a??"),
            ("an override of the direction", "a\u202eb", "a?b"),
            ("half a character", "a\ud800", "a?"),
            ("letters and a joiner", f"é 电池 {FARSI}", f"é 电池 {FARSI}"),
        ):
            with self.subTest(case):
                self.assertEqual(kf.plain(given), expected)

    def test_reason_is_the_innermost_error(self) -> None:
        refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        with self.assertRaises(RequestException) as caught:
            try:
                raise ProtocolError("aborted", refused)
            except ProtocolError as error:
                raise RequestException(MaxRetryError(mock.Mock(), "/", error)) from error
        self.assertEqual(kf.reason(caught.exception), "Connection refused")
        self.assertEqual(kf.reason(ValueError("a\nb")), "a b")
        self.assertEqual(kf.reason(ValueError()), "ValueError")

    def test_white_space_around_a_key_is_stripped(self) -> None:
        for given in ("key", " key\n", "\tkey\r\n", "\u00a0key"):
            with self.subTest(given):
                self.assertEqual(kf.clean_key(given), "key")

    def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(self) -> None:
        absent, bad = "there is no API key: set", "the API key has a character other than visible ASCII: check"
        for case, given, text in (
            ("absent", "", absent),
            ("blank", " \n", absent),
            ("an inner space", f"{KEY} {KEY}", bad),
            ("an inner line break", f"{KEY}\nX-Evil: {KEY}", bad),
            ("a letter outside ASCII", f"{KEY}é", bad),
            ("a quotation mark of a word processor", f"\u2019{KEY}", bad),
            ("a control character", f"\x7f{KEY}", bad),
        ):
            with self.subTest(case):
                self.assertEqual(str(self.failure(kf.UsageError, kf.clean_key, given)), f"{text} KF_API_KEY")
                self.assertEqual(str(self.failure(kf.UsageError, self.make, given)), f"{text} KF_API_KEY")

    def make(self, api_key: str) -> kf.KFClient:
        return kf.KFClient(kf.BASE_URL, api_key)

    def test_base_urls_that_keep_the_key_safe_are_taken(self) -> None:
        for given, expected in (
            (kf.BASE_URL, kf.BASE_URL),
            ("https://h/v1/", "https://h/v1"),
            ("https://h", "https://h"),
            ("HTTPS://H:8443/V1//", "https://h:8443/V1"),
            ("http://localhost:80/v1", "http://localhost:80/v1"),
            ("http://127.1.2.3/", "http://127.1.2.3"),
            ("http://[::1]:8080/", "http://[::1]:8080"),
        ):
            with self.subTest(given):
                self.assertEqual(kf.clean_base_url(given), expected)

    def test_other_base_urls_are_refused(self) -> None:
        https, bare = "must be https (http only to this machine)", "must have no user, query or fragment"
        for text, urls in (
            (https, ["", *words("http://h http://localhost.h http://127.0.0.1.h http://localhost@h http://[::2]")]),
            (https, words("ftp://h file:///etc h/v1 https:// https:///v1")),
            (bare, words("https://user:word@h https://user@h http://user@localhost")),
            (bare, words("https://h/?a=b https://h/? https://h?a https://h/#a https://h#")),
            ("is not a URL", words("https://h:port https://h:99999 https://[::1")),
        ):
            for given in urls:
                with self.subTest(given):
                    error = self.failure(kf.UsageError, kf.clean_base_url, given)
                    self.assertEqual(str(error), f"the base URL {text}: check --base-url or KF_BASE_URL")

    def test_some_sites_cannot_be_a_segment_of_a_path(self) -> None:
        for given, text in (
            *((site, f"{site!r} cannot be a site's id: check --site") for site in ("", ".", "..")),
            ("a\ud800", "'a\\ud800' is no valid text: check --site"),
        ):
            with self.subTest(text):
                self.assertEqual(str(self.failure(kf.UsageError, kf.path_segment, given)), text)
        self.assertEqual(kf.path_segment("a/b?c#d%2e é\r\n..."), "a%2Fb%3Fc%23d%252e%20%C3%A9%0D%0A...")

    def test_rfc_3339_times_are_read(self) -> None:
        for micros, times in (
            (0, "2022-01-01T00:00:00Z 2022-01-01t00:00:00z 2022-01-01T00:00:00.000Z 2021-12-31T24:00:00Z"),
            (0, "2022-01-01T01:00:00+01:00 2021-12-31T18:30:00.0-05:30 2022-01-01T14:00:00.000+14:00"),
            (0, "2022-01-01T00:00:00-00:00 2021-12-31T24:00:00.000z 2022-01-01T00:00:00.0000000009Z"),
            (500_000, "2022-01-01T00:00:00.5Z 2022-01-01t01:00:00.50+01:00 2022-01-01T00:00:00.50000000z"),
            (123_456, "2022-01-01T00:00:00.123456Z 2022-01-01T00:00:00.123456999Z"),
            (123_400, "2022-01-01T00:00:00.1234Z 2021-12-31T23:00:00.12340-01:00"),
            (111_111, "2022-01-01T00:00:00." + "1" * 40 + "Z"),
            (-1000, "2021-12-31T23:59:59.999Z 2022-01-01T00:59:59.999+01:00"),
        ):
            for given in (*words(times), *(given.replace("T", " ") for given in words(times))):
                with self.subTest(given):
                    read = kf.parse_time(given)
                    self.assertEqual(read - self.NEW_YEAR, timedelta(microseconds=micros))
                    self.assertIsNotNone(read.utcoffset())

    def test_other_times_are_refused_by_every_python_alike(self) -> None:
        others: tuple[Any, ...] = (None, 10, [], {})
        for given in (*self.NO_TIMES, *others):
            with self.subTest(given), self.assertRaises((ValueError, TypeError)):
                kf.parse_time(given).timestamp()

    def test_a_persons_date_without_a_zone_is_utc(self) -> None:
        dates = words("2022-01-01 2022-01 20220101 2022-W01-1 2022-001 2022-01-01T00:00 2022-01-01T00:00:00.000Z")
        dates += [*words("2022-01-01t00:00:00z 2022-01-01T01:00:00+01:00 2021-12-31T24:00"), "2022-01-01 00:00"]
        given: Any
        for given in (*dates, self.NEW_YEAR.astimezone(timezone(timedelta(hours=5)))):
            with self.subTest(given):
                read = kf.parse_since(given)
                self.assertEqual(read, self.NEW_YEAR + timedelta(days=2 if given == "2022-W01-1" else 0))
                self.assertIsNotNone(read.utcoffset())

    def test_what_is_no_date_is_refused(self) -> None:
        dates = words("10 yesterday 02/03/2022 2022-02-30 2021-12-31T23:59:60Z 2022-01-01T00:00:00+24:00")
        for given in (*dates, *words("9999-12-31T24:00 \uff12022-01-01"), "", "\x1b[31m\n"):
            with self.subTest(given):
                text = f"{kf.plain(given)!r} is no ISO 8601 date or time, such as 2022-06-01: check --since"
                self.assertEqual(str(self.failure(kf.UsageError, kf.parse_since, given)), text)
        error = self.failure(kf.UsageError, kf.parse_since, datetime(2022, 1, 1))
        self.assertEqual(str(error), "the date is a datetime without a zone")

    def test_json_that_a_second_download_would_not_mend_is_a_kferror(self) -> None:
        too_much = ["[" * 100_000, '{"a":' * 100_000]
        too_much += ["1" * 5000] if hasattr(sys, "get_int_max_str_digits") else []
        for given, text in (
            *((name, f"the API sent {name}, which is no JSON") for name in ("NaN", "Infinity", "-Infinity")),
            *((value, "the API sent JSON nested too deep, or a number too long, to read") for value in too_much),
        ):
            whole = f'[{{"a": {given}}}]'.encode()
            for where, call in (
                ("loads", lambda given=given: kf.loads(given)),
                ("read_json", lambda whole=whole: kf.read_json([whole])),
                ("read_array", lambda whole=whole: list(kf.read_array([b"[{},", whole, b"]"]))),
            ):
                with self.subTest(given[:9], where=where):
                    self.assertEqual(str(self.failure(kf.KFError, call)), f"{text}; nothing was sent")

    def test_a_small_body_is_read_however_it_is_cut(self) -> None:
        for body in ('{"name": "é 电池"}', "\ufeff{}", " [1]\n"):
            pieces = [bytes([byte]) for byte in body.encode()]
            self.assertEqual(kf.read_json(pieces), json.loads(body.lstrip("\ufeff")))
        for pieces in ([b'"\xe9"'], [b'{"a"'], [], [b"<p>"]):  # these can be asked for again
            with self.subTest(pieces), self.assertRaises(ValueError):
                kf.read_json(pieces)
        error = self.failure(kf.KFError, kf.read_json, itertools.repeat(b" " * kf.PIECE))
        self.assertEqual(str(error), "the API sent site information of over 16777216 bytes; nothing was sent")

    def test_site_information_that_breaks_the_contract_is_refused(self) -> None:
        no_site, no_list = "the API sent no site with an id and a name", "the API sent a site without a list of devices"
        no_name, first = "device 2 has no id or no name", {"id": "b1", "name": "Battery 1"}
        no_sites: Sequence[Any] = ([SITE_INFO], None, {}, {"id": kf.SITE, "devices": []}, {**SITE_INFO, "id": 1})
        no_devices = (None, "b2", {"id": "b2"}, {"name": "b2"}, {"id": 2, "name": "b2"}, {"id": "b2", "name": None})
        two_names = {**SITE_INFO, "devices": [first, {**first, "name": "x"}]}
        for given, text in (
            *((given, no_site) for given in no_sites),
            *((given, no_list) for given in ({"id": kf.SITE, "name": ""}, {**SITE_INFO, "devices": {}})),
            *(({**SITE_INFO, "devices": [first, device]}, no_name) for device in no_devices),
            (two_names, "device 2 is listed twice with different names"),
            (site_info({}, "\x1b[2Jelse"), f"asked for {kf.SITE!r}, the API sent '?[2Jelse'"),
        ):
            with self.subTest(given):
                error = self.failure(kf.KFError, kf.read_site_info, given, kf.SITE)
                self.assertEqual(str(error), f"GET /site-info: {text}; nothing was sent")

    def test_devices_keep_their_order_and_may_be_repeated(self) -> None:
        devices: list[Any] = [{"id": "z", "name": "1"}, {"id": "a", "name": "1", "more": 1}, {"id": "z", "name": "1"}]
        self.assertEqual(list(kf.device_names(devices).items()), [("z", "1"), ("a", "1")])
        self.assertEqual(kf.device_names([]), {})
        self.assertEqual(kf.read_site_info(SITE_INFO, kf.SITE), SITE_INFO)

    def kept(self, outages: Sequence[Any], since: str | datetime = kf.SINCE) -> list[Any]:
        return list(self.client("http://localhost")._filter_outages(outages, SITE_INFO, since))

    def test_outage_beginning_at_since_is_kept(self) -> None:
        since: Any
        for since, (kept, begins) in itertools.product(
            ("2022-01-01", "2022-01-01T02:00:00+02:00", self.NEW_YEAR),
            (
                (1, "2022-01-01T00:00:00.000Z 2022-01-01T00:00:00.001Z 2022-01-01T01:00:00.000+01:00"),
                (1, "2021-12-31T19:00:00.000-05:00 2021-12-31T24:00:00Z 2022-01-01t00:00:00z"),
                (0, "2021-12-31T23:59:59.999Z 2021-12-31T23:59:59.999999Z 2021-12-31T23:59:59.999999999Z"),
                (0, "2022-01-01T00:59:59.999+01:00 2022-01-01T00:00:00.000+00:01 2021-12-31T18:59:59.999-05:00"),
            ),
        ):
            for begin in words(begins):
                with self.subTest(begin, since=since):
                    self.assertEqual(len(self.kept([outage("b1", begin)], since)), kept)

    def test_only_so_many_times_are_remembered_and_each_rightly(self) -> None:
        texts = [f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z" for second in range(3 * 3600)]
        self.assertGreater(len(texts), kf.INSTANTS_MAX)
        for number, text in enumerate((*texts, *texts)):
            self.assertEqual(kf.instants["2022-01-01T" + text], self.NEW_YEAR.timestamp() + number % len(texts))
            self.assertLessEqual(len(kf.instants), kf.INSTANTS_MAX)

    def test_only_begin_counts(self) -> None:
        self.assertEqual(self.kept([outage("b1", "2021-12-31T00:00:00Z", "2023-01-01T00:00:00Z")]), [])
        backwards = outage("b1", "2022-02-01T00:00:00Z", "2021-02-01T00:00:00Z")
        self.assertEqual(self.kept([backwards]), [{**backwards, "name": "Battery 1"}])

    def test_order_repeated_rows_unknown_fields_and_the_letters_of_times_are_kept(self) -> None:
        odd = outage("b2", "2022-12-01t01:00:00.5+01:00", "2022-12-02 00:00:00z")
        more = {"more": [{"é": None}], **outage("b1"), "1": 1.0}
        given = [odd, more, outage("elsewhere"), odd, {**outage("b1"), "name": "another"}]
        before = copy.deepcopy(given)
        kept = self.kept(given)
        self.assertEqual(kept, [{**row, "name": NAMES[row["id"]]} for row in given if row["id"] in NAMES])
        self.assertEqual(given, before)
        self.assertTrue(all(mine is not theirs for mine in kept for theirs in given))

    def test_an_outage_of_the_site_without_two_times_is_refused_naming_row_field_and_value(self) -> None:
        good = outage("b2", "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")  # looked at even if it began too early
        text = "GET /outages: the {1} of outage 2 is no RFC 3339 time; nothing was sent; it is {0}"
        for field in ("begin", "end"):
            values: Sequence[Any] = (None, 10, 1.5, True, [], {"a": 1}, *self.NO_TIMES)
            bad = [({**good, field: value}, repr(value)) for value in values]
            missing = {name: value for name, value in good.items() if name != field}
            for given, held in (*bad, (missing, "nothing")):
                with self.subTest(field, held=held):
                    error = self.failure(kf.KFError, self.kept, [outage("b1"), given])
                    self.assertEqual(str(error), text.format(kf.plain(held), field))
        for value in ("\x1b[2J\n" * 50, "9" * 100_000, ["\u202e"] * 1000):
            error = self.failure(kf.KFError, self.kept, [outage("b1", end=value)])
            self.assertTrue(str(error).isprintable() and len(str(error)) < 300, error)

    def test_what_is_wrong_inside_an_outage_of_another_site_is_ignored(self) -> None:
        strangers = [{"id": "x", "begin": None, "end": 10}, {"id": ""}, {"id": "y", "begin": "02/03/2022"}]
        self.assertEqual(self.kept([*strangers, outage("b1")]), [{**outage("b1"), "name": "Battery 1"}])

    def test_an_outage_without_a_string_id_is_refused(self) -> None:
        ids: Sequence[Any] = (None, 1, True, ["b1"], {})
        for given in (None, "b1", 1, [], ["id"], {}, {"ID": "b1"}, *({"id": id} for id in ids)):
            with self.subTest(given):
                error = self.failure(kf.KFError, self.kept, [outage("b1"), outage("x"), given])
                text = "GET /outages: outage 3 has no id that is a string; nothing was sent"
                self.assertEqual(str(error), text)


class ReadArrayTests(TestCase):
    """However the bytes are cut, `read_array` is to say what `json.loads` says of the whole."""

    BODIES = (
        *words(r'[] [{}] [{},{}] [{},1,{}] [1,-2.5e3,true,null] [[{}],{},[{}]] ["}",{},"},{"] [{"a":0.5},{"a":10}]'),
        *words(r'[{"a":"}"},{"b":"\"},{\""}] [{"\\":"\\"},{"a":"{\u007d\ud83d\udd0b"}] [{"a":"]}"},"}",{"b":"[{"}]'),
        *words(r'[[[{}]]] {"a":[{}]} {"a":{}} 1 "}" null true "[{}]"'),
        *('[{"a":1},{"b":[{}]} , {"c":{}}]', '\ufeff[{"é":"电池🔋"},{}]', '[{} ,\n{"a":[{},{}]}\t,\r\n{}]', " [ ] "),
    )
    NO_JSON = (
        *words("[ ] [} [{] {}} [{} [{}, [{},] [,] [,{}] [{},,{}] [{}{}] [{}.5] [{}1] [{}.5,{}] [{}]] [{}], [{}]x"),
        *words("[{}:{}] [{'a':1}] [{}x,{}] [{}],[{}] [{}]\ufeff [\ufeff{}] [{}}] [{},tru] [01] [{}/**/]"),
        *words('[NaN] [{"a":1}{"a":2}] [{},{]}] [{}[]] [{}""] <p>{}</p> [{}},{}] } ,[{}] [{"a"}] [{"a":}] [{}-1,{}]'),
        *words('[{}[NaN,{}] ,{"a":NaN}'),
        *("", " ", "[{} {}]", "[{}] {}", '[{"a":"\n"}]', "[{}] ]"),
    )

    def said(self, pieces: Iterable[bytes]) -> Any:
        """Return the elements, or whether the bytes were "broken" or "refused"."""
        try:
            return list(itertools.chain.from_iterable(kf.read_array(pieces)))
        except kf.KFError:
            return "refused"
        except ValueError:
            return "broken"

    def expected(self, body: bytes) -> Any:
        try:
            elements = json.loads(body.decode("utf-8-sig"), parse_constant=lambda name: 1 / 0)
        except ZeroDivisionError:
            return "refused"
        except ValueError:
            return "broken"
        return elements if isinstance(elements, list) else "refused"

    def check(self, body: bytes, *cuts: int) -> None:
        pieces = [body[begin:end] for begin, end in zip((0, *cuts), (*cuts, len(body)))]
        said, expected = self.said(pieces), self.expected(body)
        if said != expected or repr(said) != repr(expected):  # 1, 1.0 and True are equal
            self.fail(f"{pieces} gave {said}, not {expected}")

    def test_bodies_are_read_alike_however_they_are_cut(self) -> None:
        not_utf_8 = (b"\xff", b"\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\x94")
        bodies = [text.encode() for text in (*self.BODIES, *self.NO_JSON)]
        for body in (*bodies, *(b'[{"a":"%b"},{}]' % bad for bad in not_utf_8)):
            with self.subTest(body):
                self.check(body)
                self.check(body, *range(len(body)))
                for first, second in itertools.combinations_with_replacement(range(len(body) + 1), 2):
                    self.check(body, first, second)

    def test_a_body_that_stops_is_refused_wherever_it_stops(self) -> None:
        for text in self.BODIES:
            body = text.encode()
            with self.subTest(text):
                self.assertNotEqual(self.expected(body), "broken")
                for stop in range(len(body)):
                    for cut in range(stop + 1):
                        self.check(body[:stop], cut)
        for text in self.NO_JSON:
            self.assertIn(self.expected(text.encode()), ("broken", "refused"), text)

    def test_random_bodies_are_read_alike_however_they_are_cut(self) -> None:
        rnd = random.Random(7)

        def value(depth: int) -> Any:
            kind = rnd.randrange(7 if depth else 5)
            if kind > 4:
                values = [value(depth - 1) for _ in range(rnd.randrange(4))]
                return values if kind == 5 else {text(): item for item in values}
            return (text(), rnd.randrange(-999, 999), rnd.random() * 1e6, None, True)[kind]

        def text() -> str:
            return "".join(rnd.choice('ab é电🔋{}[],:"\\\n 1') for _ in range(rnd.randrange(5)))

        for _ in range(400):
            elements = [value(3) if rnd.random() < 0.2 else {text(): value(2)} for _ in range(rnd.randrange(6))]
            separators = rnd.choice((None, (",", ":"), (" ,\n ", "\t:")))
            body = json.dumps(elements, ensure_ascii=rnd.random() < 0.5, separators=separators).encode()
            if rnd.random() < 0.3:  # break it
                at = rnd.randrange(len(body))
                body = body[:at] + bytes(rnd.choice(b'{}[],:"\\ 1x') for _ in range(rnd.randrange(2))) + body[at + 1 :]
            for count in (0, 1, 2, 3, 8, 30):
                self.check(body, *sorted(rnd.randrange(len(body) + 1) for _ in range(count)))

    def test_elements_come_while_the_rest_is_still_to_come(self) -> None:
        came: list[str] = []

        def pieces() -> Iterator[bytes]:
            for before in (b"[", b",", b","):
                came.append("piece")
                yield before + dumps({"a": "x" * 100_000})
            yield b"]"

        for elements in kf.read_array(pieces()):
            came.extend("element" for _ in elements)
        self.assertEqual(came, ["piece", "element"] * 3)

    def test_an_element_that_never_ends_does_not_fill_the_memory(self) -> None:
        text = "the API sent outages that cannot be told apart for 1048576 characters; nothing was sent"
        for case, start, rest in (
            ("a string", b'[{"id": "', b"a"),
            ("a string of braces", b'[{"id": "', b"}"),
            ("white space", b"[", b" "),
            ("digits", b'[{"id": 1', b"1"),
            ("a list in it", b'[{"id": [', b'"",'),
            ("objects in it", b'[{"id": [', b"{},"),
        ):
            with self.subTest(case):
                pieces = itertools.chain([start], itertools.repeat(rest * kf.PIECE))
                self.assertEqual(str(self.failure(kf.KFError, list, kf.read_array(pieces))), text)


def broken(good: Any) -> dict[str, Reply]:
    """Return the ways in which an answer of `good` can break off or be garbled."""
    body, start = dumps(good), answer(json=good)[:-3]
    zipped, in_gzip = gzip.compress(body), {"Content-Encoding": "gzip"}
    in_chunks = answer(headers={**NO_LENGTH, "Transfer-Encoding": "chunked"}, body=b"")
    return {
        "no answer": then_close(b""),
        "reset": then_reset(b""),
        "silence": then_stall(b""),
        "garbage": then_close(b"\x16\x03\x01\x02garbage\r\n\r\n"),
        "status cut": then_close(b"HTTP/1.1 2"),
        "headers cut": then_close(b"HTTP/1.1 200 OK\r\nContent-Le"),
        "headers without end": then_drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 99, 0),
        "a header without end": then_drip(b"HTTP/1.1 200 OK\r\nA: ", b"b" * kf.PIECE, 0),
        "shorter than Content-Length": then_close(start),
        "reset in the body": then_reset(start),
        "silence in the body": then_stall(start),
        "no length and the JSON stops": then_close(answer(body=body[:-1], headers=NO_LENGTH)),
        "chunked without its end": then_close(in_chunks + chunk(body)),
        "cut in a chunk": then_close(in_chunks + chunk(body)[:-9]),
        "a chunk of no length": then_close(in_chunks + chunk(body) + b"xyz\r\n"),
        "gzip cut": answer(body=zipped[: len(zipped) // 2], headers=in_gzip),
        "gzip corrupt": answer(body=zipped[:40] + b"\xff" * 9 + zipped[49:], headers=in_gzip),
        "no gzip": answer(body=body, headers=in_gzip),
        "HTML": answer(body=b"<!DOCTYPE html>", headers={"Content-Type": "text/html"}),
        "empty": answer(body=b""),
        "not UTF-8": answer(body=body[:-2] + b'"\xe9"]'),
        "garbage behind it": answer(body=body + b"]"),
        "two of them": answer(body=body * 2),
    }


class ClientTests(TestCase):
    STATUSES = (429, 500, 502, 503, 504)

    def retry(self, **options: Any) -> Retry:
        adapter = self.client(kf.BASE_URL, **options).session.get_adapter(kf.BASE_URL)
        assert isinstance(adapter, HTTPAdapter)
        return adapter.max_retries

    def test_the_four_steps(self) -> None:
        api = self.api()
        client = self.client(api.url + "/")
        self.assertEqual(client.handler(), DUE)
        self.assertEqual((api.lines, api.posted), ([INFO, OUTAGES, POST], [DUE]))
        self.assertEqual((client.sent, client.site_info, client.outages_read), (True, SITE_INFO, 4))
        self.assertEqual(self.warned, [])

    def test_site_and_date_may_be_given_by_position_or_name(self) -> None:
        api = self.api()
        client = self.client(api.url)
        date = datetime(2022, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
        self.assertEqual(client.handler(kf.SITE, date), DUE)
        self.assertEqual(client.handler(kf.SITE, "2022-01-02"), DUE[:1])
        self.assertEqual(client.handler(site=kf.SITE, date="2022-04-01"), [])
        self.assertEqual(api.posted, [DUE, DUE[:1], []])

    def test_an_empty_list_is_posted_too(self) -> None:
        for case, outages in (("no outages", []), ("none of the site", [outage("x")]), ("none since", [ALL[2]])):
            with self.subTest(case):
                api = self.api(outages=[answer(json=outages)])
                self.assertEqual(self.handle(api), [])
                self.assertEqual((api.requests[-1].line, api.requests[-1].body), (POST, b"[]"))

    def test_the_headers_of_each_request(self) -> None:
        api = self.api(post=[answer(503)])
        self.handle(api)
        for request in api.requests:
            with self.subTest(request.line):
                self.assertEqual(request.headers.get_all("x-api-key"), [KEY])
                self.assertEqual(request.headers.get_all("User-Agent"), [f"kf_backend/{kf.__version__}"])
                self.assertIsNone(request.headers["Authorization"])
                posts = request.line == POST
                self.assertEqual(request.headers["Content-Type"], "application/json" if posts else None)
                self.assertEqual(request.headers["Content-Length"], str(len(request.body)) if posts else None)
        self.assertEqual(api.posted, [DUE, DUE])

    def test_http_and_https_meet_a_retry_of_429_and_500_for_post_too(self) -> None:
        session = self.client(kf.BASE_URL).session
        self.assertIs(type(session), Session)
        for url in (kf.BASE_URL, "https://elsewhere", "http://127.0.0.1:80"):
            adapter = session.get_adapter(url)
            assert isinstance(adapter, HTTPAdapter)
            self.assertEqual(adapter.max_retries.total, 5)
            for method, status in itertools.product(("GET", "POST"), self.STATUSES):
                self.assertTrue(adapter.max_retries.is_retry(method, status), (url, method, status))
            for status in (200, 400, 403, 404, 413, *REDIRECTS):
                self.assertFalse(adapter.max_retries.is_retry("GET", status, has_retry_after=True), status)

    def test_a_site_reaches_the_api_as_one_segment(self) -> None:
        for site, segment in (
            *(("a/b", "a%2Fb"), ("a?b", "a%3Fb"), ("a#b", "a%23b"), ("../outages", "..%2Foutages")),
            *(("%2e%2e", "%252e%252e"), ("a b", "a%20b"), ("é", "%C3%A9"), ("...", "...")),
        ):
            with self.subTest(site):
                api = self.api()
                info, post = f"GET /site-info/{segment}", f"POST /site-outages/{segment}"
                api.healthy.update({info: answer(json=site_info(NAMES, site)), post: answer(json={})})
                self.client(api.url).handler(site)
                self.assertEqual(api.lines, [info, OUTAGES, post])

    def test_a_wrong_argument_makes_no_request(self) -> None:
        api = self.api()
        dates: list[Any] = ["", "yesterday", datetime(2022, 1, 1)]
        for args in (*((site,) for site in ("", ".", "..", "\ud800")), *((kf.SITE, date) for date in dates)):
            with self.subTest(ascii(args)):
                self.failure(kf.UsageError, self.client(api.url).handler, *args)
        self.assertEqual(api.connections, 0)

    def test_a_dry_run_does_all_but_the_post(self) -> None:
        api = self.api()
        client = self.client(api.url, dry_run=True)
        self.assertEqual(client.handler(), DUE)
        self.assertEqual((api.lines, client.sent), ([INFO, OUTAGES], False))

    def test_answers_in_other_guises_are_read(self) -> None:
        body, zipped = dumps(ALL), {"Content-Encoding": "GZip"}
        chunks = [chunk(body[at : at + 7]) for at in range(0, len(body), 7)] + [chunk(b"")]
        for case, reply in (
            ("a byte order mark", answer(body=b"\xef\xbb\xbf" + body)),
            ("UTF-8 as text/plain", answer(body=body, headers={"Content-Type": "text/plain"})),
            ("another charset is named", answer(body=body, headers={"Content-Type": "text/plain; charset=latin-1"})),
            ("gzip", answer(body=gzip.compress(body), headers=zipped)),
            ("gzip in two members", answer(body=gzip.compress(body[:99]) + gzip.compress(body[99:]), headers=zipped)),
            ("identity", answer(body=body, headers={"Content-Encoding": "identity"})),
            ("without a length", then_close(answer(body=body, headers=NO_LENGTH))),
            ("chunked", answer(headers={**NO_LENGTH, "Transfer-Encoding": "chunked"}, body=b"") + b"".join(chunks)),
        ):
            with self.subTest(case):
                api = self.api(outages=[reply])
                self.assertEqual(self.handle(api), DUE)
                self.assertEqual((api.lines, api.posted), ([INFO, OUTAGES, POST], [DUE]))
        info = answer(body=b"\xef\xbb\xbf" + dumps(SITE_INFO), headers={"Content-Type": "text/plain"})
        self.assertEqual(self.handle(self.api(info=[info])), DUE)

    def test_the_post_has_a_connection_of_its_own(self) -> None:
        """The server may have closed the one before while the client was still filtering."""
        for script in ({}, {"outages": [then_close(answer(json=ALL))]}, {"info": [then_close(answer(json=SITE_INFO))]}):
            with self.subTest(list(script)):
                api = self.api(**script)
                self.assertEqual(self.handle(api), DUE)
                self.assertEqual([request.nth for request in api.requests if request.line == POST], [1])

    def test_what_comes_behind_a_200_does_not_matter_to_the_post(self) -> None:
        for case, reply in (
            ("no body", answer(body=b"")),
            ("no JSON", answer(body=b"<p>")),
            ("cut", then_close(answer(json={})[:-1])),
            ("reset", then_reset(answer(json={})[:-1])),
            ("silence", then_stall(answer(json={})[:-1])),
            ("endless", then_drip(answer(headers=NO_LENGTH, body=b""), b"x" * kf.PIECE, 0)),
            ("in an encoding not asked for", answer(json={}, headers={"Content-Encoding": "br"})),
            ("corrupt gzip", answer(json={}, headers={"Content-Encoding": "gzip"})),
        ):
            with self.subTest(case):
                api = self.api(post=[reply])
                client = self.client(api.url, timeout=0.2 if case == "silence" else 10)
                self.assertEqual(client.handler(), DUE)
                self.assertEqual((client.sent, api.lines), (True, [INFO, OUTAGES, POST]))

    def test_progress_is_told_as_the_outages_come(self) -> None:
        rows = [outage("b1" if row % 10 == 0 else "x") for row in range(5000)]
        api = self.api(outages=[answer(json=rows)])
        told: list[tuple[int, int | None, int]] = []
        kept: list[int] = []

        def on_progress(client: kf.KFClient) -> None:
            told.append((client.received, client.expected, client.outages_read))
            kept.append(len(client.site_outages))

        self.assertEqual(len(self.handle(api, on_progress=on_progress)), 500)
        size = len(dumps(rows))
        self.assertGreater(len(told), 2)
        self.assertEqual(told, sorted(told))
        self.assertEqual({expected for _, expected, _ in told}, {size})
        self.assertEqual(told[-1], (size, size, 5000))
        self.assertEqual(kept, [-(-outages_read // 10) for _, _, outages_read in told])

    def test_with_closes_the_session(self) -> None:
        client = kf.KFClient(kf.BASE_URL, KEY)
        with mock.patch.object(client.session, "close", wraps=client.session.close) as close:
            with client as entered:
                self.assertIs(entered, client)
                close.assert_not_called()
            close.assert_called_once_with()

    def test_the_key_shows_nowhere(self) -> None:
        """`failure` looks for it in each error and its traceback, and `tearDown` in the log."""
        self.assertNotIn(KEY, repr(self.client(kf.BASE_URL)))
        api = self.api(info=[answer(403, {"message": f"no {KEY}\x1b[31m for\nyou"})])
        error = self.failure(kf.KFError, self.handle, api)
        self.assertEqual((error.status, error.message), (403, "no [key]?[31m for you"))
        said = "answered 403, 'no [key]?[31m for you'; nothing was sent: check KF_API_KEY"
        self.assertEqual(str(error), f"GET {api.url}/site-info/{kf.SITE}: {said}")
        for case, script in (
            ("a time", {"outages": [answer(json=[outage("b1", end=KEY)])]}),
            ("another site", {"info": [answer(json=site_info({}, KEY))]}),
            ("a Location", {"info": [answer(302, {}, {"Location": f"https://h/{KEY}"})]}),
            ("a Retry-After", {"info": [answer(429, {}, {"Retry-After": KEY})] * 6}),
            ("an encoding", {"info": [answer(200, {}, {"Content-Encoding": KEY})]}),
        ):
            with self.subTest(case):
                self.failure(kf.KFError, self.handle, self.api(**script))

    def test_a_request_that_was_refused_is_made_again(self) -> None:
        for status in self.STATUSES:
            with self.subTest(status):
                refused = [answer(status, {"message": "no"}, {})] * 5
                api = self.api(info=refused, outages=refused, post=refused)  # each has tries of its own
                self.assertEqual(self.handle(api), DUE)
                self.assertEqual(api.lines, [INFO] * 6 + [OUTAGES] * 6 + [POST] * 6)
                self.assertEqual(api.posted, [DUE] * 6)
                tries = [f"{line}: answered {status}; try {n} of 6 in N s" for _, line in REQUESTS for n in range(2, 7)]
                self.assertEqual(self.warned[-15:], tries)

    def test_the_sixth_refusal_ends_the_run_in_the_words_of_the_api(self) -> None:
        for status, (name, line) in itertools.product(self.STATUSES, REQUESTS):
            with self.subTest(status, line=line):
                api = self.api(**{name: [answer(status, {"message": "too busy"})] * 6})
                client = self.client(api.url)
                error = self.failure(kf.KFError, client.handler)
                outcome = "the list was not accepted" if line == POST else "nothing was sent"
                text = f"answered {status}, 'too busy'; {outcome}: run it again"
                self.assertTrue(str(error).startswith(f"{line.replace(' ', f' {api.url}')}: {text}"), error)
                self.assertEqual((error.status, error.message, client.sent), (status, "too busy", False))
                self.assertEqual((api.lines.count(line), len(api.posted)), (6, 6 if line == POST else 0))

    def test_other_statuses_end_the_run_at_once(self) -> None:
        hints = {400: "the API does not take the list as it is", 403: "check KF_API_KEY"}
        hints[404] = "check --site and --base-url"
        hints[201] = hints[202] = hints[204] = kf.HINTS[299]
        hints[304] = "redirects are not followed, check --base-url"
        for status in (201, 202, 204, 304, 400, 401, 403, 404, 405, 410, 413, 418, 501, 599):
            for name, line in REQUESTS:
                with self.subTest(status, line=line):
                    api = self.api(**{name: [answer(status, {"message": "no"})]})
                    error = self.failure(kf.KFError, self.handle, api)
                    self.assertEqual((error.status, api.lines.count(line)), (status, 1))
                    self.assertIn(f": answered {status}", str(error))
                    self.assertRegex(str(error), f"; .*: {hints.get(status, 'run it again later')}$")

    def test_the_message_of_an_error_is_a_line(self) -> None:
        zipped = answer(404, body=gzip.compress(b'{"message": "no"}'), headers={"Content-Encoding": "gzip"})
        no_words = (b"", b"<p>no</p>", b"[]", b"null", b"{}", b"\xff", b"[" * 10**5, b'{"message": ["a"]}')
        for message, reply in (
            ("Site not found", answer(404, {"message": "Site not found"})),
            ("a ?[31m?b?", answer(404, {"message": "a\r\n\x1b[31m\u202eb\x00"})),
            ("x" * 200, answer(404, {"message": "x" * 100_000})),
            ("é", answer(404, body=b"\xef\xbb\xbf" + dumps({"message": "é"}))),
            ("no", zipped),
            ("no", then_close(answer(404, {"message": "no"}, NO_LENGTH))),
            *((None, answer(404, body=body)) for body in no_words),
        ):
            with self.subTest(message):
                gc.collect()  # Python 3.8 aborts where a finalizer runs at the very depth at which it gives up
                error = self.failure(kf.KFError, self.handle, self.api(info=[reply]))
                self.assertEqual((error.status, error.message), (404, message))
                self.assertTrue(str(error).isprintable() and len(str(error)) < 400)

    def test_a_refusal_with_a_broken_body_is_a_refusal_still(self) -> None:
        for status in (403, 503):
            head = answer(status, headers={**AGAIN, "Content-Length": "99"}, body=b'{"mess')
            for how, reply in (
                ("cut", then_close(head)),
                ("reset", then_reset(head)),
                ("silence", then_stall(head)),
                ("endless", then_drip(answer(status, headers=NO_LENGTH, body=b""), b" " * kf.PIECE, 0)),
                ("corrupt", answer(status, {}, headers={"Content-Encoding": "gzip"})),
                ("in an encoding not asked for", answer(status, {}, headers={"Content-Encoding": "br"})),
            ):
                with self.subTest(status, how=how):
                    api = self.api(post=[reply])
                    client = self.client(api.url, timeout=0.15 if how == "silence" else 10)
                    if status == 503:
                        self.assertEqual((client.handler(), api.posted), (DUE, [DUE, DUE]))
                    else:
                        error = self.failure(kf.KFError, client.handler)
                        self.assertEqual((error.status, error.message, api.posted), (403, None, [DUE]))

    def test_redirects_are_never_followed(self) -> None:
        elsewhere = self.api()
        for status, (count, (name, line)) in itertools.product(REDIRECTS, enumerate(REQUESTS, 1)):
            for location in (elsewhere.url + line.split()[1], None):
                with self.subTest(status, line=line, location=location):
                    api = self.api(**{name: [answer(status, {}, {"Location": location, **AGAIN})]})
                    error = self.failure(kf.KFError, self.handle, api)
                    self.assertEqual((error.status, len(api.lines)), (status, count))
                    self.assertRegex(str(error), ": redirects are not followed, check --base-url$")
        self.assertEqual(elsewhere.connections, 0)

    def test_retry_after_is_obeyed_or_ignored(self) -> None:
        for given, expected in (
            *(("0", 0), ("7", 7), ("30", 30), (" 30 ", 30), ("061", 61), ("Sat, 01 Jan 2022 00:00:00 GMT", 0)),
            *((given, None) for given in words("-5 1.5 1e3 soon NaN 5s \u0665 2022-01-01")),
            *((given, None) for given in ("", " ", "5 s", "Sat, 99 Foo 2022", "Sat, 01 Jan 99999 00:00:00 GMT")),
        ):
            with self.subTest(given):
                self.assertEqual(self.retry().get_retry_after(HTTPResponse(headers={"Retry-After": given})), expected)
                if not expected:
                    api = self.api(outages=[answer(503, {}, {"Retry-After": given})])
                    self.assertEqual(self.handle(api), DUE)
        soon = HTTPResponse(headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)})
        wait = self.retry().get_retry_after(soon)
        self.assertTrue(wait and 20 < wait <= 30, wait)

    def test_a_retry_after_of_over_a_minute_ends_the_run_and_is_named(self) -> None:
        dates = ("Fri, 31 Dec 9999 23:59:59 GMT", formatdate(time.time() + 300, usegmt=True))
        for given, (name, line) in itertools.product(("61", "86400", "1" + "0" * 20, *dates), REQUESTS):
            with self.subTest(given, line=line):
                api = self.api(**{name: [answer(429, {"message": "no"}, {"Retry-After": given})]})
                error = self.failure(kf.KFError, self.handle, api)
                hint = f": run it again after the wait that it asks for, Retry-After: {given}"
                self.assertTrue(str(error).endswith(hint), error)
                self.assertEqual((error.status, error.message, api.lines.count(line)), (429, "no", 1))

    def test_waits_grow_with_jitter_to_half_a_minute_in_all(self) -> None:
        totals = set()
        for _ in range(50):
            retry, total = self.retry(backoff=kf.BACKOFF), 0.0
            for longest in (1, 2, 4, 8, 15):
                retry = retry.increment("GET", "/", error=ProtocolError("cut"))
                wait = retry.get_backoff_time()
                self.assertTrue(longest / 2 <= wait <= longest, (longest, wait))
                total += wait
            totals.add(total)
            with self.assertRaises(MaxRetryError):
                retry.increment("GET", "/", error=ProtocolError("cut"))
        self.assertLessEqual(max(totals), 30)
        self.assertGreater(len(totals), 10)

    def test_a_get_that_breaks_off_is_made_again_and_nothing_of_it_used(self) -> None:
        for case, reply in broken(GHOST).items():
            with self.subTest(case, line=OUTAGES):
                api = self.api(outages=[reply])
                client = self.client(api.url, timeout=0.15 if "silence" in case else 10)
                self.assertEqual(client.handler(), DUE)
                self.assertEqual((api.lines, api.posted), ([INFO, OUTAGES, OUTAGES, POST], [DUE]))
                self.assertEqual((client.outages_read, client.site_outages), (4, DUE))
                self.assertRegex(self.warned.pop(), "^GET /outages: .+; try 2 of 6 in N s$")
        for case, reply in broken(site_info({**NAMES, "x": "ghost"})).items():
            with self.subTest(case, line=INFO):
                api = self.api(info=[reply])
                self.assertEqual(self.handle(api, timeout=0.15 if "silence" in case else 10), DUE)
                self.assertEqual(api.lines, [INFO, INFO, OUTAGES, POST])

    def test_a_get_that_breaks_off_six_times_ends_the_run(self) -> None:
        texts = {"reset": "Connection reset by peer", "cut in a chunk": "the answer broke off: .+, 6 times"}
        texts["HTML"] = r"the answer is cut short or no JSON: Expecting value: line 1 column 1 \(char 0\), 6 times"
        for (name, line), body in zip(REQUESTS, (SITE_INFO, GHOST)):
            for case, reply in broken(body).items():
                if line == INFO and "silence" in case:  # takes its time
                    continue
                with self.subTest(case, line=line):
                    api = self.api(**{name: itertools.repeat(reply)})
                    client = self.client(api.url, timeout=0.04 if "silence" in case else 10)
                    error = self.failure(kf.KFError, client.handler)
                    where, text = re.escape(line.replace(" ", f" {api.url}")), texts.get(case, ".+")
                    self.assertRegex(
                        str(error), f"^{where}: {text}; nothing was sent: ({kf.RUN_AGAIN}|{kf.NO_ANSWER})$"
                    )
                    self.assertEqual((api.lines.count(line), api.posted, client.sent), (6, [], False))

    def test_broken_bodies_and_refusals_share_one_budget(self) -> None:
        cut, refused, reset = then_close(answer(json=GHOST)[:-1]), answer(500, {"message": "no"}), then_reset(b"")
        api = self.api(outages=[refused, cut, refused, cut, reset])
        self.assertEqual(self.handle(api), DUE)
        self.assertEqual(api.lines.count(OUTAGES), 6)
        self.assertEqual([int(line.split()[-6]) for line in self.warned], [2, 3, 4, 5, 6])
        for last, text in ((refused, "answered 500, 'no'"), (cut, "broke off"), (reset, "reset")):
            api = self.api(outages=[refused, cut, refused, cut, reset, last])
            self.assertIn(text, str(self.failure(kf.KFError, self.handle, api)))
            self.assertEqual(api.lines, [INFO] + [OUTAGES] * 6)
        api = self.api(outages=[cut, answer(429, {}, {"Retry-After": "99"})])
        self.assertIn("Retry-After: 99", str(self.failure(kf.KFError, self.handle, api)))

    def test_bodies_that_a_second_download_would_not_mend_are_refused_at_once(self) -> None:
        too_long = [("outages", b'[{"id": %b}]' % (b"1" * 5000), "the API sent JSON nested too deep, or")]
        for name, body, text in (
            ("outages", dumps({"outages": ALL}), "GET /outages: the API sent something other than a list; "),
            ("outages", b"null", "GET /outages: the API sent something other than a list; "),
            ("outages", b'[{"id": "x", "more": NaN}]', "the API sent NaN, which is no JSON; nothing was sent"),
            ("outages", b'[{"id":' * 100_000, "the API sent JSON nested too deep, or"),
            ("outages", b'[{"id": "b1"}]', "GET /outages: the begin of outage 1 is no RFC 3339 time; "),
            *(too_long if hasattr(sys, "get_int_max_str_digits") else ()),
            ("info", b"null", "GET /site-info: the API sent no site with an id and a name; "),
            ("info", dumps(SITE_INFO)[:-1] + b', "more": NaN}', "the API sent NaN, which is no JSON; nothing was sent"),
            ("info", b"[" * 100_000, "the API sent JSON nested too deep, or"),
            (
                "outages",
                dumps(ALL)[:-2] + b', "more": 1e999}]',
                "GET /outages: an outage of the site holds what is no ",
            ),
        ):
            with self.subTest(body[:20], name=name):
                api = self.api(**{name: [answer(body=body)]})
                gc.collect()  # Python 3.8 aborts where a finalizer runs at the very depth at which it gives up
                error = self.failure(kf.KFError, self.handle, api)
                self.assertTrue(str(error).startswith(text) and "; nothing was sent" in str(error), error)
                self.assertEqual(api.lines, [INFO, OUTAGES][: 1 + (name == "outages")])
        for encoding in ("br", "zstd", "deflate", "gzip, gzip", "identity, gzip"):
            with self.subTest(encoding):
                api = self.api(outages=[answer(json=ALL, headers={"Content-Encoding": encoding})])
                error = self.failure(kf.KFError, self.handle, api)
                text = f"{api.url}/outages: the Content-Encoding {encoding} was not asked for; nothing was sent"
                self.assertEqual((str(error), api.lines), (text, [INFO, OUTAGES]))

    def traced(self, call: Callable[..., Any], *args: Any) -> int:
        """Return the most bytes that were in use at a time during a call."""
        tracemalloc.start()
        try:
            call(*args)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_no_body_fills_the_memory(self) -> None:
        member, zipped = gzip.compress(b" " * 2**24), {"Content-Encoding": "gzip"}  # 16 MiB, and there may be many
        for case, reply in (
            ("space", answer(200, body=gzip.compress(b"[") + member * 32, headers=zipped)),
            ("a text", answer(200, body=gzip.compress(b'[{"id": "') + member * 32, headers=zipped)),
            ("a refusal", answer(403, body=gzip.compress(b'{"message": "') + member * 32, headers=zipped)),
            ("endless", then_drip(answer(headers=NO_LENGTH, body=b'[{"id": "'), b"x" * kf.PIECE, 0)),
        ):
            for name in ("info", "outages"):
                with self.subTest(case, name=name):
                    api = self.api(**{name: [reply]})
                    self.assertLess(self.traced(self.failure, kf.KFError, self.handle, api), 80 * 2**20)
                    self.assertEqual(api.lines, [INFO, OUTAGES][: 1 + (name == "outages")])

    def test_outages_of_other_sites_are_not_held(self) -> None:
        rows = b",".join([dumps(outage("x"))] * 1000)

        def reply(sock: socket.socket) -> None:
            sock.sendall(answer(headers=NO_LENGTH, body=b"[") + rows)
            for _ in range(49):
                sock.sendall(b"," + rows)
            sock.sendall(b"]")

        self.assertLess(self.traced(self.handle, self.api(outages=[reply])), len(rows) * 25)

    def test_a_post_without_an_answer_is_never_sent_twice(self) -> None:
        early = answer(103, headers=NO_LENGTH, body=b"")
        for case, reply in (
            ("closed", then_close(b"")),
            ("reset", then_reset(b"")),
            ("silence", then_stall(b"")),
            ("garbage", then_close(b"garbage\r\n\r\n")),
            ("no HTTP", then_close(b"\x00\xff" * 99)),
            ("status cut", then_close(b"HTTP/1.1 20")),
            ("no status", then_close(b"HTTP/1.1 abc Huh\r\n\r\n")),
            ("headers without end", then_drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 99, 0)),
            ("a status without end", then_drip(b"HTTP/1.1 200 ", b"x" * kf.PIECE, 0)),
            ("early hints and silence", then_stall(early)),
            ("switching protocols", then_close(early.replace(b"103", b"101"))),
        ):
            for refused in (0, 2):
                with self.subTest(case, refused=refused):
                    api = self.api(post=[answer(503)] * refused + [reply])
                    client = self.client(api.url, timeout=0.15 if "silence" in case else 10)
                    error = self.failure(kf.OutcomeUnknown, client.handler)
                    self.assertRegex(str(error), f"^POST {api.url}/site-outages/{kf.SITE}: .+; {UNKNOWN}$")
                    self.assertEqual((api.lines, client.sent), ([INFO, OUTAGES] + [POST] * (refused + 1), None))
        self.assertEqual(self.failure(kf.KFError, self.handle, self.api(outages=[then_close(early)])).status, 103)

    def test_a_slow_uplink_is_not_silence(self) -> None:
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else loopback takes the whole at once
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)

        def read_slowly() -> None:
            sock, _ = listener.accept()
            received = b""
            with sock:
                while not received.endswith(b"}]"):
                    piece = sock.recv(4096)
                    if not piece:
                        return
                    received += piece
                    time.sleep(0.025)
                sock.sendall(answer(json={}))

        thread = threading.Thread(target=read_slowly)
        thread.start()
        self.addCleanup(thread.join)
        client = self.client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.6)
        client._adapter.poolmanager.connection_pool_kw["socket_options"] = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)]
        start = time.monotonic()
        rows: list[Any] = DUE * 1000
        client._post_site_outages(kf.SITE, rows)
        self.assertGreater(time.monotonic() - start, 2 * client.timeout)
        self.assertTrue(client.sent)

    def test_a_request_that_found_no_connection_was_not_sent(self) -> None:
        client = self.client(self.api(listening=False).url)
        for call, line, outcome in (
            (client.handler, INFO, "nothing was sent"),
            (lambda: client._post_site_outages(kf.SITE, []), POST, "the list was not accepted"),
        ):
            with self.subTest(line):
                text = f"{line.replace(' ', f' {client.base_url}')}: Connection refused; {outcome}: {kf.NO_ANSWER}"
                self.assertEqual(str(self.failure(kf.KFError, call)), text)
                self.assertIs(client.sent, False)
                tries = [f"{line}: Connection refused; try {number} of 6 in N s" for number in range(2, 7)]
                self.assertEqual(self.warned[-5:], tries)

    def test_a_connection_that_was_refused_at_first_is_made(self) -> None:
        for call, line in ((kf.KFClient.handler, INFO), (lambda client: client._post_site_outages(kf.SITE, DUE), POST)):
            with self.subTest(line):
                api = self.api(listening=False)
                client = self.client(api.url, backoff=0.01)

                def listen(record: logging.LogRecord, api: API = api) -> None:
                    if not api.thread.ident:
                        api.listen()

                at_first_warning = Listener(listen, logging.WARNING)
                logging.getLogger("kf_backend").addHandler(at_first_warning)
                self.opened.callback(logging.getLogger("kf_backend").removeHandler, at_first_warning)
                self.assertEqual(call(client), DUE)
                self.assertEqual((api.lines.count(line), api.posted), (1, [DUE]))

    def test_whatever_the_weather_a_list_is_accepted_once_or_the_error_is_true(self) -> None:
        rnd, api = random.Random(11), self.api()
        whole = {line: api.healthy[line] for _, line in REQUESTS}
        accepted: list[bool | None] = []
        seen = {"sent": 0, "KFError": 0, "OutcomeUnknown": 0}

        def weather(line: str) -> Iterator[Reply]:
            while True:
                kind = rnd.choices(("200", "429", "500", "503", "reset", "cut", "slow"), (3, 1, 2, 1, 1, 1, 1))[0]
                if line == POST:
                    accepted.append(None if kind == "reset" else kind in ("200", "cut", "slow"))
                if kind == "reset":
                    yield then_reset(b"")
                elif kind == "cut":
                    yield then_close(whole[line][:-1])
                elif kind == "slow":
                    yield slowly(whole[line])
                else:
                    yield whole[line] if kind == "200" else answer(int(kind), {"message": "no"}, {})

        def slowly(said: bytes) -> Reply:
            def reply(sock: socket.socket) -> None:
                for at in range(0, len(said), 99):
                    sock.sendall(said[at : at + 99])

            return reply

        for _ in range(60):
            accepted.clear()
            api.requests.clear()
            api.script = {line: weather(line) for line in whole}
            try:
                self.assertEqual(self.handle(api), DUE)
                outcome = "sent"
            except kf.KFError as error:
                outcome = type(error).__name__
            seen[outcome] += 1
            self.assertEqual(accepted.count(True), outcome == "sent")
            self.assertEqual(accepted.count(None), outcome == "OutcomeUnknown")
            self.assertEqual(api.posted, [DUE] * len(accepted))
        self.assertTrue(all(seen.values()), seen)

    def test_https_is_spoken_where_the_certificate_is_trusted(self) -> None:
        tls, file = self.tls()
        api = self.api(tls=tls, post=[answer(500)])
        with self.subTest("trusted"), mock.patch.dict(os.environ, REQUESTS_CA_BUNDLE=file):
            self.assertEqual(self.handle(api), DUE)
            self.assertEqual(api.posted, [DUE, DUE])
        api = self.api(tls=tls)
        with self.subTest("untrusted"):
            self.assertIn("certificate verify failed", str(self.failure(kf.KFError, self.handle, api)))
            self.assertEqual((api.connections, api.requests), (1, []))
        with self.subTest("no such file"), mock.patch.dict(os.environ, REQUESTS_CA_BUNDLE="/nowhere/ca.pem"):
            self.assertIn("/nowhere/ca.pem", str(self.failure(kf.KFError, self.handle, api)))

    def test_a_corrupt_tls_record_never_makes_a_post_go_out_twice(self) -> None:
        def corrupt(sock: socket.socket) -> None:
            os.write(sock.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            sock.settimeout(0.2)
            sock.recv(1)

        tls, os.environ["REQUESTS_CA_BUNDLE"] = self.tls()
        api = self.api(tls=tls, post=[corrupt])
        self.failure(kf.OutcomeUnknown, self.handle, api)
        self.assertEqual(api.lines, [INFO, OUTAGES, POST])

    def test_a_netrc_never_adds_credentials(self) -> None:
        tls, os.environ["REQUESTS_CA_BUNDLE"] = self.tls()
        with tempfile.TemporaryDirectory() as home:
            Path(home, ".netrc").write_text("default login user password word\n")
            Path(home, ".netrc").chmod(0o600)
            os.environ.update(HOME=home, NETRC=str(Path(home, ".netrc")))
            for api in (self.api(), self.api(tls=tls)):
                self.assertEqual(self.handle(api), DUE)
                for request in api.requests:
                    self.assertEqual((request.headers["Authorization"], request.headers["x-api-key"]), (None, KEY))

    def test_plain_http_to_this_machine_never_goes_through_a_proxy(self) -> None:
        proxy, api = self.api(), self.api()
        os.environ.update(dict.fromkeys(words("HTTP_PROXY http_proxy ALL_PROXY all_proxy HTTPS_PROXY"), proxy.url))
        self.assertEqual(self.handle(api), DUE)
        self.assertEqual(proxy.connections, 0)

    def test_a_proxy_for_https_is_obeyed_and_does_not_see_the_key(self) -> None:
        tls, os.environ["REQUESTS_CA_BUNDLE"] = self.tls()
        api, proxy = self.api(tls=tls), self.api()
        connect = f"CONNECT {api.address}"

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                for piece in iter(lambda: source.recv(65536), b""):
                    sink.sendall(piece)
                sink.shutdown(socket.SHUT_WR)

        def tunnel(sock: socket.socket) -> None:
            sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with socket.create_connection(("127.0.0.1", api.server_address[1])) as onward:
                back = threading.Thread(target=pump, args=(onward, sock))
                back.start()
                pump(sock, onward)
                back.join()

        proxy.script[connect] = itertools.repeat(tunnel)
        os.environ["HTTPS_PROXY"] = proxy.url
        self.assertEqual(self.handle(api), DUE)
        self.assertEqual((set(proxy.lines), api.posted), ({connect}, [DUE]))
        self.assertEqual({request.headers["x-api-key"] for request in proxy.requests}, {None})
        proxy.requests.clear()
        os.environ["NO_PROXY"] = "127.0.0.1"
        self.assertEqual(self.handle(api), DUE)
        self.assertEqual(proxy.requests, [])

    def test_a_proxy_or_a_host_that_is_not_there_ends_the_run(self) -> None:
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        client = self.client("https://api.invalid/v1")
        with mock.patch("socket.getaddrinfo", side_effect=unknown):
            said = [str(self.failure(kf.KFError, client.handler))]
        os.environ["HTTPS_PROXY"] = self.api(listening=False).url
        said.append(str(self.failure(kf.KFError, client.handler)))
        texts = ["Name or service not known", "the proxy: Connection refused"]
        where, hint = f"GET https://api.invalid/v1/site-info/{kf.SITE}: ", f"; nothing was sent: {kf.NO_ANSWER}"
        self.assertEqual(said, [where + text + hint for text in texts])


class ReportTests(TestCase):
    SINCE = datetime(2022, 1, 1, tzinfo=timezone.utc).timestamp()

    def report(self, names: Mapping[str, str], spans: Mapping[str, Any], columns: int = 80, name: str = "Site") -> str:
        """Return the report of outages that began and ended at `spans`, in days since the date."""

        def at(days: float) -> str:
            return (datetime(2022, 1, 1) + timedelta(days=days)).isoformat(timespec="milliseconds") + "Z"

        given: list[kf.SiteOutage] = [
            {"id": device, "begin": at(begin), "end": at(end), "name": names[device]}
            for device in spans
            for begin, end in spans[device]
        ]
        before = copy.deepcopy(given)
        text = kf.report(site_info(names, "site", name), given, 12_345, self.SINCE, columns, "sent")
        self.assertEqual(given, before)
        for line in text.split("\n"):
            self.assertLessEqual(kf.width(line), columns, line)
            self.assertEqual(line, line.rstrip())
        return text

    def test_a_whole_report(self) -> None:
        spans = {"b1": [(0, 10.5), (4, 5), (20, 20.25)], "b3": [(10, 40)]}
        names = {"b1": "Battery 1", "b2": "电池 2", "b3": "Batterie é3"}
        expected = """\
            Site (site)
            4 of 12,345 outages sent, those of the site since 2022-01-01 00:00 UTC.

            Device       Outages  First begin       Last end          Out of service
            Battery 1          3  2022-01-01 00:00  2022-01-21 06:00         10d 18h
            电池 2             0  -                 -                          0d 0h
            Batterie é3        1  2022-01-11 00:00  2022-02-10 00:00          30d 0h
            Times are UTC. Overlapping outages of a device are counted once.

            Battery 1    ##################...............#.................................
            电池 2       ...................................................................
            Batterie é3  ................###################################################
                         2022-01-01                   2022-01-21                  2022-02-10
                         # out of service"""
        self.assertEqual(self.report(names, spans), re.sub("(?m)^ {12}", "", expected))

    def test_nothing_but_a_long_name_is_cut_at_60_columns(self) -> None:
        text = self.report({"b1": "Battery 1", "b2": "Battery 2"}, {"b1": [(0, 10)], "b2": [(9, 10)]}, 60)
        self.assertNotIn("~", text)
        for part in ("since 2022-01-01", "counted", "First begin ", "Last end ", "Out of service"):
            self.assertIn(part, text)

    def test_a_report_of_no_outages(self) -> None:
        no_spans: dict[str, Any] = {}
        for names, spans in ((NAMES, no_spans), (NAMES, {"b1": []}), ({}, no_spans)):
            text = self.report(names, spans)
            self.assertIn("\n0 of 12,345 outages sent, those of the site since 2022-01-01 00:00 UTC.\n", text)
            for name in names.values():
                self.assertRegex(text, rf"(?m)^{name} +0  -  +-  +0d 0h$")

    def test_no_line_is_wider_than_the_terminal(self) -> None:
        names = {"b1": "B" * 200, "b2": "电池" * 60, "b3": "e\u0301" * 90, "b4": FARSI, "b5": "🔋", "b6": ""}
        names["b7"] = "\x1b[31mred\x1b[0m\n\x9b2J\u202e"
        many = [(number / 24, number / 24 + 0.5) for number in range(10_000)]
        for case, widths, spans in (
            ("none", (1, 20, 40, 60, 69, 70, 80, 120, 300), {}),
            ("one instant", (1, 20, 40, 60, 69, 70, 80, 120, 300), {"b1": [(0, 0)]}),
            ("one outage", (40, 60, 80, 120), {"b2": [(3, 4)]}),
            ("10,000", (40, 120), {"b1": many, "b4": many[:1]}),
            ("the end of time", (40, 60, 80, 120), {"b1": [(0, 2_900_000)]}),
        ):
            for columns in widths:
                with self.subTest(case, columns=columns):
                    text = self.report(names, spans, columns, name="电池\x1b[2J" * 50)
                    self.assertNotRegex(text, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]")
                    self.assertEqual("#" in text, bool(spans) and columns >= 9)

    def test_columns_are_aligned_whatever_the_script(self) -> None:
        names = {"b1": "Battery", "b2": "电池电池", "b3": "e\u0301e\u0301", "b4": FARSI}
        for columns in (60, 80, 120):
            lines = self.report(names, {device: [(0, 1)] for device in names}, columns).split("\n")
            rows = [kf.width(line) for line in lines if line.endswith(" 1d 0h")]
            self.assertEqual((len(rows), len(set(rows))), (4, 1))
            self.assertEqual([kf.width(line) for line in lines if "##" in line], [columns] * 4)

    def test_overlapping_outages_of_a_device_are_counted_once(self) -> None:
        for case, spans, out in (
            ("apart", [(0, 1), (2, 3)], "2d 0h"),
            ("touching", [(0, 1), (1, 2)], "2d 0h"),
            ("overlapping", [(0, 2), (1, 3)], "3d 0h"),
            ("one in another", [(0, 4), (1, 2), (3, 3.5)], "4d 0h"),
            ("the same twice", [(0, 1), (0, 1)], "1d 0h"),
            ("not in order", [(4, 6), (0, 1), (5, 7)], "4d 0h"),
            ("long, then short, then apart", [(0, 10), (1, 2), (9, 12), (20, 21)], "13d 0h"),
            ("instants", [(0, 0), (1, 1)], "0d 0h"),
            ("one that ends before it began", [(1, 2), (5, 3)], "1d 0h"),
            ("minutes", [(0, 0.01)], "<1h"),
            ("hours that round to a day", [(0, 0.99)], "1d 0h"),
        ):
            with self.subTest(case):
                text = self.report({"b1": "B"}, {"b1": spans})
                self.assertRegex(text, rf"(?m)^B +{len(spans)}  .+  {re.escape(out)}$")
        self.assertIn("2022-01-01 00:00  2022-02-10 00:00", self.report({"b1": "B"}, {"b1": [(0, 40), (1, 2)]}))

    def test_a_timeline_marks_where_the_device_was_out(self) -> None:
        no_spans: list[Any] = []
        for spans, columns, expected in (
            (no_spans, 5, "....."),
            ([(0, 10)], 5, "#####"),
            ([(0, 1)], 5, "#...."),
            ([(9, 10)], 5, "....#"),
            ([(10, 10)], 5, "....#"),
            ([(0, 0)], 5, "#...."),
            ([(2.1, 4.1)], 10, "..###....."),
            ([(2.1, 3.9), (2.5, 6.9)], 10, "..#####..."),
            ([(0, 1), (9.5, 10)], 1, "#"),
        ):
            with self.subTest(spans):
                self.assertEqual(kf.timeline(spans, 0, 10, columns), expected)
        self.assertEqual(kf.timeline([(5, 5)], 5, 5, 4), "#...")

    def test_durations_and_stamps(self) -> None:
        for seconds, expected in ((0, "0d 0h"), (1, "<1h"), (3600, "0d 1h"), (90_000, "1d 1h"), (8_647_200, "100d 2h")):
            self.assertEqual(kf.duration(seconds), expected)
        for at, expected in ((self.SINCE, "2022-01-01 00:00"), (-0.001, "1969-12-31 23:59"), (253_402_304_399, "?")):
            self.assertEqual(kf.stamp(at), expected)

    def test_width_and_fit_count_columns(self) -> None:
        for text, columns, fitted in (
            *(("abc", 3, "abc  "), ("", 0, "     "), ("abcdef", 6, "abcd~"), ("电池", 4, "电池 ")),
            *(
                ("电池电", 6, "电池~"),
                ("电a池a", 6, "电a~ "),
                ("e\u0301a", 2, "e\u0301a   "),
                (FARSI, 7, FARSI[:-3] + "~"),
            ),
        ):
            with self.subTest(text):
                self.assertEqual((kf.width(text), kf.fit(text, 5), kf.width(kf.fit(text, 5))), (columns, fitted, 5))

    def test_progress_is_a_line(self) -> None:
        for given, expected in (
            ((12_345_678, 24_691_356, 98_765, 4321), "12.3 MB (50%), 98,765 outages read, 4,321 kept"),
            ((12_345_678, None, 0, 0), "12.3 MB, 0 outages read, 0 kept"),
            ((0, 0, 0, 0), "0.0 MB, 0 outages read, 0 kept"),
        ):
            self.assertEqual(kf.progress(*given), expected)


class DemoTests(TestCase):
    def test_the_demo_answers_like_the_real_api(self) -> None:
        url = self.opened.enter_context(kf.demo_api())
        client = self.opened.enter_context(kf.KFClient(url, kf.DEMO_KEY, backoff=0.001))
        self.assertEqual((len(client.handler()), client.outages_read), (10, 108))
        told = [line.replace(kf.SITE, "SITE") for line in self.warned]
        again = "answered 500; try 2 of 6 in N s"
        self.assertEqual(told, [f"GET /site-info/SITE: {again}", f"POST /site-outages/SITE: {again}"])
        outages = client._get_outages()
        self.assertEqual(outages, sorted(outages, key=lambda outage: outage["id"]))
        names = kf.device_names(client.site_info["devices"])
        begins = sorted(outage["begin"] for outage in outages if outage["id"] in names)
        self.assertEqual((len(names), len(begins)), (8, 18))
        self.assertEqual(begins[7:9], ["2021-12-31T23:59:59.999Z", "2022-01-01T00:00:00.000Z"])
        bad: Any = [{"id": "1"}]
        self.assertEqual(self.failure(kf.KFError, client._post_site_outages, kf.SITE, bad).status, 400)
        error = self.failure(kf.KFError, client.handler, "elsewhere")
        self.assertEqual((error.status, error.message), (404, "Site not found"))
        stranger = self.opened.enter_context(kf.KFClient(url, "another"))
        error = self.failure(kf.KFError, stranger.handler)
        self.assertEqual((error.status, error.message), (403, "Forbidden"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Failing(io.StringIO):
    """A stream that fails with the error of that number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


class CommandLineTests(TestCase):
    def test_a_run_reports_on_stdout_alone(self) -> None:
        api = self.api()
        self.assertEqual(self.run_main(KF_BASE_URL=api.url), (0, REPORT, ""))
        self.assertEqual(api.posted, [DUE])

    def test_a_dry_run_prints_json_alone_on_stdout(self) -> None:
        api = self.api()
        code, stdout, stderr = self.run_main("--dry-run", KF_BASE_URL=api.url)
        self.assertEqual((code, json.loads(stdout), api.posted), (0, DUE, []))
        self.assertEqual(stderr, REPORT.replace("outages sent", "outages would be sent"))
        self.assertEqual(self.run_main("-q", "--dry-run", KF_BASE_URL=api.url), (0, stdout, ""))

    def test_each_option_in_any_order(self) -> None:
        for argv, kept in (
            (["--since=2022-02-01", "--base-url", "URL", "--timeout=5"], 1),
            (["--timeout", "5", "--base-url=URL", "--since", "2022-02-01"], 1),
            (["--deadline", "60", "--site", kf.SITE, "--base-url", "URL"], 2),
            (["-q", "--base-url", "URL/"], 2),
            (["--since", "2021-01-01T00:00+01:00", "--base-url", "URL"], 3),
        ):
            with self.subTest(argv):
                api = self.api()
                argv = [arg.replace("URL", api.url) for arg in argv]
                code, stdout, stderr = self.run_main(*argv, KF_BASE_URL="https://api.invalid")  # a flag wins
                self.assertEqual((code, len(api.posted[0]), stderr, stdout == ""), (0, kept, "", "-q" in argv))

    def test_verbose_tells_of_each_request_and_quiet_of_errors_alone(self) -> None:
        again = f"kf_backend: {OUTAGES}: answered 500; try 2 of 6 in 0.0 s\n"
        told = f"kf_backend: {INFO}: 200 in N s, N bytes\n{again}kf_backend: {OUTAGES}: 200 in N s, N bytes\n"
        told += f"kf_backend: {POST}: 200 in N s, N bytes sent\n"
        for argv, expected in (((), again), (("-q",), ""), (("--quiet",), ""), (("-v",), told), (("--verbose",), told)):
            with self.subTest(argv):
                api = self.api(outages=[answer(500)])
                code, _, stderr = self.run_main(*argv, KF_BASE_URL=api.url)
                self.assertEqual((code, re.sub(r"200 in [0-9.]+ s, [0-9]+", "200 in N s, N", stderr)), (0, expected))

    def test_a_failure_is_one_line_and_a_code(self) -> None:
        info, post = f"GET URL/site-info/{kf.SITE}: answered", f"POST URL/site-outages/{kf.SITE}:"
        refused, closed = {"info": [answer(403, {"message": "Forbidden"})]}, {"post": [then_close(b"")]}
        bad, no_list = {"post": [answer(400, {"message": "no"})]}, {"outages": [answer(json={})]}
        ascii_alone = "the API key has a character other than visible ASCII: check KF_API_KEY"
        far = "the base URL must be https (http only to this machine): check --base-url or KF_BASE_URL"
        lost = "GET URL/site-info/x: answered 404, 'Site not found'; nothing was sent: check --site and --base-url"
        script: Mapping[str, Any]
        environ: Mapping[str, str | None]
        for code, text, argv, script, environ in (
            (1, f"{info} 403, 'Forbidden'; nothing was sent: check KF_API_KEY", "", refused, {}),
            (1, lost, "--site x", {}, {}),
            (1, f"{post} answered 400, 'no'; the list was not accepted: {kf.HINTS[400]}", "", bad, {}),
            (1, "GET /outages: the API sent something other than a list; nothing was sent", "", no_list, {}),
            (2, "there is no API key: set KF_API_KEY", "", {}, {"KF_API_KEY": None}),
            (2, ascii_alone, "", {}, {"KF_API_KEY": f"{KEY}\n{KEY}"}),
            (2, ascii_alone, "", {}, {"KF_API_KEY": f"{KEY}é"}),
            (2, "'..' cannot be a site's id: check --site", "--site ..", {}, {}),
            (2, "'soon' is no ISO 8601 date or time, such as 2022-06-01: check --since", "--since soon", {}, {}),
            (2, far, "--base-url http://example.com", {}, {}),
            (2, far, "--base-url=", {}, {}),
            (3, f"{post} Remote end closed connection without response; {UNKNOWN}", "", closed, {}),
        ):
            for quiet in ([], ["-q"]):
                with self.subTest(text, quiet=quiet):
                    api = self.api(**script)
                    said = self.run_main(*words(argv), *quiet, **{"KF_BASE_URL": api.url, **environ})
                    self.assertEqual(said, (code, "", f"kf_backend: {text}\n".replace("URL/", f"{api.url}/")))
                    self.assertEqual(api.connections == 0, code == 2)

    def test_a_key_from_a_file_with_its_line_break_is_taken(self) -> None:
        api = self.api()
        self.assertEqual(self.run_main(KF_BASE_URL=api.url, KF_API_KEY=f" {KEY}\n")[0], 0)
        self.assertEqual(api.requests[0].headers["x-api-key"], KEY)

    def test_wrong_use_is_told_in_a_line(self) -> None:
        number = "is no number of seconds, more than 0 and at most 86400"
        for argv, text in (
            *(
                ([option, value], f"argument {option}: {value!r} {number}")
                for option in ("--timeout", "--deadline")
                for value in ("0", "-1", "nan", "inf", "86401", "x", "")
            ),
            (["--dead", "5"], "unrecognized arguments: --dead 5"),
            (["--dry"], "unrecognized arguments: --dry"),
            (["--api-key"], "unrecognized arguments: --api-key"),
            (["extra"], "unrecognized arguments: extra"),
            (["--since"], "argument --since: expected one argument"),
            (["-q", "-v"], "argument -v/--verbose: not allowed with argument -q/--quiet"),
            (["--demo", "--base-url", "https://h"], "--demo brings an API of its own: leave out --base-url"),
        ):
            with self.subTest(argv):
                self.assertEqual(self.run_main(*argv), (2, "", f"kf_backend: {text}; --help tells more\n"))

    def test_help_fits_a_screen_and_version_is_told(self) -> None:
        code, stdout, stderr = self.run_main("-h")
        self.assertEqual((code, stderr), (0, ""))
        self.assertLessEqual(len(stdout.splitlines()), 34)
        self.assertLessEqual(max(map(len, stdout.splitlines())), 80)
        for word in (*words("KF_API_KEY KF_BASE_URL HTTPS_PROXY NO_PROXY REQUESTS_CA_BUNDLE UTC 130"), kf.SITE):
            self.assertIn(word, stdout)
        self.assertEqual(self.run_main("--help"), (code, stdout, stderr))
        self.assertEqual(self.run_main("--version"), (0, f"kf_backend {kf.__version__}\n", ""))

    def test_the_deadline_bounds_a_run_whatever_the_server_does(self) -> None:
        stopped, unsent = "kf_backend: stopped after 0.2 s (--deadline); ", "nothing was sent: run it again"
        head, body = then_drip(b"HTTP/1.1 200 OK\r\nA: ", b"b"), then_drip(answer(headers=NO_LENGTH, body=b"["), b" ")
        again, wait = then_drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001), answer(429, {}, {"Retry-After": "30"})
        for case, name, reply, code, outcome in (
            ("a head that drips", "info", head, 1, unsent),
            ("a body that drips", "outages", body, 1, unsent),
            ("100 Continue for ever", "outages", again, 1, unsent),
            ("a wait", "outages", wait, 1, unsent),
            ("a POST's head that drips", "post", head, 3, UNKNOWN),
            ("a POST's wait", "post", wait, 1, unsent),
            ("a POST's body that drips", "post", body, 0, "the list was sent"),
        ):
            with self.subTest(case):
                api, began = self.api(**{name: [reply]}), time.monotonic()
                said, stdout, stderr = self.run_main("--deadline", "0.2", "--base-url", api.url)
                self.assertLess(time.monotonic() - began, 10)
                self.assertEqual((said, stdout, stderr.splitlines()[-1]), (code, "", stopped + outcome))
                line = dict(REQUESTS)[name]
                waits = [f"kf_backend: {line}: answered 429; try 2 of 6 in 30.0 s"] if reply == wait else []
                self.assertEqual((api.lines[-1], stderr.splitlines()[:-1]), (line, waits))

    def test_main_leaves_signals_and_log_as_they_were(self) -> None:
        def state() -> Any:
            handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
            log = logging.getLogger("kf_backend")
            return handlers, signal.getitimer(signal.ITIMER_REAL), log.level, log.handlers[:]

        before = state()
        for argv in ((), ("-v",), ("--site", ".."), ("--timeout", "x")):
            self.run_main(*argv, KF_BASE_URL=self.api().url)
            self.assertEqual(state(), before)

    def test_main_runs_in_a_thread(self) -> None:
        api, said = self.api(), []
        thread = threading.Thread(target=lambda: said.append(self.run_main("-q", KF_BASE_URL=api.url)))
        thread.start()
        thread.join()
        self.assertEqual((said, api.posted), ([(0, "", "")], [DUE]))

    def on(self, stdout: Any, stderr: Any, *argv: str, **script: Any) -> tuple[int, API]:
        """Run `main` with those streams; return its exit code, and the API."""
        api = self.api(**script)
        environ = mock.patch.dict(os.environ, KF_API_KEY=KEY, KF_BASE_URL=api.url)
        with environ, mock.patch.multiple(sys, stdout=stdout, stderr=stderr):
            return kf.main(argv), api

    def test_a_terminal_sees_how_far_a_long_download_is(self) -> None:
        whole = answer(json=ALL)

        def slow(sock: socket.socket) -> None:
            for wait, piece in ((0, whole[:-300]), (0.3, whole[-300:-200]), (0.3, whole[-200:])):
                time.sleep(wait)
                sock.sendall(piece)

        stderr = Terminal()
        self.assertEqual(self.on(io.StringIO(), stderr, outages=[slow])[0], 0)
        self.assertRegex(stderr.getvalue(), r"^(\r0\.0 MB \([0-9]+%\), [1-4] outages read, [0-2] kept +)+\r\x1b\[K$")
        self.assertEqual({len(part) for part in stderr.getvalue().split("\r")[1:-1]}, {79})
        self.assertEqual(self.on(io.StringIO(), quiet := Terminal(), "-q")[0], 0)
        self.assertEqual(quiet.getvalue(), "")

    def test_a_stream_that_fails_costs_no_outage(self) -> None:
        report, printed = "kf_backend: the report could not be printed: ", "kf_backend: the list could not be printed: "
        full = "No space left on device"
        for case, stdout, argv, code, expected in (
            ("full", Failing(errno.ENOSPC), (), 0, f"{report}{full}; the list was sent\n"),
            ("broken pipe", Failing(errno.EPIPE), (), 0, ""),
            ("closed", None, (), 0, f"{report}Bad file descriptor; the list was sent\n"),
            ("full", Failing(errno.ENOSPC), ("-q",), 0, ""),
            ("full", Failing(errno.ENOSPC), ("-q", "--dry-run"), 1, f"{printed}{full}\n"),
            ("broken pipe", Failing(errno.EPIPE), ("-q", "--dry-run"), 0, ""),
        ):
            with self.subTest(case, argv=argv):
                stderr = io.StringIO()
                said, api = self.on(stdout, stderr, *argv)
                self.assertEqual((said, stderr.getvalue(), len(api.posted)), (code, expected, "--dry-run" not in argv))

    def test_a_stdout_that_knows_few_letters_shows_the_others_as_codes(self) -> None:
        stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
        self.assertEqual(self.on(stdout, io.StringIO())[0], 0)
        stdout.seek(0)
        self.assertEqual(stdout.read(), REPORT.replace("№", r"\u2116"))

    def test_a_run_of_the_script(self) -> None:
        api = self.api()
        for run in [self.spawn(api.url) for _ in range(2)]:  # two at once do each other no harm
            self.assertEqual(self.finished(run), (0, REPORT, ""))
        self.assertEqual(api.posted, [DUE, DUE])

    def test_a_signal_is_told_in_a_line_with_the_truth_about_the_list(self) -> None:
        unsent, runs = "nothing was sent: run it again", []
        head = answer(headers={"Content-Length": "9"}, body=b"")
        for number, name, said, outcome in (
            (signal.SIGINT, "outages", b"", unsent),
            (signal.SIGTERM, "outages", answer(json=ALL)[:-9], unsent),
            (signal.SIGINT, "post", b"", UNKNOWN),
            (signal.SIGTERM, "post", b"", UNKNOWN),
            (signal.SIGINT, "post", head, "the list was sent"),
        ):
            stalling = threading.Event()
            run = self.spawn(self.api(**{name: [then_stall(said, stalling)]}).url)
            runs.append((run, stalling, number, outcome))
        self.assertTrue(all(stalling.wait(60) for _, stalling, _, _ in runs))
        time.sleep(0.2)  # until they wait for the rest
        for run, _, number, outcome in runs:
            with self.subTest(number, outcome=outcome):
                run.send_signal(number)
                text = f"kf_backend: stopped by {signal.Signals(number).name}; {outcome}\n"
                self.assertEqual(self.finished(run), (128 + number, "", text))

    def test_streams_that_are_closed_or_full_change_nothing(self) -> None:
        reader, closed = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        report, printed = "kf_backend: the report could not be printed: ", "kf_backend: the list could not be printed: "
        no_space, runs = "No space left on device", []
        for case, argv, streams, expected, posts in (
            ("closed", "", {"stdout": closed}, (0, None, ""), 1),
            ("closed, dry run", "-q --dry-run", {"stdout": closed}, (0, None, ""), 0),
            ("full", "", {"stdout": full}, (0, None, f"{report}{no_space}; the list was sent\n"), 1),
            ("full, dry run", "-q --dry-run", {"stdout": full}, (1, None, f"{printed}{no_space}\n"), 0),
            ("stderr full", "", {"stderr": full}, (0, REPORT, None), 1),
            ("stderr full, failing", "--site nowhere", {"stderr": full}, (1, "", None), 0),
        ):
            api = self.api(outages=[answer(500)] if case == "stderr full" else ())
            runs.append((case, api, self.spawn(api.url, *words(argv), **streams), expected, posts))
        for case, api, run, expected, posts in runs:
            with self.subTest(case):
                self.assertEqual((self.finished(run), len(api.posted)), (expected, posts))
        os.close(closed)
        os.close(full)

    def test_the_library_is_silent_and_its_import_does_nothing(self) -> None:
        api = self.api(outages=[answer(500)], post=[answer(500)])
        program = f"""if True:
            import logging, os, signal, sys, threading
            before = signal.getsignal(signal.SIGINT), dict(os.environ), sys.excepthook
            from kf_backend import KFClient
            assert before == (signal.getsignal(signal.SIGINT), dict(os.environ), sys.excepthook)
            assert threading.active_count() == 1 and not logging.getLogger().handlers
            with KFClient({api.url!r}, {KEY!r}) as client:
                assert len(client.handler({kf.SITE!r}, "2022-01-01")) == 2
            assert before[0] == signal.getsignal(signal.SIGINT)
        """
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
        run = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, timeout=60)
        self.assertEqual((run.returncode, run.stdout, run.stderr), (0, b"", b""))
        self.assertEqual(api.posted, [DUE, DUE])


class ReadmeTests(TestCase):
    """The README beside this file is to agree with the program."""

    COMMAND = "python kf_backend.py --demo"

    def setUp(self) -> None:
        super().setUp()
        self.readme = SCRIPT.with_name("README.md").read_text("utf-8")

    def test_the_example_is_what_the_demo_prints(self) -> None:
        """Also, the demo: it shows two retries, and an outage at the very date."""
        code, stdout, stderr = self.finished(self.spawn("https://api.invalid", "--demo"))
        again = "answered 500; try 2 of 6 in N s\n"
        told = "demo: an API of its own at http://127.0.0.1:PORT, which fails once on a GET and once on a POST\n"
        told += f"kf_backend: GET /site-info/{kf.SITE}: {again}kf_backend: POST /site-outages/{kf.SITE}: {again}"
        self.assertEqual((code, self.normal(stderr)), (0, f"kf_backend: {told}"))
        self.assertRegex(stdout, rf"^Norwich Pear Tree \({kf.SITE}\)\n10 of 108 outages sent, ")
        self.assertRegex(stdout, r"\nBattery 1 +[1-9] +2022-01-01 00:00 ")
        blocks = re.findall(r"(?ms)^```[a-z]*\n(.*?)^```$", self.readme)
        commands = next(number for number, block in enumerate(blocks) if self.COMMAND in block)
        self.assertEqual(self.normal(blocks[commands + 1]), self.normal(stderr + stdout))

    def normal(self, text: str) -> str:
        return re.sub(r"(?m)[0-9.]+ s$", "N s", re.sub(r"127\.0\.0\.1:[0-9]+", "127.0.0.1:PORT", text))

    def test_every_option_is_in_the_readme_and_no_other(self) -> None:
        options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", self.run_main("-h")[1]))
        self.assertGreater(len(options), 10)
        table = re.findall(r"(?m)^\| (`-.*?`) \|", self.readme)
        self.assertEqual(set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(table))), options)

    def test_every_exit_code_is_in_the_readme_and_no_other(self) -> None:
        helped = re.findall(r"(?<=  )([0-9]+) [a-z]", self.run_main("-h")[1].split("exit codes:")[1])
        self.assertEqual(helped, words("0 1 2 3 130 143"))
        table = self.readme.split("| exit code |")[1].split("\n\n")[0]
        self.assertEqual(re.findall(r"[0-9]+", " ".join(re.findall(r"(?m)^\| ([0-9, ]+) \|", table))), helped)

    def test_every_variable_and_command_is_in_the_readme(self) -> None:
        for name in words("KF_API_KEY KF_BASE_URL HTTPS_PROXY NO_PROXY REQUESTS_CA_BUNDLE"):
            self.assertIn(f"`{name}`", self.readme)
        for command in ("pip install -r requirements.txt", self.COMMAND, "python -m unittest discover"):
            self.assertIn(f"\n$ {command}\n", self.readme)
        self.assertLess(len(self.readme.splitlines()), 150)


if __name__ == "__main__":
    unittest.main()
