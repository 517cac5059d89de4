"""Tests for kf_backend.py, in its order: rules, client, report, demo, command line, README.

`API` is a real server on 127.0.0.1. `self.api(outages=[...], info=[...], post=[...])` sets the first replies to each of
the three requests; any later reply is a healthy one. A reply is bytes or, for misbehavior, a function of the socket
(`then_reset`, for example). `api.asked` lists the requests, one letter each: `OIP` is a healthy run. Most of what a
server can do, and how the run then ends, is a row of `ServerTests`.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import gzip
import http.client
import io
import itertools
import json
import logging.handlers
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta, timezone
from email.message import Message
from email.utils import formatdate
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Union
from unittest import mock

import requests
from urllib3 import HTTPResponse
from urllib3.exceptions import ProtocolError

import kf_backend as kf

SCRIPT, words = Path(kf.__file__), str.split
KEY = "s3cret-key!\\~'"
FORMS = (KEY, repr(KEY)[1:-1], "s3cret-key%21%5C~%27")  # as it might be shown
LETTERS = {"GET /outages": "O", f"GET /site-info/{kf.SITE}": "I", f"POST /site-outages/{kf.SITE}": "P"}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LINES = dict(zip(("outages", "info", "post"), LETTERS))
STATUSES, REDIRECTS = (429, 500, 502, 503, 504), (301, 302, 303, 307, 308)
UNSIZED: dict[str, Any] = {"Content_Length": None}
CHUNKED: dict[str, Any] = {**UNSIZED, "Transfer_Encoding": "chunked"}
UNSENT, REFUSED = "Nothing was sent", "The list was not accepted"
UNKNOWN = "The list may or may not have been applied; check before rerunning"
CUT = r"response cut off \([0-9]+ bytes read, [0-9]+ more expected\)"
RESET, DECODE = "Connection reset by peer", "Error -3 while decompressing data: .+"
#: Its third character is a joiner, which takes no column.
FARSI = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
#: Self-signed for 127.0.0.1, valid until 2120. Its key is only for these tests.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBcTCCARegAwIBAgIUAvH9xUU2k6hhgl9NMBoukCLGWk8wCgYIKoZIzj0EAwIwDTELMAkGA1UEAwwCa2YwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAx
MDEwMDAwMDBaMA0xCzAJBgNVBAMMAmtmMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEkp+qvaudAlvwS9stU0gGIC4XiBaabFIwOEVGjoizbXDRs2eP
qHnA4Pr520g4BMnOgpN/pAyKADuqldL7borL66NTMFEwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwHQYDVR0OBBYEFCcP/QGUxiHcDiKP
HBugL1E6rrVyMA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIgb32qhlyRuN7CrbudEmy24cDLFY/Kc0ex/x+EFq5WVtsCIQDAeFhvpTTU
4MW191+wJsViYY/uj9fhlnuVK6PcXoUi5Q==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRC1prJNykci/ZkR1TsXzHhqGq+7gVSbMDKT38kFAd1yhRANCAASSn6q9q50CW/BL2y1T
SAYgLheIFppsUjA4RUaOiLNtcNGzZ4+oecDg+vnbSDgEyc6Ck3+kDIoAO6qV0vtuisvr
-----END PRIVATE KEY-----
"""

Reply = Union[bytes, "Callable[[socket.socket], None]"]


def outage(device: str, begin: Any = "2022-05-01T00:00:00.000Z", end: Any = "2022-05-02T00:00:00.000Z") -> Any:
    return {"id": device, "begin": begin, "end": end}


def site_info(names: Mapping[str, str], site: str = kf.SITE, name: str = "Norwich Pear Tree") -> Any:
    return {"id": site, "name": name, "devices": [{"id": id, "name": name} for id, name in names.items()]}


NAMES = {"b1": "Battery 1", "b2": "Batterie №2", "b3": "Battery 3"}
SITE_INFO = site_info(NAMES)
#: Sent by `GET /outages`: one begins exactly at the date; another begins a millisecond before it and ends after it.
ALL = [
    outage("b2", "2022-03-01T00:00:00.000Z", "2022-03-04T04:00:00.000Z"),
    outage("another", "10", "yesterday"),
    outage("b1", "2021-12-31T23:59:59.999Z", "2022-06-01T00:00:00.000Z"),
    outage("b1", "2022-01-01T00:00:00.000Z", "2022-01-11T12:00:00.000Z"),
]
DUE = [{**ALL[0], "name": "Batterie №2"}, {**ALL[3], "name": "Battery 1"}]
REPORT = """\
Outages since 2022-01-01: Norwich Pear Tree (norwich-pear-tree)

Device       Outages  Downtime    2022-01-01                          2022-03-04
Battery 1          1  10 d 12 h   ########......................................
Batterie №2        1  3 d 4 h     ...........................................###
No outages: Battery 3

"""


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def answer(value: Any = b"", status: int = 200, **headers: str | None) -> bytes:
    """Return a response with the body `value` (as JSON unless it is bytes). A header set to None is omitted."""
    body = value if isinstance(value, bytes) else dumps(value)
    fields = {"Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in fields.items() if text is not None)
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


def no(status: int, message: str = "no", **headers: str | None) -> bytes:
    return answer({"message": message}, status, **headers)


def zipped(body: bytes, status: int = 200, encoding: str = "gzip") -> bytes:
    return answer(body, status, Content_Encoding=encoding)


def chunks(body: bytes, size: int) -> bytes:
    """Return `body` in chunks, as a CHUNKED response has it, without the final empty chunk."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def then_close(said: bytes) -> Reply:
    return lambda sock: sock.sendall(said)


def then_reset(said: bytes) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        time.sleep(0.02 if said else 0)  # a reset discards what the client has not read
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(sock.detach())

    return reply


def then_drip(said: bytes, drop: bytes, seconds: float = 0.0, count: int = 9999) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        for _ in range(count):  # until the client hangs up
            sock.sendall(drop)
            time.sleep(seconds)

    return reply


def then_stall(said: bytes, stalling: threading.Event, end: threading.Event | None = None, rest: bytes = b"") -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        stalling.set()
        end.wait(30) if end else sock.recv(1)  # until the client hangs up
        sock.sendall(rest)

    return reply


class Request(NamedTuple):
    line: str  # such as "GET /outages"
    headers: Message
    body: bytes


class Connection(socketserver.StreamRequestHandler):
    """A connection for one request, as the client asks."""

    timeout = 20
    disable_nagle_algorithm = True
    server: API

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client may hang up
            if line := self.rfile.readline().decode("latin-1").rpartition(" ")[0]:
                headers = http.client.parse_headers(self.rfile)
                body = self.rfile.read(int(headers.get("Content-Length", 0)))
                reply = self.server.reply(Request(line, headers, body))
                reply(self.connection) if callable(reply) else self.connection.sendall(reply)


class API(socketserver.ThreadingTCPServer):
    """The API. Its port refuses connections until it is `listening`."""

    request_queue_size = 50

    def __init__(self, script: Mapping[str, Iterable[Reply]], tls: ssl.SSLContext | None, listening: bool) -> None:
        super().__init__(("127.0.0.1", 0), Connection, bind_and_activate=False)
        self.server_bind()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.url, self.tls = f"{'https' if tls else 'http'}://{self.address}", tls
        self.script = {line: iter(replies) for line, replies in script.items()}
        self.healthy = dict(zip(LETTERS, (answer(ALL), answer(SITE_INFO), answer({}))))
        self.requests: list[Request] = []
        self.connections, self.lock = 0, threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.001,))
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
            return next(self.script.get(request.line, iter(())), self.healthy.get(request.line, no(404, "No site")))

    def get_request(self) -> Any:
        self.connections += 1
        sock, address = super().get_request()
        return self.tls.wrap_socket(sock, True, do_handshake_on_connect=False) if self.tls else sock, address

    @property
    def asked(self) -> str:
        return "".join(LETTERS.get(request.line, f"({request.line})") for request in self.requests)

    @property
    def posted(self) -> list[Any]:
        return [json.loads(request.body) for request in self.requests if request.line.startswith("POST")]


class TestCase(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        """Isolate the test from the caller's environment and collect its log. A test that hangs ends the suite."""
        faulthandler.dump_traceback_later(40, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.opened = contextlib.ExitStack()
        self.addCleanup(self.opened.close)
        ours = r"(?i)KF_.*|.*_PROXY|COLUMNS|LINES|NETRC|NO_COLOR|(REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_.*|PYTHON(?!PATH).*"
        kept = {name: value for name, value in os.environ.items() if not re.fullmatch(ours, name)}
        self.opened.enter_context(mock.patch.dict(os.environ, kept, clear=True, COLUMNS="80"))
        self.opened.enter_context(mock.patch.dict(kf.KFClient.__init__.__kwdefaults__, backoff=0.0002))
        self.logged = logging.handlers.BufferingHandler(10**9)
        self.opened.enter_context(mock.patch.multiple(logging.getLogger(), handlers=[self.logged], level=logging.DEBUG))

    def tearDown(self) -> None:
        told = "\n".join(record.getMessage() for record in self.logged.buffer)
        self.assertEqual(re.findall(rf"{re.escape(KEY)}|retrying in (?:[1-9]|0\.[1-9])", told), [])  # nor a real wait

    @contextlib.contextmanager
    def subTest(self, *case: Any, **values: Any) -> Iterator[None]:
        """Run a case as unittest does, then close what it opened."""
        outer, self.opened = self.opened, contextlib.ExitStack()
        try:
            with super().subTest(*case, **values), self.opened:
                yield
        finally:
            self.opened = outer

    def api(self, tls: Any = None, listening: Any = True, **replies: Any) -> API:
        return self.opened.enter_context(API({LINES[name]: replies[name] for name in replies}, tls, listening))

    def tls(self) -> ssl.SSLContext:
        """Return a server's SSL context, and have clients trust it."""
        file = self.path("cert.pem", CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        os.environ["REQUESTS_CA_BUNDLE"] = str(file)
        return context

    def path(self, name: str, text: str) -> Path:
        file = Path(self.opened.enter_context(tempfile.TemporaryDirectory()), name)
        file.write_text(text, "utf-8")
        file.chmod(0o600)
        return file

    def client(self, url: str, **options: Any) -> kf.KFClient:
        return self.opened.enter_context(kf.KFClient(url, KEY, **{"timeout": 20, **options}))

    def failure(self, kind: type[kf.KFError], call: Callable[..., Any], *args: Any) -> kf.KFError:
        """Return the error that `call` raises, of exactly that kind. The key must not show in it or its traceback."""
        with self.assertRaises(kf.KFError) as caught:
            call(*args)
        error = caught.exception
        self.assertIs(type(error), kind, error)
        shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.assertNotIn(KEY, f"{shown}{error!r}{vars(error)}")
        self.assertTrue(str(error).isprintable() and len(str(error)) < 600, error)
        return error

    def run_main(self, *argv: str, **environ: str | None) -> tuple[Any, str, str]:
        """Return the exit code, stdout and stderr of `main`. A variable set to None is omitted."""
        values = {name: value for name, value in {"KF_API_KEY": KEY, **environ}.items() if value is not None}
        stdout, stderr = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ, values), mock.patch.multiple(sys, stdout=stdout, stderr=stderr):
            try:
                code: Any = kf.main(argv)
            except SystemExit as stop:
                code = stop.code
        for form in FORMS:
            self.assertNotIn(form, stdout.getvalue() + stderr.getvalue())
        return code, stdout.getvalue(), stderr.getvalue()

    def spawn(self, url: str, *argv: str, ignored: int = 0, **options: Any) -> subprocess.Popen[str]:
        """Start the script in its own process, killed at the end. It ignores the signal `ignored`, if not 0."""

        def prepare() -> None:  # our parent may ignore some (nohup)
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

        environ = {**os.environ, "KF_BASE_URL": url, "KF_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
        args = [sys.executable, "-X", "dev", "-W", "error", str(SCRIPT), *argv]
        streams = {"args": args, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": prepare}
        process = self.opened.enter_context(subprocess.Popen(env=environ, encoding="utf-8", **{**streams, **options}))
        self.opened.callback(process.kill)
        return process

    def finished(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        stdout, stderr = process.communicate(timeout=30)
        self.assertNotIn(KEY, f"{stdout}{stderr}")
        return process.returncode, stdout, stderr

    def normal(self, text: str) -> str:
        """Return `text` with its times and ports replaced by N and PORT."""
        text = re.sub(r"127\.0\.0\.1:[0-9]+", "127.0.0.1:PORT", text)
        return re.sub(r"\b[0-9]+\.[0-9]+ s\b", "N s", text)


class RulesTests(TestCase):
    NEW_YEAR = kf.parse_time(kf.SINCE)
    NO_TIMES = (
        *("", " 2022-01-01T00:00:00Z", "2022-01-01T00:00:00Z\n", "2022-01-01T00:00:00 Z"),
        *words("10 May 02/03/2022 2022-01-01 2022-01-01T00:00Z 2022-01-01T00:00:00 2022-01-01_00:00:00Z"),
        *words("20220101T000000Z 2022-W01-1T00:00:00Z 2022-001T00:00:00Z +02022-01-01T00:00:00Z 0000-01-01T00:00:00Z"),
        *words("2021-12-31T23:59:60Z 2022-13-01T00:00:00Z 2022-02-29T00:00:00Z \uff12022-01-01T00:00:00Z"),
        *words("2022-01-01T25:00:00Z 2022-01-01T24:00:01Z 2022-01-01T00:60:00Z 9999-12-31T24:00:00Z"),
        *words("2022-01-01T00:00:00+24:00 2022-01-01T00:00:00+00:60 2022-01-01T00:00:00+01 2022-01-01T00:00:00+0100"),
        *words("2022-01-01T00:00:00PST 2022-01-01T00:00:00Z+01:00 2022-01-01T00:00:00.Z 2022-01-01T00:00:00,5Z"),
        *words("2022-01-01T24:00:00.5Z 2022-01-01T00:00:00\u0660Z 22022-01-01T00:00:00Z 2022-01-01T00:00:00ZZ"),
    )

    def test_safe_removes_keys_and_whatever_moves_the_cursor(self) -> None:
        self.opened.enter_context(mock.patch.object(kf, "api_keys", {KEY, "got", "four", "four+more", 'with"quote'}))
        for case, given, expected in (
            *(("an escape code", "a\x1b[31mb", "a?[31mb"), ("an 8-bit one", "a\x9b31mb", "a?31mb")),
            *(("lines", " a\r\n\t b\u2028c\v", "a b c"), ("a lone surrogate", "a\ud800", "a?")),
            ("a bell, a backspace, a direction override", "a\a\b\u202eb", "a???b"),
            ("letters and a joiner", f"é 电池 {FARSI}", f"é 电池 {FARSI}"),
            *(("a long text", "x" * 501, "x" * 500 + "..."), ("one at the limit", "x" * 500, "x" * 500)),
            ("a short key may be an ordinary word", "got four", "got [key]"),
            *(("a longer key", "four+more", "[key]"), ("in JSON", dumps('with"quote').decode(), '"[key]"')),
            *((f"a key before it is cut: {key}", "x" * 494 + f" {key}\nb", "x" * 494 + " [key]...") for key in FORMS),
        ):
            self.assertEqual(kf.safe(given), expected, case)

    def test_a_key_is_stripped_and_must_be_a_valid_header_value(self) -> None:
        for given in ("key", " key\n", "\tkey\r\n", "\u00a0key"):
            self.assertEqual(kf.clean_key(given), "key")
        bad = "the API key contains invalid characters (only visible ASCII is allowed)"
        rows: list[tuple[Any, str]] = [(absent, "no API key") for absent in (None, "", " \n")]
        ends = ("é", "\u2019", "\udcff", "\x7f", f" {KEY}", f"\nX-Evil: {KEY}", f"\0{KEY}")
        for given, text in (*rows, *((KEY + end, bad) for end in ends)):
            error = self.failure(kf.UsageError, kf.KFClient, kf.BASE_URL, given)
            self.assertEqual((str(error), error.check), (text, ("api_key",)), given)

    def test_only_base_urls_that_keep_the_key_safe_are_accepted(self) -> None:
        for given, expected in (
            *((" https://h/v1/\r\n", "https://h/v1"), ("HTTPS://H:8443/V1//", "https://h:8443/V1")),
            *(("https://bücher.de/ü", "https://xn--bcher-kva.de/%C3%BC"), ("https://h/a/%2e/b", "https://h/a/b")),
            *((url, url) for url in (kf.BASE_URL, "https://h")),
            *((f"http://{host}/v1", f"http://{host}/v1") for host in words("localhost:80 127.1.2.3 [::1]:8080")),
        ):
            self.assertEqual(kf.clean_base_url(given), expected)
        https, bare = "must use https (http is allowed only for localhost)", "credentials, a query or a fragment"
        invalid = "is not a valid URL"
        for text, urls in (
            (https, "http://h http://localhost.h http://127.0.0.1.h http://[::2] http://127.999.1.1 ftp://h"),
            (https, "http://128.0.0.1 file:///etc"),
            (bare, "https://user:word@h https://user@h http://user@localhost http://localhost@h"),
            (bare, "https://h/?a=b https://h/? https://h?a https://h/#a https://h#"),
            (invalid, "h/v1 https:// https:///v1 https://h:port https://h:99999 https://[::1 https://a..b https://.a"),
            (invalid, "https://*"),
        ):
            for url in words(urls):
                error = self.failure(kf.UsageError, kf.KFClient, url, KEY)
                self.assertRegex(str(error), f"^the base URL .*{re.escape(text)}$", url)
                self.assertEqual(error.check, ("base_url",))
        for absent in (None, ""):
            self.assertIn(invalid, str(self.failure(kf.UsageError, kf.KFClient, absent, KEY)))

    def test_rfc_3339_times_are_read_exactly(self) -> None:
        midnight, _ = self.NEW_YEAR
        for expected, times in (
            ((midnight, ""), "2022-01-01T00:00:00Z 2022-01-01t00:00:00z 2022-01-01T00:00:00.000Z 2021-12-31T24:00:00Z"),
            ((midnight, ""), "2022-01-01T01:00:00+01:00 2021-12-31T18:30:00.0-05:30 2022-01-01T14:00:00.000+14:00"),
            ((midnight, ""), "2022-01-01T00:00:00-00:00 2021-12-31T24:00:00.000z 2021-12-31T24:00:00+00:00"),
            ((midnight, "0000000009"), "2022-01-01T00:00:00.0000000009Z 2022-01-01t01:00:00.00000000090+01:00"),
            ((midnight, "5"), "2022-01-01T00:00:00.5Z 2022-01-01t01:00:00.50+01:00 2022-01-01T00:00:00.50000000z"),
            ((midnight, "1" * 2000), f"2022-01-01T00:00:00.{'1' * 2000}Z"),
            ((midnight - 1, "999"), "2021-12-31T23:59:59.999Z 2022-01-01T00:59:59.999+01:00"),
            ((-62_135_596_800 - 14 * 3600, ""), "0001-01-01T00:00:00+14:00"),
            ((253_402_300_799 + 3600, "9"), "9999-12-31T23:59:59.9-01:00"),
        ):
            for given in (*words(times), *words(times.replace("T", "_"))):
                self.assertEqual(kf.parse_time(given.replace("_", " ")), expected, given[:40])

    def test_a_date_is_utc_unless_it_has_an_offset(self) -> None:
        east, odd = timezone(timedelta(hours=5)), timezone(timedelta(hours=1, seconds=7, microseconds=9))
        given: Any
        dates = "2022-01-01 20220101 2022-01-01T00:00 2022-01-01T00:00:00.000 2022-01-01T00:00:00.000Z"
        dates += " 2022-01-01T00:00Z 2022-01-01t00:00:00z 2022-01-01T01:00+01:00 2021-12-31T24:00"
        for given in (*words(dates), "2022-01-01 00:00", " 2022-01-01\r\n", date(2022, 1, 1)):
            self.assertEqual(kf.parse_since(given), self.NEW_YEAR, given)
        self.assertEqual(kf.parse_since("2022-01-01T00:00:00.0000001"), (self.NEW_YEAR[0], "0000001"))
        self.assertEqual(kf.parse_since(datetime(2022, 1, 1, 5, tzinfo=east)), self.NEW_YEAR)
        moment = datetime(2022, 1, 1, 1, 0, 7, 500_009, tzinfo=odd)
        self.assertEqual(kf.parse_since(moment), (self.NEW_YEAR[0], "5"))

    def test_invalid_dates_are_rejected_alike_on_every_python(self) -> None:
        dates = "10 yesterday 02/03/2022 2022-02-30 2021-12-31T23:59:60Z 2022-01-01T00:00:00+24:00 2022-01 2022 9 NaN"
        dates += " 20220601120000 1791011512345 2022-06-01+02:00 2022-W53-1 2022-001 2022-06-01Z 2022-06-01T12"
        dates += " 9999-12-31T24:00 \uff12022-01-01 2022-06-01T12:00:00,5 2022-06-01T12:00+24:00 2022-060-1"
        others: list[Any] = ["", "2022-06-01 +02:00", None, 10, "\x1b[31m\n" * 99, datetime(2022, 1, 1)]
        api = self.api()
        for given in (*words(dates), *others):
            error = self.failure(kf.UsageError, self.client(api.url).handler, kf.SITE, given)
            text = r"'.{0,53}' is not an ISO 8601 date or time \(for example, 2022-06-01\)"
            text = "the datetime has no time zone; pass an aware datetime" if isinstance(given, datetime) else text
            self.assertRegex(str(error), f"^{text}$", given)
            self.assertEqual((error.check, api.connections), (("date",), 0))

    def kept(self, outages: Iterable[Any]) -> list[Any]:
        return self.client("http://localhost")._filter_outages(outages, SITE_INFO, kf.SINCE)

    def test_order_duplicates_unknown_fields_and_the_text_of_times_are_kept(self) -> None:
        odd = outage("b2", "2022-12-01t01:00:00.5+01:00", "2022-12-02 00:00:00z")
        more = {"more": [{"é": None}], **outage("b1"), "1": 1.0}
        backwards = outage("b1", "2022-02-01T00:00:00Z", "2021-02-01T00:00:00Z")
        # Errors in outages of other sites are ignored.
        strangers = [{"id": "x", "begin": None, "end": 10}, {"id": ""}, {"id": "y", "begin": float("nan")}]
        given = [odd, more, outage("elsewhere"), odd, *strangers, {**outage("b1"), "name": "another"}, backwards]
        before = copy.deepcopy(given)
        kept = self.kept(iter(given))
        self.assertEqual(kept, [{**row, "name": NAMES[row["id"]]} for row in given if row["id"] in NAMES])
        self.assertEqual(repr(given), repr(before))

    def test_an_invalid_id_or_time_is_reported_with_its_row_field_and_value(self) -> None:
        good = outage("b2", "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")  # checked even if it began too early
        others: list[Any] = [None, 10, 1.5, True, [], {"a": 1}, *self.NO_TIMES]
        for field in ("begin", "end"):
            missing = {name: value for name, value in good.items() if name != field}
            bad = [({**good, field: value}, json.dumps(value)) for value in others]
            for given, held in (*bad, (missing, "missing")):
                error = self.failure(kf.KFError, self.kept, [outage("b1"), given])
                self.assertEqual(str(error), f"GET /outages: outage 2 has an invalid {field}: {kf.safe(held)}")
        for value in ("\x1b[2J\n" * 50, "9" * 100_000, ["\u202e"] * 1000, "x" * 95 + KEY):
            error = self.failure(kf.KFError, self.kept, [outage("b1", end=value)])
            self.assertLess(len(str(error)), 160)
            self.assertNotIn(KEY[:5], str(error))
        ids: list[Any] = [None, 1, True, ["b1"], {}]
        for bad_id in (None, "b1", 1, [], ["id"], {}, {"ID": "b1"}, *({"id": id} for id in ids)):
            error = self.failure(kf.KFError, self.kept, [outage("b1"), outage("x"), bad_id])
            self.assertRegex(str(error), "^GET /outages: outage 3 has an invalid id: ")


class ReadArrayTests(TestCase):
    """Wherever the bytes are split, `read_array` agrees with `json.loads` of the whole."""

    BODIES = (
        *words(r'[] [{}] [{},"}"] [{},1,{}] [1,-2.5e3,true,null] [[{}],{},[{}]] ["}",{},"},{"] [{"a":0.5},{"a":10}]'),
        *words(r'[{"a":"}"},{"b":"\"},{\""}] [{"\\":"\\"},{"a":"{\u007d\ud83d\udd0b"}] [{"a":"]}"},"}",{"b":"[{"}]'),
        *words(r'[[[{}]]] [{"a":{},"b":"}"},{"a":"}"}] [{"a":[{},{}]},{"b":{}},{"c":[]}] [NaN,{"a":Infinity}]'),
        *('[{"a":1},{"b":[{}]} , {"c":{}}]', '\ufeff[{"é":"电池🔋"},{}]', '[{} ,\n{"a":[{},{}]}\t,\r\n{}]', " [ ] "),
    )
    NO_JSON = (
        *words("[ ] [} [{] {}} [{} [{}, [{},] [,] [,{}] [{},,{}] [{}{}] [{}.5] [{}1] [{}.5,{}] [{}]] [{}], [{}]x"),
        *words("[{}:{}] [{'a':1}] [{}x,{}] [{}],[{}] [{}]\ufeff [\ufeff{}] [{}}] [{},tru] [01] [{}/**/]"),
        *words('[{"a":1}{"a":2}] [{},{]}] [{}[]] [{}""] <p>{}</p> [{}},{}] } ,[{}] [{"a"}] [{"a":}] [{}-1,{}]'),
        *("", " ", "[{} {}]", "[{}] {}", '[{"a":"\n"}]', "[{}] ]"),
    )

    def said(self, read: Callable[[], Any]) -> str:
        try:
            return repr(read())  # 1 == 1.0 == True, but NaN != NaN
        except ValueError:
            return "refused"

    def expected(self, body: bytes) -> str:
        return self.said(lambda: json.loads(body.decode("utf-8-sig")))

    def check(self, body: bytes, *cuts: int) -> None:
        pieces = [body[begin:end] for begin, end in zip((0, *cuts), (*cuts, len(body)))]
        said = self.said(lambda: list(itertools.chain.from_iterable(kf.read_array(pieces))))
        self.assertEqual(said, self.expected(body), pieces)

    def test_fixed_and_random_bodies_are_read_alike_wherever_they_are_split(self) -> None:
        not_utf_8 = (b"\xff", b"\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\x94")
        good, bad = ([text.encode() for text in texts] for texts in (self.BODIES, self.NO_JSON))
        self.assertEqual(list(map(self.expected, bad)), ["refused"] * len(bad))
        for body in (*good, *bad, *(b'[{"a":"%b"},{}]' % letters for letters in not_utf_8)):
            self.check(body)
            self.check(body, *range(len(body)))
            for first, second in itertools.combinations_with_replacement(range(len(body) + 1), 2):
                self.check(body, first, second)
        for body in good:
            self.assertNotEqual(self.expected(body), "refused", body)
            for stop in range(len(body)):
                self.check(body[:stop], stop // 2)
        rnd = random.Random(7)

        def value(depth: int) -> Any:
            kind = rnd.randrange(7 if depth else 5)
            if kind > 4:
                values = [value(depth - 1) for _ in range(rnd.randrange(4))]
                return values if kind == 5 else {text(): item for item in values}
            return (text(), rnd.randrange(-999, 999), rnd.random() * 1e6, None, True)[kind]

        def text() -> str:
            return "".join(rnd.choice('ab é电🔋{}[],:"\\\n 1') for _ in range(rnd.randrange(5)))

        for _ in range(300):
            items = [value(3) if rnd.random() < 0.2 else {text(): value(2)} for _ in range(rnd.randrange(6))]
            separators = rnd.choice((None, (",", ":"), (" ,\n ", "\t:")))
            body = json.dumps(items, ensure_ascii=rnd.random() < 0.5, separators=separators).encode()
            at = rnd.randrange(len(body))
            damaged = body[:at] + rnd.choice(["", *'{}[],:"\\ 1x']).encode() + body[at + 1 :]
            for count in (0, 1, 2, 3, 8, 30):
                self.check(body, *sorted(rnd.randrange(len(body) + 1) for _ in range(count)))
                self.check(damaged, *sorted(rnd.randrange(len(damaged) + 1) for _ in range(count)))

    def test_large_outages_are_read_in_batches_and_endless_ones_are_rejected(self) -> None:
        large = [{"id": str(n), "a": [{"b": "}" * 10}] * 10_000, "c": "x}"} for n in range(21)]  # 4 MB
        items = [*large, *({"id": str(n), "a": {"b": {}}, "c": [{}, {}]} for n in range(5_000))]
        body = dumps(items)
        lists = list(kf.read_array(body[at : at + kf.CHUNK] for at in range(0, len(body), kf.CHUNK)))
        self.assertEqual(list(itertools.chain.from_iterable(lists)), items)
        self.assertGreater(len(lists), 24)
        for start, rest in (
            *((b'[{"id": "', b"a"), (b'[{"id": "', b"}"), (b"[", b" "), (b'[{"id": 1', b"1"), (b'[{"id": [', b'"",')),
            *((b'[{"id": [', b"{},"), (b'[{"a":{},"b":' + b"[" * 500, b"[]")),
        ):
            pieces = itertools.chain([start], itertools.repeat(rest * 90_000, 20))
            error = self.failure(kf.KFError, list, kf.read_array(pieces))
            self.assertEqual(str(error), "GET /outages: an outage longer than 1,048,576 characters", start[:20])


class ChainTests(TestCase):
    """Random valid outages, devices and dates, checked against a simple model that uses exact fractions."""

    def exact(self, text: str) -> Fraction:
        numbers = re.findall("[0-9]+", text)
        year, month, day, hour, minute, second = map(int, numbers[:6])
        fraction = numbers[6] if "." in text else "0"
        offset = 0 if text[-1] in "Zz" else int(f"{text[-6]}1") * (int(numbers[-2]) * 60 + int(numbers[-1]))
        minutes = (date(year, month, day).toordinal() * 24 + hour) * 60 + minute - offset
        return minutes * 60 + second + Fraction(int(fraction), 10 ** len(fraction))

    def moment(self, rnd: random.Random) -> str:
        """Return a time. Equal ones, and some that differ in the last digit, are common."""
        any_day = f"{rnd.randrange(1, 10_000):04}-{rnd.randrange(1, 13):02}-28"
        day, clock = rnd.choice(("2021-12-31", "2022-01-01", any_day)), rnd.choice(words("00 01 12 23 24"))
        clock += ":59:59" if clock == "23" and rnd.random() < 0.5 else ":00:00"
        digits = rnd.choice(words(". .0 .000 .999999999999 .000000000001 .5 .50 .4999999")).rstrip(".")
        zone = rnd.choice(words("Z z +00:00 -00:00 +01:00 -01:00 +14:00 -12:30 +23:59"))
        return f"{day}{rnd.choice('Tt ')}{clock}{'' if clock == '24:00:00' else digits}{zone}"

    def test_the_chain_agrees_with_a_simple_model(self) -> None:
        rnd, api = random.Random(2022), self.api()
        client = self.client(api.url)
        for _ in range(100):
            names = {f"d{n}": f"Device {rnd.randrange(9)} é" for n in rnd.sample(range(12), rnd.randrange(5))}
            outages, since = [], self.moment(rnd)
            for _row in range(rnd.randrange(18)):
                more = rnd.choice(({}, {"x": {"y": [1.5]}}))
                outages.append({**outage(f"d{rnd.randrange(12)}", self.moment(rnd), self.moment(rnd)), **more})
            outages += outages[: rnd.randrange(3)]
            api.healthy.update(zip(LETTERS, (answer(outages), answer(site_info(names)))))
            kept = []
            for row in outages:
                if row["id"] in names and self.exact(row["begin"]) >= self.exact(since):
                    kept.append({**row, "name": names[row["id"]]})
            self.assertEqual(client.handler(kf.SITE, since), kept, since)
            self.assertEqual((api.posted[-1], client.outages_read, client.sent), (kept, len(outages), True))


def broken(good: Any, part: str) -> Iterable[tuple[str, Reply, str]]:
    """Return the ways in which a response of `good` can be cut off or garbled, with a pattern for each message."""
    body, start, squeezed, head = dumps(good), answer(good)[:-3], gzip.compress(dumps(good)), b"HTTP/1.1 200 OK\r\n"
    closed, pieces = "Remote end closed connection without response", answer(**CHUNKED) + chunks(body, 9999)
    return (
        *(("no answer", then_close(b""), closed), ("reset", then_reset(b""), RESET), ("empty", answer(), part)),
        *(("garbage", then_close(b"\x16\x03\x01\x02garbage\r\n\r\n"), ".+"), ("white space", answer(b" \n"), part)),
        *(("status cut", then_close(b"HTTP/1.1 2"), ".+"), ("headers cut", then_close(head + b"Content-Le"), ".+")),
        ("endless headers", then_close(head + b"A: b\r\n" * 200), "got more than 100 headers"),
        ("an endless header", then_close(head + b"A: " + b"b" * 70_000), "got more than 65536 bytes .*"),
        *(("shorter than stated", then_close(start), CUT), ("reset in the body", then_reset(start), RESET)),
        ("no length, cut JSON", then_close(answer(body[:-1], **UNSIZED)), part),
        *(("cut in a chunk", then_close(pieces[:-9]), CUT), ("a bad chunk", then_close(pieces + b"xyz\r\n"), ".+")),
        *(("gzip cut", zipped(squeezed[: len(squeezed) // 2]), part), ("not gzip", zipped(body), DECODE)),
        ("gzip corrupt", zipped(squeezed[:40] + b"\xff" * 9 + squeezed[49:]), DECODE),
        ("HTML", answer(b"<!DOCTYPE html>", Content_Type="text/html"), part),
        *(("in quotes", answer(b' "' + body + b'" '), part), ("a trailing letter", answer(body + b"x"), part)),
        *(("no last chunk", then_close(pieces), ".+"), ("UTF-16", answer(body.decode().encode("utf-16")), part)),
    )


class ServerTests(TestCase):
    """What a server can do, and how the run then ends."""

    def row(self, case: str, code: int, end: str, asked: str, again: str = "got [0-9]+", **script: Any) -> None:
        """Run `main` against an API that replies as `script` says; expect the requests `asked`. `again` is a pattern
        for the reason of each retry, `end` one for the last line of a failed run (`^`: without the request's name).
        """
        with self.subTest(case, **{name: str(replies)[:60] for name, replies in script.items()}):
            api, start = self.api(**script), time.monotonic()
            said, stdout, stderr = self.run_main(KF_BASE_URL=api.url)
            self.assertLess(time.monotonic() - start, 8)
            self.assertEqual((said, api.asked, api.posted), (code, asked, [DUE] * asked.count("P")), stderr)
            lines = []
            for line, letter in LETTERS.items():
                wait = rf"{line}: ({again}); retrying in [0-9.]+ s \(attempt {{}} of 6\)"
                lines += [wait.format(number) for number in range(2, asked.count(letter) + 1)]
            lines += [end[1:] if end.startswith("^") else f"{api.requests[-1].line}: {end}"] if code else []
            self.assertRegex(stderr, "^" + "".join(f"kf_backend: {line}\n" for line in lines) + "$")
            self.assertEqual((stdout == "", api.connections), (code > 0, len(asked)))  # one per request

    def test_rejections_are_retried_up_to_six_attempts(self) -> None:
        for status in STATUSES:
            busy, again = [no(status, "too busy")] * 6, f"got {status}"
            hint = rf'got {status} [A-Z][\w -]+ \("too busy"\) \(6 attempts\)\. '
            script = {"outages": busy[1:], "info": busy[1:], "post": busy[1:]}
            self.row("five times each", 0, "", "O" * 6 + "I" * 6 + "P" * 6, again, **script)
            self.row("outages", 1, f"{hint}{UNSENT}; try again later", "OOOOOO", again, outages=busy)
            self.row("info", 1, f"{hint}{UNSENT}; try again later", "OIIIIII", again, info=busy)
            self.row("post", 1, f"{hint}{REFUSED}; try again later", "OIPPPPPP", again, post=busy)

    def test_other_statuses_end_the_run_at_once(self) -> None:
        key, base = r"check the API key \(KF_API_KEY\)", r"check the base URL \(--base-url or KF_BASE_URL\)"
        both, later = r"check the site ID and the base URL \(--site, --base-url or KF_BASE_URL\)", "; try again later"
        fields = {"Location": self.api().url + "/outages", "Retry_After": "0"}
        for status, phrase, advice in (
            *((401, "Unauthorized", f"; {key}"), (403, "Forbidden", f"; {key}"), (404, "Not Found", f"; {both}")),
            *((405, "Method Not Allowed", f"; {base}"), (410, "Gone", f"; {base}"), (418, ".*", "")),
            *((408, "Request Timeout", later), (425, ".*", later), (413, r"[\w ]+", "; the list is too large")),
            (400, "Bad Request", "; the API rejected the format of the request"),
            *((status, r"[\w ]+", f"; redirects are not followed; {base}") for status in REDIRECTS),
        ):
            problem, reply = rf'got {status} {phrase} ?\("no"\)\. ', [no(status, **fields)]
            self.row("outages", 1, f"{problem}{UNSENT}{advice}", "O", outages=reply)
            self.row("info", 1, f"{problem}{UNSENT}{advice}", "OI", info=reply)
            self.row("post", 1, f"{problem}{REFUSED}{advice}", "OIP", post=reply)
        unclear = dict.fromkeys((201, 202, 204, 206, 501, 505, 599), "")
        for status, advice in {**unclear, 520: later, 524: later}.items():
            reply = [answer(status=204, **UNSIZED) if status == 204 else no(status)]
            self.row("outages", 1, rf"got {status}.*\. {UNSENT}{advice}", "O", outages=reply)
            self.row("post", 3, rf"got {status}.*\. {UNKNOWN}", "OIP", post=reply)

    def test_an_interrupted_get_is_retried_and_none_of_it_is_used(self) -> None:
        advice = r"(check the network and the base URL \(.+\)|try again later)"
        ghosts = [outage("b1", "2022-02-02T00:00:00.000Z"), *ALL]
        for case, reply, text in broken(ghosts, "expected a complete JSON array"):
            self.row(case, 0, "", "OOIP", text, outages=[reply])
            end = rf"{text} \(6 attempts\)\. {UNSENT}; {advice}"
            self.row(case, 1, end, "OOOOOO", text, outages=[reply] * 6)
        for case, reply, text in broken(site_info({**NAMES, "x": "ghost"}), "expected a complete JSON object"):
            self.row(case, 0, "", "OIIP", text, info=[reply])

    def test_an_attempt_ends_after_timeout_without_data(self) -> None:
        start, runs, half, stalling = time.monotonic(), [], answer(Content_Length="9"), threading.Event()
        with ThreadPoolExecutor(9) as pool:
            for name, said, asked in (
                *(("outages", b"", "OOIP"), ("outages", answer(ALL)[:-3], "OOIP"), ("info", half, "OIIP")),
                *(("post", b"", "OIP"), ("post", half, "OIP")),
            ):
                api = self.api(**{name: [then_stall(said, stalling)]})
                runs.append((asked, api, pool.submit(self.client(api.url, timeout=1).handler)))
        self.assertLess(time.monotonic() - start, 15)
        for asked, api, run in runs:
            if asked == "OIP":
                self.assertRegex(str(self.failure(kf.OutcomeUnknown, run.result)), "^POST .*: .*timed out")
            self.assertEqual((asked == "OIP" or run.result(), api.asked), (asked == "OIP" or DUE, asked))
        warned = [record.getMessage() for record in self.logged.buffer if record.name == "kf_backend"]
        self.assertEqual(len([text for text in warned if re.match("GET .*timed out.*; retrying in", text)]), 3, warned)

    def test_broken_bodies_and_rejections_share_one_budget(self) -> None:
        cut, busy, reset = then_close(answer(ALL)[:-1]), no(500), then_reset(b"")
        again, mixed = f"got 500|{CUT}|{RESET}", [busy, cut, busy, cut, reset]
        self.row("five", 0, "", "OOOOOOIP", again, outages=mixed)
        for last, end in ((busy, "got 500 .*"), (cut, CUT), (reset, RESET)):
            self.row("six", 1, rf"{end} \(6 attempts\)\. {UNSENT}; .*", "OOOOOO", again, outages=[*mixed, last])
        end = rf"got 429 Too Many Requests \(2 attempts\)\. {UNSENT}; .*\(Retry-After: 99\)"
        self.row("a long wait", 1, end, "OO", again, outages=[cut, answer({}, 429, Retry_After="99")])

    def test_other_forms_of_good_responses_are_read(self) -> None:
        body, mark = dumps(ALL), b"\xef\xbb\xbf"
        for case, reply in (
            *((f"encoding '{name}'", zipped(body, encoding=name)) for name in ("identity", "")),
            ("white space around it", answer(b"\r\n\t " * 99 + body + b"\n \t\r" * 99)),
            ("a wrong charset", answer(body, Content_Type="text/plain; charset=latin-1")),
            *((name, zipped(gzip.compress(body), encoding=name)) for name in ("gzip", "GZip", "x-gzip")),
            ("gzip in two members", zipped(gzip.compress(body[:99]) + gzip.compress(body[99:]))),
            *(("text", answer(body, Content_Type="text/plain")), ("unsized", then_close(answer(body, **UNSIZED)))),
            *(("a BOM", answer(mark + body)), ("chunked", answer(**CHUNKED) + chunks(body, 7) + b"0\r\n\r\n")),
            ("large, with a NaN that is dropped", answer(b"[" + b'{"id": "x", "a": NaN}, ' * 30_000 + body[1:])),
            ("unsolicited answers", then_drip(answer(ALL) + answer(site_info({})) + answer({}), b"", 0.1, 1)),
        ):
            self.row(case, 0, "", "OIP", outages=[reply])
        self.row("site info", 0, "", "OIP", info=[answer(mark + dumps(SITE_INFO), Content_Type="text/plain")])
        self.row("an unsolicited answer", 0, "", "OIP", info=[then_drip(answer(SITE_INFO) + answer({}), b"", 0.1, 1)])
        for reply in (answer({}), answer(), answer(b" \n"), answer([]), answer({"ok": 1})):
            self.row("a POST is accepted", 0, "", "OIP", post=[reply])

    def test_invalid_data_ends_the_run_at_once(self) -> None:
        nested, first, unsent = b"[" * 100_000, SITE_INFO["devices"][0], rf"\. {UNSENT}"
        invalid, dropped = rf"the response is not valid JSON \(.+\){unsent}", "^GET /outages: a site outage is"
        for case, body, asked, end in (
            *(("not JSON", b"[{]", "O", invalid), ("two arrays", b"[] []", "O", invalid)),
            ("not UTF-8", dumps(ALL)[:-3] + b'\xe9"}]', "O", invalid),
            ("too deep", b'[{"a":{},"b":' + nested + b"]" * 100_000 + b"}]", "O", invalid),
            ("no time", b'[{"id": "b1"}]', "OI", f"^GET /outages: outage 1 has an invalid begin: missing{unsent}"),
            ("a NaN", dumps(ALL)[:-2] + b', "more": NaN}]', "OI", rf"{dropped} not valid JSON \(.+\){unsent}"),
        ):
            self.row(case, 1, end, asked, outages=[answer(body)])
        if hasattr(sys, "get_int_max_str_digits"):
            self.row("digits", 1, invalid, "O", outages=[answer(b'[{"id": %b}]' % (b"1" * 5000))])
        no_site, no_name = "expected a site with an id, a name and devices", "device 2 has no id or name"
        for value, end in (
            *(({}, no_site), ({"id": kf.SITE, "name": ""}, no_site)),
            *(({**SITE_INFO, "name": 1}, no_site), ({**SITE_INFO, "devices": {}}, no_site)),
            *(({**SITE_INFO, "devices": [first, device]}, no_name) for device in (None, "b2", {"id": "b2"})),
            *(({**SITE_INFO, "devices": [first, {**device, "name": "x"}]}, no_name) for device in ({}, {"id": 2})),
            ({**SITE_INFO, "devices": [first, {"id": "b2", "name": None}]}, no_name),
            ({**SITE_INFO, "devices": [first, {**first, "name": "x"}]}, "device 2 is listed twice with .*names"),
            (site_info({}, "\x1b[2Jelse"), rf"requested site '{kf.SITE}' but got '\?\[2Jelse'"),
        ):
            self.row(str(value)[:90], 1, f"^GET /site-info: {end}{unsent}", "OI", info=[answer(value)])
        for body in (nested, b'"\xed\xa0\x80"'):
            self.row("site info", 1, invalid, "OI", info=[answer(b'{"a": ' + body + b"}")])
        self.row("a duplicate", 0, "", "OIP", info=[answer({**SITE_INFO, "devices": [*SITE_INFO["devices"], first]})])
        for encoding in ("br", "zstd", "deflate", "gzip, gzip", "identity, gzip"):
            end = f"unexpected Content-Encoding: {encoding}{unsent}"
            self.row(encoding, 1, end, "O", outages=[zipped(b"[]", encoding=encoding)])

    def test_a_post_without_a_usable_answer_is_never_sent_twice(self) -> None:
        html, told = "got 200 with a non-JSON response", 'got 200 with the message "{}"'
        early = answer(status=103, **UNSIZED)
        for case, reply, end in broken(SITE_INFO, html):
            if case not in ("empty", "white space", "headers cut"):  # status 200 without a body
                self.row(case, 3, rf"{end}\. {UNKNOWN}", "OIP", post=[reply])
        for case, reply, end in (
            *(("not HTTP", then_close(b"\0\xff" * 99), ".+"), ("no status", then_close(b"HTTP/1.1 a\r\n\r\n"), ".+")),
            ("an endless status", then_close(b"HTTP/1.1 200 " + b"x" * 70_000), ".+"),
            ("early hints", then_close(early), "got 103.*"),
            ("switching protocols", then_close(early.replace(b"103", b"101")), "got 101 Switching Protocols"),
            *(("not UTF-8", answer(b'"\xe9"'), html), ("nested", answer(b"[" * 100_000), html)),
            ("another", answer({"errorType": "E", "errorMessage": f"no {KEY}\n"}), told.format(r"no \[key\]")),
            ("a blank message", answer({"errorType": "E", "errorMessage": " "}), told.format("errorMessage")),
            ("a claim to be a proxy", then_close(b"Tunnel connection failed: 403\r\n\r\n"), ".+"),
            *(("an error", no(200), told.format("no")), ("a third", answer({"errorType": [1]}), told.format(r"\[1\]"))),
            ("endless", then_drip(answer(**UNSIZED), b" " * kf.CHUNK), "the response is longer than 1,048,576 bytes"),
            ("an unexpected encoding", zipped(b"{}", encoding="br"), "unexpected Content-Encoding: br"),
        ):
            self.row(case, 3, rf"{end}\. {UNKNOWN}", "OIP", post=[reply])
            self.row(case, 3, rf"{end} \(3 attempts\)\. {UNKNOWN}", "OIPPP", post=[no(503), no(429), reply])

    def test_a_rejection_with_a_broken_body_is_still_a_rejection(self) -> None:
        end = rf"got 403 Forbidden\. {REFUSED}; check the API key \(KF_API_KEY\)"
        bodies = (b"<p>", b"[]", b"null", b"\xff", b"[" * 10**5)
        reply: Any
        for case, reply in (
            ("cut", [then_close(answer(b'{"mess', status, Content_Length="99")) for status in (503, 403)]),
            ("reset", [then_reset(answer(b'{"mess', status, Content_Length="99")) for status in (503, 403)]),
            ("endless", [then_drip(answer(b"", status, **UNSIZED), b" " * kf.CHUNK) for status in (503, 403)]),
            *((repr(text[:9]), [answer(text, status) for status in (503, 403)]) for text in bodies),
            *((name, [zipped(b"{}", status, name) for status in (503, 403)]) for name in ("gzip", "br")),
        ):
            self.row(case, 0, "", "OOIPP", outages=reply[:1], post=reply[:1])
            self.row(case, 1, end, "OIP", post=reply[1:])
        self.row("slow", 0, "", "OOIP", outages=[then_drip(answer(b"", 503, **UNSIZED), b" ", 0.1, 99)])

    def test_waits_grow_with_jitter_and_total_at_most_30_s_unless_retry_after_is_longer(self) -> None:
        soon, far = (formatdate(time.time() + seconds, usegmt=True) for seconds in (40, 300))
        odd = "-5|1.5|1e3|soon|NaN|5s|\u0665|2022-01-01|0|| |5 s|Sat, 99 Foo 2022|Sat, 01 Jan 99999 00:00:00 GMT"
        odd += "|Sat, 01 Jan 2022 00:00:00 GMT|Sat, 01 Jan 99999999999 00:00:00 GMT|1 Jan , 2022"
        for given, shortest, longest in (
            *(("7", 7.0, 7), (" 30 ", 30, 30), ("060", 60, 60), (soon, 20, 40)),
            *((given, 0.5, 1) for given in odd.split("|")),
        ):
            with self.subTest(given), mock.patch("time.sleep") as sleep:
                client, response = self.client(kf.BASE_URL, backoff=1.0), HTTPResponse(headers={"Retry-After": given})
                client._doing = "GET /outages"
                client._retry.increment("GET", "/outages", response=response).sleep(response)
                self.assertTrue(shortest <= sleep.call_args[0][0] <= longest, sleep.call_args)
        for given in ("61", "86400", "1" + "0" * 20, far, "Fri, 31 Dec 9999 23:59:59 GMT"):
            wait = rf"; try again after the requested delay \(Retry-After: {given}\)"
            reply = [no(429, Retry_After=given)]
            self.row(given, 1, rf'got 429 Too Many Requests \("no"\)\. {UNSENT}{wait}', "O", outages=reply)
            self.row(given, 1, rf'got 429 Too Many Requests \("no"\)\. {REFUSED}{wait}', "OIP", post=reply)
        totals: set[float] = set()
        for _ in range(50):
            client = self.client(kf.BASE_URL, backoff=kf.BACKOFF)
            client._doing, retry = "GET /outages", client._retry
            with mock.patch("time.sleep") as sleep:
                for _ in range(5):
                    retry = retry.increment("GET", "/", error=ProtocolError("cut"))
                    retry.sleep()
            waits = [call[0][0] for call in sleep.call_args_list]
            self.assertTrue(all(most / 2 <= wait <= most for wait, most in zip(waits, (1, 2, 4, 8, 15))), waits)
            totals.add(sum(waits))
        self.logged.flush()  # forget these waits: none of them was real
        self.assertTrue(max(totals) <= 30 and len(totals) > 10, totals)

    def test_whatever_the_faults_a_list_is_accepted_once_or_the_error_is_true(self) -> None:
        rnd, api = random.Random(11), self.api()
        accepted: list[bool | None] = []
        sent, seen = {"sent": True, "KFError": False, "OutcomeUnknown": None}, set()

        def weather(line: str) -> Iterator[Reply]:
            whole, busy, reset = api.healthy[line], no(rnd.choice(STATUSES)), then_reset(b"")
            cut = then_close(whole[:-1])
            while True:
                said, ok = rnd.choice([(whole, True)] * 4 + [(busy, False)] * 4 + [(reset, None), (cut, None)])
                accepted.extend([ok] if line.startswith("POST") else [])
                yield said

        client = self.client(api.url)
        for _ in range(50):
            accepted.clear()
            api.requests.clear()
            api.script = {line: weather(line) for line in LETTERS}
            try:
                self.assertEqual(client.handler(), DUE)
                outcome = "sent"
            except kf.KFError as error:
                outcome = type(error).__name__
            seen.add(outcome)
            self.assertIs(client.sent, sent[outcome])
            times = accepted.count(True), accepted.count(None)
            self.assertEqual(times, (outcome == "sent", outcome == "OutcomeUnknown"))
            self.assertEqual(api.posted, [DUE] * len(accepted))
        self.assertEqual(seen, set(sent))


class ClientTests(TestCase):
    """What only programs that use the client see."""

    def test_attributes_tell_what_a_run_did_and_each_step_works_alone(self) -> None:
        outages = [answer(ALL), answer(ALL[:1]), no(500), then_close(answer(ALL)[:-1]), answer(status=403)]
        api = self.api(post=[answer({}), then_close(b"")], outages=outages)
        client = self.client(api.url + "/")
        self.assertEqual((client.site_info, client.outages_read, client.sent), (site_info({}, "", ""), 0, False))
        self.assertIs(type(client.session), requests.Session)
        for adapter in client.session.adapters.values():
            self.assertLessEqual({429, 500}, set(vars(adapter)["max_retries"].status_forcelist))
        self.assertEqual(client.handler(kf.SITE, "2022-01-01"), DUE)
        self.assertEqual((client.site_info, client.outages_read, client.sent), (SITE_INFO, 4, True))
        self.failure(kf.UsageError, client.handler, "")
        self.assertIs(client.sent, False)
        self.failure(kf.OutcomeUnknown, lambda: client.handler(site=kf.SITE, date=date(2022, 2, 1)))
        self.assertEqual((api.posted, client.outages_read, client.sent), ([DUE, DUE[:1]], 1, None))
        with mock.patch.object(requests.Response, "close", autospec=True, side_effect=requests.Response.close) as close:
            error = self.failure(kf.KFError, client.handler)
        self.assertEqual((error.status, error.message, error.check, client.sent), (403, None, ("api_key",), False))
        error = self.failure(kf.OutcomeUnknown, self.client(self.api(post=[no(501)]).url).handler)
        self.assertEqual((error.status, error.message), (501, "no"))
        self.assertEqual(close.call_count, 2)  # the one that was cut, and the 403; requests never sees the 500
        api, due = self.api(), list(kf.site_outages_of(ALL, NAMES, kf.parse_since(kf.SINCE)))
        client = self.client(api.url)
        self.assertEqual(list(client._get_outages()), ALL)
        self.assertEqual(client._get_site_info(kf.SITE), SITE_INFO)
        self.assertEqual(client._filter_outages(iter(ALL), SITE_INFO, date(2022, 1, 1)), DUE)
        self.assertEqual(client._post_site_outages(kf.SITE, due), DUE)
        for step, value, result in (
            ("_get_outages", ALL[3:], DUE[1:]),
            ("_get_site_info", site_info({"b2": "x"}), [{**DUE[0], "name": "x"}]),
            ("_filter_outages", [], []),
            ("_post_site_outages", "posted", "posted"),
        ):
            with self.subTest(step), mock.patch.object(client, step, return_value=value):
                api.requests.clear()
                self.assertEqual(client.handler(), result)
                self.assertEqual(api.posted, [] if step == "_post_site_outages" else [result])

    def test_each_request_has_its_headers_and_the_site_as_one_path_segment(self) -> None:
        api = self.api(post=[answer(status=503)])
        self.client(api.url).handler()
        for request in api.requests:
            length, kind = (str(len(request.body)), "application/json") if request.body else (None, None)
            expected: dict[str, str | None] = {"x-api-key": KEY, "Authorization": None, "Content-Type": kind}
            expected.update({"User-Agent": f"kf_backend/{kf.__version__}", "Accept": "application/json"})
            expected.update({"Accept-Encoding": "gzip", "Connection": "close", "Content-Length": length})
            for name, text in expected.items():
                self.assertEqual(request.headers.get_all(name, []), [] if text is None else [text], name)
        self.assertEqual(api.posted, [DUE, DUE])
        for site, segment in (
            *(("a/b", "a%2Fb"), ("a?b", "a%3Fb"), ("a#b", "a%23b"), ("../outages", "..%2Foutages")),
            *(("%2e%2e", "%252e%252e"), ("a b", "a%20b"), ("é", "%C3%A9"), ("...", "..."), ("\r\n", "%0D%0A")),
        ):
            api = self.api()
            info, post = f"GET /site-info/{segment}", f"POST /site-outages/{segment}"
            api.healthy.update({info: answer(site_info(NAMES, site)), post: answer({})})
            self.client(api.url).handler(site)
            self.assertEqual(api.asked, f"O({info})({post})")
        refused: list[tuple[Any, str]] = [("", "''"), (".", "'.'"), ("..", "'..'"), ("a\ud800", r"'a\ud800'")]
        api = self.api()
        for given, text in (*refused, (None, "None")):
            error = self.failure(kf.UsageError, self.client(api.url).handler, given)
            self.assertEqual((str(error), error.check), (f"invalid site ID {text}", ("site",)))
        self.assertEqual(api.connections, 0)

    def test_the_key_never_appears(self) -> None:
        """`failure` looks for it in each error and its traceback, and `tearDown` in the log."""
        self.assertNotIn(KEY, repr(self.client(kf.BASE_URL)) + str(vars(self.client(kf.BASE_URL))))
        for said, shown in (
            (f"no {KEY}\x1b[31m for\nyou", "no [key]?[31m for you"),
            ("x" * 190 + KEY * 9, "x" * 190 + "[key][key]..."),
        ):
            error = self.failure(kf.KFError, self.client(self.api(info=[no(403, said)]).url).handler)
            self.assertEqual(error.message, shown)
        for name, reply in (
            *(("info", answer(site_info({}, KEY))), ("info", no(429, Retry_After=KEY))),
            *(("info", no(302, Location=f"https://h/{KEY}")), ("info", answer({}, Content_Encoding=KEY))),
            ("info", then_close(f"HTTP/1.1 {KEY}\r\n\r\n".encode())),
            ("outages", answer([outage("b1", end="2" * 90 + KEY)])),
        ):
            error = self.failure(kf.KFError, self.client(self.api(**{name: [reply] * 6}).url).handler)
            self.assertNotIn(KEY[:6], str(error))

    def test_temporary_files_are_limited_and_deleted(self) -> None:
        large, folder = [answer(b"[" + b" " * 99_999 + dumps(ALL)[1:])], self.path("x", "").parent
        endless = then_drip(answer(b"[", **UNSIZED), b" " * kf.CHUNK)
        self.opened.enter_context(mock.patch.multiple(kf, MEMORY_MAX=1000, OUTAGES_MAX=200_000, SITE_INFO_MAX=1000))
        self.opened.enter_context(mock.patch.object(tempfile, "tempdir", str(folder)))
        self.assertEqual(self.client(self.api(outages=large).url).handler(), DUE)
        for script, text in (
            ({"outages": [endless]}, "GET /outages: the response is longer than 200,000 bytes"),
            ({"info": [endless]}, f"GET /site-info/{kf.SITE}: the response is longer than 1,000 bytes"),
            ({"outages": large, "info": [no(404, "Not Found")]}, f"GET /site-info/{kf.SITE}: got 404 Not Found"),
        ):
            self.assertEqual(str(self.failure(kf.KFError, self.client(self.api(**script).url).handler)), text)
        self.assertEqual(os.listdir(folder), ["x"])
        in_chunks = [answer(**CHUNKED) + chunks(b"[" + b" " * 99_999 + dumps(ALL)[1:], 999) + b"0\r\n\r\n"]
        nowhere = mock.patch.object(tempfile, "tempdir", str(folder / "nowhere"))
        full = mock.patch("tempfile.TemporaryFile", return_value=io.BufferedRandom(io.FileIO("/dev/full", "r+")))
        for patch, reply, text in ((nowhere, large, "No such file .*nowhere"), (full, in_chunks, "No space left on")):
            with patch:
                error = self.failure(kf.KFError, self.client(self.api(outages=reply).url).handler)
            self.assertRegex(str(error), f"^GET /outages: temporary file: .*{text}")

    def test_no_response_fills_memory(self) -> None:
        bomb = gzip.compress(b" " * 2**24) * 3  # 48 MiB
        rows, redirect = b",".join([dumps(outage("x"))] * 40_000), answer(status=302, Location="/", **UNSIZED)
        self.opened.enter_context(mock.patch.multiple(kf, MEMORY_MAX=2**20, OUTAGES_MAX=2**25, SITE_INFO_MAX=2**20))
        for case, script in (
            ("a bomb", {"outages": [zipped(gzip.compress(b"[") + bomb)]}),
            ("a text bomb", {"info": [zipped(gzip.compress(b'{"id": "') + bomb)]}),
            ("a rejection", {"post": [zipped(gzip.compress(b'{"message": "') + bomb, 403)]}),
            ("a redirect", {"outages": [then_drip(redirect, b"x" * 2**20)]}),
            ("other sites", {"outages": [answer(b"[" + rows + b"]")]}),
        ):
            handler = self.client(self.api(**script).url).handler
            with self.subTest(case):
                tracemalloc.start()
                self.opened.callback(tracemalloc.stop)
                handler() if case == "other sites" else self.failure(kf.KFError, handler)
                self.assertLess(tracemalloc.get_traced_memory()[1], (8 if case == "other sites" else 40) * 2**20)

    def test_progress_counts_bytes_and_ends_with_equal_numbers(self) -> None:
        body = dumps([outage("x")] * 20_000)
        in_chunks = answer(**CHUNKED) + chunks(body, 9000) + b"0\r\n\r\n"
        for reply, expected in ((answer(body), len(body)), (in_chunks, None), (zipped(gzip.compress(body)), None)):
            with self.subTest(reply[:90]):
                told: list[tuple[int, int | None]] = []
                client = self.client(self.api(outages=[reply]).url)
                client.on_progress = lambda *numbers, told=told: told.append(numbers)
                client.handler()
                self.assertEqual([numbers[0] for numbers in told], sorted(numbers[0] for numbers in told))
                self.assertEqual({numbers[1] for numbers in told[:-1]}, {expected})
                self.assertEqual((told[-1], len(told) > 9), ((len(body), len(body)), True))

    def post(self, client: kf.KFClient) -> Any:
        return client._post_site_outages("x", [])

    def test_a_request_that_cannot_connect_is_not_sent_and_is_retried(self) -> None:
        url = self.api(listening=False).url
        unknown = mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(socket.EAI_NONAME, "Name not known"))
        for base, text, patch in (
            (url, "Connection refused", contextlib.nullcontext()),
            ("https://api.invalid/v1", "Name not known", unknown),
        ):
            client = self.client(base)
            for call, line in ((kf.KFClient.handler, "GET /outages"), (self.post, "POST /site-outages/x")):
                with patch:
                    error = self.failure(kf.KFError, call, client)
                self.assertEqual((str(error), client.sent), (f"{line}: {text} (6 attempts)", False))
                self.assertEqual((error.advice, error.check), ("check the network and the base URL", ("base_url",)))
        for step, args, asked in (("handler", (), "OIP"), ("_post_site_outages", (kf.SITE, DUE), "P")):
            api = self.api(listening=False)
            with mock.patch("time.sleep", side_effect=lambda seconds, api=api: api.thread.ident or api.listen()):
                self.assertEqual(getattr(self.client(api.url), step)(*args), DUE)
            self.assertEqual(api.asked, asked)

    def test_https_needs_a_trusted_certificate_and_netrc_is_ignored(self) -> None:
        def corrupt(sock: socket.socket) -> None:
            os.write(sock.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            sock.recv(1)

        tls, netrc = self.tls(), self.path(".netrc", "default login user password word\n")
        os.environ.update(HOME=str(netrc.parent), NETRC=str(netrc))
        for api in (self.api(post=[no(500)]), self.api(tls=tls, post=[no(500)])):
            self.assertEqual(self.client(api.url).handler(), DUE)
            self.assertEqual(api.posted, [DUE, DUE])
            sent = {(request.headers["Authorization"], request.headers["x-api-key"]) for request in api.requests}
            self.assertEqual(sent, {(None, KEY)})
        api = self.api(tls=tls, post=[corrupt])
        self.failure(kf.OutcomeUnknown, self.client(api.url).handler)
        self.assertEqual(api.asked, "OIP")  # a corrupt record never causes a second POST
        for bundle, text, connections in (("", "certificate verify failed", 1), ("/no/ca.pem", "/no/ca.pem", 0)):
            api, os.environ["REQUESTS_CA_BUNDLE"] = self.api(tls=tls), bundle
            self.assertIn(text, str(self.failure(kf.KFError, self.client(api.url).handler)))
            self.assertEqual((api.connections, api.requests), (connections, []))

    def test_a_proxy_is_used_only_for_https_and_never_sees_the_key(self) -> None:
        api, proxy = self.api(tls=self.tls()), self.api()
        connect = f"CONNECT {api.address}"

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                for piece in iter(lambda: source.recv(65536), b""):
                    sink.sendall(piece)
                sink.shutdown(socket.SHUT_WR)

        def tunnel(sock: socket.socket) -> None:
            sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with socket.create_connection(("127.0.0.1", api.server_address[1])) as onward:
                there = threading.Thread(target=pump, args=(sock, onward))
                there.start()
                pump(onward, sock)
                sock.shutdown(socket.SHUT_RD)  # the client may keep its end open
                there.join()

        proxy.script[connect] = iter([tunnel] * 9)
        os.environ.update(dict.fromkeys(words("HTTP_PROXY http_proxy ALL_PROXY all_proxy HTTPS_PROXY"), proxy.url))
        for url, exempt, asked in ((self.api().url, "", ""), (api.url, "", connect), (api.url, "127.0.0.1", connect)):
            os.environ["NO_PROXY"] = exempt
            self.assertEqual(self.client(url).handler(), DUE)
            self.assertEqual(proxy.asked, f"({asked})" * 3 if asked else "")
        self.assertEqual(({request.headers["x-api-key"] for request in proxy.requests}, api.asked), ({None}, "OIPOIP"))
        os.environ["NO_PROXY"] = ""
        proxy.script[connect] = iter([tunnel] * 9)
        drop = [then_close(b"")]  # by the API, not by the proxy: a GET is retried, and a POST may have been applied
        api.script = {"GET /outages": iter(drop), f"POST /site-outages/{kf.SITE}": iter(drop)}
        self.failure(kf.OutcomeUnknown, self.client(api.url).handler)
        self.assertEqual(api.asked, "OIPOIP" + "OOIP")

    def test_a_proxy_error_names_the_variable_and_never_a_password(self) -> None:
        os.environ["REQUESTS_CA_BUNDLE"] = str(self.path("cert.pem", CERTIFICATE))
        down, refused = self.api(listening=False).url, r"Connection refused \(6 attempts\)"
        for url, text in (
            (down.replace("//", "//user:pass-word@"), refused),
            (down.replace("//", '//user:"pass-word@'), f"(invalid URL|{refused})"),
            *((f"{scheme}://user:pass-word@h:port", "invalid URL") for scheme in words("http foo socks5")),
            ("socks5://user:pass-word@h", "SOCKS needs the package PySocks"),
        ):
            os.environ["HTTPS_PROXY"] = url
            client = self.client("https://api.invalid/v1")
            for call in (kf.KFClient.handler, self.post):
                error = self.failure(kf.KFError, call, client)
                self.assertRegex(str(error), rf": proxy \(HTTPS_PROXY or ALL_PROXY\): {text}$")

    def test_a_reason_is_never_empty_and_names_the_file(self) -> None:
        wrapped = requests.ConnectionError(ConnectionResetError(104, "Reset by peer"))
        denied = PermissionError(13, "Permission denied", "/a/b"), "[Errno 13] Permission denied: '/a/b'"
        for error, text in ((ValueError(), "ValueError"), (OSError(), "OSError"), denied, (wrapped, "Reset by peer")):
            self.assertEqual(kf.root_cause(error), (text, False))
        self.assertEqual(kf.root_cause(OSError("Tunnel")), ("proxy (HTTPS_PROXY or ALL_PROXY): Tunnel", True))


class ReportTests(TestCase):
    def report(self, names: Mapping[str, str], spans: Mapping[str, Any], columns: int = 80, name: str = "Site") -> str:
        """Return the report of outages with these `spans`, in days since the date."""

        def at(days: float) -> str:
            return (datetime(2022, 1, 1) + timedelta(days=days)).isoformat(timespec="milliseconds") + "Z"

        pairs = [(device, at(begin), at(end)) for device in spans for begin, end in spans[device]]
        given = [kf.SiteOutage(id=id, begin=begin, end=end, name=names[id]) for id, begin, end in pairs]
        text = kf.report(site_info(names, "site", name), given, kf.parse_time(kf.SINCE)[0], columns)
        for line in text.split("\n"):
            self.assertEqual((line, kf.width(line) <= columns), (line.rstrip(), True))
        return text

    def test_a_report_lists_or_counts_the_devices_without_outages(self) -> None:
        names = {"b1": "Battery 1", "b2": "电池 2", "b3": "Batterie é电", "b4": ""}
        lines = self.report(names, {"b1": [(0, 10.5), (4, 5), (20, 20.25)], "b3": [(10, 40)]}).split("\n")
        self.assertEqual(lines[2], "Device        Outages  Downtime    2022-01-01                         2022-02-10")
        self.assertEqual(lines[3], "Battery 1           3  10 d 18 h   ############..........#......................")
        self.assertEqual(lines[4:], [f"Batterie é电        1  30 d 0 h    {'.' * 11}{'#' * 34}", "No outages: 电池 2,"])
        many, head = {f"d{n}": f"Device {n}" for n in range(9)}, "Outages since 2022-01-01: Site (site)"
        self.assertEqual(self.report(many, {}, 60), f"{head}\nNo outages: 9 devices")
        self.assertEqual(self.report(many, {}, 120), f"{head}\nNo outages: {', '.join(many.values())}")
        self.assertEqual(self.report({}, {}), head)
        self.assertRegex(self.report({"d": "D" * 99}, {"d": [(0, 1)]}, 60), r"(?s)^(?!.*No outages).*\nD{19}~ +1 ")

    def test_no_line_is_wider_than_the_terminal_and_columns_are_aligned(self) -> None:
        names = {"b1": "B" * 200, "b2": "电池" * 60, "b3": "e\u0301\u20dd" * 90, "b4": FARSI, "b5": "🔋", "b6": ""}
        names["b7"] = "\x1b[31mred\x1b[0m\n\x9b2J\u202e"
        many: Any = [(n / 24, n / 24 + 0.5) for n in range(2_000)]
        late: Any = {"b1": [(0, 2_900_000)], "b3": [(5, 2)]}
        old = kf.report(SITE_INFO, [], kf.parse_time("0001-01-01T00:00:00+05:00")[0], 80)  # in the year 0 in UTC
        self.assertRegex(old, "^Outages since 0001-01-01: ")
        cases: list[Any] = [{}, {"b1": [(0, 0)]}, {"b1": many, "b4": many[:1]}, late]
        for columns in (20, 60, 80, 500):
            for spans in (*cases, {device: [(0, 1)] for device in names}):
                text = self.report(names, spans, columns, name="电池\x1b[2J" * 50)
                self.assertNotRegex(text, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]")
                self.assertEqual("#" in text, bool(spans) and columns > 30, text)
                wide = [kf.width(line) for line in text.split("\n") if "#" in line]
                self.assertTrue(len(spans) < 7 or set(wide) <= {columns}, text)

    def test_overlapping_outages_count_once_and_a_timeline_marks_them(self) -> None:
        spans: Any
        for case, spans, downtime in (
            *(("apart", [(0, 1), (2, 3)], "2 d 0 h"), ("touching", [(0, 1), (1, 2)], "2 d 0 h")),
            *(("overlapping", [(0, 2), (1, 3)], "3 d 0 h"), ("the same twice", [(0, 1), (0, 1)], "1 d 0 h")),
            ("nested", [(0, 4), (1, 2), (3, 3.5)], "4 d 0 h"),
            ("unordered", [(4, 6), (0, 1), (5, 7)], "4 d 0 h"),
            ("long, then short, then apart", [(0, 10), (1, 2), (9, 12), (20, 21)], "13 d 0 h"),
            *(("instants", [(0, 0), (1, 1)], "0 min"), ("ends before it begins", [(1, 2), (5, 3)], "1 d 0 h")),
            *(("minutes", [(0, 1 / 36)], "40 min"), ("hours", [(0, 5 / 36)], "3 h 20 min")),
            *(("near an hour", [(0, 3599 / 86_400)], "1 h 0 min"), ("near a day", [(0, 86_399 / 86_400)], "1 d 0 h")),
            ("a day and an hour", [(0, 25 / 24)], "1 d 1 h"),
        ):
            text = self.report({"b1": "B"}, {"b1": spans})
            self.assertRegex(text, rf"(?m)^B +{len(spans)}  {downtime} +[#.]{{51}}$", case)
        for spans, expected in (
            *(([(0.0, 10)], "#" * 51), ([(0, 0), (10, 10)], "#" + "." * 49 + "#")),
            ([(0.0, 1), (9, 10)], "######" + "." * 39 + "######"),
            ([(5, 5), (9.999, 10)], "." * 25 + "#" + "." * 24 + "#"),
        ):
            self.assertIn(f"  {expected}", self.report({"b1": "B"}, {"b1": spans}).split("\n")[3])
        for text, columns, fitted in (
            *(("abc", 3, "abc  "), ("", 0, "     "), ("abcde", 5, "abcde"), ("abcdef", 6, "abcd~")),
            *(("电池", 4, "电池 "), ("电池电", 6, "电池~"), ("电a池a", 6, "电a~ ")),
            *(("e\u0301\u20dda", 2, "e\u0301\u20dda   "), (FARSI, 7, FARSI[:-3] + "~")),
        ):
            self.assertEqual((kf.width(text), kf.fit(text, 5), kf.width(kf.fit(text, 5))), (columns, fitted, 5))


class DemoTests(TestCase):
    def test_the_demo_answers_like_the_real_api(self) -> None:
        threads = threading.enumerate()
        with mock.patch("socket.getfqdn", side_effect=AssertionError("name looked up")), kf.demo_api() as url:
            client = self.client(url)
            self.assertEqual((len(client.handler()), client.outages_read), (10, 108))
            outages = list(client._get_outages())
            self.assertEqual(outages, sorted(outages, key=lambda outage: outage["id"]))
            names = kf.device_names(client.site_info)
            begins = sorted(outage["begin"] for outage in outages if outage["id"] in names)
            self.assertEqual((len(names), len(begins)), (8, 18))
            self.assertEqual(begins[7:9], ["2021-12-31T23:59:59.999Z", kf.SINCE])
            self.assertEqual(self.failure(kf.KFError, client.handler, "elsewhere").message, "Site not found")
            [thread] = [thread for thread in threading.enumerate() if thread not in threads]
            used = time.process_time()
            time.sleep(0.3)
            self.assertLess(time.process_time() - used, 0.15)  # its thread is idle
        thread.join(20)
        self.assertFalse(thread.is_alive())


class CommandLineTests(TestCase):
    def test_a_run_reports_on_stdout_and_a_dry_run_prints_only_json_there(self) -> None:
        api = self.api()
        code, stdout, stderr = self.run_main(KF_BASE_URL=f" {api.url}/\r\n", KF_API_KEY=f" {KEY}\n")
        verdict = self.normal(f"Sent 2 of 4 outages to {api.url} in 0.0 s.\n")
        self.assertEqual((code, self.normal(stdout), stderr, api.posted), (0, REPORT + verdict, "", [DUE]))
        code, stdout, stderr = self.run_main("--dry-run", KF_BASE_URL=api.url)
        self.assertEqual((code, stdout, api.asked), (0, json.dumps(DUE, indent=2) + "\n", "OIPOI"))
        self.assertEqual(stderr, REPORT + "Dry run: 2 of 4 outages would be sent.\n")
        self.assertEqual(self.run_main("-q", "--dry-run", KF_BASE_URL=api.url), (0, stdout, ""))
        for columns, width in (("120", 120), ("60", 60), ("", 80)):
            with mock.patch("os.get_terminal_size", return_value=os.terminal_size((0, 0))):
                stdout = self.run_main(KF_BASE_URL=api.url, COLUMNS=columns)[1]
            self.assertEqual(max(map(len, stdout.splitlines())), width)
        with io.TextIOWrapper(io.BytesIO(), "ascii") as few_letters:  # others are shown as escapes
            self.on(few_letters)
            few_letters.seek(0)
            self.assertIn(r"Batterie \u21162", few_letters.read())

    def test_options_and_defaults_reach_the_client(self) -> None:
        api = self.api()
        for argv, kept in (
            ("--since=2022-02-01 --base-url URL", 1),
            ("--base-url=URL/ --since 2021-01-01T00:00+01:00", 3),
            (f"-q --deadline 86400 --timeout 86400 --site {kf.SITE} --base-url URL", 2),
        ):
            said = self.run_main(*words(argv.replace("URL", api.url)), KF_BASE_URL="https://api.invalid")
            self.assertEqual((said[0], len(api.posted[-1]), said[2], said[1] == ""), (0, kept, "", "-q" in argv))
        for argv, timeout, deadline in (("", 30, 600), ("--timeout 7 --deadline 9", 7, 9)):
            with mock.patch.object(kf, "KFClient", side_effect=kf.KFError("made")) as made:
                self.assertEqual(self.run_main(*words(argv))[0], 1)
            self.assertEqual((made.call_args[0], made.call_args[1]["timeout"]), ((kf.BASE_URL, KEY), timeout))
            with mock.patch("threading.Timer", wraps=threading.Timer) as timer:
                self.run_main(*words(argv), KF_BASE_URL=api.url)
            self.assertEqual(timer.call_args[0][0], deadline)
        client = kf.KFClient(kf.BASE_URL, KEY)
        self.assertEqual((client.base_url, client.timeout, client.dry_run, kf.BACKOFF), (kf.BASE_URL, 30, False, 1))
        for columns in ("60", "80", "120"):
            code, stdout, stderr = self.run_main("-h", COLUMNS=columns)
            self.assertEqual((code, stderr, max(map(len, stdout.splitlines())) <= max(int(columns), 85)), (0, "", True))
        self.assertEqual(self.run_main("--version"), (0, f"kf_backend {kf.__version__}\n", ""))

    def test_verbose_logs_each_request_and_quiet_only_errors(self) -> None:
        again = "kf_backend: GET /outages: got 500; retrying in N s (attempt 2 of 6)\n"
        told = f"{again}kf_backend: GET /outages: 200 in N s, {len(dumps(ALL))} bytes\n"
        told += f"kf_backend: GET /site-info/{kf.SITE}: 200 in N s, {len(dumps(SITE_INFO))} bytes\n"
        told += f"kf_backend: POST /site-outages/{kf.SITE}: 200 in N s, {len(json.dumps(DUE))} bytes\n"
        for option, expected in (("", again), ("-q", ""), ("--quiet", ""), ("-v", told), ("--verbose", told)):
            code, _, stderr = self.run_main(*words(option), KF_BASE_URL=self.api(outages=[no(500)]).url)
            self.assertEqual((code, self.normal(stderr)), (0, expected), option)
        with mock.patch("time.monotonic", side_effect=itertools.count(1000, 2.5)):
            _, stdout, stderr = self.run_main("-v", KF_BASE_URL=self.api().url)
        self.assertRegex(stderr + stdout, r"(?s)GET /outages: 200 in [1-9]\.[0-9]+ s.* in [1-9][0-9]\.[0-9] s\.\n$")

    def test_a_usage_error_prints_a_line_and_makes_no_request(self) -> None:
        api, url, not_allowed = self.api(), "check --base-url or KF_BASE_URL", "not allowed with argument"
        date, key = rf"' is not an ISO 8601 date .*\. {UNSENT}; check --since", f"{UNSENT}; check KF_API_KEY"
        see, limits = r" \(see --help\)", "--timeout and --deadline must be more than 0 and at most 86400 seconds"
        for argv, text in (
            *((f"{name} {n}", limits) for name in ("--timeout", "--deadline") for n in words("0 -1 nan inf 86401")),
            ("--timeout x", "argument --timeout: invalid float value: 'x'"),
            (f"--timeout {KEY}", r'argument --timeout: invalid float value: "\[key\]"'),
            *((f"--dead{end}", "unrecognized arguments: --dead") for end in ("=x", " 5", f" {KEY}")),
            *((f"{start}{KEY}", "unrecognized arguments") for start in ("", "-k", "--", "--not-a-key1")),
            ("--since", "argument --since: expected one argument"),
            ("--verbose=another", "argument -v/--verbose: ignored explicit argument"),
            ("-q -v", f"argument -v/--verbose: {not_allowed} -q/--quiet"),
            ("--demo --base-url https://h", f"argument --base-url: {not_allowed} --demo"),
            *((f"--site={site}", rf"invalid site ID '{site}'\. {UNSENT}; check --site") for site in ("", "..")),
            *(("--since x", f"'x{date}"), (f"--since {KEY}", rf"'\[key\]{date}")),
            ("--base-url http://h", rf"the base URL must use https \(.*\)\. {UNSENT}; {url}"),
            ("--base-url=", rf"the base URL is not a valid URL\. {UNSENT}; {url}"),
        ):
            for quiet in ("", "-q")[: 1 if argv == "-q -v" else 2]:
                said = self.run_main(*words(f"{argv} {quiet}"), KF_BASE_URL=api.url)
                self.assertEqual((said[0], said[1], api.connections), (2, "", 0), argv)
                self.assertRegex(said[2], f"^kf_backend: {text}{'' if UNSENT in text else see}\n$", argv)
        for given, text in ((None, "no API key"), ("a\nb", "the API key .*"), ("four\udcff", "the API key .*")):
            said = self.run_main(KF_BASE_URL=api.url, KF_API_KEY=given)
            self.assertRegex(f"{said[0]}{said[2]}", rf"^2kf_backend: {text}\. {key}\n$")
        for argv, code, text in (("--since x", 2, f": 'x{date}"), ("--site x", 1, r"404 .*site ID and .* \(--site\)")):
            said = self.run_main("--demo", *words(argv))
            self.assertRegex(f"{said[0]}{said[2]}", rf"(?s)^{code}kf_backend: demo: .*{text}\n$")

    def on(self, stdout: Any, *argv: str, **script: Any) -> str:
        """Run `main` with that stdout and a terminal as stderr; return what it wrote to stderr."""
        environ, stderr = {"KF_API_KEY": KEY, "KF_BASE_URL": self.api(**script).url}, io.StringIO()
        self.opened.enter_context(mock.patch.object(stderr, "isatty", return_value=True))
        with mock.patch.dict(os.environ, environ), mock.patch.multiple(sys, stdout=stdout, stderr=stderr):
            self.assertEqual(kf.main(argv), 0)
        return stderr.getvalue()

    def test_a_terminal_shows_the_progress_of_a_long_download_within_its_width(self) -> None:
        """The clock is mocked: each reading advances it by `step` seconds."""
        body, line, gone = dumps([outage("x")] * 24_000), r"\r\x1b\[KDownloading outages{}", r"\r\x1b\[K$"
        sized, unsized = [answer(body)], [then_close(answer(body, **UNSIZED))]
        percent, plain = line.format(r": [0-2]\.[0-9] of 2.0 MB \([0-9]+%\)"), line.format(r": [0-2]\.[0-9] MB")
        for case, step, script, argv, term, columns, expected in (
            ("slow", 0.3, sized, "", "xterm", 80, f"^({percent}){{9,}}{gone}"),
            ("a few times a second", 0.05, sized, "", "xterm", 80, f"^({percent}){{4,8}}{gone}"),
            ("no length", 0.3, unsized, "", "xterm", 80, f"^({plain}){{9,}}{gone}"),
            ("narrow", 0.3, sized, "", "xterm", 20, f"^({line.format('')}){{9,}}{gone}"),
            ("a message", 0, [no(500)], "", "xterm", 80, r"^\r\x1b\[Kkf_backend: GET /outages: got 500; .*\n$"),
            *(("fast", 0, sized, "", "xterm", 80, "^$"), ("quiet", 0.3, sized, "-q", "xterm", 80, "^$")),
            ("dumb", 0.3, sized, "", "dumb", 80, "^$"),
        ):
            with self.subTest(case), mock.patch.dict(os.environ, TERM=term, COLUMNS=str(columns)):
                self.opened.enter_context(mock.patch("time.monotonic", side_effect=itertools.count(0, step)))
                self.assertRegex(self.on(io.StringIO(), *words(argv), outages=script), expected)

    def test_main_reports_the_outcome_and_leaves_logging_and_signals_unchanged(self) -> None:
        for error, text in ((MemoryError(), "MemoryError"), (ValueError("no"), "no"), (OSError(28, "Full"), "Full")):
            with self.subTest(text), mock.patch.object(kf, "report", side_effect=error):
                expected = (0, "", f"kf_backend: {text}. The list was sent\n")
                self.assertEqual(self.run_main(KF_BASE_URL=self.api().url), expected)
        with mock.patch.object(kf.KFClient, "_receive", side_effect=[MemoryError()]), self.assertRaises(MemoryError):
            self.run_main(KF_BASE_URL=self.api().url)  # a bug keeps its traceback if nothing was sent
        real = kf.KFClient._receive
        patch = mock.patch.object(kf.KFClient, "_receive", lambda *args: real(*args) if args[3:] > (b"",) else 1 / 0)
        with patch:
            said = self.run_main(KF_BASE_URL=self.api().url)
        self.assertEqual(said, (3, "", f"kf_backend: division by zero. {UNKNOWN}\n"))
        states, api = [], self.api()
        with ThreadPoolExecutor(1) as pool:
            for call in (lambda: None, lambda: self.run_main("-q", KF_BASE_URL=api.url)):
                ran = pool.submit(call).result()
                handlers = [signal.getsignal(number) for number in STOPS]
                states.append((handlers, kf.log.handlers[:], kf.log.level))
        self.assertEqual((ran, api.posted, states[1]), ((0, "", ""), [DUE], states[0]))


class ProcessTests(TestCase):
    def test_closed_or_full_streams_do_not_stop_a_run(self) -> None:
        reader, closed = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        self.addCleanup(os.close, closed)
        no_space, runs = "kf_backend: No space left on device. ", []
        none: dict[str, Any] = {"stdout": None, "stderr": None, "preexec_fn": lambda: os.closerange(0, 3)}
        for case, argv, streams, expected, asked in (
            ("closed", "", {"stdout": closed}, (0, None, ""), "OIP"),
            ("closed, dry run", "-q --dry-run", {"stdout": closed}, (0, None, ""), "OI"),
            ("full", "", {"stdout": full}, (0, None, f"{no_space}The list was sent\n"), "OIP"),
            ("full, dry run", "-q --dry-run", {"stdout": full}, (1, None, f"{no_space}{UNSENT}\n"), "OI"),
            ("stderr full", "-v", {"stderr": full}, (0, REPORT, None), "OIP"),
            ("stderr full, failing", "--site nowhere", {"stderr": full}, (1, "", None), "O(GET /site-info/nowhere)"),
            ("no streams", "", none, (0, None, None), "OIP"),
        ):
            api = self.api()
            runs.append((case, api, self.spawn(api.url, *words(argv), **streams), expected, asked))
        for case, api, run, expected, asked in runs:
            with self.subTest(case):
                code, stdout, stderr = self.finished(run)
                self.assertEqual((code, stdout and stdout[: len(REPORT)], stderr), expected)
                self.assertEqual(api.asked, asked)

    def test_a_signal_at_any_time_prints_one_true_line(self) -> None:
        rnd, api, outcomes = random.Random(3), self.api(), (UNKNOWN, UNSENT, "The list was sent")
        for times in (1, 2):
            runs = [self.spawn(api.url, "-q") for _ in range(6)]
            for run in runs:
                status = Path(f"/proc/{run.pid}/status")  # it has started once it blocks signals
                while run.poll() is None and re.search("SigBlk:\\s0+\n", status.read_text()):
                    time.sleep(0.005)
                time.sleep(rnd.random() * 0.1)
                kind = rnd.choice(STOPS)
                for _ in range(times):
                    run.send_signal(kind)
            for run in runs:
                code, _, stderr = self.finished(run)
                if code or stderr:  # it was not done already
                    name = signal.Signals(code - 128).name if code > 128 else code
                    self.assertIn(stderr, [f"kf_backend: interrupted by {name}. {text}\n" for text in outcomes])

    def test_a_signal_reports_the_outcome_and_an_ignored_one_stays_ignored(self) -> None:
        half, wait, end, runs = answer(Content_Length="9"), no(429, Retry_After="30"), threading.Event(), []
        for number, name, said, outcome in (
            (signal.SIGINT, "outages", b"", UNSENT),
            (signal.SIGTERM, "outages", answer(ALL)[:-9], UNSENT),
            (signal.SIGHUP, "post", b"", UNKNOWN),
            (signal.SIGTERM, "post", half, UNKNOWN),
            (signal.SIGINT, "post", wait, UNSENT),
            *((number, "outages", answer(ALL)[:-1], "") for number in (signal.SIGHUP, signal.SIGINT)),
        ):
            stalling = threading.Event()
            reply = then_stall(said, stalling) if outcome else then_stall(said, stalling, end, answer(ALL)[-1:])
            api = self.api(**{name: [reply]})
            ignored = 0 if outcome else number
            runs.append((self.spawn(api.url, ignored=ignored), stalling, number, said, outcome))
        self.opened.callback(end.set)
        for run, stalling, number, said, _ in runs:
            self.assertTrue(stalling.wait(30))
            if said is wait and run.stderr:
                self.assertIn("retrying", run.stderr.readline())
            run.send_signal(number)
        time.sleep(0.2)
        end.set()
        for run, _, number, said, outcome in runs:
            with self.subTest(number, outcome=outcome, said=said):
                text = f"kf_backend: interrupted by {signal.Signals(number).name}. {outcome}\n" if outcome else ""
                code, _, stderr = self.finished(run)
                self.assertEqual((code, stderr[-len(text) :] if text else ""), (128 + number if outcome else 0, text))

    def test_the_deadline_ends_a_run_stuck_anywhere(self) -> None:
        head, endless, runs = b"HTTP/1.1 200 OK\r\nA: ", answer(b"{", **UNSIZED), []
        full = "import fcntl, os, runpy, sys; fcntl.fcntl({0}, 1031, 4096); os.write({0}, b'x' * 4096)"
        lookup = "import runpy, socket, sys, time; socket.getaddrinfo = lambda *args: time.sleep(60)"
        main = "; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        for case, code, outcome, script, start in (
            ("nobody reads stderr", 1, "", {"outages": [then_drip(head, b"b", 0.05)]}, full.format(2)),
            ("slow headers", 1, UNSENT, {"outages": [then_drip(head, b"b", 0.05)]}, ""),
            ("a slow body", 1, UNSENT, {"info": [then_drip(endless, b" ", 0.05)]}, ""),
            ("endless 100 Continue", 1, UNSENT, {"outages": [then_drip(b"", b"HTTP/1.1 100 X\r\n\r\n", 0.05)]}, ""),
            ("a wait before a POST", 1, UNSENT, {"post": [no(429, Retry_After="30")]}, ""),
            ("a POST's slow headers", 3, UNKNOWN, {"post": [then_drip(head, b"b", 0.05)]}, ""),
            ("a slow rejection", 1, UNSENT, {"post": [then_drip(answer(b"", 403, **UNSIZED), b" ", 0.05)]}, ""),
            ("nobody reads stdout", 0, "The list was sent", {}, full.format(1)),
            ("a slow host name lookup", 1, UNSENT, {}, lookup),
        ):
            argv = [sys.executable, *(["-c", start + main] if start else []), str(SCRIPT), "--deadline", "2"]
            runs.append((case, code, outcome, self.spawn(self.api(**script).url, args=argv)))
        for case, code, outcome, run in runs:
            with self.subTest(case):
                self.assertEqual(run.wait(30), code)
                stderr = self.finished(run)[2]
                expected = f"kf_backend: stopped: the 2 s --deadline expired. {outcome}" if outcome else "x" * 4096
                self.assertEqual(stderr.splitlines()[-1], expected)

    def test_no_list_leaves_once_the_deadline_has_said_so(self) -> None:
        """Neither at first nor after a wait: `end` keeps the lock. (Here, it then does not end the process.)"""
        for post, before in (([], 0), ([no(503)], 1)):
            api = self.api(post=post)
            client = self.client(api.url)
            run = threading.Thread(target=client._post_site_outages, args=(kf.SITE, DUE))
            end = mock.Mock(side_effect=lambda *args, client=client: kf.end_early(client, 0.001).join(30))
            with mock.patch("os._exit") as ended, mock.patch("os.write"), mock.patch("time.sleep", end):
                if not before:
                    end()
                run.start()
                while not ended.called:
                    run.join(0.01)
                run.join(0.2)
            self.addCleanup(run.join, 30)
            self.addCleanup(client.lock.release)
            self.assertEqual((api.connections, ended.call_args), (before, mock.call(1)))

    def test_the_library_is_silent_and_its_import_does_nothing(self) -> None:
        api = self.api(outages=[no(500)], post=[no(500)])
        program = f"""if True:
            import logging, os, signal, sys, threading
            def state():
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
                return signal.getsignal(signal.SIGINT), mask, dict(os.environ), sys.excepthook, threading.active_count()
            before = state()
            from kf_backend import KFClient
            with KFClient({api.url!r}, {KEY!r}, backoff=0.01) as client:
                assert len(client.handler({kf.SITE!r}, "2022-01-01")) == 2
            assert before == state() and not logging.getLogger().handlers
        """
        args = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
        self.assertEqual(self.finished(self.spawn(api.url, args=args, cwd=SCRIPT.parent)), (0, "", ""))
        self.assertEqual(api.posted, [DUE, DUE])


class ReadmeTests(TestCase):
    """README.md, requirements.txt and the script agree."""

    README = SCRIPT.with_name("README.md").read_text("utf-8")

    def test_the_example_is_what_the_demo_prints(self) -> None:
        """Also checks the demo: two retries, and an outage exactly at the default date."""
        code, stdout, stderr = self.run_main("--demo", KF_API_KEY=None, KF_BASE_URL="https://api.invalid")
        again = "got 500; retrying in N s (attempt 2 of 6)\n"
        told = "kf_backend: demo: mock API at http://127.0.0.1:PORT (its first GET and first POST will fail)\n"
        told += f"kf_backend: GET /outages: {again}kf_backend: POST /site-outages/{kf.SITE}: {again}"
        self.assertEqual((code, self.normal(stderr)), (0, told))
        self.assertLessEqual(len((stderr + stdout).splitlines()), 22)
        self.assertRegex(stdout, r"\nSent 10 of 108 outages to http://127\.0\.0\.1:[0-9]+ in [0-9.]+ s\.\n$")
        self.assertIn(self.normal(f"```text\n{stderr}{stdout}```\n"), self.normal(self.README))

    def test_every_option_default_variable_and_exit_code_is_in_the_readme(self) -> None:
        shown, option = self.run_main("-h", COLUMNS="200")[1], r"(?<![\w-])--?[a-z][a-z-]*"
        table = " ".join(re.findall(r"(?m)^\| (`-.*?`) \|", self.README))
        about, options = shown.split("SIGTERM, SIGHUP\n")
        self.assertEqual(set(re.findall(option, table)), set(re.findall(option, options)))
        plain = self.README.replace("`", "").lower()
        lines = re.findall(r"(?m)^  (-(?!-version|h).+?)  +(.+)$", options)
        self.assertEqual([line for line in lines if "| {} | {}".format(*line).lower() not in plain], [])
        self.assertEqual((len(lines), about[:31], "\n2. GET" in about), (9, "usage: kf_backend.py [options]\n", True))
        self.assertEqual(self.README.count(f" {kf.MEMORY_MAX / 2**20:g} MiB"), 2)
        names = words("KF_API_KEY KF_BASE_URL HTTPS_PROXY ALL_PROXY NO_PROXY REQUESTS_CA_BUNDLE")
        for name in (kf.SITE, kf.SINCE, kf.BASE_URL, *names):
            self.assertTrue(f"`{name}`" in self.README and name in shown, name)
        rows = re.findall(r"(?m)^\| ([0-9, ]+) \|", self.README.split("| exit code |")[1].split("\n\n")[0])
        for codes in (" ".join(rows), about.split("exit codes:")[1]):
            self.assertEqual(set(re.findall("[0-9]+", codes)), set(words("0 1 2 3 130 143 129")))
        self.assertLess(len(self.README.splitlines()), 130)
        self.assertNotRegex(self.README, r"(?ms)^```console$(?:(?!```).)*#")

    def test_the_python_block_runs_as_is(self) -> None:
        blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", self.README)
        os.environ["KF_API_KEY"] = KEY
        with mock.patch.object(kf.KFClient, "handler", return_value=DUE) as handler:
            exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})
        handler.assert_called_once_with("norwich-pear-tree", "2022-06-01")

    def test_requirements_and_the_inline_metadata_agree(self) -> None:
        [block] = re.findall(r"(?m)^# /// script\n((?:# .*\n)+?)# ///$", SCRIPT.read_text("utf-8"))
        listed = json.loads("".join(re.findall(r"dependencies = (\[.*\])", block)))
        self.assertEqual(listed, words(SCRIPT.with_name("requirements.txt").read_text("utf-8")))
        self.assertEqual([re.split("[<>=]", one)[0] for one in listed], words("requests urllib3 python-dateutil"))
        self.assertIn('requires-python = ">=3.8"', block)


if __name__ == "__main__":
    unittest.main()
