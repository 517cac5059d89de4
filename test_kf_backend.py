"""Tests of kf_backend.py, in its own order: rules, client, report, demo, command line, README.

`API` is a real server on 127.0.0.1. `self.api(outages=[...], info=[...], post=[...])` gives the replies to each of the
three requests, one after the other; after them comes the healthy one. A reply is bytes, or a function of the socket for
what is less polite (`then_close`, `then_reset`, `then_stall`, `then_drip`, `then_keep`).
`api.asked` says what was requested, a letter each: `OIP` is a healthy run. Most of what a server can do, and what
becomes of the run, is a row of `ServerTests`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from email.message import Message
from email.utils import formatdate
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Union
from unittest import mock

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

import kf_backend as kf

SCRIPT = Path(kf.__file__)
KEY = "s3cret-key!\\~'"
LETTERS = {"GET /outages": "O", f"GET /site-info/{kf.SITE}": "I", f"POST /site-outages/{kf.SITE}": "P"}
LINES = dict(zip(("outages", "info", "post"), LETTERS))
STATUSES = (429, 500, 502, 503, 504)
REDIRECTS = (301, 302, 303, 307, 308)
NO_LENGTH = {"Content-Length": None}
UNKNOWN = "The list may or may not have been applied; check before rerunning"
#: Its third letter joins two others, and takes no column.
FARSI = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
#: Vouches for 127.0.0.1 until 2120, to those who trust it. Its key is only for these tests.
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


NAMES = {"b1": "Battery 1", "b2": "Batterie №2", "b3": "Battery 3"}
SITE_INFO = site_info(NAMES)
#: As `GET /outages` has them: one begins exactly at the date, and one, which ends after it, a millisecond before it.
ALL = [
    outage("b2", "2022-03-01T00:00:00.000Z", "2022-03-04T04:00:00.000Z"),
    outage("another", "10", "yesterday"),
    outage("b1", "2021-12-31T23:59:59.999Z", "2022-06-01T00:00:00.000Z"),
    outage("b1", "2022-01-01T00:00:00.000Z", "2022-01-11T12:00:00.000Z"),
]
DUE = [{**ALL[0], "name": "Batterie №2"}, {**ALL[3], "name": "Battery 1"}]
REPORT = """\
Norwich Pear Tree (norwich-pear-tree), outages since 2022-01-01

Device       Outages  Downtime    2022-01-01                          2022-03-04
Battery 1          1  10 d 12 h   ########......................................
Batterie №2        1  3 d 4 h     ...........................................###
No outages: Battery 3

"""
SENT = "Sent 2 of 4 outages to {} in N s.\n"


def words(text: str) -> list[str]:
    return text.split()


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def answer(
    status: int = 200, json: Any = None, headers: Mapping[str, str | None] | None = None, body: bytes | None = None
) -> bytes:
    """Return a response of JSON, or of `body`. A header of None is left out."""
    body = dumps(json) if body is None else body
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


def zipped(body: bytes, status: int = 200, encoding: str = "gzip") -> bytes:
    return answer(status, body=body, headers={"Content-Encoding": encoding})


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def then_close(said: bytes) -> Reply:
    return lambda sock: sock.sendall(said)


def then_reset(said: bytes) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        time.sleep(0.02 if said else 0)  # a reset overtakes what the client has not read
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(sock.detach())

    return reply


def then_keep(said: bytes) -> Reply:
    """Ignore `Connection: close` for a while."""

    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        time.sleep(0.1)

    return reply


def then_stall(said: bytes, stalling: threading.Event | None = None) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        if stalling:
            stalling.set()
        sock.recv(1)  # until the client hangs up

    return reply


def then_drip(said: bytes, drop: bytes, seconds: float = 0.0, stalling: threading.Event | None = None) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(said)
        if stalling:
            stalling.set()
        for _ in range(100_000):  # until the client hangs up
            sock.sendall(drop)
            time.sleep(seconds)

    return reply


class Request(NamedTuple):
    line: str  # such as "GET /outages"
    headers: Message
    body: bytes


class Connection(socketserver.StreamRequestHandler):
    timeout = 20  # then the client has left it open
    disable_nagle_algorithm = True
    server: API

    def setup(self) -> None:
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        closing = False
        while not closing:
            line = self.rfile.readline().decode("latin-1").rpartition(" ")[0]
            if not line:
                return
            headers = http.client.parse_headers(self.rfile)
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            reply = self.server.reply(Request(line, headers, body))
            closing = headers["Connection"] == "close" or not isinstance(reply, bytes)
            reply(self.connection) if callable(reply) else self.connection.sendall(reply)

    def finish(self) -> None:
        super().finish()
        self.request.close()


class API(socketserver.ThreadingTCPServer):
    """The API. Its port refuses connections until it is `listening`."""

    request_queue_size = 50

    def __init__(self, script: Mapping[str, Iterable[Reply]], tls: ssl.SSLContext | None, listening: bool) -> None:
        super().__init__(("127.0.0.1", 0), Connection, bind_and_activate=False)
        self.server_bind()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.address}"
        self.tls = tls
        self.script = {line: iter(replies) for line, replies in script.items()}
        self.healthy = dict(zip(LETTERS, (answer(json=ALL), answer(json=SITE_INFO), answer(json={}))))
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
    def asked(self) -> str:
        return "".join(LETTERS.get(request.line, f"({request.line})") for request in self.requests)

    @property
    def posted(self) -> list[Any]:
        return [json.loads(request.body) for request in self.requests if request.line.startswith("POST")]


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class TestCase(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        """Leave nothing of the caller's environment, and collect what is logged. A test that hangs ends the suite."""
        faulthandler.dump_traceback_later(45, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        ours = r"(?i)KF_.*|.*_PROXY|COLUMNS|LINES|NETRC|NO_COLOR|(REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_.*|PYTHON(?!PATH).*"
        kept = {name: value for name, value in os.environ.items() if not re.fullmatch(ours, name)}
        patch = mock.patch.dict(os.environ, kept, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        quick = mock.patch.dict(kf.KFClient.__init__.__kwdefaults__, backoff=0.0002)
        quick.start()
        self.addCleanup(quick.stop)
        collector, root = Collector(), logging.getLogger()
        self.records = collector.records
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
        outer, self.opened = self.opened, contextlib.ExitStack()
        try:
            with super().subTest(*case, **values), self.opened:
                yield
        finally:
            self.opened = outer

    def api(self, tls: Any = None, listening: Any = True, **replies: Any) -> API:
        return self.opened.enter_context(API({LINES[name]: replies[name] for name in replies}, tls, listening))

    def tls(self) -> ssl.SSLContext:
        """Return what a server of https needs, and have clients trust it."""
        file = self.path("cert.pem", CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        os.environ["REQUESTS_CA_BUNDLE"] = str(file)
        return context

    def path(self, name: str, text: str) -> Path:
        folder = self.opened.enter_context(tempfile.TemporaryDirectory())
        Path(folder, name).write_text(text, "utf-8")
        Path(folder, name).chmod(0o600)
        return Path(folder, name)

    def client(self, url: str, **options: Any) -> kf.KFClient:
        return self.opened.enter_context(kf.KFClient(url, KEY, **{"timeout": 20, **options}))

    def failure(self, kind: type[kf.KFError], call: Callable[..., Any], *args: Any, **options: Any) -> kf.KFError:
        """Return the error that `call` raises, of just that kind. The key must not show in it nor in its traceback."""
        with self.assertRaises(kf.KFError) as caught:
            call(*args, **options)
        error = caught.exception
        self.assertIs(type(error), kind, error)
        shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.assertNotIn(KEY, f"{shown}{error!r}{vars(error)}")
        self.assertTrue(str(error).isprintable() and len(str(error)) < 600, error)
        return error

    def run_main(self, *argv: str, **environ: str | None) -> tuple[Any, str, str]:
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
        for form in (KEY, repr(KEY)[1:-1], requests.utils.quote(KEY, safe="")):
            self.assertNotIn(form, stdout.getvalue() + stderr.getvalue())
        return code, stdout.getvalue(), stderr.getvalue()

    def spawn(self, url: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start the script in a process of its own, which is killed if the test leaves it behind."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        environ = {**os.environ, "KF_BASE_URL": url, "KF_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
        options = {"args": [sys.executable, "-X", "dev", "-W", "error", str(SCRIPT), *argv], **streams, **options}
        process = self.opened.enter_context(subprocess.Popen(env=environ, encoding="utf-8", **options))
        self.opened.callback(process.kill)
        return process

    def finished(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        stdout, stderr = process.communicate(timeout=40)
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

    def test_safe_leaves_nothing_that_moves_the_cursor(self) -> None:
        for case, given, expected in (
            ("an escape code", "a\x1b[31mb", "a?[31mb"),
            ("one of 8 bits", "a\x9b31mb", "a?31mb"),
            ("lines", " a\r\n\t b\u2028c\v", "a b c"),
            ("a bell and a backspace", "a\a\b", "a??"),
            ("an override of the direction", "a\u202eb", "a?b"),
            ("half a character", "a\ud800", "a?"),
            ("letters and a joiner", f"é 电池 {FARSI}", f"é 电池 {FARSI}"),
            ("a long text", "x" * 501, "x" * 500 + "..."),
            ("one just short enough", "x" * 500, "x" * 500),
        ):
            with self.subTest(case):
                self.assertEqual(kf.safe(given), expected)

    def test_safe_replaces_a_key_in_each_form_before_it_cuts_but_not_a_short_one(self) -> None:
        kf.clean_key(KEY)
        kf.clean_key("got")
        for given in (KEY, repr(KEY)[1:-1], "s3cret-key%21%5C~%27"):
            with self.subTest(given):
                self.assertEqual(kf.safe(f"got a {given}\nb", 12), "got a [key] ...")
        kf.clean_key("8letters")
        kf.clean_key("7letter")
        self.assertEqual(kf.safe("8letters 7letter"), "[key] 7letter")

    def test_white_space_around_a_key_is_stripped(self) -> None:
        for given in ("key", " key\n", "\tkey\r\n", "\u00a0key"):
            with self.subTest(given):
                self.assertEqual(kf.clean_key(given), "key")

    def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(self) -> None:
        bad = "the API key contains invalid characters (only visible ASCII is allowed)"
        for given, text in (
            *((absent, "no API key") for absent in (None, "", " \n")),
            *((f"{KEY}{letter}{KEY}", bad) for letter in (" ", "\n", "\r\nX-Evil: ", "\x00", "\t")),
            *((f"{KEY}{letter}", bad) for letter in ("é", "\u2019", "\x7f")),
        ):
            with self.subTest(given):
                key: Any = given
                error = self.failure(kf.UsageError, kf.KFClient, kf.BASE_URL, key)
                self.assertEqual((str(error), error.check), (text, ("api_key",)))

    def test_base_urls_that_keep_the_key_safe_are_taken(self) -> None:
        for given, expected in (
            (kf.BASE_URL, kf.BASE_URL),
            (" https://h/v1/\r\n", "https://h/v1"),
            ("https://h", "https://h"),
            ("HTTPS://H:8443/V1//", "https://h:8443/V1"),
            ("https://bücher.de/ü", "https://xn--bcher-kva.de/%C3%BC"),
            *((f"http://{host}/v1", f"http://{host}/v1") for host in words("localhost:80 127.1.2.3 [::1]:8080")),
        ):
            with self.subTest(given):
                self.assertEqual(kf.clean_base_url(given), expected)

    def test_other_base_urls_are_refused(self) -> None:
        https, bare = "must use https (http is allowed only for localhost)", "credentials, a query or a fragment"
        for text, urls in (
            (https, words("http://h http://localhost.h http://127.0.0.1.h http://[::2] http://127.999.1.1 ftp://h")),
            (https, words("http://127.0.0.1\\@h.com http://128.0.0.1 file:///etc")[1:]),
            (bare, words("https://user:word@h https://user@h http://user@localhost http://localhost@h")),
            (bare, words("https://h/?a=b https://h/? https://h?a https://h/#a https://h#")),
            (
                "not a valid URL",
                [None, "", *words("h/v1 https:// https:///v1 https://h:port https://h:99999 https://[::1")],
            ),
            ("not a valid URL", words("https://a..b https://.a https://*")),
        ):
            for given in urls:
                with self.subTest(given):
                    url: Any = given
                    error = self.failure(kf.UsageError, kf.KFClient, url, KEY)
                    self.assertIn(text, str(error))
                    self.assertEqual(error.check, ("base_url",))

    def test_a_site_is_one_segment_of_a_path_or_refused(self) -> None:
        self.assertEqual(kf.path_segment("a/b?c#d%2e é\r\n..."), "a%2Fb%3Fc%23d%252e%20%C3%A9%0D%0A...")
        for given, text in (("", "''"), (".", "'.'"), ("..", "'..'"), ("a\ud800", r"'a\ud800'"), (None, "None")):
            with self.subTest(given):
                site: Any = given
                error = self.failure(kf.UsageError, kf.path_segment, site)
                self.assertEqual((str(error), error.check), (f"invalid site ID {text}", ("site",)))

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
            for given in (*words(times), *(given.replace("T", " ") for given in words(times))):
                with self.subTest(given[:40]):
                    self.assertEqual(kf.parse_time(given), expected)

    def test_other_times_are_refused_by_every_python_alike(self) -> None:
        others: tuple[Any, ...] = (None, 10, [], {})
        for given in (*self.NO_TIMES, *others):
            with self.subTest(given), self.assertRaises((ValueError, TypeError, OverflowError)):
                kf.parse_time(given)

    def test_a_persons_date_is_utc_unless_it_has_an_offset(self) -> None:
        dates = words("2022-01-01 20220101 2022-01-01T00:00 2022-01-01T00:00:00.000 2022-01-01T00:00:00.000Z")
        dates += [*words("2022-01-01t00:00:00z 2022-01-01T01:00+01:00 2021-12-31T24:00 2022-01-01T00:00Z")]
        east = timezone(timedelta(hours=5))
        given: Any
        for given in (
            *dates,
            "2022-01-01 00:00",
            " 2022-01-01\r\n",
            date(2022, 1, 1),
            datetime(2022, 1, 1, 5, tzinfo=east),
        ):
            with self.subTest(given):
                self.assertEqual(kf.parse_since(given), self.NEW_YEAR)
        odd = timezone(timedelta(hours=1, seconds=7, microseconds=9))
        moment = datetime(2022, 1, 1, 1, 0, 7, 500_009, tzinfo=odd)
        self.assertEqual(kf.parse_since(moment), (self.NEW_YEAR[0], "5"))
        self.assertEqual(kf.parse_since("2022-01-01T00:00:00.0000001"), (self.NEW_YEAR[0], "0000001"))

    def test_what_is_not_a_date_is_refused_by_every_python_alike(self) -> None:
        dates = words("10 yesterday 02/03/2022 2022-02-30 2021-12-31T23:59:60Z 2022-01-01T00:00:00+24:00 2022-01 2022")
        dates += words("20220601120000 1791011512345 2022-06-01+02:00 2022-W53-1 2022-001 2022-06-01Z 2022-06-01T12 9")
        dates += words("9999-12-31T24:00 \uff12022-01-01 2022-06-01T12:00:00,5 2022-06-01T12:00+24:00 2022-060-1 NaN")
        given: Any
        for given in (*dates, "", "2022-06-01 +02:00", None, 10, "\x1b[31m\n" * 99):
            with self.subTest(given):
                error = self.failure(kf.UsageError, kf.parse_since, given)
                self.assertRegex(str(error), r"^'.{0,53}' is not an ISO 8601 date or time \(for example, 2022-06-01\)$")
                self.assertEqual(error.check, ("date",))
        error = self.failure(kf.UsageError, kf.parse_since, datetime(2022, 1, 1))
        self.assertEqual(str(error), "the datetime has no time zone; pass an aware datetime")

    def kept(self, outages: Sequence[Any], since: Any = kf.SINCE) -> list[Any]:
        return self.client("http://localhost")._filter_outages(outages, SITE_INFO, since)

    def test_order_repeated_rows_unknown_fields_and_the_text_of_times_are_kept(self) -> None:
        odd = outage("b2", "2022-12-01t01:00:00.5+01:00", "2022-12-02 00:00:00z")
        more = {"more": [{"é": None}], **outage("b1"), "1": 1.0}
        backwards = outage("b1", "2022-02-01T00:00:00Z", "2021-02-01T00:00:00Z")
        given = [odd, more, outage("elsewhere"), odd, {**outage("b1"), "name": "another"}, backwards]
        before = copy.deepcopy(given)
        kept = self.kept(iter(given))
        self.assertEqual(kept, [{**row, "name": NAMES[row["id"]]} for row in given if row["id"] in NAMES])
        self.assertEqual(given, before)
        self.assertTrue(all(mine is not theirs for mine in kept for theirs in given))

    def test_an_outage_of_the_site_without_two_times_is_refused_naming_row_field_and_value(self) -> None:
        good = outage("b2", "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")  # looked at even if it began too early
        for field in ("begin", "end"):
            values: Sequence[Any] = (None, 10, 1.5, True, [], {"a": 1}, *self.NO_TIMES)
            bad = [({**good, field: value}, json.dumps(value)) for value in values]
            missing = {name: value for name, value in good.items() if name != field}
            for given, held in (*bad, (missing, "nothing")):
                with self.subTest(field, held=held):
                    error = self.failure(kf.KFError, self.kept, [outage("b1"), given])
                    self.assertEqual(str(error), f"GET /outages: outage 2 has an invalid {field}: {kf.safe(held)}")
        for value in ("\x1b[2J\n" * 50, "9" * 100_000, ["\u202e"] * 1000, "x" * 95 + KEY):
            error = self.failure(kf.KFError, self.kept, [outage("b1", end=value)])
            self.assertLess(len(str(error)), 160)
            self.assertNotIn(KEY[:5], str(error))

    def test_what_is_wrong_inside_an_outage_of_another_site_is_ignored(self) -> None:
        strangers = [{"id": "x", "begin": None, "end": 10}, {"id": ""}, {"id": "y", "begin": float("nan")}]
        self.assertEqual(self.kept([*strangers, outage("b1")]), [{**outage("b1"), "name": "Battery 1"}])

    def test_an_outage_without_a_string_id_is_refused(self) -> None:
        ids: Sequence[Any] = (None, 1, True, ["b1"], {})
        for given in (None, "b1", 1, [], ["id"], {}, {"ID": "b1"}, *({"id": id} for id in ids)):
            with self.subTest(given):
                error = self.failure(kf.KFError, self.kept, [outage("b1"), outage("x"), given])
                self.assertRegex(str(error), "^GET /outages: outage 3 has an invalid id: ")


class ReadArrayTests(TestCase):
    """Wherever the bytes are split, `read_array` says what `json.loads` says of the whole."""

    BODIES = (
        *words(r'[] [{}] [{},{}] [{},1,{}] [1,-2.5e3,true,null] [[{}],{},[{}]] ["}",{},"},{"] [{"a":0.5},{"a":10}]'),
        *words(r'[{"a":"}"},{"b":"\"},{\""}] [{"\\":"\\"},{"a":"{\u007d\ud83d\udd0b"}] [{"a":"]}"},"}",{"b":"[{"}]'),
        *words(
            r'[[[{}]]] [{"a":{},"b":"}"},{"a":"}"}] [{"a":[{},{}]},{"b":{}},{"c":[]}] [NaN,{"a":Infinity}] [{},"}"]'
        ),
        *('[{"a":1},{"b":[{}]} , {"c":{}}]', '\ufeff[{"é":"电池🔋"},{}]', '[{} ,\n{"a":[{},{}]}\t,\r\n{}]', " [ ] "),
    )
    NO_JSON = (
        *words("[ ] [} [{] {}} [{} [{}, [{},] [,] [,{}] [{},,{}] [{}{}] [{}.5] [{}1] [{}.5,{}] [{}]] [{}], [{}]x"),
        *words("[{}:{}] [{'a':1}] [{}x,{}] [{}],[{}] [{}]\ufeff [\ufeff{}] [{}}] [{},tru] [01] [{}/**/]"),
        *words('[{"a":1}{"a":2}] [{},{]}] [{}[]] [{}""] <p>{}</p> [{}},{}] } ,[{}] [{"a"}] [{"a":}] [{}-1,{}]'),
        *("", " ", "[{} {}]", "[{}] {}", '[{"a":"\n"}]', "[{}] ]"),
    )

    def said(self, pieces: Iterable[bytes]) -> Any:
        """Return the items, or that the bytes were "refused"."""
        try:
            return list(itertools.chain.from_iterable(kf.read_array(pieces)))
        except ValueError:
            return "refused"

    def expected(self, body: bytes) -> Any:
        try:
            return json.loads(body.decode("utf-8-sig"))
        except ValueError:
            return "refused"

    def check(self, body: bytes, *cuts: int) -> None:
        pieces = [body[begin:end] for begin, end in zip((0, *cuts), (*cuts, len(body)))]
        said, expected = self.said(pieces), self.expected(body)
        if repr(said) != repr(expected):  # 1, 1.0 and True are equal, NaN is not
            self.fail(f"{pieces} gave {said}, not {expected}")

    def test_bodies_are_read_alike_wherever_they_are_split(self) -> None:
        not_utf_8 = (b"\xff", b"\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\x94")
        bodies = [text.encode() for text in (*self.BODIES, *self.NO_JSON)]
        for body in (*bodies, *(b'[{"a":"%b"},{}]' % bad for bad in not_utf_8)):
            with self.subTest(body):
                self.check(body)
                self.check(body, *range(len(body)))
                for first, second in itertools.combinations_with_replacement(range(len(body) + 1), 2):
                    self.check(body, first, second)
        for text in self.BODIES:
            body = text.encode()
            self.assertNotEqual(self.expected(body), "refused", text)
            for stop in range(len(body)):
                self.check(body[:stop], stop // 2)
        self.assertEqual({self.expected(text.encode()) for text in self.NO_JSON}, {"refused"})

    def test_random_bodies_are_read_alike_wherever_they_are_split(self) -> None:
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
            if rnd.random() < 0.3:  # break it
                at = rnd.randrange(len(body))
                body = body[:at] + bytes(rnd.choice(b'{}[],:"\\ 1x') for _ in range(rnd.randrange(2))) + body[at + 1 :]
            for count in (0, 1, 2, 3, 8, 30):
                self.check(body, *sorted(rnd.randrange(len(body) + 1) for _ in range(count)))

    def test_large_outages_with_objects_inside_are_read(self) -> None:
        large = [{"id": str(n), "a": [{"b": "}" * 10}] * 40_000, "c": "x}"} for n in range(5)]
        small = [{"id": str(n), "a": {"b": {}}, "c": [{}, {}]} for n in range(20_000)]
        for items in (large, small):
            body = dumps(items)
            lists = list(kf.read_array(body[at : at + kf.CHUNK] for at in range(0, len(body), kf.CHUNK)))
            self.assertEqual(list(itertools.chain.from_iterable(lists)), items)
            self.assertGreater(len(lists), 4)  # as they come, not at the end

    def test_an_outage_that_never_ends_does_not_fill_the_memory(self) -> None:
        for start, rest in (
            *((b'[{"id": "', b"a"), (b'[{"id": "', b"}"), (b"[", b" "), (b'[{"id": 1', b"1"), (b'[{"id": [', b'"",')),
            *((b'[{"id": [', b"{},"), (b'[{"a":{},"b":' + b"[" * 500, b"[]")),
        ):
            with self.subTest(start[:20], rest=rest):
                pieces = itertools.chain([start], itertools.repeat(rest * kf.CHUNK, 100))
                error = self.failure(kf.KFError, list, kf.read_array(pieces))
                self.assertEqual(str(error), "GET /outages: an outage longer than 1,048,576 characters")


class ChainTests(TestCase):
    """Random outages, devices and dates that keep to the contract, against ten plain lines that use exact fractions."""

    def exact(self, text: str) -> Fraction:
        year, month, day, hour, minute, second, fraction, sign, hours, minutes = re.fullmatch(
            r"(....)-(..)-(..)[Tt ](..):(..):(..)(?:\.(\d+))?(?:[Zz]|([+-])(..):(..))", text
        ).groups()  # type: ignore[union-attr]
        days = date(int(year), int(month), int(day)).toordinal()
        offset = int(f"{sign or '+'}1") * (int(hours or 0) * 3600 + int(minutes or 0) * 60)
        seconds = days * 86_400 + int(hour) * 3600 + int(minute) * 60 + int(second) - offset
        return seconds + Fraction(int(fraction or 0), 10 ** len(fraction or ""))

    def moment(self, rnd: random.Random) -> str:
        near = rnd.random() < 0.6  # equal ones, and some that differ in the last digit, are to be met often
        day = f"{rnd.choice((2021, 2022)) if near else rnd.randrange(1, 9999):04}-{rnd.randrange(1, 13):02}-{rnd.choice((1, 28)):02}"
        day = rnd.choice(("2021-12-31", "2022-01-01")) if near else day
        clock = rnd.choice(("00:00:00", "23:59:59", "12:30:00", "24:00:00", "01:00:00", "23:00:00"))
        digits = (
            "" if clock == "24:00:00" else rnd.choice(("", "0", "000", "9" * 12, "000000000001", "5", "50", "4999999"))
        )
        zone = rnd.choice(("Z", "z", "+00:00", "-00:00", "+01:00", "-01:00", "+14:00", "-12:30", "+23:59"))
        return f"{day}{rnd.choice('Tt ')}{clock}{'.' if digits else ''}{digits}{zone}"

    def test_the_chain_keeps_what_ten_plain_lines_keep(self) -> None:
        rnd, api = random.Random(2022), self.api()
        client = self.client(api.url)
        for number in range(150):
            names = {f"d{n}": f"Device {rnd.randrange(9)} é" for n in rnd.sample(range(12), rnd.randrange(5))}
            outages = [
                {
                    **outage(f"d{rnd.randrange(12)}", self.moment(rnd), self.moment(rnd)),
                    **rnd.choice(({}, {"x": {"y": [1.5]}})),
                }
                for _ in range(rnd.randrange(12))
            ]
            outages += outages[: rnd.randrange(3)]
            since = self.moment(rnd)
            api.healthy["GET /outages"] = answer(json=outages)
            api.healthy[f"GET /site-info/{kf.SITE}"] = answer(json=site_info(names))
            with self.subTest(number, since=since):
                kept = []
                for row in outages:
                    if row["id"] in names and self.exact(row["begin"]) >= self.exact(since):
                        kept.append({**row, "name": names[row["id"]]})
                self.assertEqual(client.handler(kf.SITE, since), kept)
                self.assertEqual((api.posted[-1], client.outages_read, client.sent), (kept, len(outages), True))


def broken(good: Any) -> dict[str, Reply]:
    """Return the ways in which a response of `good` can break off or be garbled."""
    body, start = dumps(good), answer(json=good)[:-3]
    squeezed = gzip.compress(body)
    in_chunks = answer(headers={**NO_LENGTH, "Transfer-Encoding": "chunked"}, body=b"")
    return {
        "no answer": then_close(b""),
        "reset": then_reset(b""),
        "garbage": then_close(b"\x16\x03\x01\x02garbage\r\n\r\n"),
        "status cut": then_close(b"HTTP/1.1 2"),
        "headers cut": then_close(b"HTTP/1.1 200 OK\r\nContent-Le"),
        "headers without end": then_drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 99),
        "a header without end": then_drip(b"HTTP/1.1 200 OK\r\nA: ", b"b" * kf.CHUNK),
        "shorter than Content-Length": then_close(start),
        "reset in the body": then_reset(start),
        "no length and the JSON stops": then_close(answer(body=body[:-1], headers=NO_LENGTH)),
        "chunked without its end": then_close(in_chunks + chunk(body)),
        "cut in a chunk": then_close(in_chunks + chunk(body)[:-9]),
        "a chunk of no length": then_close(in_chunks + chunk(body) + b"xyz\r\n"),
        "gzip cut": zipped(squeezed[: len(squeezed) // 2]),
        "gzip corrupt": zipped(squeezed[:40] + b"\xff" * 9 + squeezed[49:]),
        "not gzip": zipped(body),
        "HTML": answer(body=b"<!DOCTYPE html>", headers={"Content-Type": "text/html"}),
        "empty": answer(body=b""),
        "white space": answer(body=b" \n"),
        "another bracket": answer(body=b" {" + body + b"} "),
        "a letter behind it": answer(body=body + b"x"),
        "UTF-16": answer(body=body.decode().encode("utf-16")),
    }


class ServerTests(TestCase):
    """What a server can do, and what becomes of the run."""

    def row(
        self, case: str, code: int, end: str, asked: str, posts: int | None = None, options: str = "", **script: Any
    ) -> None:
        """Run the script's `main` against an API that replies as `script` says.

        `end` is a pattern for the last line on stderr (without its start and its outcome), `asked` the requests made,
        and `posts` how many of them had the due list as their body: all POSTs, by default.
        """
        with self.subTest(case, **{name: str(replies)[:60] for name, replies in script.items()}):
            api, start = self.api(**script), time.monotonic()
            said, stdout, stderr = self.run_main(*words(options), KF_BASE_URL=api.url)
            self.assertLess(time.monotonic() - start, 30)
            lines = stderr.splitlines()
            self.assertEqual((said, api.asked), (code, asked), stderr)
            self.assertEqual(api.posted, [DUE] * asked.count("P"))
            retries = sum(asked.count(letter) - 1 for letter in set(asked))
            self.assertEqual(len(lines), retries + (code > 0), stderr)
            for line in lines[:retries]:
                self.assertRegex(
                    line, r"^kf_backend: (GET|POST) /\S+: \S.*; retrying in [0-9.]+ s \(attempt [2-6] of 6\)$"
                )
            if code:
                where = re.escape(f"{ {v: k for k, v in LETTERS.items()}[asked[-1]] }: ")
                where = where if not end.startswith("^") else ""
                self.assertRegex(lines[-1], f"^kf_backend: {where}{end.lstrip('^')}$")
            self.assertEqual(stdout == "", code > 0)
            self.assertEqual(api.connections, len(asked))  # one for each request

    def test_rejections_are_retried_up_to_six_attempts(self) -> None:
        later, hint = "Nothing was sent; try again later", r'got {} [A-Z][\w -]+ \("too busy"\) \(6 attempts\)\. '
        for status in STATUSES:
            no = [answer(status, {"message": "too busy"})]
            self.row("each once", 0, "", "OOIIPP", outages=no, info=no, post=no)
            self.row("each five times", 0, "", "O" * 6 + "I" * 6 + "P" * 6, outages=no * 5, info=no * 5, post=no * 5)
            self.row("outages", 1, hint.format(status) + later, "O" * 6, outages=no * 6)
            self.row("info", 1, hint.format(status) + later, "O" + "I" * 6, info=no * 6)
            end = hint.format(status) + "The list was not accepted; try again later"
            self.row("post", 1, end, "OI" + "P" * 6, post=no * 6)

    def test_other_statuses_end_the_run_at_once(self) -> None:
        key, base, both = "check the API key", "check the base URL", "check the site ID and the base URL"
        redirect = f"redirects are not followed; {base}"
        fields = {"Location": self.api().url + "/outages", "Retry-After": "0"}
        for status, phrase, advice, flags in (
            *((status, " Unauthorized", key, "KF_API_KEY") for status in (401,)),
            (403, " Forbidden", key, "KF_API_KEY"),
            (404, " Not Found", both, "--site, --base-url or KF_BASE_URL"),
            (405, " Method Not Allowed", base, "--base-url or KF_BASE_URL"),
            (410, " Gone", base, "--base-url or KF_BASE_URL"),
            (400, " Bad Request", "the API rejected the format of the request", ""),
            (408, " Request Timeout", "try again later", ""),
            (413, r" [\w ]+", "the list is too long", ""),
            (418, ".*", "", ""),
            *((status, r" [\w ]+", redirect, "--base-url or KF_BASE_URL") for status in REDIRECTS),
        ):
            no = [answer(status, {"message": "no"}, fields)]
            problem = f'got {status}{phrase} \\("no"\\)\\. '
            end = "".join((f"; {advice}" if advice else "", rf" \({flags}\)" if flags else ""))
            self.row("outages", 1, f"{problem}Nothing was sent{end}", "O", outages=no)
            self.row("info", 1, f"{problem}Nothing was sent{end}", "OI", info=no)
            self.row("post", 1, f"{problem}The list was not accepted{end}", "OIP", post=no)
        for status in (201, 202, 204, 206, 501, 505, 520, 524, 599):
            no = [answer(status, {"message": "no"}) if status != 204 else answer(status, headers=NO_LENGTH, body=b"")]
            later = "; try again later" if status in (520, 524) else ""
            self.row("outages", 1, rf"got {status}.*\. Nothing was sent{later}", "O", outages=no)
            self.row("post", 3, rf"got {status}.*\. {UNKNOWN}", "OIP", post=no)

    def test_a_get_that_breaks_off_is_requested_again_and_nothing_of_it_used(self) -> None:
        texts = {
            "reset": "Connection reset by peer",
            "shorter than Content-Length": r"IncompleteRead\(.*\)",
            "HTML": "expected a whole JSON array",
        }
        ghost = [outage("b1", "2022-02-02T00:00:00.000Z"), *ALL]
        for case, reply in broken(ghost).items():
            self.row(case, 0, "", "OOIP", outages=[reply])
            end = rf"{texts.get(case, '.+')} \(6 attempts\)\. Nothing was sent; .*"
            self.row(case, 1, end, "OOOOOO", outages=itertools.repeat(reply, 9))
        for case, reply in broken(site_info({**NAMES, "x": "ghost"})).items():
            if case != "another bracket":
                self.row(case, 0, "", "OIIP", info=[reply])
        stalled = then_stall(answer(json=ghost)[:-3])
        self.row("silence", 0, "", "OOIP", outages=[then_stall(b"")], options="--timeout 1")
        self.row("silence in the body", 0, "", "OOIP", outages=[stalled], options="--timeout 1")

    def test_broken_bodies_and_rejections_share_one_budget(self) -> None:
        cut, no, reset = then_close(answer(json=ALL)[:-1]), answer(500, {"message": "no"}), then_reset(b"")
        self.row("five", 0, "", "OOOOOOIP", outages=[no, cut, no, cut, reset])
        for last, end in ((no, "got 500 .*"), (cut, "IncompleteRead.*"), (reset, "Connection reset by peer.*")):
            self.row(
                "six",
                1,
                rf"{end} \(6 attempts\)\. Nothing was sent; .*",
                "OOOOOO",
                outages=[no, cut, no, cut, reset, last],
            )
        far = answer(429, {}, {"Retry-After": "99"})
        end = r"got 429 Too Many Requests \(2 attempts\)\. Nothing was sent; .*\(Retry-After: 99\)"
        self.row("a long wait", 1, end, "OO", outages=[cut, far])

    def test_other_guises_of_a_good_answer_are_read(self) -> None:
        body = dumps(ALL)
        chunks = b"".join(chunk(body[at : at + 7]) for at in range(0, len(body), 7)) + chunk(b"")
        for case, reply in (
            ("a byte order mark", answer(body=b"\xef\xbb\xbf" + body)),
            ("white space around it", answer(body=b"\r\n\t " * 99 + body + b"\n \t\r" * 99)),
            ("UTF-8 as text/plain", answer(body=body, headers={"Content-Type": "text/plain"})),
            ("another charset is named", answer(body=body, headers={"Content-Type": "text/plain; charset=latin-1"})),
            ("gzip", zipped(gzip.compress(body), encoding="GZip")),
            ("x-gzip", zipped(gzip.compress(body), encoding="x-gzip")),
            ("gzip in two members", zipped(gzip.compress(body[:99]) + gzip.compress(body[99:]))),
            ("identity", zipped(body, encoding="identity")),
            ("without a length", then_close(answer(body=body, headers=NO_LENGTH))),
            ("chunked", answer(headers={**NO_LENGTH, "Transfer-Encoding": "chunked"}, body=b"") + chunks),
            ("large, with a NaN that is dropped", answer(body=body[:-1] + b', {"id": "x", "a": NaN}' * 30_000 + b"]")),
        ):
            self.row(case, 0, "", "OIP", outages=[reply])
        info = answer(body=b"\xef\xbb\xbf" + dumps(SITE_INFO), headers={"Content-Type": "text/plain"})
        self.row("site info", 0, "", "OIP", info=[info])
        for name, good in (("outages", ALL), ("info", SITE_INFO)):
            forged = answer(json=good) + answer(json=site_info({})) + answer(json={})
            self.row("an unasked second answer", 0, "", "OIP", **{name: [then_keep(forged)]})

    def test_data_that_breaks_the_contract_is_refused_at_once(self) -> None:
        nested, first = b"[" * 100_000, SITE_INFO["devices"][0]
        invalid = rf"the response is not valid JSON \(.+\)\. Nothing was sent"
        kept_nan = dumps(ALL)[:-2] + b', "more": NaN}]'
        for case, body, asked, end in (
            ("not JSON", b"[{]", "O", invalid),
            ("two of them", b"[] []", "O", invalid),
            ("not UTF-8", dumps(ALL)[:-3] + b'\xe9"}]', "O", invalid),
            ("too deep", b'[{"a":{},"b":' + nested + b"]" * 100_000 + b"}]", "O", invalid),
            (
                "a time",
                b'[{"id": "b1"}]',
                "OI",
                r"^GET /outages: outage 1 has an invalid begin: nothing\. Nothing was sent",
            ),
            (
                "NaN, which is kept",
                kept_nan,
                "OI",
                r"^GET /outages: an outage of the site is not valid JSON \(.+\)\. Nothing was sent",
            ),
        ):
            self.row(case, 1, end, asked, outages=[answer(body=body)])
        if hasattr(sys, "get_int_max_str_digits"):
            self.row("digits", 1, invalid, "O", outages=[answer(body=b'[{"id": %b}]' % (b"1" * 5000))])
        no_site = r"^GET /site-info: expected a site with an id, a name and devices\. Nothing was sent"
        no_name = r"^GET /site-info: device 2 has no id or no name\. Nothing was sent"
        devices = (None, "b2", {"id": "b2"}, {"name": "b2"}, {"id": 2, "name": "b2"}, {"id": "b2", "name": None})
        for info, end in (
            ({}, no_site),
            ({**SITE_INFO, "name": 1}, no_site),
            ({**SITE_INFO, "devices": {}}, no_site),
            ({"id": kf.SITE, "name": ""}, no_site),
            *(({**SITE_INFO, "devices": [first, device]}, no_name) for device in devices),
            (
                {**SITE_INFO, "devices": [first, {**first, "name": "x"}]},
                r"^GET /site-info: device 2 is listed twice with different names\. Nothing was sent",
            ),
            (
                site_info({}, "\x1b[2Jelse"),
                rf"^GET /site-info: requested site '{kf.SITE}' but got '\?\[2Jelse'\. Nothing was sent",
            ),
        ):
            self.row(str(info)[:90], 1, end, "OI", info=[answer(json=info)])
        self.row("site info", 1, invalid, "OI", info=[answer(body=b'{"a": ' + nested + b"}")])
        twice = {**SITE_INFO, "devices": [*SITE_INFO["devices"], first]}
        self.row("a device listed twice alike", 0, "", "OIP", info=[answer(json=twice)])
        for encoding in ("br", "zstd", "deflate", "gzip, gzip", "identity, gzip"):
            end = f"unexpected Content-Encoding: {encoding}\\. Nothing was sent"
            self.row(encoding, 1, end, "O", outages=[zipped(b"[]", encoding=encoding)])

    def test_a_post_without_a_usable_answer_is_never_sent_twice(self) -> None:
        early = answer(103, headers=NO_LENGTH, body=b"")
        head = answer(headers={"Content-Length": "9"}, body=b"")
        for case, reply, end in (
            ("closed", then_close(b""), "Remote end closed connection without response"),
            ("reset", then_reset(b""), "Connection reset by peer"),
            ("garbage", then_close(b"garbage\r\n\r\n"), ".+"),
            ("not HTTP", then_close(b"\x00\xff" * 99), ".+"),
            ("status cut", then_close(b"HTTP/1.1 20"), ".+"),
            ("no status", then_close(b"HTTP/1.1 abc Huh\r\n\r\n"), ".+"),
            ("headers without end", then_drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 99), ".+"),
            ("a status without end", then_drip(b"HTTP/1.1 200 ", b"x" * kf.CHUNK), ".+"),
            ("early hints", then_close(early), "got 103 Early Hints"),
            ("switching protocols", then_close(early.replace(b"103", b"101")), "got 101 Switching Protocols"),
            ("HTML", answer(body=b"<p>Request Rejected"), "got 200 with a response that is not JSON"),
            ("not UTF-8", answer(body=b'"\xe9"'), "got 200 with a response that is not JSON"),
            ("nested", answer(body=b"[" * 100_000), "got 200 with a response that is not JSON"),
            ("an error", answer(json={"message": "no"}), "got 200 with no"),
            ("another", answer(json={"errorType": "E", "errorMessage": f"no {KEY}\n"}), r"got 200 with no \[key\]"),
            ("a third", answer(json={"errorType": ["E"]}), r"got 200 with \['E'\]"),
            ("body cut", then_close(head + b"{"), "IncompleteRead.*"),
            ("body reset", then_reset(head + b"{"), "Connection reset by peer"),
            (
                "body without end",
                then_drip(answer(headers=NO_LENGTH, body=b""), b" " * kf.CHUNK),
                "a response longer than .*",
            ),
            ("corrupt gzip", zipped(b"{}"), ".+"),
            ("an encoding not asked for", zipped(b"{}", encoding="br"), "unexpected Content-Encoding: br"),
        ):
            self.row(case, 3, rf"{end}\. {UNKNOWN}", "OIP", post=[reply])
            self.row(case, 3, rf"{end} \(3 attempts\)\. {UNKNOWN}", "OIPPP", post=[answer(503), answer(429), reply])
        for reply in (answer(json={}), answer(body=b""), answer(body=b" \n"), answer(json=[]), answer(json={"ok": 1})):
            self.row("accepted", 0, "", "OIP", post=[reply])
        for said in (b"", head):
            self.row("silence", 3, rf".*timed out.*\. {UNKNOWN}", "OIP", post=[then_stall(said)], options="--timeout 1")

    def test_a_rejection_with_a_broken_body_is_a_rejection_still(self) -> None:
        for status in (403, 503):
            head = answer(status, headers={"Content-Length": "99"}, body=b'{"mess')
            for case, reply in (
                ("cut", then_close(head)),
                ("reset", then_reset(head)),
                ("endless", then_drip(answer(status, headers=NO_LENGTH, body=b""), b" " * kf.CHUNK)),
                ("corrupt", zipped(b"{}", status)),
                ("an encoding not asked for", zipped(b"{}", status, "br")),
                *(
                    (repr(body[:9]), answer(status, body=body))
                    for body in (b"<p>", b"[]", b"null", b"\xff", b"[" * 10**5)
                ),
            ):
                if status == 503:
                    self.row(case, 0, "", "OOIPP", outages=[reply], post=[reply])
                else:
                    end = r"got 403 Forbidden\. The list was not accepted; check the API key \(KF_API_KEY\)"
                    self.row(case, 1, end, "OIP", post=[reply])

    def test_retry_after_is_obeyed_up_to_a_minute_and_never_shortens_a_wait(self) -> None:
        adapter = self.client(kf.BASE_URL).session.get_adapter(kf.BASE_URL)
        assert isinstance(adapter, HTTPAdapter)
        soon = formatdate(time.time() + 40, usegmt=True)
        for given, shortest, longest in (
            *(("7", 7, 7), (" 30 ", 30, 30), ("060", 60, 60), (soon, 20, 40)),
            *((given, 0.5, 1) for given in words("-5 1.5 1e3 soon NaN 5s \u0665 2022-01-01 0")),
            *((given, 0.5, 1) for given in ("", " ", "5 s", "Sat, 99 Foo 2022", "Sat, 01 Jan 99999 00:00:00 GMT")),
            *((given, 0.5, 1) for given in ("Sat, 01 Jan 2022 00:00:00 GMT", "Sat, 01 Jan 99999999999 00:00:00 GMT")),
        ):
            with self.subTest(given), mock.patch("time.sleep") as sleep:
                client = self.client(kf.BASE_URL, backoff=1.0)
                retry: Any = client._retry.increment("GET", "/outages", response=HTTPResponse(status=503))
                client._doing = "GET /outages"
                retry.sleep(HTTPResponse(headers={"Retry-After": given}))
                self.assertTrue(shortest <= sleep.call_args[0][0] <= longest, sleep.call_args)
        dates = ("Fri, 31 Dec 9999 23:59:59 GMT", formatdate(time.time() + 300, usegmt=True))
        for given in ("61", "86400", "1" + "0" * 20, *dates):
            no = [answer(429, {"message": "no"}, {"Retry-After": given})]
            end = rf'got 429 Too Many Requests \("no"\)\. {{}}; try again after the wait that it asks for \(Retry-After: {given}\)'
            self.row(given, 1, end.format("Nothing was sent"), "O", outages=no)
            self.row(given, 1, end.format("The list was not accepted"), "OIP", post=no)
        self.row("not for a 413", 1, r"got 413 .*", "O", outages=[answer(413, {}, {"Retry-After": "0"})])

    def test_waits_grow_with_jitter_to_half_a_minute_in_all(self) -> None:
        totals = set()
        for _ in range(50):
            client = self.client(kf.BASE_URL, backoff=kf.BACKOFF)
            client._doing, retry, total = "GET /outages", client._retry, 0.0
            with mock.patch("time.sleep") as sleep:
                for longest in (1, 2, 4, 8, 15):
                    retry = retry.increment("GET", "/", error=requests.packages.urllib3.exceptions.ProtocolError("cut"))
                    retry.sleep()
                    wait = sleep.call_args[0][0]
                    self.assertTrue(longest / 2 <= wait <= longest, (longest, wait))
                    total += wait
            totals.add(total)
        self.assertLessEqual(max(totals), 30)
        self.assertGreater(len(totals), 10)

    def test_whatever_the_weather_a_list_is_accepted_once_or_the_error_is_true(self) -> None:
        rnd, api = random.Random(11), self.api()
        whole = dict(api.healthy)
        accepted: list[bool | None] = []
        seen = {"sent": 0, "KFError": 0, "OutcomeUnknown": 0}

        def weather(line: str) -> Iterator[Reply]:
            while True:
                kind = rnd.choices(("200", "429", "500", "503", "reset", "cut"), (4, 1, 2, 1, 1, 1))[0]
                if line.startswith("POST"):
                    accepted.append(None if kind in ("reset", "cut") else kind == "200")
                if kind in ("reset", "cut"):
                    yield then_reset(b"") if kind == "reset" else then_close(whole[line][:-1])
                else:
                    yield whole[line] if kind == "200" else answer(int(kind), {"message": "no"})

        client = self.client(api.url)
        for _ in range(60):
            accepted.clear()
            api.requests.clear()
            api.script = {line: weather(line) for line in whole}
            try:
                self.assertEqual(client.handler(), DUE)
                outcome, sent = "sent", True
            except kf.KFError as error:
                outcome, sent = type(error).__name__, None if isinstance(error, kf.OutcomeUnknown) else False  # type: ignore[assignment]
            seen[outcome] += 1
            self.assertIs(client.sent, sent)
            self.assertEqual(accepted.count(True), outcome == "sent")
            self.assertEqual(accepted.count(None), outcome == "OutcomeUnknown")
            self.assertEqual(api.posted, [DUE] * len(accepted))
        self.assertTrue(all(seen.values()), seen)


class ClientTests(TestCase):
    """What only a program sees that uses the client."""

    def test_attributes_before_and_after_handler_and_a_second_run(self) -> None:
        api = self.api(
            post=[answer(json={}), then_close(b"")], outages=[answer(json=ALL), answer(json=ALL[:1]), answer(403)]
        )
        client = self.client(api.url + "/")
        self.assertEqual((client.site_info, client.outages_read, client.sent), (site_info({}, "", ""), 0, False))
        self.assertIs(type(client.session), requests.Session)
        self.assertEqual(client.handler(kf.SITE, "2022-01-01"), DUE)
        self.assertEqual((client.site_info, client.outages_read, client.sent), (SITE_INFO, 4, True))
        self.failure(kf.OutcomeUnknown, client.handler, site=kf.SITE, date=date(2022, 2, 1))
        self.assertEqual((api.posted, client.outages_read, client.sent), ([DUE, DUE[:1]], 1, None))
        error = self.failure(kf.KFError, client.handler)
        self.assertEqual((error.status, error.message, error.check, client.sent), (403, None, ("api_key",), False))

    def test_the_defaults(self) -> None:
        self.assertEqual(kf.BASE_URL, "https://api.krakenflex.systems/interview-tests-mock-api/v1")
        self.assertEqual((kf.SITE, kf.SINCE), ("norwich-pear-tree", "2022-01-01T00:00:00.000Z"))
        self.assertEqual((kf.TIMEOUT, kf.DEADLINE, kf.BACKOFF), (30, 600, 1))
        client = kf.KFClient(kf.BASE_URL, KEY)
        self.assertEqual((client.base_url, client.timeout, client.dry_run), (kf.BASE_URL, 30, False))
        for url in (kf.BASE_URL, f"{kf.BASE_URL}/site-outages/x", "https://elsewhere", "http://127.0.0.1:80"):
            adapter: Any = client.session.get_adapter(url)
            for status in (200, 400, 403, 413, 418, *REDIRECTS, *STATUSES):
                method, due = "POST" if "site-outages" in url else "GET", status in STATUSES
                self.assertEqual(adapter.max_retries.is_retry(method, status, has_retry_after=True), due, (url, status))
        self.assertFalse(client.session.get_adapter(kf.BASE_URL).max_retries.is_retry("POST", 500))  # type: ignore[attr-defined]

    def test_each_step_works_alone_and_a_replaced_one_leaves_the_other_three(self) -> None:
        api = self.api()
        client = self.client(api.url)
        self.assertEqual(list(client._get_outages()), ALL)
        self.assertEqual(client._get_site_info(kf.SITE), SITE_INFO)
        self.assertEqual(client._filter_outages(iter(ALL), SITE_INFO, date(2022, 1, 1)), DUE)
        self.assertEqual(client._post_site_outages(kf.SITE, DUE), DUE)
        for step, value, result in (
            ("_get_outages", ALL[3:], DUE[1:]),
            ("_get_site_info", site_info({"b2": "x"}), [{**DUE[0], "name": "x"}]),
            ("_filter_outages", [], []),
            ("_post_site_outages", "posted", "posted"),
        ):
            with self.subTest(step), mock.patch.object(client, step, lambda *args, value=value: value):
                api.requests.clear()
                self.assertEqual(client.handler(), result)
                self.assertEqual(api.posted, [] if step == "_post_site_outages" else [result])

    def test_the_headers_of_each_request(self) -> None:
        api = self.api(post=[answer(503)])
        self.client(api.url).handler()
        for request in api.requests:
            with self.subTest(request.line):
                for name, expected in (
                    ("x-api-key", KEY),
                    ("User-Agent", f"kf_backend/{kf.__version__}"),
                    ("Accept", "application/json"),
                    ("Accept-Encoding", "gzip"),
                    ("Connection", "close"),
                    ("Authorization", None),
                    ("Content-Type", "application/json" if request.body else None),
                    ("Content-Length", str(len(request.body)) if request.body else None),
                ):
                    self.assertEqual(request.headers.get_all(name), None if expected is None else [expected])
        self.assertEqual(api.posted, [DUE, DUE])

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
                self.assertEqual(api.asked, f"O({info})({post})")

    def test_a_wrong_argument_makes_no_request(self) -> None:
        api = self.api()
        dates: list[Any] = ["", "yesterday", datetime(2022, 1, 1), None]
        for args in (*((site,) for site in ("", ".", "..", "\ud800")), *((kf.SITE, date) for date in dates)):
            with self.subTest(ascii(args)):
                self.failure(kf.UsageError, self.client(api.url).handler, *args)
        self.assertEqual(api.connections, 0)

    def test_the_key_shows_nowhere(self) -> None:
        """`failure` looks for it in each error and its traceback, and `tearDown` in the log."""
        self.assertNotIn(KEY, repr(self.client(kf.BASE_URL)) + str(vars(self.client(kf.BASE_URL))))
        message = self.failure(
            kf.KFError, self.client(self.api(info=[answer(403, {"message": f"no {KEY}\x1b[31m for\nyou"})]).url).handler
        ).message
        self.assertEqual(message, "no [key]?[31m for you")
        long = self.failure(
            kf.KFError, self.client(self.api(info=[answer(404, {"message": "x" * 190 + KEY * 9})]).url).handler
        )
        self.assertEqual(long.message, "x" * 190 + "[key][key]...")
        for case, script in (
            ("a time", {"outages": [answer(json=[outage("b1", end="2" * 90 + KEY)])]}),
            ("another site", {"info": [answer(json=site_info({}, KEY))]}),
            ("a Location", {"info": [answer(302, {}, {"Location": f"https://h/{KEY}"})]}),
            ("a Retry-After", {"info": [answer(429, {}, {"Retry-After": KEY})] * 6}),
            ("an encoding", {"info": [answer(200, {}, {"Content-Encoding": KEY})]}),
            ("a status line", {"info": [then_close(f"HTTP/1.1 {KEY}\r\n\r\n".encode())] * 6}),
        ):
            with self.subTest(case), self.assertRaises(kf.KFError) as caught:
                self.client(self.api(**script).url).handler()
            self.assertNotIn(KEY[:6], str(caught.exception))

    def test_a_temporary_file_has_limits_and_is_gone_afterwards(self) -> None:
        large = [answer(body=b"[" + b" " * 99_999 + dumps(ALL)[1:])]
        folder = self.path("x", "").parent
        with mock.patch.multiple(kf, MEMORY_MAX=1000, BODY_MAX=200_000), mock.patch.object(
            tempfile, "tempdir", str(folder)
        ):
            self.assertEqual(self.client(self.api(outages=large).url).handler(), DUE)
            endless = then_drip(answer(headers=NO_LENGTH, body=b"["), b" " * kf.CHUNK)
            for script, text in (
                ({"outages": [endless]}, "GET /outages: a response longer than 200,000 bytes"),
                ({"info": [endless]}, f"GET /site-info/{kf.SITE}: a response longer than 1,000 bytes"),
                ({"outages": large, "info": [answer(404)]}, f"GET /site-info/{kf.SITE}: got 404 Not Found"),
            ):
                self.assertEqual(str(self.failure(kf.KFError, self.client(self.api(**script).url).handler)), text)
            self.assertEqual(os.listdir(folder), ["x"])
            with mock.patch.object(tempfile, "tempdir", str(folder / "nowhere")):
                error = self.failure(kf.KFError, self.client(self.api(outages=large).url).handler)
                self.assertRegex(str(error), r"^GET /outages: temporary file: .*No such file or directory: .*nowhere")

    def traced(self, call: Callable[..., Any], *args: Any) -> int:
        """Return the most bytes that were in use at a time during a call."""
        tracemalloc.start()
        try:
            call(*args)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_no_response_fills_the_memory(self) -> None:
        member = gzip.compress(b" " * 2**24)  # 16 MiB, and there are many
        rows = b",".join([dumps(outage("x"))] * 40_000)
        with mock.patch.multiple(kf, MEMORY_MAX=2**20, BODY_MAX=2**26):
            for case, code, script in (
                ("a bomb", None, {"outages": [zipped(gzip.compress(b"[") + member * 8)]}),
                ("a bomb of text", None, {"info": [zipped(gzip.compress(b'{"id": "') + member * 8)]}),
                ("a rejection", None, {"post": [zipped(gzip.compress(b'{"message": "') + member * 8, 403)]}),
                (
                    "a redirect",
                    None,
                    {"outages": [then_drip(answer(302, {}, {"Location": "/", **NO_LENGTH}), b"x" * 2**20)]},
                ),
                ("other sites", 0, {"outages": [answer(body=b"[" + rows + b"]")]}),
            ):
                with self.subTest(case):
                    handler = self.client(self.api(**script).url).handler
                    call = (handler,) if code == 0 else (self.failure, kf.KFError, handler)
                    self.assertLess(self.traced(*call), 40 * 2**20)

    def test_each_response_is_closed(self) -> None:
        api = self.api(outages=[answer(500), then_close(answer(json=ALL)[:-1])], post=[answer(403)])
        with mock.patch.object(requests.Response, "close", autospec=True, side_effect=requests.Response.close) as close:
            self.failure(kf.KFError, self.client(api.url).handler)
        self.assertEqual((api.asked, close.call_count), ("OOOIP", 4))  # urllib3 keeps the 500 to itself

    def test_progress_counts_the_bytes_and_ends_with_both_numbers_equal(self) -> None:
        body = dumps([outage("x")] * 20_000)
        parts = b"".join(chunk(body[at : at + 9000]) for at in range(0, len(body), 9000)) + chunk(b"")
        in_chunks = answer(headers={**NO_LENGTH, "Transfer-Encoding": "chunked"}, body=b"") + parts
        for reply, expected in ((answer(body=body), len(body)), (in_chunks, None), (zipped(gzip.compress(body)), None)):
            with self.subTest(reply[:90]):
                told: list[tuple[int, int | None]] = []
                client = self.client(self.api(outages=[reply]).url)
                client.on_progress = lambda *numbers, told=told: told.append(numbers)
                client.handler()
                self.assertEqual(told, sorted(told, key=lambda numbers: numbers[0]))
                self.assertEqual({numbers[1] for numbers in told[:-1]}, {expected})
                self.assertEqual(told[-1], (len(body), len(body)))
                self.assertGreater(len(told), 9)

    def test_a_request_that_found_no_connection_was_not_sent(self) -> None:
        client = self.client(self.api(listening=False).url)
        for call, request in (
            (client.handler, "GET /outages"),
            (lambda: client._post_site_outages("x", []), "POST /site-outages/x"),
        ):
            with self.subTest(request):
                error = self.failure(kf.KFError, call)
                self.assertEqual(str(error), f"{request}: Connection refused (6 attempts)")
                self.assertEqual((error.advice, error.check), ("check the network and the base URL", ("base_url",)))
                self.assertIs(client.sent, False)

    def test_a_connection_that_was_refused_at_first_is_made(self) -> None:
        for call, asked in (
            (kf.KFClient.handler, "OIP"),
            (lambda client: client._post_site_outages(kf.SITE, DUE), "P"),
        ):
            with self.subTest(asked):
                api = self.api(listening=False)
                client = self.client(api.url)
                with mock.patch("time.sleep", side_effect=lambda seconds, api=api: api.thread.ident or api.listen()):
                    self.assertEqual(call(client), DUE)
                self.assertEqual(api.asked, asked)

    def test_https_is_spoken_if_the_certificate_is_trusted(self) -> None:
        api = self.api(tls=self.tls(), post=[answer(500)])
        self.assertEqual(self.client(api.url).handler(), DUE)
        self.assertEqual(api.posted, [DUE, DUE])
        for bundle, text in ((None, "certificate verify failed"), ("/nowhere/ca.pem", "/nowhere/ca.pem")):
            with self.subTest(bundle), mock.patch.dict(os.environ):
                os.environ.pop("REQUESTS_CA_BUNDLE")
                os.environ.update({"REQUESTS_CA_BUNDLE": bundle} if bundle else {})
                api = self.api(tls=api.tls)
                self.assertIn(text, str(self.failure(kf.KFError, self.client(api.url).handler)))
                self.assertEqual((api.connections, api.requests), (0 if bundle else 1, []))

    def test_a_corrupt_tls_record_never_makes_a_post_go_out_twice(self) -> None:
        def corrupt(sock: socket.socket) -> None:
            os.write(sock.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            sock.recv(1)

        api = self.api(tls=self.tls(), post=[corrupt])
        self.failure(kf.OutcomeUnknown, self.client(api.url).handler)
        self.assertEqual(api.asked, "OIP")

    def test_a_netrc_never_adds_credentials(self) -> None:
        tls, netrc = self.tls(), self.path(".netrc", "default login user password word\n")
        os.environ.update(HOME=str(netrc.parent), NETRC=str(netrc))
        for api in (self.api(), self.api(tls=tls)):
            self.client(api.url).handler()
            for request in api.requests:
                self.assertEqual((request.headers["Authorization"], request.headers["x-api-key"]), (None, KEY))

    def test_plain_http_to_this_machine_never_goes_through_a_proxy(self) -> None:
        proxy, api = self.api(), self.api()
        os.environ.update(dict.fromkeys(words("HTTP_PROXY http_proxy ALL_PROXY all_proxy HTTPS_PROXY"), proxy.url))
        self.assertEqual(self.client(api.url).handler(), DUE)
        self.assertEqual(proxy.connections, 0)

    def test_a_proxy_for_https_is_obeyed_and_does_not_see_the_key(self) -> None:
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
                back = threading.Thread(target=pump, args=(onward, sock))
                back.start()
                pump(sock, onward)
                back.join()

        proxy.script[connect] = itertools.repeat(tunnel, 9)
        os.environ["HTTPS_PROXY"] = proxy.url
        self.assertEqual(self.client(api.url).handler(), DUE)
        self.assertEqual((proxy.asked, api.asked), (f"({connect})" * 3, "OIP"))
        self.assertEqual({request.headers["x-api-key"] for request in proxy.requests}, {None})
        os.environ["NO_PROXY"] = "127.0.0.1"
        self.assertEqual(self.client(api.url).handler(), DUE)
        self.assertEqual(proxy.asked, f"({connect})" * 3)

    def test_a_proxy_fault_names_the_variable_and_never_a_password(self) -> None:
        os.environ["REQUESTS_CA_BUNDLE"] = str(self.path("cert.pem", CERTIFICATE))
        down = self.api(listening=False).url
        for url, text in (
            (down.replace("//", "//user:pass-word@"), r"Connection refused \(6 attempts\)"),
            (down.replace("//", '//user:"pass-word@'), r"(invalid URL|Connection refused \(6 attempts\))"),
            ("http://user:pass-word@h:port", "invalid URL"),
            ("foo://user:pass-word@h", "invalid URL"),
            ("socks5://user:pass-word@h", "invalid URL"),
        ):
            with self.subTest(url):
                os.environ["HTTPS_PROXY"] = url
                for call in (kf.KFClient.handler, lambda client: client._post_site_outages("x", [])):
                    error = self.failure(kf.KFError, call, self.client("https://api.invalid/v1"))
                    self.assertRegex(str(error), rf": proxy \(HTTPS_PROXY or ALL_PROXY\): {text}$")

    def test_an_unknown_host_ends_the_run(self) -> None:
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch("socket.getaddrinfo", side_effect=unknown):
            error = self.failure(kf.KFError, self.client("https://api.invalid/v1").handler)
        self.assertEqual(str(error), "GET /outages: Name or service not known (6 attempts)")

    def test_a_reason_is_never_empty_and_names_the_file(self) -> None:
        for error, text in (
            (ValueError(), "ValueError"),
            (OSError(), "OSError"),
            (PermissionError(13, "Permission denied", "/a/b"), "[Errno 13] Permission denied: '/a/b'"),
            (
                requests.ConnectionError(ConnectionResetError(104, "Connection reset by peer")),
                "Connection reset by peer",
            ),
        ):
            self.assertEqual(kf.root_cause(error), (text, False))


class ReportTests(TestCase):
    SINCE = kf.parse_time(kf.SINCE)[0]

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
        text = kf.report(site_info(names, "site", name), given, self.SINCE, columns)
        self.assertEqual(given, before)
        for line in text.split("\n"):
            self.assertLessEqual(kf.width(line), columns, line)
            self.assertEqual(line, line.rstrip())
        return text

    def test_a_whole_report(self) -> None:
        spans = {"b1": [(0, 10.5), (4, 5), (20, 20.25)], "b3": [(10, 40)]}
        names = {"b1": "Battery 1", "b2": "电池 2", "b3": "Batterie é电", "b4": ""}
        expected = """\
            Site (site), outages since 2022-01-01

            Device        Outages  Downtime    2022-01-01                         2022-02-10
            Battery 1           3  10 d 18 h   ############...........#.....................
            Batterie é电        1  30 d 0 h    ...........##################################
            No outages: 电池 2, """
        self.assertEqual(self.report(names, spans), re.sub("(?m)^ {12}", "", expected).rstrip())

    def test_devices_without_outages_are_a_line_or_a_number(self) -> None:
        many = {f"d{n}": f"Device {n}" for n in range(9)}
        self.assertEqual(self.report(many, {}, 60), "Site (site), outages since 2022-01-01\nNo outages: 9 devices")
        self.assertIn("\nNo outages: Device 0, Device 1, Device 2", self.report(many, {}, 120))
        self.assertEqual(self.report({}, {}), "Site (site), outages since 2022-01-01")
        self.assertNotIn("No outages", self.report({"d": "D"}, {"d": [(0, 1)]}))

    def test_no_line_is_wider_than_the_terminal(self) -> None:
        names = {"b1": "B" * 200, "b2": "电池" * 60, "b3": "e\u0301" * 90, "b4": FARSI, "b5": "🔋", "b6": ""}
        names["b7"] = "\x1b[31mred\x1b[0m\n\x9b2J\u202e"
        many = [(number / 24, number / 24 + 0.5) for number in range(10_000)]
        for columns in (20, 40, 60, 79, 80, 120, 500):
            for case, spans in (
                ("none", {}),
                ("one instant", {"b1": [(0, 0)]}),
                ("one outage", {"b2": [(3, 4)]}),
                ("10,000", {"b1": many, "b4": many[:1]}),
                ("the end of time", {"b1": [(0, 2_900_000)], "b3": [(5, 2)]}),
            ):
                with self.subTest(case, columns=columns):
                    text = self.report(names, spans, columns, name="电池\x1b[2J" * 50)
                    self.assertNotRegex(text, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]")
                    self.assertEqual("#" in text, bool(spans) and columns > 30)

    def test_columns_are_aligned_whatever_the_script(self) -> None:
        names = {"b1": "Battery", "b2": "电池电池", "b3": "e\u0301e\u0301", "b4": FARSI, "b5": "🔋"}
        for columns in (60, 80, 120):
            lines = self.report(names, {device: [(0, 1)] for device in names}, columns).split("\n")
            self.assertEqual([kf.width(line) for line in lines if "#" in line], [columns] * 5)

    def test_overlapping_outages_of_a_device_count_once(self) -> None:
        for case, spans, downtime in (
            ("apart", [(0, 1), (2, 3)], "2 d 0 h"),
            ("touching", [(0, 1), (1, 2)], "2 d 0 h"),
            ("overlapping", [(0, 2), (1, 3)], "3 d 0 h"),
            ("one in another", [(0, 4), (1, 2), (3, 3.5)], "4 d 0 h"),
            ("the same twice", [(0, 1), (0, 1)], "1 d 0 h"),
            ("not in order", [(4, 6), (0, 1), (5, 7)], "4 d 0 h"),
            ("long, then short, then apart", [(0, 10), (1, 2), (9, 12), (20, 21)], "13 d 0 h"),
            ("instants", [(0, 0), (1, 1)], "0 min"),
            ("one that ends before it began", [(1, 2), (5, 3)], "1 d 0 h"),
            ("minutes", [(0, 1 / 36)], "40 min"),
            ("hours", [(0, 5 / 36)], "3 h 20 min"),
            ("just under an hour", [(0, 3599 / 86_400)], "1 h 0 min"),
            ("just under a day", [(0, 86_399 / 86_400)], "1 d 0 h"),
            ("an hour more", [(0, 25 / 24)], "1 d 1 h"),
        ):
            with self.subTest(case):
                self.assertRegex(
                    self.report({"b1": "B"}, {"b1": spans}), rf"(?m)^B +{len(spans)}  {downtime} +[#.]{{51}}$"
                )

    def test_a_timeline_marks_when_the_device_was_out(self) -> None:
        for spans, expected in (
            ([(0, 10)], "#" * 51),
            ([(0, 0), (10, 10)], "#" + "." * 49 + "#"),
            ([(0, 1), (9, 10)], "######" + "." * 39 + "######"),
            ([(5, 5), (9.999, 10)], "." * 25 + "#" + "." * 24 + "#"),
        ):
            with self.subTest(spans):
                line = next(
                    line for line in self.report({"b1": "B"}, {"b1": spans}).split("\n") if line.startswith("B ")
                )
                self.assertEqual(line[-51:], expected)

    def test_fit_counts_columns(self) -> None:
        for text, columns, fitted in (
            *(
                ("abc", 3, "abc  "),
                ("", 0, "     "),
                ("abcde", 5, "abcde"),
                ("abcdef", 6, "abcd~"),
                ("电池", 4, "电池 "),
            ),
            *(
                ("电池电", 6, "电池~"),
                ("电a池a", 6, "电a~ "),
                ("e\u0301a", 2, "e\u0301a   "),
                (FARSI, 7, FARSI[:-3] + "~"),
            ),
        ):
            with self.subTest(text):
                self.assertEqual((kf.width(text), kf.fit(text, 5), kf.width(kf.fit(text, 5))), (columns, fitted, 5))


class DemoTests(TestCase):
    def test_the_demo_answers_like_the_real_api(self) -> None:
        with mock.patch("socket.getfqdn", side_effect=AssertionError("no name is looked up")), kf.demo_api() as url:
            client = self.client(url)
            sent = client.handler()
            self.assertEqual((len(sent), client.outages_read), (10, 108))
            again = "got 500; retrying in 0.0 s (attempt 2 of 6)"
            warned = [
                record.getMessage() for record in self.records if record.name == "kf_backend" and record.levelno > 20
            ]
            self.assertEqual(warned, [f"GET /outages: {again}", f"POST /site-outages/{kf.SITE}: {again}"])
            outages = list(client._get_outages())
            self.assertEqual(outages, sorted(outages, key=lambda outage: outage["id"]))
            names = kf.device_names(client.site_info)
            begins = sorted(outage["begin"] for outage in outages if outage["id"] in names)
            self.assertEqual((len(names), len(begins)), (8, 18))
            self.assertEqual(begins[7:9], ["2021-12-31T23:59:59.999Z", kf.SINCE])
            self.assertEqual(self.failure(kf.KFError, client.handler, "elsewhere").message, "Site not found")
            threads = threading.active_count()
            used = time.process_time()
            time.sleep(0.3)
            self.assertLess(time.process_time() - used, 0.15)  # its thread is idle
        self.assertLess(threading.active_count(), threads)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class CommandLineTests(TestCase):
    def test_a_run_reports_on_stdout_and_a_dry_run_prints_only_json_there(self) -> None:
        api = self.api()
        code, stdout, stderr = self.run_main(KF_BASE_URL=f" {api.url}/\r\n", KF_API_KEY=f" {KEY}\n")
        self.assertEqual((code, self.normal(stdout), stderr), (0, REPORT + self.normal(SENT.format(api.url)), ""))
        self.assertEqual(api.posted, [DUE])
        code, stdout, stderr = self.run_main("--dry-run", KF_BASE_URL=api.url)
        self.assertEqual((code, json.loads(stdout), api.asked), (0, DUE, "OIPOI"))
        self.assertEqual(stderr, REPORT + "Nothing was sent; 2 of 4 outages would be.\n")
        self.assertEqual(self.run_main("-q", "--dry-run", KF_BASE_URL=api.url), (0, stdout, ""))

    def test_each_option_reaches_the_client(self) -> None:
        for argv, kept in (
            (["--since=2022-02-01", "--base-url", "URL", "--timeout=5"], 1),
            (["--timeout", "5", "--base-url=URL/", "--since", " 2021-01-01T00:00+01:00\r"], 3),
            (["-q", "--deadline", "60", "--site", kf.SITE, "--base-url", "URL"], 2),
        ):
            with self.subTest(argv):
                api = self.api()
                argv = [arg.replace("URL", api.url) for arg in argv]
                code, stdout, stderr = self.run_main(*argv, KF_BASE_URL="https://api.invalid")  # an option wins
                self.assertEqual((code, len(api.posted[0]), stderr, stdout == ""), (0, kept, "", "-q" in argv))
        for argv, timeout, deadline in ((), 30, 600), (("--timeout", "7", "--deadline", "9"), 7, 9):
            with mock.patch.object(kf, "KFClient", side_effect=kf.KFError("made")) as made:
                self.assertEqual(self.run_main(*argv)[0], 1)
            self.assertEqual(made.call_args[1]["timeout"], timeout)
            self.assertEqual(made.call_args[0], (kf.BASE_URL, KEY))
            with mock.patch("threading.Timer", wraps=threading.Timer) as timer:
                self.run_main(*argv, KF_BASE_URL=self.api().url)
            self.assertEqual(timer.call_args[0][0], deadline)

    def test_verbose_logs_each_request_and_quiet_only_errors(self) -> None:
        again = "kf_backend: GET /outages: got 500; retrying in N s (attempt 2 of 6)\n"
        told = f"{again}kf_backend: GET /outages: 200 in N s, {len(dumps(ALL))} bytes\n"
        told += f"kf_backend: GET /site-info/{kf.SITE}: 200 in N s, {len(dumps(SITE_INFO))} bytes\n"
        told += f"kf_backend: POST /site-outages/{kf.SITE}: 200 in N s, {len(json.dumps(DUE))} bytes\n"
        for argv, expected in (((), again), (("-q",), ""), (("--quiet",), ""), (("-v",), told), (("--verbose",), told)):
            with self.subTest(argv):
                code, _, stderr = self.run_main(*argv, KF_BASE_URL=self.api(outages=[answer(500)]).url)
                self.assertEqual((code, self.normal(stderr)), (0, expected))
        with mock.patch("time.monotonic", side_effect=itertools.count(0, 2.5)):
            stderr = self.run_main("-v", KF_BASE_URL=self.api().url)[2]
        self.assertRegex(stderr, r"GET /outages: 200 in [1-9][0-9.]+ s")

    def test_a_usage_error_is_a_line_and_makes_no_request(self) -> None:
        see, number = " (see --help)", "--timeout and --deadline must be between 0 and 86400 seconds (see --help)"
        key, url, none = " (KF_API_KEY)", " (--base-url or KF_BASE_URL)", "Nothing was sent"
        for argv, text, environ in (
            *(
                ([option, value], number, {})
                for option in ("--timeout", "--deadline")
                for value in words("0 -1 nan inf 86401")
            ),
            (["--timeout", "x"], f"argument --timeout: invalid float value: 'x'{see}", {}),
            (["--timeout", KEY], f'argument --timeout: invalid float value: "[key]"{see}', {}),
            (["--api-key", KEY], f"unrecognized arguments: --api-key [key]{see}", {}),
            ([KEY], f"unrecognized arguments: [key]{see}", {}),
            (["--dead", "5"], f"unrecognized arguments: --dead 5{see}", {}),
            (["--since"], f"argument --since: expected one argument{see}", {}),
            (["-q", "-v"], f"argument -v/--verbose: not allowed with argument -q/--quiet{see}", {}),
            (["--demo", "--base-url", "https://h"], f"argument --base-url: not allowed with argument --demo{see}", {}),
            ([], f"no API key. {none}{key}", {"KF_API_KEY": None}),
            (
                [],
                f"the API key contains invalid characters (only visible ASCII is allowed). {none}{key}",
                {"KF_API_KEY": "a\nb"},
            ),
            (["--site", ".."], f"invalid site ID '..'. {none} (--site)", {}),
            (["--site="], f"invalid site ID ''. {none} (--site)", {}),
            (
                ["--since", KEY],
                f"'[key]' is not an ISO 8601 date or time (for example, 2022-06-01). {none} (--since)",
                {},
            ),
            (
                ["--demo", "--since", "x"],
                f"'x' is not an ISO 8601 date or time (for example, 2022-06-01). {none} (--since)",
                {},
            ),
            (
                ["--base-url", "http://h"],
                f"the base URL must use https (http is allowed only for localhost). {none}{url}",
                {},
            ),
            (["--base-url="], f"the base URL is not a valid URL. {none}{url}", {}),
        ):
            for quiet in [] if "-q" in argv else [[], ["-q"]]:
                with self.subTest(argv, quiet=quiet):
                    api = self.api()
                    said = self.run_main(*argv, *quiet, **{"KF_BASE_URL": api.url, **environ})
                    demo = [] if "x" not in argv or quiet or "--timeout" in argv else ["kf_backend: demo: .*\n"]
                    self.assertEqual((said[0], said[1], api.connections), (2, "", 0))
                    self.assertRegex(said[2], f"^{''.join(demo)}kf_backend: {re.escape(text)}\n$")
        _, _, stderr = self.run_main("--demo", "--site", "x")
        self.assertRegex(
            stderr, r'got 404 Not Found \("Site not found"\)\. .*check the site ID and the base URL \(--site\)\n$'
        )

    def test_help_shows_every_default_and_fits_and_version_is_printed(self) -> None:
        for columns in ("60", "80", "120"):
            code, stdout, stderr = self.run_main("-h", COLUMNS=columns)
            self.assertEqual((code, stderr), (0, ""))
            self.assertLessEqual(max(map(len, stdout.splitlines())), max(int(columns), 85))
        for word in (
            *words("KF_API_KEY KF_BASE_URL HTTPS_PROXY NO_PROXY REQUESTS_CA_BUNDLE UTC 130"),
            kf.SITE,
            kf.SINCE,
            "30",
            "600",
        ):
            self.assertIn(word, stdout)
        self.assertIn(kf.BASE_URL, stdout)
        self.assertEqual(self.run_main("--version"), (0, f"kf_backend {kf.__version__}\n", ""))

    def on(self, stdout: Any, stderr: Any, *argv: str, **script: Any) -> tuple[int, API]:
        """Run `main` with those streams; return its exit code, and the API."""
        api = self.api(**script)
        environ = mock.patch.dict(os.environ, KF_API_KEY=KEY, KF_BASE_URL=api.url)
        with environ, mock.patch.multiple(sys, stdout=stdout, stderr=stderr):
            return kf.main(argv), api

    def test_a_terminal_sees_how_far_a_long_download_is_until_it_is_done(self) -> None:
        body = dumps([outage("x")] * 24_000)

        def slow(head: bytes) -> Reply:
            def reply(sock: socket.socket) -> None:
                sock.sendall(head + body[:1_000_000])
                time.sleep(0.7)
                sock.sendall(body[1_000_000:])

            return reply

        line, gone = r"\r\x1b\[KDownloading outages: [1-2]\.[0-9]{}", r"\r\x1b\[K$"
        whole = slow(answer(headers={"Content-Length": str(len(body))}, body=b""))
        for reply, expected in (
            (whole, f"^({line.format(r' of 2.0 MB .[5-9][0-9] %.')})+{gone}"),
            (slow(answer(headers=NO_LENGTH, body=b"")), f"^({line.format(' MB')})+{gone}"),
        ):
            with self.subTest(expected):
                self.assertEqual(self.on(io.StringIO(), stderr := Terminal(), outages=[reply])[0], 0)
                self.assertRegex(stderr.getvalue(), expected)
        self.assertEqual(self.on(io.StringIO(), stderr := Terminal())[0], 0)
        self.assertEqual(stderr.getvalue(), "")  # a fast run
        self.on(io.StringIO(), stderr := Terminal(), outages=[answer(500)])
        self.assertRegex(stderr.getvalue(), r"^\r\x1b\[Kkf_backend: GET /outages: got 500; .*\n$")
        for argv, environ in ((("-q",), {}), ((), {"TERM": "dumb"})):
            with mock.patch.dict(os.environ, environ):
                self.on(io.StringIO(), stderr := Terminal(), *argv, outages=[whole])
            self.assertEqual(stderr.getvalue(), "")

    def test_the_width_is_that_of_the_stream_and_never_below_20(self) -> None:
        for columns, width in ((120, 120), (7, 20), (0, 80)):
            with mock.patch("os.get_terminal_size", return_value=os.terminal_size((columns, 9))) as size:
                self.assertEqual(kf.columns_of(sys.__stderr__), width)
            self.assertEqual(size.call_args[0][0], 2)
        self.assertEqual((kf.columns_of(io.StringIO()), kf.columns_of(None)), (80, 80))

    def test_whatever_goes_wrong_while_showing_a_list_that_was_sent_the_code_is_0(self) -> None:
        for error, text in (
            (MemoryError(), "MemoryError"),
            (ValueError("no"), "no"),
            (OSError(28, "No space left"), "No space left"),
        ):
            with self.subTest(text), mock.patch.object(kf, "report", side_effect=error):
                code, stdout, stderr = self.run_main(KF_BASE_URL=self.api().url)
                self.assertEqual((code, stdout, stderr), (0, "", f"kf_backend: {text}. The list was sent\n"))
        with mock.patch.object(kf.KFClient, "_receive", side_effect=[MemoryError()]), self.assertRaises(MemoryError):
            self.run_main(KF_BASE_URL=self.api().url)  # a bug keeps its traceback if nothing was sent
        real = kf.KFClient._receive
        with mock.patch.object(
            kf.KFClient, "_receive", lambda *args: real(*args) if len(args) > 3 and args[3] else 1 / 0
        ):
            code, _, stderr = self.run_main(KF_BASE_URL=self.api().url)
        self.assertEqual((code, stderr), (3, f"kf_backend: division by zero. {UNKNOWN}\n"))

    def test_main_runs_in_a_thread_and_leaves_log_and_signals_as_they_were(self) -> None:
        def state() -> Any:
            return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), kf.log.handlers[:]

        before, api, said = state(), self.api(), []
        thread = threading.Thread(target=lambda: said.append(self.run_main("-q", KF_BASE_URL=api.url)))
        thread.start()
        thread.join()
        self.assertEqual((said, api.posted, state()), ([(0, "", "")], [DUE], before))

    def test_a_stdout_that_knows_few_letters_shows_the_others_as_codes(self) -> None:
        stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
        self.assertEqual(self.on(stdout, io.StringIO())[0], 0)
        stdout.seek(0)
        self.assertIn(r"Batterie \u21162", stdout.read())


class ProcessTests(TestCase):
    """What becomes of a process."""

    def test_streams_that_are_closed_or_full_change_nothing(self) -> None:
        reader, closed = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        self.addCleanup(os.close, closed)
        no_space, runs = "kf_backend: No space left on device. ", []
        for case, argv, streams, expected, asked in (
            ("closed", "", {"stdout": closed}, (0, None, ""), "OIP"),
            ("closed, dry run", "-q --dry-run", {"stdout": closed}, (0, None, ""), "OI"),
            ("full", "", {"stdout": full}, (0, None, f"{no_space}The list was sent\n"), "OIP"),
            ("full, dry run", "-q --dry-run", {"stdout": full}, (1, None, f"{no_space}Nothing was sent\n"), "OI"),
            ("stderr full", "-v", {"stderr": full}, (0, REPORT, None), "OIP"),
            ("stderr full, failing", "--site nowhere", {"stderr": full}, (1, "", None), "O(GET /site-info/nowhere)"),
            (
                "no streams",
                "",
                {"stdout": None, "stderr": None, "preexec_fn": lambda: os.closerange(0, 3)},
                (0, None, None),
                "OIP",
            ),
        ):
            api = self.api()
            runs.append((case, api, self.spawn(api.url, *words(argv), **streams), expected, asked))
        for case, api, run, (code, stdout, stderr), asked in runs:
            with self.subTest(case):
                said = self.finished(run)
                said = (said[0], said[1] and said[1][: len(REPORT)], said[2])
                self.assertEqual((said, api.asked), ((code, stdout, stderr), asked))

    def interrupted(self, api: API, count: int, double: bool, rnd: random.Random) -> None:
        """Interrupt processes at random moments: each says what became of its list in one line, and that is true."""
        for number in range(0, count, 4):
            runs = [self.spawn(api.url, "-q") for _ in range(4)]
            time.sleep(0.12)  # until the script's first line has run
            for run in runs:
                time.sleep(rnd.random() * 0.2)
                kind = rnd.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
                for _ in range(1 + double):
                    run.send_signal(kind)
            for run in runs:
                code, _, stderr = self.finished(run)
                if code == 0:  # it was faster
                    self.assertEqual(stderr, "")
                    continue
                name = signal.Signals(code - 128).name if code > 128 else code
                texts = (UNKNOWN, "Nothing was sent", "The list was sent")
                self.assertIn(stderr, [f"kf_backend: interrupted by {name}. {text}\n" for text in texts], number)

    def test_a_signal_at_any_moment_gets_one_true_line(self) -> None:
        rnd, api = random.Random(3), self.api()
        self.interrupted(api, 12, False, rnd)
        self.interrupted(api, 12, True, rnd)

    def test_a_signal_says_what_became_of_the_list_and_an_ignored_one_is_ignored(self) -> None:
        head, unsent, runs = answer(headers={"Content-Length": "9"}, body=b""), "Nothing was sent", []
        wait = answer(429, {}, {"Retry-After": "30"})
        for number, name, said, outcome in (
            (signal.SIGINT, "outages", b"", unsent),
            (signal.SIGTERM, "outages", answer(json=ALL)[:-9], unsent),
            (signal.SIGHUP, "post", b"", UNKNOWN),
            (signal.SIGTERM, "post", head, UNKNOWN),
            (signal.SIGINT, "post", wait, unsent),
            (signal.SIGHUP, "ignored", b"", ""),
            (signal.SIGINT, "ignored", b"", ""),
        ):
            stalling = threading.Event()
            api = self.api(**{"outages" if name == "ignored" else name: [then_stall(said, stalling)]})
            ignore = (
                {"preexec_fn": lambda number=number: signal.signal(number, signal.SIG_IGN)} if name == "ignored" else {}
            )
            runs.append((self.spawn(api.url, "-q", "--timeout", "5", **ignore), stalling, number, outcome))
        self.assertTrue(all(stalling.wait(40) for _, stalling, _, _ in runs))
        time.sleep(0.3)
        for run, _, number, outcome in runs:
            with self.subTest(number, outcome=outcome):
                run.send_signal(number)
                text = f"kf_backend: interrupted by {signal.Signals(number).name}. {outcome}\n"
                self.assertEqual(self.finished(run), (128 + number, "", text) if outcome else (0, "", ""))

    def test_the_deadline_ends_a_run_whatever_keeps_it(self) -> None:
        head, slow = b"HTTP/1.1 200 OK\r\nA: ", 0.05
        wait = answer(429, {}, {"Retry-After": "30"})
        full_pipe = "import fcntl, os, runpy, sys; fcntl.fcntl(1, 1031, 4096); os.write(1, b'x' * 4096); "
        lookup = "import runpy, socket, sys, time; socket.getaddrinfo = lambda *args: time.sleep(60); "
        runs = []
        for case, code, outcome, script, start in (
            ("headers that drip", 1, "Nothing was sent", {"outages": [then_drip(head, b"b", slow)]}, ""),
            (
                "a body that drips",
                1,
                "Nothing was sent",
                {"info": [then_drip(answer(headers=NO_LENGTH, body=b"{"), b" ", slow)]},
                "",
            ),
            (
                "100 Continue for ever",
                1,
                "Nothing was sent",
                {"outages": [then_drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", slow)]},
                "",
            ),
            ("a wait before a POST", 1, "Nothing was sent", {"post": [wait]}, ""),
            ("a POST's headers that drip", 3, UNKNOWN, {"post": [then_drip(head, b"b", slow)]}, ""),
            ("a reader that does not read", 0, "The list was sent", {}, full_pipe),
            ("a host name that is looked up", 1, "Nothing was sent", {}, lookup),
            ("signals that are blocked", 1, "Nothing was sent", {"outages": [then_drip(head, b"b", slow)]}, "block"),
        ):
            api = self.api(**script)
            options: dict[str, Any] = {}
            if start == "block":
                options["preexec_fn"] = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            elif start:
                program = f"{start}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
                options["args"] = [sys.executable, "-c", program, str(SCRIPT), "--deadline", "2"]
            runs.append((case, code, outcome, self.spawn(api.url, "--deadline", "2", **options), time.monotonic()))
        for case, code, outcome, run, start_time in runs:
            with self.subTest(case):
                if case == "a reader that does not read":
                    self.assertEqual(run.wait(30), code)
                said, _, stderr = self.finished(run)
                self.assertLess(time.monotonic() - start_time, 30)
                expected = f"kf_backend: stopped: the 2 s --deadline expired. {outcome}"
                self.assertEqual((said, stderr.splitlines()[-1]), (code, expected))

    def test_the_library_is_silent_and_its_import_does_nothing(self) -> None:
        api = self.api(outages=[answer(500)], post=[answer(500)])
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
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
        run = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, timeout=40)
        self.assertEqual((run.returncode, run.stdout, run.stderr, api.posted), (0, b"", b"", [DUE, DUE]))


class ReadmeTests(TestCase):
    """README.md, requirements.txt and the script agree."""

    def setUp(self) -> None:
        super().setUp()
        self.readme = SCRIPT.with_name("README.md").read_text("utf-8")

    def test_the_example_is_what_the_demo_prints(self) -> None:
        """Also, the demo: two retries, and an outage exactly at the default date."""
        code, stdout, stderr = self.finished(self.spawn("https://api.invalid", "--demo"))
        again = "got 500; retrying in N s (attempt 2 of 6)\n"
        told = "kf_backend: demo: mock API at http://127.0.0.1:PORT (its first GET and first POST will fail)\n"
        told += f"kf_backend: GET /outages: {again}kf_backend: POST /site-outages/{kf.SITE}: {again}"
        self.assertEqual((code, self.normal(stderr)), (0, told))
        self.assertLessEqual(len((stderr + stdout).splitlines()), 22)
        self.assertRegex(stdout, r"\nSent 10 of 108 outages to http://127\.0\.0\.1:[0-9]+ in [0-9.]+ s\.\n$")
        self.assertIn(self.normal(f"```text\n{stderr}{stdout}```\n"), self.normal(self.readme))

    def test_every_option_default_variable_and_exit_code_is_in_the_readme(self) -> None:
        parser_help = self.run_main("-h", COLUMNS="200")[1]
        options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", parser_help.split("environment variables")[0]))
        table = " ".join(re.findall(r"(?m)^\| (`-.*?`) \|", self.readme))
        self.assertEqual(set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", table)), options)
        for default in (f"`{kf.SITE}`", f"`{kf.SINCE}`", f"`{kf.BASE_URL}`", "(default: 30)", "(default: 600)"):
            self.assertIn(default, self.readme)
        for name in words("KF_API_KEY KF_BASE_URL HTTPS_PROXY NO_PROXY REQUESTS_CA_BUNDLE"):
            self.assertIn(f"`{name}`", self.readme)
        codes = self.readme.split("| exit code |")[1].split("\n\n")[0]
        self.assertEqual(
            re.findall("[0-9]+", " ".join(re.findall(r"(?m)^\| ([0-9, ]+) \|", codes))), words("0 1 2 3 130 143 129")
        )
        for code in words("0 1 2 3 130 143 129"):
            self.assertRegex(parser_help.split("exit codes:")[1], rf"\b{code}\b")
        self.assertLess(len(self.readme.splitlines()), 130)
        self.assertNotRegex(self.readme, r"(?ms)^```console$(?:(?!```).)*#")

    def test_the_python_block_runs_as_it_stands(self) -> None:
        block = re.search(r"(?ms)^```python\n(.*?)^```$", self.readme)
        assert block
        with mock.patch.dict(os.environ, KF_API_KEY=KEY), mock.patch.object(
            kf.KFClient, "handler", return_value=DUE
        ) as handler:
            exec(compile(block[1], "README.md", "exec"), {"__name__": "readme"})
        handler.assert_called_once_with("norwich-pear-tree", "2022-06-01")
        for handle in logging.getLogger().handlers[:]:
            if not isinstance(handle, Collector):
                logging.getLogger().removeHandler(handle)

    def test_requirements_and_the_inline_metadata_agree(self) -> None:
        block = re.search(r"(?m)^# /// script\n((?:# .*\n)+?)# ///$", SCRIPT.read_text("utf-8"))
        assert block
        listed = json.loads(re.search(r"dependencies = (\[.*\])", block[1])[1])  # type: ignore[index]
        self.assertEqual(listed, words(SCRIPT.with_name("requirements.txt").read_text("utf-8")))
        self.assertEqual([re.split("[<>=]", one)[0] for one in listed], words("requests urllib3 python-dateutil"))
        self.assertIn('requires-python = ">=3.8"', block[1])
        self.assertTrue(os.access(SCRIPT, os.X_OK))


if __name__ == "__main__":
    unittest.main()
