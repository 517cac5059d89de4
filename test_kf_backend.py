"""Tests for kf_backend.py, in the same order: from errors to the command line.

They talk to `API`, a real HTTP server on 127.0.0.1. For one of the three requests, it
first sends the replies that a test specifies; otherwise, it answers as it should. A
reply is bytes, or, for misbehavior, a function that takes the socket. `api.requests`
lists the requests that were made: `HEALTHY` if nothing goes wrong.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import email.message
import faulthandler
import gc
import gzip
import http.client
import io
import itertools
import json
import logging
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
import warnings
from collections.abc import Callable, Iterable
from email.utils import formatdate
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Union
from unittest import mock

import requests
from urllib3 import HTTPResponse

import kf_backend as kf

SCRIPT = Path(kf.__file__)
IS_UNIX = os.name == "posix"
KEY = "s3cret-key!"

GET_OUTAGES = "GET /outages"
GET_SITE_INFO = f"GET /site-info/{kf.SITE}"
POST_SITE_OUTAGES = f"POST /site-outages/{kf.SITE}"
HEALTHY = [GET_OUTAGES, GET_SITE_INFO, POST_SITE_OUTAGES]

SITE_INFO: Any = {
    "id": kf.SITE,
    "name": "Norwich Pear Tree",
    "devices": [
        {"id": "b1", "name": "Battery 1"},
        {"id": "b2", "name": "Batterie №2"},
        {"id": "b3", "name": "Battery 3"},
    ],
}


def outage(
    device: object,
    begin: object = "2022-05-01T00:00:00.000Z",
    end: object = "2022-05-02T00:00:00.000Z",
) -> Any:
    return {"id": device, "begin": begin, "end": end}


#: One begins exactly at the default date, another a millisecond before it.
OUTAGES = [
    outage("b2", "2022-03-01T00:00:00.000Z", "2022-03-04T04:00:00.000Z"),
    outage("elsewhere", "not", "checked"),
    outage("b1", "2021-12-31T23:59:59.999Z", "2022-06-01T00:00:00.000Z"),
    outage("b1", "2022-01-01T00:00:00.000Z", "2022-01-11T12:00:00.000Z"),
]
SITE_OUTAGES = [
    {**OUTAGES[0], "name": "Batterie №2"},
    {**OUTAGES[3], "name": "Battery 1"},
]
REPORT = """\
Norwich Pear Tree (norwich-pear-tree): outages since 2022-01-01

Device       Outages      Downtime  2022-01-01                        2022-03-04
Battery 1          1     10 d 12 h  ########....................................
Batterie №2        1       3 d 4 h  .........................................###
Battery 3          0         0 min  ............................................

"""
OUTAGES_BODY = json.dumps(OUTAGES).encode()
NOT_REPORTED = "No outages were reported"
UNKNOWN = "The list may or may not have been applied; check before rerunning"

#: Self-signed for 127.0.0.1, valid until 2120. Its key is only for these tests.
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

#: /dev/full is a device that is always full. macOS and Windows have nothing like it.
needs_full_device = unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")

# A server that can misbehave

Reply = Union[bytes, "Callable[[socket.socket], None]"]


def response(body: object = b"", status: int = 200, **headers: str | None) -> bytes:
    """Return an HTTP response. `body` becomes JSON, unless it is bytes.

    `Content_Length=None` leaves out that header.
    """
    if not isinstance(body, bytes):
        body = json.dumps(body, ensure_ascii=False).encode()
    fields = {"Content_Length": str(len(body)), **headers}
    head = f"HTTP/1.1 {status} Said\r\n"
    for name, value in fields.items():
        if value is not None:
            head += f"{name.replace('_', '-')}: {value}\r\n"
    return head.encode() + b"\r\n" + body


def chunked(body: bytes) -> bytes:
    """Return a response in chunks of 50 bytes."""
    reply = response(Content_Length=None, Transfer_Encoding="chunked")
    for start in range(0, len(body), 50):
        chunk = body[start : start + 50]
        reply += b"%x\r\n%b\r\n" % (len(chunk), chunk)
    return reply + b"0\r\n\r\n"


def reset(sock: socket.socket) -> None:
    """End a connection with a reset rather than an orderly close."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(sock.detach())


def endless(start: bytes, rest: bytes, pause: float = 0.0) -> Reply:
    """Return a reply that sends `start`, and then `rest` until the client hangs up."""

    def reply(sock: socket.socket) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(rest)
            time.sleep(pause)

    return reply


class Request(NamedTuple):
    line: str  # such as "GET /outages"
    headers: email.message.Message
    body: bytes


class Connection(socketserver.StreamRequestHandler):
    """Serves one request, and closes the connection."""

    timeout = 20
    server: API

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # The client may hang up.
            line = self.rfile.readline().decode("latin-1").rpartition(" ")[0]
            if not line:
                return
            headers = http.client.parse_headers(self.rfile)
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            reply = self.server.reply_to(Request(line, headers, body))
            if callable(reply):
                reply(self.connection)
            else:
                self.connection.sendall(reply)


class API(socketserver.ThreadingTCPServer):
    """A mock of the KrakenFlex API. Until `start` is called, it refuses connections."""

    request_queue_size = 50
    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Connection, bind_and_activate=False)
        self.server_bind()
        self.tls = tls
        self.port = int(self.server_address[1])
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        if tls:
            self.url = f"https://{self.address}"
        self.connections = 0
        self.received: list[Request] = []
        self.replies: dict[str, list[Any]] = {}
        self.healthy = {
            GET_OUTAGES: response(OUTAGES),
            GET_SITE_INFO: response(SITE_INFO),
            POST_SITE_OUTAGES: response({}),
        }
        self.thread = threading.Thread(target=self.serve_forever, args=(0.001,))

    def start(self) -> None:
        self.server_activate()
        self.thread.start()

    def __exit__(self, *exc_info: object) -> None:
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
        self.server_close()

    def get_request(self) -> Any:
        self.connections += 1
        sock, address = super().get_request()
        if self.tls:
            sock = self.tls.wrap_socket(sock, True, do_handshake_on_connect=False)
        return sock, address

    def reply_to(self, request: Request) -> Any:
        self.received.append(request)
        if self.replies.get(request.line):
            return self.replies[request.line].pop(0)
        no_site = response({"message": "No site"}, 404)
        return self.healthy.get(request.line, no_site)

    @property
    def requests(self) -> list[str]:
        return [request.line for request in self.received]

    @property
    def posted(self) -> list[Any]:
        return [json.loads(request.body) for request in self.received if request.body]


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    stdout: str
    stderr: str


class TestCase(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        """Keep the caller's environment out, and collect what is logged."""
        faulthandler.dump_traceback_later(50, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        ours = r"(?i)KF_.*|.*_PROXY|NETRC|COLUMNS|TERM|.*_CA_BUNDLE|SSL_CERT_.*"
        kept = {}
        for name, value in os.environ.items():
            if not re.fullmatch(ours, name):
                kept[name] = value
        self.use(mock.patch.dict(os.environ, kept, clear=True))
        self.use(mock.patch.dict(kf.KFClient.__init__.__kwdefaults__, backoff=0.001))
        self.log = logging.handlers.BufferingHandler(10**9)
        root = logging.getLogger()
        self.use(mock.patch.multiple(root, handlers=[self.log], level=logging.DEBUG))

    def use(self, manager: Any) -> Any:
        """Enter a context manager until the end of the test."""
        return self.stack.enter_context(manager)

    def patch(self, **values: Any) -> None:
        """Replace these attributes of the script until the end of the test."""
        self.use(mock.patch.multiple(kf, **values))

    def messages(self) -> list[str]:
        """Return what the client has logged."""
        ours = [record for record in self.log.buffer if record.name == "kf_backend"]
        return [record.getMessage() for record in ours]

    def api(self, line: str = "", *replies: Reply, tls: Any = None) -> API:
        """Return an API that gives these replies to `line` first."""
        api = self.stopped_api(tls)
        api.replies[line] = list(replies)
        api.start()
        return api

    def stopped_api(self, tls: Any = None) -> API:
        api: API = self.use(API(tls))
        return api

    def client(self, api: API, **options: Any) -> kf.KFClient:
        client: kf.KFClient = self.use(kf.KFClient(api.url, KEY, **options))
        return client

    def assert_reported(self, line: str, *replies: Reply) -> API:
        """Assert that a run reports the right list after these replies to `line`."""
        api = self.api(line, *replies)
        self.assertEqual(self.client(api).handler(), SITE_OUTAGES)
        self.assertEqual(api.posted[-1], SITE_OUTAGES)
        return api

    def assert_not_reported(self, message: str, line: str, *replies: Reply) -> API:
        """Assert that a run ends with "no outages were reported", and this message."""
        api = self.api(line, *replies)
        error = self.error(self.client(api).handler)
        self.assertIs(error.outcome, kf.NOT_REPORTED)
        self.assertRegex(str(error), message)
        return api

    def assert_unknown(
        self, message: str, line: str, *replies: Reply, timeout: float = 20
    ) -> API:
        """Assert that a run ends with "may or may not", this message, and the list."""
        api = self.api(line, *replies)
        client = self.client(api, timeout=timeout)
        error = self.error(client.handler)
        self.assertEqual(vars(error), {"site_outages": SITE_OUTAGES})
        self.assertIs(error.outcome, kf.UNKNOWN)
        self.assertIs(client.outcome, kf.UNKNOWN)
        self.assertRegex(str(error), message)
        return api

    def file(self, name: str, text: str) -> Path:
        path = Path(self.use(tempfile.TemporaryDirectory()), name)
        path.write_text(text, "utf-8")
        path.chmod(0o600)
        return path

    def error(self, call: Callable[..., Any], *args: Any) -> kf.KFError:
        """Return the KFError that `call` raises. It must not show the key."""
        with self.assertRaises(kf.KFError) as caught:
            call(*args)
        error = caught.exception
        shown = traceback.format_exception(type(error), error, error.__traceback__)
        self.assertNotIn(KEY, f"{''.join(shown)}{error!r}")
        self.assertTrue(str(error).isprintable(), str(error))
        return error

    def run_or_fail(self, client: kf.KFClient) -> None:
        try:
            client.handler()
        except kf.KFError as error:
            traceback.clear_frames(error.__traceback__)  # closes temporary files

    def run_main(self, *argv: str, **environ: str) -> Ended:
        """Run `main` in this process. The key must not be shown."""
        environ = {"KF_API_KEY": KEY, **environ}
        stdout = io.StringIO()
        stderr = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, environ))
            stack.enter_context(contextlib.redirect_stdout(stdout))
            stack.enter_context(contextlib.redirect_stderr(stderr))
            try:
                code = kf.main(list(argv))
            except SystemExit as exit:
                code = int(exit.code or 0)
        ended = Ended(code, stdout.getvalue(), stderr.getvalue())
        self.assertNotIn(KEY, ended.stdout + ended.stderr)
        return ended


class ErrorTests(TestCase):
    def test_untrusted_text_becomes_one_printable_line(self) -> None:
        for given, expected in (
            ("a\x1b[31mb", "a?[31mb"),
            ("a\x9b31mb", "a?31mb"),
            (" a\r\n\t b\u2028c\v", "a b c"),
            ("a\a\b\u202eb", "a???b"),
            ("a\ud800", "a?"),
            ("é 电池", "é 电池"),
            ("x" * 10, "x" * 10),
            ("x" * 11, "x" * 10),
        ):
            self.assertEqual(kf.one_line(given, 10), expected)

    def test_a_reason_describes_the_innermost_error_and_names_its_file(self) -> None:
        reset_by_peer = ConnectionResetError(104, "Reset by peer")
        missing = FileNotFoundError(2, "No such file", "/a/b")
        for error, expected in (
            (requests.ConnectionError(reset_by_peer), "[Errno 104] Reset by peer"),
            (missing, "[Errno 2] No such file: '/a/b'"),
            (ValueError("a\nb"), "a b"),
            (ValueError(), "ValueError"),
        ):
            self.assertEqual(kf.reason(error), expected)

    def test_a_reason_ignores_what_the_caller_was_handling(self) -> None:
        api = self.api(GET_OUTAGES, reset, reset, reset)
        try:
            raise ZeroDivisionError("of the caller")
        except ZeroDivisionError:
            error = self.error(self.client(api).handler)
        self.assertIn("Connection reset by peer", str(error))


class KeyAndAddressTests(TestCase):
    def test_white_space_around_a_key_is_stripped(self) -> None:
        for given in ("key", " key\n", "\tkey\r\n", "\u00a0key"):
            self.assertEqual(kf.clean_key(given), "key")

    def test_a_key_that_is_not_a_valid_header_is_refused_and_not_shown(self) -> None:
        only_ascii = "the API key may contain only visible ASCII characters"
        for given, expected in (
            ("", "no API key; set KF_API_KEY"),
            (" \n", "no API key; set KF_API_KEY"),
            (f"{KEY}é", only_ascii),
            (f"{KEY}\u2019", only_ascii),
            (f"{KEY}\x7f", only_ascii),
            (f"{KEY} {KEY}", only_ascii),
            (f"{KEY}\nX-Evil: 1", only_ascii),
        ):
            error = self.error(kf.KFClient, kf.BASE_URL, given)
            self.assertIsInstance(error, kf.UsageError)
            self.assertEqual(str(error), expected)

    def test_base_urls_that_keep_the_key_safe_are_accepted(self) -> None:
        for given, expected in (
            (kf.BASE_URL, kf.BASE_URL),
            (" https://h/v1/\r\n", "https://h/v1"),
            ("HTTPS://H:8443/V1//", "https://h:8443/V1"),
            ("https://bücher.de/ü", "https://xn--bcher-kva.de/%C3%BC"),
            ("https://h", "https://h"),
            ("http://localhost:80/v1", "http://localhost:80/v1"),
            ("http://127.0.0.1/v1", "http://127.0.0.1/v1"),
            ("http://[::1]:8080", "http://[::1]:8080"),
        ):
            self.assertEqual(kf.clean_base_url(given), expected)

    def test_other_base_urls_are_refused(self) -> None:
        for given in (
            "",
            "h/v1",
            "https://",
            "https:///v1",
            "https://h:port",
            "https://h:99999",
            "https://[::1",
            "https://*",
            "https://user:word@h",
            "https://user@h",
            "https://h/?a=b",
            "https://h?",
            "https://h/#a",
            "http://h",
            "http://localhost.h",
            "http://localhost@h",
            "http://user@localhost",
            "http://127.0.0.1.h",
            "http://[::2]",
            "ftp://localhost",
            "file:///etc",
        ):
            with self.assertRaisesRegex(kf.UsageError, "^the base URL must", msg=given):
                kf.KFClient(given, KEY)

    def test_a_site_is_one_path_segment(self) -> None:
        for given, expected in (
            ("a/b", "a%2Fb"),
            ("a?b", "a%3Fb"),
            ("a#b", "a%23b"),
            ("../outages", "..%2Foutages"),
            ("%2e%2e", "%252e%252e"),
            ("é", "%C3%A9"),
            ("...", "..."),
        ):
            self.assertEqual(kf.path_segment(given), expected)

    def test_an_invalid_site_id_is_refused_before_any_request(self) -> None:
        api = self.api()
        for given in ("", ".", "..", "a\ud800", None):
            error = self.error(self.client(api).handler, given)
            self.assertIsInstance(error, kf.UsageError)
            self.assertEqual(str(error), f"invalid site ID: {given!a}")
        self.assertEqual(api.connections, 0)


class TimeTests(TestCase):
    NEW_YEAR = dt.datetime(2022, 1, 1, tzinfo=dt.timezone.utc)
    INVALID = (
        "",
        "10",
        "May",
        "02/03/2022",
        "2022-01-01",
        "2022-01-01T00:00Z",
        "2022-01-01T00:00:00",
        " 2022-01-01T00:00:00Z",
        "2022-01-01T00:00:00Z\n",
        "2022-01-01_00:00:00Z",
        "20220101T000000Z",
        "2022-W01-1T00:00:00Z",
        "2022-001T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "2022-13-01T00:00:00Z",
        "2022-02-29T00:00:00Z",
        "2022-01-01T24:00:00Z",
        "2022-01-01T24:00:00.5Z",
        "2022-01-01T25:00:00Z",
        "2022-01-01T00:60:00Z",
        "2021-12-31T23:59:60Z",
        "2022-01-01T00:00:00+24:00",
        "2022-01-01T00:00:00+00:60",
        "2022-01-01T00:00:00+0100",
        "2022-01-01T00:00:00PST",
        "2022-01-01T00:00:00.Z",
        "2022-01-01T00:00:00,5Z",
        "\uff12022-01-01T00:00:00Z",
        "2022-01-01T00:00:00\u0660Z",
    )

    def test_rfc_3339_times_are_read_to_the_microsecond(self) -> None:
        second = dt.timedelta(seconds=1)
        for given, expected in (
            ("2022-01-01T00:00:00Z", self.NEW_YEAR),
            ("2022-01-01t00:00:00z", self.NEW_YEAR),
            ("2022-01-01 00:00:00.000Z", self.NEW_YEAR),
            ("2022-01-01T01:00:00+01:00", self.NEW_YEAR),
            ("2021-12-31T18:30:00.0-05:30", self.NEW_YEAR),
            ("2022-01-01T00:00:00-00:00", self.NEW_YEAR),
            ("2022-01-01T23:59:00+23:59", self.NEW_YEAR),
            ("2021-12-31T23:59:59.999Z", self.NEW_YEAR - second / 1000),
            ("2022-01-01T00:00:00.5Z", self.NEW_YEAR + second / 2),
            ("2022-01-01t00:00:00.50000000z", self.NEW_YEAR + second / 2),
            ("2022-01-01T00:00:00.0000019999Z", self.NEW_YEAR + second / 10**6),
        ):
            self.assertEqual(kf.parse_time(given), expected, given)

    def test_times_that_are_not_rfc_3339_are_refused(self) -> None:
        for given in self.INVALID:
            with self.assertRaises(ValueError, msg=given):
                kf.parse_time(given)

    def test_a_date_is_utc_unless_it_has_an_offset(self) -> None:
        east = dt.timezone(dt.timedelta(hours=5))
        given: Any
        for given in (
            "2022-01-01",
            "20220101",
            " 2022-01-01\r\n",
            "2022-01-01T00:00",
            "2022-01-01 00:00",
            "2022-01-01T00:00:00.000",
            "2022-01-01T00:00Z",
            "2022-01-01t00:00:00z",
            "2022-01-01T01:00+01:00",
            dt.date(2022, 1, 1),
            dt.datetime(2022, 1, 1),
            dt.datetime(2022, 1, 1, 5, tzinfo=east),
        ):
            self.assertEqual(kf.parse_since(given), self.NEW_YEAR, given)

    def test_invalid_dates_are_refused_before_any_request(self) -> None:
        api = self.api()
        given: Any
        for given in (
            "",
            "10",
            "yesterday",
            "02/03/2022",
            "2022",
            "2022-01",
            "2022-0101",
            "2022-02-30",
            "2022-W53-1",
            "2022-001",
            "20220601120000",
            "1791011512345",
            "2022-06-01Z",
            "2022-06-01+02:00",
            "2022-06-01T12",
            "2022-06-01T24:00",
            "2022-06-01T12:00:00,5",
            "2022-06-01T12:00+24:00",
            "2021-12-31T23:59:60Z",
            "\uff12022-01-01",
            None,
            10,
            "\x1b[31m" * 99,
        ):
            error = self.error(self.client(api).handler, kf.SITE, given)
            self.assertIsInstance(error, kf.UsageError)
            expected = "expected an ISO 8601 date or time like 2022-06-01, but got"
            self.assertEqual(str(error), f"{expected} {str(given)!a:.50}")
        self.assertEqual(api.connections, 0)


class SelectTests(TestCase):
    def select(self, outages: Iterable[Any]) -> list[Any]:
        client = kf.KFClient("http://localhost", KEY)
        return client._filter_outages(outages, SITE_INFO, kf.SINCE)

    def test_outages_are_kept_as_received_with_the_name_added(self) -> None:
        given = [
            outage("b2", "2022-12-01t01:00:00.5+01:00", "2022-12-02 00:00:00z"),
            {"more": [{"é": None}], **outage("b1"), "1": 1.0},
            {**outage("b1"), "name": "another"},
        ]
        given.append(given[0])
        before = copy.deepcopy(given)
        names = ["Batterie №2", "Battery 1", "Battery 1", "Batterie №2"]
        expected = [{**row, "name": name} for row, name in zip(given, names)]
        self.assertEqual(self.select(iter(given)), expected)
        self.assertEqual(given, before)

    def test_an_outage_that_began_exactly_at_the_date_is_kept(self) -> None:
        exactly = outage("b1", "2022-01-01T01:00:00+01:00")
        too_early = outage("b1", "2021-12-31T23:59:59.999999Z")
        self.assertEqual(len(self.select([exactly, too_early])), 1)

    def test_errors_in_outages_of_other_sites_do_not_matter(self) -> None:
        self.assertEqual(self.select([outage("x", None, 10), {"id": ""}]), [])

    def test_an_outage_whose_id_is_not_text_is_refused(self) -> None:
        values: list[Any] = [None, 1, True, ["b1"], {}]
        bad_ids = [outage(value) for value in values]
        for given in (None, "b1", 1, [], ["id"], {}, *bad_ids):
            with self.assertRaisesRegex(kf.KFError, "outage 2 has an invalid id: "):
                self.select([outage("x"), given])

    def test_the_error_for_an_invalid_time_has_its_row_field_and_value(self) -> None:
        values: list[Any] = [None, 10, True, [], {"a": 1}]
        for value in (*values, *TimeTests.INVALID):
            for field in ("begin", "end"):
                # Checked even if it began too early.
                bad = outage("b1", "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")
                bad[field] = value
                error = self.error(self.select, [outage("b2"), bad])
                message = f"GET /outages: outage 2 has an invalid {field}: "
                self.assertEqual(str(error), message + json.dumps(bad))

    def test_a_missing_time_is_refused(self) -> None:
        error = self.error(self.select, [{"id": "b1", "more": "x" * 1000}])
        message = (
            r'^GET /outages: outage 1 has an invalid begin: \{"id": "b1", "more": "x'
        )
        self.assertRegex(str(error), message + "{200,290}$")

    def test_an_outage_that_ends_before_it_begins_is_sent_with_a_warning(self) -> None:
        backwards = outage("b1", "2022-02-01T00:00:00Z", "2021-02-01T00:00:00Z")
        instant = outage("b1", "2022-02-01T00:00:00Z", "2022-02-01T00:00:00Z")
        self.assertEqual(len(self.select([instant, backwards])), 2)
        expected = ["GET /outages: outage 2 ends before it begins"]
        self.assertEqual(self.messages(), expected)


class ReadArrayTests(TestCase):
    """However a body is cut into pieces, it is read as `json.loads` reads it."""

    GOOD = (
        "[]",
        " [ ] ",
        "[{}]",
        '[{},"}"]',
        "[{},1,{}]",
        "[1,-2.5e3,true,null]",
        "[[{}],{},[{}]]",
        '["}",{},"},{"]',
        '[{"a":0.5},{"a":10}]',
        r'[{"a":"}"},{"b":"\"},{\""}]',
        r'[{"\\":"\\"},{"a":"{\u007d\ud83d\udd0b"}]',
        '[{"a":"]}"},"}",{"b":"[{"}]',
        "[[[{}]]]",
        '[{"a":{},"b":"}"},{"a":"}"}]',
        '[{"a":[{},{}]},{"b":{}},{"c":[]}]',
        '[NaN,{"a":Infinity}]',
        '[{"a":1},{"b":[{}]} , {"c":{}}]',
        '\ufeff[{"é":"电池🔋"},{}]',
        '[{} ,\n{"a":[{},{}]}\t,\r\n{}]',
    )
    BAD = (
        "",
        " ",
        "[",
        "]",
        "[}",
        "[{]",
        "{}}",
        "[{}",
        "[{},",
        "[{},]",
        "[,]",
        "[,{}]",
        "[{},,{}]",
        "[{}{}]",
        "[{} {}]",
        "[{}.5]",
        "[{}1]",
        "[{}]]",
        "[{}],[{}]",
        "[{}] {}",
        "[{}]x",
        "[{}]\ufeff",
        "[\ufeff{}]",
        "[{}:{}]",
        "[{'a':1}]",
        "[{}x,{}]",
        "[{},tru]",
        "[01]",
        '[{"a":1}{"a":2}]',
        "[{},{]}]",
        "[{}[]]",
        "[{}],",
        "<p>{}</p>",
        "} ,[{}]",
        '[{"a"}]',
        '[{"a":}]',
        '[{"a":"\n"}]',
    )

    def loads(self, body: bytes) -> str:
        """Return what json.loads reads, as text, so that 1 and 1.0 differ."""
        try:
            return repr(json.loads(body.decode("utf-8-sig")))
        except ValueError:
            return "refused"

    def read(self, body: bytes, size: int) -> str:
        """Return what read_array reads if it gets `size` bytes at a time."""
        items: list[Any] = []
        with mock.patch.object(kf, "READ_SIZE", size):
            try:
                for batch in kf.read_array(io.BytesIO(body)):
                    items += batch
            except ValueError:
                return "refused"
        return repr(items)

    def check(self, body: bytes) -> None:
        expected = self.loads(body)
        for size in range(1, len(body) + 2):
            self.assertEqual(self.read(body, size), expected, (body, size))

    def test_arrays_are_read_as_json_reads_them(self) -> None:
        for text in self.GOOD:
            self.assertNotEqual(self.loads(text.encode()), "refused")
            self.check(text.encode())

    def test_invalid_arrays_are_refused(self) -> None:
        for text in self.BAD:
            self.assertEqual(self.loads(text.encode()), "refused")
            self.check(text.encode())

    def test_an_array_that_is_cut_off_is_refused(self) -> None:
        for text in self.GOOD:
            body = text.strip().encode()
            for end in range(len(body)):
                self.check(body[:end])

    def test_invalid_utf_8_is_refused(self) -> None:
        for letter in (b"\xff", b"\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\x94"):
            self.check(b'[{"a":"' + letter + b'"},{}]')
            self.check(b"[{}]" + letter)

    def test_random_and_damaged_arrays_are_read_as_json_reads_them(self) -> None:
        rnd = random.Random(7)
        values = [
            "{}",
            '{"}":"{"}',
            '{"a":{}}',
            "[{}]",
            '"},{"',
            "1.5",
            "null",
            '"é🔋"',
        ]
        letters = ["", *'{}[],:"\\ 1x']
        for _ in range(400):
            body = f"[{rnd.choice([',', ' ,']).join(rnd.choices(values, k=5))}]"
            position = rnd.randrange(len(body))
            damaged = body[:position] + rnd.choice(letters) + body[position + 1 :]
            for text in (body, damaged):
                expected = self.loads(text.encode())
                for size in (1, 2, 3, 7, 40):
                    self.assertEqual(self.read(text.encode(), size), expected, text)

    def test_a_large_array_comes_in_batches(self) -> None:
        body = json.dumps([outage("x")] * 9_000).encode()
        batches = list(kf.read_array(io.BytesIO(body)))
        self.assertEqual(list(itertools.chain(*batches)), json.loads(body))
        self.assertLess(max(map(len, batches)), 1_000)

    def test_an_endless_item_is_refused(self) -> None:
        self.patch(TEXT_MAX=500_000)
        for body in (
            b'[{"id": "' + b"a" * 600_000,
            b'[{"id": "' + b"}" * 600_000,
            b"[" + b" " * 600_000,
            b"[1" + b",1" * 300_000,
            b'[{"id": [' + b"{}," * 200_000,
            b'[{"a":{},"b":' + b"[" * 500 + b"[]" * 300_000,
        ):
            with self.assertRaisesRegex(
                ValueError, "no outage ends within 500,000 characters"
            ):
                list(kf.read_array(io.BytesIO(body)))


class RetryTests(TestCase):
    """Rejections and failed connections: what urllib3 retries, and when."""

    def test_each_request_is_retried_up_to_five_times(self) -> None:
        for status in (429, 500, 503):
            busy = response({}, status)
            for line in HEALTHY:
                api = self.assert_reported(line, *[busy] * 5)
                self.assertEqual(api.requests.count(line), 6)
                message = f"^{line}: got {status} .*; try again later$"
                api = self.assert_not_reported(message, line, *[busy] * 6)
                self.assertEqual(api.requests.count(line), 6)

    def test_a_get_is_retried_after_502_and_504(self) -> None:
        for status in (502, 504):
            self.assert_reported(GET_OUTAGES, response({}, status))
            self.assert_reported(GET_SITE_INFO, response({}, status))

    def test_a_post_is_not_retried_after_502_and_504(self) -> None:
        for status in (502, 504):
            message = rf"^{POST_SITE_OUTAGES}: got {status} \(slow\)$"
            reply = response(b"slow", status)
            api = self.assert_unknown(message, POST_SITE_OUTAGES, reply)
            self.assertEqual(api.requests, HEALTHY)

    def test_a_413_with_retry_after_is_not_retried(self) -> None:
        reply = response({}, 413, Retry_After="0")
        api = self.assert_not_reported("; the list is too long", GET_OUTAGES, reply)
        self.assertEqual(api.requests, [GET_OUTAGES])

    def test_each_retry_is_logged_with_its_reason_and_wait(self) -> None:
        self.assert_reported(GET_OUTAGES, response({}, 500), response({}, 429))
        expected = [
            "GET /outages: got 500; retry 1 of 5 in 0 s",
            "GET /outages: got 429; retry 2 of 5 in 0 s",
        ]
        self.assertEqual(self.messages()[:2], expected)

    def waits(self, rejection: HTTPResponse) -> list[float]:
        """Return the seconds that a client waits before each of five retries."""
        client = kf.KFClient("http://localhost", KEY, backoff=kf.BACKOFF)
        adapter: Any = client.session.get_adapter("http://localhost")
        retry = adapter.max_retries
        with mock.patch.object(kf, "sleep") as sleep:
            for _ in range(5):
                retry = retry.increment("GET", "/outages", response=rejection)
                retry.sleep(rejection)
        return [call[0][0] for call in sleep.call_args_list]

    def test_waits_double_with_jitter(self) -> None:
        totals = set()
        for _ in range(20):
            waits = self.waits(HTTPResponse(status=500))
            for wait, shortest in zip(waits, (0, 2, 4, 8, 16)):
                self.assertTrue(shortest <= wait <= shortest + 1, waits)
            totals.add(sum(waits))
        self.assertGreater(len(totals), 10)

    def third_wait(self, retry_after: str) -> float:
        """Return the third wait: 4 to 5 seconds, unless Retry-After asks for more."""
        return self.waits(HTTPResponse(headers={"Retry-After": retry_after}))[2]

    def test_a_longer_retry_after_is_obeyed(self) -> None:
        self.assertEqual(self.third_wait("7"), 7)
        self.assertEqual(self.third_wait(" 030 "), 30)
        self.assertEqual(self.third_wait("60"), 60)
        date = formatdate(time.time() + 40, usegmt=True)
        self.assertAlmostEqual(self.third_wait(date), 40, delta=10)

    def test_a_shorter_or_malformed_retry_after_is_ignored(self) -> None:
        for given in (
            "1",
            "Sat, 01 Jan 2022 00:00:00 GMT",
            "",
            "-5",
            "1.5",
            "soon",
            "NaN",
            "50s",
            "50 s",
            "\u0665\u0665",
            "2022-01-01",
            "Sat, 99 Foo 2022",
            "1 Jan , 2022",
            "Sat, 01 Jan 99999999999 00:00:00 GMT",
        ):
            self.assertTrue(4 <= self.third_wait(given) <= 5, given)

    def test_a_retry_after_over_a_minute_ends_the_run_at_once(self) -> None:
        self.patch(sleep=lambda seconds: None)
        for given in ("61", "86400", "1" + "0" * 20, "Fri, 31 Dec 9999 23:59:59 GMT"):
            busy = response({"message": "wait"}, 429, Retry_After=given)
            for line in HEALTHY:
                message = rf"^{line}: got 429 \(wait\)"
                api = self.assert_not_reported(message, line, busy)
                self.assertEqual(api.requests.count(line), 1)

    def test_a_rejection_with_an_endless_body_is_not_read_to_its_end(self) -> None:
        busy = response(status=503, Content_Length=None)
        self.assert_reported(GET_OUTAGES, endless(busy, b" " * 65536))

    def post(self, client: kf.KFClient) -> Any:
        sent: Any = SITE_OUTAGES
        return client._post_site_outages(kf.SITE, sent)

    def test_a_connection_that_fails_is_tried_again(self) -> None:
        for call in (kf.KFClient.handler, self.post):
            api = self.stopped_api()

            def start(seconds: float, api: API = api) -> None:
                if not api.thread.ident:
                    api.start()

            with mock.patch.object(kf, "sleep", start):
                self.assertEqual(call(self.client(api)), SITE_OUTAGES)

    def test_without_any_connection_nothing_was_sent(self) -> None:
        client = self.client(self.stopped_api())
        for call in (kf.KFClient.handler, self.post):
            error = self.error(call, client)
            self.assertRegex(str(error), r"^[A-Z]+ /[\w/-]+: \[Errno .*refused")
            self.assertIs(error.outcome, kf.NOT_REPORTED)
            self.assertIs(client.outcome, kf.NOT_REPORTED)
        self.assertEqual(len(self.messages()), 10)

    def test_an_unknown_host_is_looked_up_six_times(self) -> None:
        unknown = socket.gaierror(socket.EAI_NONAME, "Name not known")
        client = kf.KFClient("https://api.invalid/v1", KEY)
        with mock.patch("socket.getaddrinfo", side_effect=unknown) as look_up:
            error = self.error(client.handler)
        self.assertRegex(str(error), r"^GET /outages: \[Errno -?\d+\] Name not known$")
        self.assertEqual(look_up.call_count, 6)


class RejectionTests(TestCase):
    """Statuses that are final."""

    def test_a_get_with_any_status_other_than_200_fails(self) -> None:
        for status in (201, 204, 301, 304, 400, 418, 501):
            reply = response(status=status, Location="/")
            for line in (GET_OUTAGES, GET_SITE_INFO):
                api = self.assert_not_reported(f"^{line}: got {status} ", line, reply)
                self.assertEqual(api.requests.count(line), 1)

    def test_a_post_with_a_4xx_was_not_applied(self) -> None:
        for status in (400, 403, 404, 408, 413, 499):
            reply = response(status=status)
            api = self.assert_not_reported(f"got {status}", POST_SITE_OUTAGES, reply)
            self.assertEqual(api.requests, HEALTHY)

    def test_a_post_with_another_status_may_have_been_applied(self) -> None:
        for status in (201, 202, 204, 303, 307, 399, 501, 599):
            reply = response(status=status, Location="/outages")
            message = f"got {status} [^;]*$"  # no advice
            api = self.assert_unknown(message, POST_SITE_OUTAGES, reply)
            self.assertEqual(api.requests, HEALTHY)

    def test_an_interim_status_is_not_an_answer(self) -> None:
        for status in (101, 103):
            reply = response(status=status, Content_Length=None)
            self.assert_unknown(f"got {status}", POST_SITE_OUTAGES, reply)

    def test_the_message_says_what_to_do(self) -> None:
        for status, advice in (
            (302, "check the base URL"),
            (400, "the API rejected the format of the request"),
            (401, "check the API key"),
            (403, "check the API key and the base URL"),
            (404, "check the site ID and the base URL"),
            (405, "check the base URL"),
            (413, "the list is too long"),
        ):
            message = rf"^{GET_OUTAGES}: got {status} \(no\); {advice}$"
            reply = response({"message": "no"}, status)
            self.assert_not_reported(message, GET_OUTAGES, reply)

    def test_a_redirect_is_never_followed(self) -> None:
        elsewhere = self.api()
        for status in (301, 302, 303, 307, 308):
            reply = response(status=status, Location=f"{elsewhere.url}/outages")
            for line in HEALTHY:
                self.error(self.client(self.api(line, reply)).handler)
        self.assertEqual(elsewhere.connections, 0)

    def test_the_message_quotes_the_api(self) -> None:
        for body, expected in (
            (b'{"message": "Forbidden"}', "Forbidden"),
            (b'{"Message": "Forbidden"}', "Forbidden"),
            (b'{"message": null}', '{"message": null}'),
            (b'{"message": "", "Message": "no"}', "no"),
            (b'{"message": ["a"]}', "['a']"),
            (b'{"error": "no"}', '{"error": "no"}'),
            (b"<p>\x1b[31m\r\n no</p>", "<p>?[31m no</p>"),
            (b"[]", "[]"),
            (b"\xff", "\ufffd"),
            (b"", "Said"),
            (b"x" * 500, "x" * 300),
            (KEY.encode(), "[key]"),
            (b"x" * 290 + KEY.encode() * 9, "x" * 290 + "[key][key]"),
        ):
            message = re.escape(f"got 403 ({expected}); check the API key")
            self.assert_not_reported(message, GET_OUTAGES, response(body, 403))

    def test_a_rejection_with_a_broken_body_is_still_a_rejection(self) -> None:
        start = response(b'{"mess', 403, Content_Length="99")

        def cut_and_reset(sock: socket.socket) -> None:
            sock.sendall(start)
            time.sleep(0.02)  # A reset discards what the client has not read.
            reset(sock)

        for reply in (
            start,
            cut_and_reset,
            endless(response(status=403, Content_Length=None), b" " * 65536),
            response(b"no gzip", 403, Content_Encoding="gzip"),
            response(b"[" * 100_000, 403),
        ):
            message = r"got 403 \(.*\); check the API key"
            self.assert_not_reported(message, POST_SITE_OUTAGES, reply)


class DownloadTests(TestCase):
    """Responses to a GET that are lost, incomplete or invalid."""

    def assert_recovers(self, reply: Reply) -> None:
        """Assert that after such replies, the GET is made again."""
        for line in (GET_OUTAGES, GET_SITE_INFO):
            api = self.assert_reported(line, reply, reply)
            self.assertEqual(api.requests.count(line), 3)

    def assert_refused(self, message: str, line: str, reply: Reply) -> None:
        """Assert that this reply ends the run at once, with this message."""
        api = self.assert_not_reported(message, line, reply)
        self.assertEqual(api.requests[-1], line)
        self.assertEqual(api.requests.count(line), 1)

    def test_no_answer(self) -> None:
        self.assert_recovers(b"")

    def test_a_reset(self) -> None:
        self.assert_recovers(reset)

    def test_no_answer_in_time(self) -> None:
        for start in (b"", response(OUTAGES)[:-9]):

            def stall(sock: socket.socket, start: bytes = start) -> None:
                sock.sendall(start)
                sock.recv(1)  # until the client hangs up

            client = self.client(self.api(GET_OUTAGES, stall), timeout=0.5)
            self.assertEqual(client.handler(), SITE_OUTAGES)
            self.assertRegex(self.messages()[0], "timed out.*; download 2 of 3$")

    def test_headers_that_are_cut_off(self) -> None:
        self.assert_recovers(b"HTTP/1.1 2")
        self.assert_recovers(b"HTTP/1.1 200 OK\r\nContent-Le")
        self.assert_recovers(b"\x16\x03\x01\x02garbage\r\n\r\n")

    def test_endless_headers(self) -> None:
        self.assert_recovers(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200)
        self.assert_recovers(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000)

    def test_a_body_that_is_shorter_than_stated(self) -> None:
        self.assert_recovers(response(OUTAGES)[:-3])

    def test_a_reset_in_the_body(self) -> None:
        def cut_and_reset(sock: socket.socket) -> None:
            sock.sendall(response(OUTAGES)[:-3])
            reset(sock)

        self.assert_recovers(cut_and_reset)

    def test_a_body_without_a_length_that_is_cut_off(self) -> None:
        ghosts = [outage("b1", "2022-02-02T00:00:00Z"), *OUTAGES]
        self.assert_recovers(response(ghosts, Content_Length=None)[:-1])
        self.assert_recovers(response(SITE_INFO, Content_Length=None)[:-1])

    def test_chunks_that_are_cut_off(self) -> None:
        whole = chunked(json.dumps(OUTAGES).encode())
        self.assert_recovers(whole[:-9])
        self.assert_recovers(whole[:-5] + b"xyz\r\n")

    def test_a_corrupt_gzip_body(self) -> None:
        body = gzip.compress(json.dumps(OUTAGES).encode())
        corrupt = body[:40] + b"\xff" * 9 + body[49:]
        for broken in (body[:50], corrupt, b"[not gzip]"):
            self.assert_recovers(response(broken, Content_Encoding="gzip"))

    def test_a_body_that_is_not_json_from_end_to_end(self) -> None:
        whole = json.dumps(OUTAGES)
        for text in ("", " \n", "<!DOCTYPE html>", f'"{whole}"', whole + "x", "[", "{"):
            self.assert_recovers(response(text.encode()))
        self.assert_recovers(response(whole.encode("utf-16")))

    def test_a_list_where_an_object_belongs_and_vice_versa(self) -> None:
        self.assert_reported(GET_OUTAGES, response(SITE_INFO))
        self.assert_reported(GET_SITE_INFO, response(OUTAGES))

    def test_the_third_broken_response_ends_the_run(self) -> None:
        broken = [response(OUTAGES)[:-3]] * 3
        message = r"^GET /outages: IncompleteRead\(.* 3 more expected"
        api = self.assert_not_reported(message, GET_OUTAGES, *broken)
        self.assertEqual(api.requests, [GET_OUTAGES] * 3)
        numbers = [message[-6:] for message in self.messages()]
        self.assertEqual(numbers, ["2 of 3", "3 of 3"])

    def test_other_good_responses(self) -> None:
        body = json.dumps(OUTAGES).encode()
        info = json.dumps(SITE_INFO, ensure_ascii=False).encode()
        squeezed = gzip.compress(body)
        members = gzip.compress(body[:99]) + gzip.compress(body[99:])
        mark = b"\xef\xbb\xbf"
        blanks = b"\r\n\t " * 99_999
        dropped = b'{"id": "x", "a": NaN}, ' * 30_000
        for reply in (
            response(body, Content_Encoding="identity"),
            response(squeezed, Content_Encoding="gzip"),
            response(squeezed, Content_Encoding="x-gzip"),
            response(members, Content_Encoding="gzip"),
            response(body, Content_Length=None),
            response(body, Content_Type="text/plain; charset=latin-1"),
            response(mark + body),
            response(blanks + body + blanks),
            response(b"[" + dropped + body[1:]),
            chunked(body),
        ):
            api = self.assert_reported(GET_OUTAGES, reply)
            self.assertEqual(api.requests, HEALTHY)
        reply = response(mark + info, Content_Type="text/plain")
        self.assert_reported(GET_SITE_INFO, reply)

    def test_a_complete_body_that_is_not_json_is_refused(self) -> None:
        deep = b"[" * 100_000 + b"]" * 100_000
        latin_1 = json.dumps(OUTAGES).encode()[:-3] + b'\xe9"}]'
        for body in (b"[{]", b"[] []", latin_1, b'[{"a":{},"b":' + deep + b"}]"):
            message = r"^GET /outages: not valid JSON \(.+\)$"
            self.assert_refused(message, GET_OUTAGES, response(body))
        for body in (b"{]}", b'{"a": "\xed\xa0\x80"}', b'{"a": ' + deep + b"}"):
            message = rf"^{GET_SITE_INFO}: not valid JSON \(.+\)$"
            self.assert_refused(message, GET_SITE_INFO, response(body))

    # Python has this limit since 3.8.14, 3.9.14, 3.10.7 and 3.11.
    @unittest.skipUnless(hasattr(sys, "get_int_max_str_digits"), "has no such limit")
    def test_a_number_with_thousands_of_digits_is_refused(self) -> None:
        reply = response(b'[{"id": "x", "n": ' + b"1" * 5000 + b"}]")
        self.assert_refused("not valid JSON", GET_OUTAGES, reply)

    def test_nan_in_an_outage_that_is_kept_is_refused(self) -> None:
        reply = response([{**outage("b1"), "more": float("nan")}])
        message = r"^GET /outages: not valid JSON \(.+\)$"
        self.assert_not_reported(message, GET_OUTAGES, reply)

    def test_incomplete_site_information_is_refused(self) -> None:
        change: Any
        for change in (
            {"id": None},
            {"name": None},
            {"name": 1},
            {"devices": None},
            {"devices": {}},
            {"devices": ""},
            {"devices": [None]},
            {"devices": ["b2"]},
            {"devices": [{"id": "b2"}]},
            {"devices": [{"name": "x"}]},
            {"devices": [{"id": 2, "name": "x"}]},
            {"devices": [{"id": ["b2"], "name": "x"}]},
            {"devices": [{"id": "b2", "name": None}]},
        ):
            message = "^GET /site-info: missing or invalid id, name or devices$"
            reply = response({**SITE_INFO, **change})
            self.assert_refused(message, GET_SITE_INFO, reply)

    def test_a_device_may_be_listed_twice_but_not_with_two_names(self) -> None:
        devices = SITE_INFO["devices"]
        reply = response({**SITE_INFO, "devices": devices * 2})
        self.assert_reported(GET_SITE_INFO, reply)
        devices = [*devices, {"id": "b1", "name": "another"}]
        message = "^GET /site-info: device 'b1' has two names$"
        reply = response({**SITE_INFO, "devices": devices})
        self.assert_refused(message, GET_SITE_INFO, reply)

    def test_the_information_on_another_site_is_refused(self) -> None:
        message = rf"asked for site '{kf.SITE}' but got '\\x1b\[2Jx{{90,94}}$"
        reply = response({**SITE_INFO, "id": "\x1b[2J" + "x" * 1000})
        self.assert_refused(message, GET_SITE_INFO, reply)

    def test_a_response_that_is_too_long_is_refused(self) -> None:
        self.patch(BODY_MAX=200_000)
        reply = endless(response(b"[", Content_Length=None), b" " * 65536)
        for line in (GET_OUTAGES, GET_SITE_INFO):
            message = f"^{line}: the response is longer than 200,000 bytes$"
            self.assert_refused(message, line, reply)

    LARGE = response(b"[" + b" " * 99_999 + json.dumps(OUTAGES).encode()[1:])

    @needs_full_device
    def test_a_full_disk_is_a_failed_download(self) -> None:
        self.patch(MEMORY_MAX=1000)
        with open("/dev/full", "w+b") as full:
            self.use(mock.patch("tempfile.TemporaryFile", return_value=full))
            message = "^GET /outages: .*No space left on device$"
            self.assert_refused(message, GET_OUTAGES, self.LARGE)

    def test_a_missing_temporary_folder_is_named(self) -> None:
        self.patch(MEMORY_MAX=1000)
        self.use(mock.patch.object(tempfile, "tempdir", "/no/such/folder"))
        message = "^GET /outages: .*no.such.folder"
        self.assert_refused(message, GET_OUTAGES, self.LARGE)

    def test_temporary_files_are_closed_and_deleted(self) -> None:
        folder = self.use(tempfile.TemporaryDirectory())
        self.patch(MEMORY_MAX=1000)
        self.use(mock.patch.object(tempfile, "tempdir", folder))
        with warnings.catch_warnings(record=True) as unclosed:
            warnings.simplefilter("always", ResourceWarning)
            breaks_off = self.LARGE[:-1]
            self.assert_reported(GET_OUTAGES, breaks_off, self.LARGE)
            gc.collect()
        self.assertEqual(unclosed, [])
        self.assertEqual(os.listdir(folder), [])

    def test_no_response_fills_memory(self) -> None:
        self.patch(BODY_MAX=2**23)
        bomb = gzip.compress(b" " * 2**24)
        many = b"[" + OUTAGES_BODY[1:-1] + b', {"id": "x"}' * 5 * 10**5 + b"]"
        redirect = response(status=302, Location="/", Content_Length=None)
        for line, reply in (
            (GET_OUTAGES, response(bomb, Content_Encoding="gzip")),
            (GET_SITE_INFO, response(bomb, Content_Encoding="gzip")),
            (POST_SITE_OUTAGES, response(bomb, 403, Content_Encoding="gzip")),
            (GET_OUTAGES, endless(redirect, b"x" * 2**20)),
            (GET_OUTAGES, response(many)),
        ):
            client = self.client(self.api(line, reply))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.run_or_fail(client)
            self.assertLess(tracemalloc.get_traced_memory()[1], 2**25)
            tracemalloc.stop()


class PostTests(TestCase):
    """The answer to the POST."""

    def assert_unclear(self, message: str, reply: Reply) -> None:
        """Assert that this reply makes the outcome unknown, and nothing is retried."""
        busy = response({}, 503)
        message = f"^{POST_SITE_OUTAGES}: {message}$"
        api = self.assert_unknown(message, POST_SITE_OUTAGES, reply)
        self.assertEqual(api.requests, HEALTHY)
        api = self.assert_unknown(message, POST_SITE_OUTAGES, busy, reply)
        self.assertEqual(api.requests, [*HEALTHY, POST_SITE_OUTAGES])

    def test_an_empty_200_or_an_empty_object_is_accepted(self) -> None:
        for reply in (
            response(b"{}"),
            response(b""),
            response(b" \n"),
            response(b" { }\r\n"),
            response(b"{}", Content_Length=None),
            response(gzip.compress(b"{}"), Content_Encoding="gzip"),
            chunked(b"{" + b" " * 99 + b"}"),
        ):
            self.assert_reported(POST_SITE_OUTAGES, reply)

    def test_a_200_with_any_other_body_is_unclear(self) -> None:
        for body, said in (
            (b'{"message": "no"}', "no"),
            (b'{"Message": "no"}', "no"),
            (b'{"statusCode": 500}', '{"statusCode": 500}'),
            (b'{"error": "no"}', '{"error": "no"}'),
            (b'{"success": false}', '{"success": false}'),
            (b"false", "false"),
            (b"[]", "[]"),
            (b"{} {}", "{} {}"),
            (b"{}" + b" " * 99_999 + b"x", "{}"),
            (b"<html>Log in</html>", "<html>Log in</html>"),
            (b"\xff", "\ufffd"),
            (b"[" * 100_000, "[" * 300),
        ):
            self.assert_unclear(re.escape(f"got 200 ({said})"), response(body))

    def test_no_answer(self) -> None:
        self.assert_unclear("Remote end closed connection without response", b"")

    def test_a_reset(self) -> None:
        self.assert_unclear(r"\[Errno .*\] Connection reset by peer", reset)

    def test_no_answer_in_time(self) -> None:
        def silent(sock: socket.socket) -> None:
            sock.recv(1)  # until the client hangs up

        api = self.assert_unknown("timed out", POST_SITE_OUTAGES, silent, timeout=0.5)
        self.assertEqual(api.requests, HEALTHY)

    def test_an_answer_that_is_not_http(self) -> None:
        self.assert_unclear(".+", b"\0\xff" * 99)
        self.assert_unclear(".+", b"HTTP/1.1 a\r\n\r\n")
        self.assert_unclear(".+", b"HTTP/1.1 200 " + b"x" * 70_000)
        self.assert_unclear(".+", b"Tunnel connection failed: 403\r\n\r\n")

    def test_an_answer_that_is_cut_off(self) -> None:
        self.assert_unclear("IncompleteRead.*", response(b"{}", Content_Length="3"))
        self.assert_unclear("IncompleteRead.*", response(b"", Content_Length="2"))
        self.assert_unclear(".+", chunked(b"{}")[:-5])
        self.assert_unclear("Error -3.*", response(b"no gzip", Content_Encoding="gzip"))

    def test_an_endless_answer(self) -> None:
        reply = endless(response(b"no", Content_Length=None), b" " * 65536)
        self.assert_unclear(r"got 200 \(no\)", reply)

    def test_each_request_has_a_connection_of_its_own(self) -> None:
        """On a reused connection, an answer may already be waiting."""

        def more_than_requested(sock: socket.socket) -> None:
            sock.sendall(response(OUTAGES) + response({}) * 2)
            sock.recv(1)

        api = self.assert_reported(GET_OUTAGES, more_than_requested)
        self.assertEqual(api.connections, 3)


class ClientTests(TestCase):
    def test_the_headers_of_each_request(self) -> None:
        api = self.assert_reported(POST_SITE_OUTAGES, response(status=503))
        for request in api.received:
            headers = request.headers
            self.assertEqual(headers.get_all("x-api-key"), [KEY])
            self.assertEqual(headers["Accept-Encoding"], "gzip")
            self.assertEqual(headers["User-Agent"], f"kf_backend/{kf.__version__}")
            self.assertIsNone(headers["Authorization"])
        for request in api.received[2:]:
            self.assertEqual(request.headers["Content-Type"], "application/json")
            self.assertEqual(json.loads(request.body), SITE_OUTAGES)

    def test_the_session_is_a_requests_session_with_a_retry_adapter(self) -> None:
        session = kf.KFClient(kf.BASE_URL, KEY).session
        self.assertIs(type(session), requests.Session)
        for url in ("https://h", "http://localhost"):
            adapter: Any = session.get_adapter(url)
            statuses = set(adapter.max_retries.status_forcelist)
            self.assertEqual(statuses, {429, 500, 502, 503, 504})

    def test_a_site_reaches_the_api_as_one_segment(self) -> None:
        api = self.api()
        api.healthy["GET /site-info/a%2Fb"] = response({**SITE_INFO, "id": "a/b"})
        api.healthy["POST /site-outages/a%2Fb"] = response({})
        self.assertEqual(self.client(api).handler("a/b"), SITE_OUTAGES)

    def test_attributes_tell_what_a_run_did(self) -> None:
        client = self.client(self.api())
        self.assertIs(client.outcome, kf.NOT_REPORTED)
        client.handler()
        client.handler()
        self.assertIs(client.outcome, kf.REPORTED)
        self.assertEqual(client.outages_received, 4)
        self.assertEqual(client.site_info, SITE_INFO)
        self.assertEqual(client.site_outages, SITE_OUTAGES)
        self.error(client.handler, "")
        self.assertIs(client.outcome, kf.NOT_REPORTED)

    def test_a_dry_run_does_not_send_the_list(self) -> None:
        api = self.api()
        client = self.client(api, dry_run=True)
        self.assertEqual(client.handler(), SITE_OUTAGES)
        self.assertIs(client.outcome, kf.NOT_REPORTED)
        self.assertEqual(api.requests, HEALTHY[:2])

    def test_each_step_works_alone(self) -> None:
        client = self.client(self.api())
        sent: Any = SITE_OUTAGES
        day = dt.date(2022, 1, 1)
        self.assertEqual(list(client._get_outages()), OUTAGES)
        self.assertEqual(client._get_site_info(kf.SITE), SITE_INFO)
        self.assertEqual(client._filter_outages(OUTAGES, SITE_INFO, day), SITE_OUTAGES)
        self.assertEqual(client._post_site_outages(kf.SITE, sent), SITE_OUTAGES)

    def test_each_step_can_be_replaced(self) -> None:
        renamed = {**SITE_INFO, "devices": [{"id": "b2", "name": "x"}]}
        for step, value, expected in (
            ("_get_outages", OUTAGES[3:], SITE_OUTAGES[1:]),
            ("_get_site_info", renamed, [{**SITE_OUTAGES[0], "name": "x"}]),
            ("_post_site_outages", "posted", "posted"),
        ):
            client = self.client(self.api())
            with mock.patch.object(client, step, return_value=value):
                self.assertEqual(client.handler(), expected)

    def test_a_long_download_is_logged(self) -> None:
        self.patch(PROGRESS=0)
        api = self.assert_reported("")
        self.assertIn(f"{api.url}/outages: 0.0 MB received", self.messages())

    def exact(self, text: str) -> Fraction:
        """Return a time in seconds, computed without using `datetime.datetime`."""
        match: Any = re.fullmatch("(.{10}).(..):(..):([0-9.]+)(.+)", text)
        day, hour, minute, second, zone = match.groups()
        minutes = dt.date.fromisoformat(day).toordinal() * 1440
        minutes += int(hour) * 60 + int(minute)
        if zone not in "Zz":
            offset = int(zone[1:3]) * 60 + int(zone[4:])
            minutes -= int(f"{zone[0]}{offset}")
        return minutes * 60 + Fraction(second)

    def some_time(self, rnd: random.Random) -> str:
        """Return a random time. Equal and nearly equal ones are common."""
        any_day = str(dt.date.fromordinal(rnd.randrange(9, 3_600_000)))
        day = rnd.choice(["2021-12-31", "2022-01-01", any_day])
        clock = rnd.choice(["T00:00:00", "t01:00:00", "T12:00:00", "T23:59:59"])
        fraction = rnd.choice(["", ".0", ".000", ".999999", ".000001", ".5"])
        zone = rnd.choice(["Z", "z", "+00:00", "-00:00", "+01:00", "-12:30"])
        return day + clock + fraction + zone

    def test_a_run_agrees_with_a_simple_filter(self) -> None:
        rnd = random.Random(2022)
        api = self.api()
        client = self.client(api)
        for _ in range(60):
            names = {}
            for number in rnd.sample(range(12), rnd.randrange(5)):
                names[f"d{number}"] = f"Device {number % 3} é"
            since = self.some_time(rnd)
            outages = []
            expected = []
            for _ in range(rnd.randrange(18)):
                device = f"d{rnd.randrange(12)}"
                row = outage(device, self.some_time(rnd), self.some_time(rnd))
                outages.append(row)
                if device in names and self.exact(row["begin"]) >= self.exact(since):
                    expected.append({**row, "name": names[device]})
            devices = [{"id": device, "name": names[device]} for device in names]
            api.healthy[GET_OUTAGES] = response(outages)
            api.healthy[GET_SITE_INFO] = response({**SITE_INFO, "devices": devices})
            self.assertEqual(client.handler(kf.SITE, since), expected)
            self.assertEqual(api.posted[-1], expected)

    def test_the_outcome_is_true_and_no_list_is_applied_twice(self) -> None:
        rnd = random.Random(11)
        api = self.api()
        client = self.client(api)
        accepted = response({})
        refused = response({}, 503)
        seen = set()
        for _ in range(60):
            api.received.clear()
            for line in (GET_OUTAGES, POST_SITE_OUTAGES):
                whole = api.healthy[line]
                faults = [refused, reset, whole[:-1]]
                api.replies[line] = rnd.choices([whole, *faults], k=9)
            posts = list(api.replies[POST_SITE_OUTAGES])
            self.run_or_fail(client)
            seen.add(client.outcome)
            answers = posts[: api.requests.count(POST_SITE_OUTAGES)]
            lost = len(answers) - answers.count(accepted) - answers.count(refused)
            # The outcome is 0 or 1 here, so this also says: at most once.
            self.assertEqual(answers.count(accepted), client.outcome is kf.REPORTED)
            self.assertEqual(lost, client.outcome is kf.UNKNOWN)
        self.assertEqual(len(seen), 3)


class NetworkTests(TestCase):
    """TLS, proxies, and what the environment may change."""

    def tls(self) -> ssl.SSLContext:
        """Return a server's TLS settings, and let clients trust its certificate."""
        file = self.file("cert.pem", CERTIFICATE)
        os.environ["REQUESTS_CA_BUNDLE"] = str(file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def test_https_works_with_a_private_ca(self) -> None:
        api = self.api(tls=self.tls())
        self.assertEqual(self.client(api).handler(), SITE_OUTAGES)

    def test_an_untrusted_certificate_is_not_retried(self) -> None:
        api = self.api(tls=self.tls())
        del os.environ["REQUESTS_CA_BUNDLE"]
        error = self.error(self.client(api).handler)
        self.assertIn("certificate verify failed", str(error))
        self.assertEqual(api.connections, 1)

    def test_a_ca_bundle_that_cannot_be_used_is_named(self) -> None:
        api = self.api(tls=self.tls())
        empty = str(self.file("empty.pem", "no certificate"))
        for bundle in ("/no/ca.pem", empty):
            os.environ["REQUESTS_CA_BUNDLE"] = bundle
            error = self.error(self.client(api).handler)
            self.assertIn(bundle, str(error))

    def test_a_corrupt_tls_record_never_causes_a_second_post(self) -> None:
        def corrupt(sock: socket.socket) -> None:
            os.write(sock.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            sock.recv(1)

        api = self.api(POST_SITE_OUTAGES, corrupt, tls=self.tls())
        error = self.error(self.client(api).handler)
        self.assertIs(error.outcome, kf.UNKNOWN)
        self.assertEqual(api.requests, HEALTHY)

    def test_netrc_adds_no_credentials(self) -> None:
        netrc = self.file(".netrc", "default login user password word\n")
        os.environ["NETRC"] = str(netrc)
        for api in (self.api(), self.api(tls=self.tls())):
            self.client(api).handler()
            for request in api.received:
                self.assertIsNone(request.headers["Authorization"])

    def use_proxy(self, url: str) -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            os.environ[name] = url
            os.environ[name.lower()] = url

    def tunnel(self, api: API) -> API:
        """Return a proxy that passes everything on to `api`."""

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                for piece in iter(lambda: source.recv(65536), b""):
                    sink.sendall(piece)
                sink.shutdown(socket.SHUT_WR)

        def pass_on(sock: socket.socket) -> None:
            sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with socket.create_connection(("127.0.0.1", api.port)) as onward:
                back = threading.Thread(target=pump, args=(sock, onward))
                back.start()
                pump(onward, sock)
                sock.shutdown(socket.SHUT_RD)
                back.join()

        return self.api(f"CONNECT {api.address}", *[pass_on] * 9)

    def test_a_proxy_is_used_for_https_and_never_sees_the_key(self) -> None:
        api = self.api(tls=self.tls())
        proxy = self.tunnel(api)
        self.use_proxy(proxy.url)
        self.assertEqual(self.client(api).handler(), SITE_OUTAGES)
        self.assertEqual(len(proxy.received), 3)
        for request in proxy.received:
            self.assertNotIn(KEY, request.headers.as_string())

    def test_no_proxy_is_used_for_plain_http_or_for_an_exempt_host(self) -> None:
        proxy = self.api()
        self.use_proxy(proxy.url)
        self.assert_reported("")
        os.environ["NO_PROXY"] = "127.0.0.1"
        self.client(self.api(tls=self.tls())).handler()
        self.assertEqual(proxy.connections, 0)

    def test_answers_lost_behind_a_proxy_are_handled_like_any_other(self) -> None:
        """To urllib3, they are a ProxyError, which is neither `connect` nor `read`."""
        lost = b""
        api = self.api(tls=self.tls())
        api.replies[GET_OUTAGES] = [lost]
        api.replies[POST_SITE_OUTAGES] = [lost]
        self.use_proxy(self.tunnel(api).url)
        error = self.error(self.client(api).handler)
        self.assertIs(error.outcome, kf.UNKNOWN)
        self.assertEqual(api.requests, [GET_OUTAGES, *HEALTHY])

    def test_a_proxy_failure_is_reported_as_one(self) -> None:
        down = self.stopped_api().url
        for url, message in (
            (down, r": proxy: \[Errno .*refused$"),
            (down.replace("//", "//user:pass-word@"), r": proxy: \[Errno .*refused$"),
            ("http://user:pass-word@h:port", ": proxy: invalid URL$"),
        ):
            self.use_proxy(url)
            client = kf.KFClient("https://api.invalid/v1", KEY)
            error = self.error(client.handler)
            self.assertRegex(str(error), message)
            self.assertNotIn("pass-word", f"{error}{self.messages()}")

    def test_a_proxy_that_refuses_is_named(self) -> None:
        # The oldest urllib3 leaves its socket open then.
        self.use(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)
        self.use_proxy(self.api().url)
        error = self.error(kf.KFClient("https://api.invalid/v1", KEY).handler)
        self.assertRegex(str(error), "Tunnel connection failed: 404")
        del error
        gc.collect()


class ReportTests(TestCase):
    SINCE = TimeTests.NEW_YEAR

    def spans(self, days: str) -> Any:
        """Return a device's outages, given like "0-1 5-9.5", in days since SINCE."""
        spans = []
        for span in days.split():
            begin, end = map(float, span.split("-"))
            first = self.SINCE + dt.timedelta(days=begin)
            spans.append((first, self.SINCE + dt.timedelta(days=end)))
        return spans

    def test_overlapping_outages_count_once_towards_downtime(self) -> None:
        for days, outages in (
            (0, ""),
            (2, "0-1 2-3"),
            (2, "0-1 1-2"),
            (3, "0-2 1-3"),
            (1, "0-1 0-1"),
            (4, "0-4 1-2 3-3.5"),
            (4, "4-6 0-1 5-7"),
            (13, "0-10 1-2 9-12 20-21"),
            (1, "1-1 1-2 5-3"),
        ):
            downtime = kf.downtime(self.spans(outages), self.SINCE)
            self.assertEqual(downtime, dt.timedelta(days=days), outages)

    def test_a_duration_has_its_two_largest_units(self) -> None:
        for minutes, expected in (
            (0, "0 min"),
            (0.5, "0 min"),
            (40, "40 min"),
            (59.6, "1 h 0 min"),
            (200, "3 h 20 min"),
            (24 * 60 - 0.1, "1 d 0 h"),
            (25 * 60 + 59, "1 d 1 h"),
            (2000 * 24 * 60, "2000 d 0 h"),
        ):
            self.assertEqual(kf.duration(dt.timedelta(minutes=minutes)), expected)

    def test_a_timeline_of_ten_days_marks_each_cell_with_an_outage(self) -> None:
        last = self.SINCE + dt.timedelta(days=10)
        for outages, expected in (
            ("", ".........."),
            ("0-10", "##########"),
            ("0-0 10-10", "#........#"),
            ("0-2.5 9.5-10", "###......#"),
            ("3.2-3.3 5.5-5.5", "...#.#...."),
            ("8-2", ".........."),
        ):
            line = kf.timeline(self.spans(outages), self.SINCE, last, 10)
            self.assertEqual(line, expected)

    def report(self, columns: int, **devices: str) -> list[str]:
        """Return the lines of a report on these devices, with outages given in days."""
        listed = [{"id": name, "name": name} for name in devices]
        info: Any = {"id": "s", "name": "Site", "devices": listed}
        outages: Any = []
        for name, days in devices.items():
            for begin, end in self.spans(days):
                outages.append(outage(name, begin.isoformat(), end.isoformat()))
        return kf.report(info, outages, self.SINCE, columns).split("\n")

    def test_the_columns_fit_the_names_and_the_width(self) -> None:
        expected = [
            "Site (s): outages since 2022-01-01",
            "",
            "Device   Outages      Downtime  2022-01-01        2027-06-29",
            "a              1       5 d 0 h  #...........................",
            "battery        2    2000 d 0 h  ############################",
            "c              0         0 min  ............................",
        ]
        lines = self.report(60, a="0-5", battery="5-2005 9-9", c="")
        self.assertEqual(lines, expected)

    def test_no_line_is_wider_than_the_terminal(self) -> None:
        for columns in (20, 28, 40, 60, 80, 200):
            lines = self.report(columns, D="1-500", **{"N" * 300: "0-1"})
            self.assertLessEqual(max(map(len, lines)), columns)

    def test_a_narrower_terminal_loses_the_dates_and_then_the_timeline(self) -> None:
        heading, row = self.report(50, D="0-1")[2:]
        self.assertEqual(heading, "Device  Outages      Downtime")
        self.assertRegex(row, "#$")
        self.assertNotIn("#", self.report(28, D="0-1")[3])

    def test_names_are_made_printable_and_cut(self) -> None:
        lines = self.report(60, **{"\x1b[31m\n" + "x" * 40: "0-1"})
        self.assertRegex(lines[3], r"^\?\[31m x{14}  ")

    def test_the_first_and_last_possible_years(self) -> None:
        outages: Any = [
            outage("b1", "0001-01-02T00:00:00Z", "9999-12-31T23:59:59-23:00")
        ]
        since = kf.parse_since("0001-01-01T00:00+05:00")
        text = kf.report(SITE_INFO, outages, since, 80)
        self.assertIn(": outages since 0001-01-01\n", text)
        self.assertIn(" 9999-12-31\n", text)


class DemoTests(TestCase):
    def test_the_demo_answers_like_the_api(self) -> None:
        with kf.demo_api() as url, kf.KFClient(url, KEY) as client:
            self.assertEqual(len(client.handler()), 10)
            begins = [outage["begin"] for outage in client._get_outages()]
        self.assertIn(kf.SINCE, begins)
        self.assertIn("2021-12-31T23:59:59.999Z", begins)

    def test_failing_to_start_a_thread_is_reported_in_one_line(self) -> None:
        no_thread = RuntimeError("can't start new thread")
        with mock.patch("threading.Thread.start", side_effect=no_thread):
            ended = self.run_main("--demo")
        problem = "--demo cannot start the thread that it needs"
        line = f"kf_backend: {problem}. {NOT_REPORTED}."
        self.assertEqual((ended.code, ended.stderr.splitlines()[-1]), (1, line))


def without_times(text: str) -> str:
    """Return `text` with each port and number of seconds replaced by a placeholder."""
    text = re.sub(r"127\.0\.0\.1:[0-9]+", "127.0.0.1:PORT", text)
    return re.sub(r"\b[0-9.]+ s\b", "N s", text)


class CommandLineTests(TestCase):
    def test_a_run_prints_the_report_on_stdout(self) -> None:
        api = self.api()
        ended = self.run_main(KF_BASE_URL=f" {api.url}/\r\n", KF_API_KEY=f" {KEY}\n")
        verdict = f"Sent 2 outages (of 4 received) to {api.url} in 0.0 s.\n"
        self.assertEqual(without_times(ended.stdout), REPORT + without_times(verdict))
        self.assertEqual((ended.code, ended.stderr), (0, ""))
        self.assertEqual(api.posted, [SITE_OUTAGES])

    def test_a_dry_run_prints_only_the_list_on_stdout(self) -> None:
        api = self.api()
        ended = self.run_main("--dry-run", KF_BASE_URL=api.url)
        self.assertEqual(ended.stdout, json.dumps(SITE_OUTAGES, indent=2) + "\n")
        verdict = "Dry run: 2 outages (of 4 received) would be sent.\n"
        self.assertEqual((ended.code, ended.stderr), (0, REPORT + verdict))
        self.assertEqual(api.requests, HEALTHY[:2])

    def test_an_unknown_outcome_prints_the_list_on_stdout(self) -> None:
        for argv in ([], ["-q"]):
            api = self.api(POST_SITE_OUTAGES, b"")
            ended = self.run_main(*argv, KF_BASE_URL=api.url)
            self.assertEqual(ended.code, 3)
            self.assertEqual(json.loads(ended.stdout), SITE_OUTAGES)
            self.assertRegex(ended.stderr, f"^kf_backend: POST .* {UNKNOWN}.\n$")

    def test_a_key_that_comes_back_in_a_broken_answer_is_not_shown(self) -> None:
        api = self.api(POST_SITE_OUTAGES, f"{KEY}\r\n\r\n".encode())
        self.assertIn(
            ": [key]. The list may", self.run_main(KF_BASE_URL=api.url).stderr
        )

    def test_a_failure_is_one_line_on_stderr(self) -> None:
        ended = self.run_main("--site", "x", KF_BASE_URL=self.api().url)
        problem = (
            "GET /site-info/x: got 404 (No site); check the site ID and the base URL"
        )
        self.assertEqual(ended, (1, "", f"kf_backend: {problem}. {NOT_REPORTED}.\n"))

    def test_quiet_prints_only_errors(self) -> None:
        for option in ("-q", "--quiet"):
            api = self.api(GET_OUTAGES, response(status=500))
            self.assertEqual(self.run_main(option, KF_BASE_URL=api.url), (0, "", ""))

    def test_verbose_logs_each_request(self) -> None:
        for option in ("-v", "--verbose"):
            api = self.api(GET_OUTAGES, response(status=500))
            ended = self.run_main(option, KF_BASE_URL=api.url)
            expected = "kf_backend: GET /outages: got 500; retry 1 of 5 in N s\n"
            for line in HEALTHY:
                size = len(api.healthy[line].partition(b"\r\n\r\n")[2])
                expected += f"kf_backend: {line}: 200 in N s, {size} bytes\n"
            self.assertEqual(without_times(ended.stderr), expected)

    def test_since_and_site_reach_the_api(self) -> None:
        api = self.api()
        for argv, count in (
            ("--since=2022-02-01", 1),
            ("--since 2021-01-01T00:00+01:00", 3),
            (f"--deadline 86400 --timeout 86400 --site {kf.SITE}", 2),
        ):
            ended = self.run_main(*argv.split(), "--base-url", api.url)
            self.assertEqual((ended.code, len(api.posted[-1])), (0, count))

    def test_defaults_and_the_timeout_reach_the_client(self) -> None:
        for argv, timeout in ((), 30), (("--timeout=7",), 7):
            with mock.patch.object(
                kf, "KFClient", side_effect=kf.KFError("no")
            ) as made:
                self.run_main(*argv)
            expected = mock.call(kf.BASE_URL, KEY, timeout=timeout, dry_run=False)
            self.assertEqual(made.call_args, expected)

    def assert_usage_error(self, message: str, *argv: str, **environ: str) -> None:
        """Assert that no request is made, and that the last line matches `message`."""
        api = self.api()
        ended = self.run_main(*argv, **{"KF_BASE_URL": api.url, **environ})
        self.assertEqual((ended.code, ended.stdout), (2, ""))
        self.assertRegex(ended.stderr, message)
        self.assertEqual(api.connections, 0)

    def test_a_number_of_seconds_is_positive_and_at_most_a_day(self) -> None:
        for number in ("0", "-1", "nan", "inf", "86401"):
            for option in ("--timeout", "--deadline"):
                message = f"argument {option}: must be more than 0 and at most 86400$"
                self.assert_usage_error(message, f"{option}={number}")

    def test_wrong_options_are_usage_errors(self) -> None:
        self.assert_usage_error("invalid seconds value: 'x'$", "--timeout", "x")
        self.assert_usage_error("--since: expected one argument$", "--since")
        self.assert_usage_error("unrecognized arguments: --nothing$", "--nothing")
        self.assert_usage_error("not allowed with", "--demo", "--base-url=https://h")
        self.assert_usage_error("--demo has only the site", "--demo", "--site=x")

    def test_invalid_values_are_usage_errors(self) -> None:
        for message, option in (
            (r"invalid site ID: '\.\.'", "--site=.."),
            ("invalid site ID: ''", "--site="),
            ("expected an ISO 8601 date .*, but got 'x'", "--since=x"),
            ("the base URL must begin with https:// .*", "--base-url=http://h"),
            ("the base URL must begin with https:// .*", "--base-url="),
        ):
            line = rf"^kf_backend: {message}\. {NOT_REPORTED}\.$"
            self.assert_usage_error(line, option)
        self.assert_usage_error("no API key; set KF_API_KEY", KF_API_KEY="")
        self.assert_usage_error("the API key may contain only", KF_API_KEY="a\nb")

    def test_help_lists_options_before_environment_and_codes(self) -> None:
        ended = self.run_main("--help", COLUMNS="80")
        self.assertLessEqual(max(map(len, ended.stdout.splitlines())), 80)
        parts = "GET /outages: all.*options:|optional arguments:.*--quiet.*"
        parts += "KF_API_KEY .*exit codes:.*\n  3 .*\n  130 "
        self.assertRegex(ended.stdout, f"(?s)({parts})")
        self.assertIn(f" {kf.BASE_URL})\n", ended.stdout)

    def test_a_name_that_stdout_cannot_encode_is_escaped(self) -> None:
        os.environ.update(KF_API_KEY=KEY, KF_BASE_URL=self.api().url)
        stdout = self.use(io.TextIOWrapper(io.BytesIO(), "ascii"))
        with contextlib.redirect_stdout(stdout):
            self.assertEqual(kf.main([]), 0)
        stdout.seek(0)
        self.assertIn(r"Batterie \u21162", stdout.read())

    def test_the_outcome_is_true_whatever_goes_wrong_after_the_post(self) -> None:
        for error, problem in (
            (MemoryError(), "MemoryError"),
            (ValueError("no"), "no"),
            (OSError(28, "Full"), "[Errno 28] Full"),
        ):
            with mock.patch.object(kf, "report", side_effect=error):
                ended = self.run_main(KF_BASE_URL=self.api().url)
            line = f"kf_backend: {problem}. The list was accepted.\n"
            self.assertEqual(ended, (0, "", line))

    def test_the_outcome_is_true_whatever_goes_wrong_during_the_post(self) -> None:
        with mock.patch.object(kf, "beginning_of", side_effect=MemoryError):
            ended = self.run_main(KF_BASE_URL=self.api().url)
        self.assertEqual(ended.code, 3)
        self.assertEqual(json.loads(ended.stdout), SITE_OUTAGES)
        self.assertEqual(ended.stderr, f"kf_backend: MemoryError. {UNKNOWN}.\n")

    def test_a_bug_keeps_its_traceback_if_nothing_was_sent(self) -> None:
        with mock.patch.object(kf, "read_array", side_effect=MemoryError):
            with self.assertRaises(MemoryError):
                self.run_main(KF_BASE_URL=self.api().url)

    def test_main_restores_what_it_changes(self) -> None:
        def state() -> Any:
            handlers = [signal.getsignal(number) for number in signal.valid_signals()]
            if not IS_UNIX:
                return handlers, kf.log.handlers[:]
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            timer = signal.getitimer(signal.ITIMER_REAL)
            return handlers, kf.log.handlers[:], blocked, timer

        state()
        before = state()
        self.run_main(KF_BASE_URL=self.api().url)
        self.run_main(KF_BASE_URL=self.api(POST_SITE_OUTAGES, b"").url)
        self.assertEqual(state(), before)

    def test_main_works_outside_the_main_thread(self) -> None:
        ended: list[Ended] = []
        url = self.api().url

        def run() -> None:
            ended.append(self.run_main("-q", KF_BASE_URL=url))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        self.assertEqual(ended, [(0, "", "")])


# Windows has no signals that one process can send to another, and no SIGALRM.
@unittest.skipUnless(IS_UNIX, "needs Unix signals and timers")
class ProcessTests(TestCase):
    """The script, run as a separate process."""

    def spawn(self, url: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start the script, with the default action for each signal."""

        def use_defaults() -> None:
            for number in kf.SIGNALS:
                signal.signal(number, signal.SIG_DFL)

        command = [sys.executable, "-X", "dev", "-W", "error", str(SCRIPT), *argv]
        os.environ.update(KF_BASE_URL=url, KF_API_KEY=KEY, PYTHONIOENCODING="utf-8")
        settings = {
            "args": command,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "preexec_fn": use_defaults,
            "encoding": "utf-8",
            **options,
        }
        process: subprocess.Popen[str] = self.use(subprocess.Popen(**settings))
        self.stack.callback(process.kill)
        return process

    def end(self, process: subprocess.Popen[str]) -> Ended:
        stdout, stderr = process.communicate(timeout=30)
        self.assertNotIn(KEY, f"{stdout}{stderr}")
        return Ended(process.returncode, stdout, stderr)

    def stall(self, start: bytes) -> tuple[Reply, threading.Event]:
        """Return a reply that sends only `start`, and an event set once it has."""
        stalling = threading.Event()

        def reply(sock: socket.socket) -> None:
            sock.sendall(start)
            stalling.set()
            sock.recv(1)  # until the client hangs up

        return reply, stalling

    def test_a_process_dies_of_a_signal_after_printing_one_true_line(self) -> None:
        part = response(OUTAGES)[:-9]
        runs = []
        for number, line, start in (
            (signal.SIGINT, GET_OUTAGES, b""),
            (signal.SIGTERM, GET_OUTAGES, part),
            (signal.SIGHUP, POST_SITE_OUTAGES, b""),
            (signal.SIGTERM, POST_SITE_OUTAGES, part),
        ):
            sentence = UNKNOWN if line == POST_SITE_OUTAGES else NOT_REPORTED
            name = signal.Signals(number).name
            expected = f"kf_backend: interrupted by {name}. {sentence}.\n"
            reply, stalling = self.stall(start)
            process = self.spawn(self.api(line, reply).url)
            runs.append((process, stalling, Ended(-number, "", expected)))
        for process, stalling, ended in runs:
            self.assertTrue(stalling.wait(30))
            time.sleep(0.05)
            process.send_signal(-ended.code)
            process.send_signal(-ended.code)
            self.assertEqual(self.end(process), ended)

    def test_a_signal_at_any_time_prints_at_most_one_true_line(self) -> None:
        rnd = random.Random(3)
        api = self.api()
        processes = [self.spawn(api.url, "-q") for _ in range(8)]
        for process in processes:
            time.sleep(rnd.random() / 4)
            process.send_signal(signal.SIGTERM)
        for process in processes:
            ended = self.end(process)
            self.assertIn(ended.code, (0, -signal.SIGTERM))
            line = r"(kf_backend: interrupted by SIGTERM\. .+\.\n)?"
            self.assertRegex(ended.stderr, f"^{line}$")

    def test_a_signal_that_is_ignored_stays_ignored(self) -> None:
        def ignore() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        go_on = threading.Event()
        stalling = threading.Event()

        def wait(sock: socket.socket) -> None:
            stalling.set()
            go_on.wait(30)
            sock.sendall(response(OUTAGES))

        api = self.api(GET_OUTAGES, wait)
        process = self.spawn(api.url, "-q", preexec_fn=ignore)
        self.assertTrue(stalling.wait(30))
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        go_on.set()
        self.assertEqual(self.end(process), (0, "", ""))

    def test_a_signal_is_handled_while_another_thread_runs(self) -> None:
        program = (
            "import sys, threading, time; import kf_backend;"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start();"
            "sys.exit(kf_backend.main(['-q']))"
        )
        reply, stalling = self.stall(b"")
        command = [sys.executable, "-c", program]
        url = self.api(POST_SITE_OUTAGES, reply).url
        process = self.spawn(url, args=command, cwd=SCRIPT.parent)
        self.assertTrue(stalling.wait(30))
        process.send_signal(signal.SIGTERM)
        self.assertIn(UNKNOWN, self.end(process).stderr)

    def test_the_deadline_ends_a_run_that_is_stuck(self) -> None:
        headers = endless(b"HTTP/1.1 200 OK\r\nA: ", b"b", 0.05)
        body = endless(response(b"[", Content_Length=None), b" ", 0.05)
        refusal = endless(response(status=403, Content_Length=None), b" ", 0.05)
        wait = response(status=429, Retry_After="30")
        runs = []
        for outcome, line, reply in (
            (kf.NOT_REPORTED, GET_OUTAGES, headers),
            (kf.NOT_REPORTED, GET_SITE_INFO, body),
            (kf.NOT_REPORTED, POST_SITE_OUTAGES, refusal),
            (kf.UNKNOWN, POST_SITE_OUTAGES, headers),
            (kf.UNKNOWN, POST_SITE_OUTAGES, wait),
        ):
            url = self.api(line, reply).url
            runs.append((outcome, self.spawn(url, "--deadline", "1.5")))
        for outcome, process in runs:
            ended = self.end(process)
            self.assertEqual(ended.code, outcome.exit_code)
            problem = "the --deadline of 1.5 s has passed"
            line = f"kf_backend: {problem}. {outcome.sentence}."
            self.assertIn(line, ended.stderr)
            if outcome is kf.UNKNOWN:
                self.assertEqual(json.loads(ended.stdout), SITE_OUTAGES)

    def test_the_deadline_holds_if_its_signal_is_blocked_and_ignored(self) -> None:
        def block() -> None:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])

        url = self.api(GET_OUTAGES, self.stall(b"")[0]).url
        process = self.spawn(url, "--deadline", "0.5", preexec_fn=block)
        self.assertIn("the --deadline of 0.5 s has passed", self.end(process).stderr)

    def test_the_deadline_holds_if_nobody_reads_what_is_written(self) -> None:
        reader, full_pipe = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, full_pipe)
        os.set_blocking(full_pipe, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full_pipe, b"x" * 4096)
        os.set_blocking(full_pipe, True)
        silent, _ = self.stall(b"")
        healthy = self.api()
        stuck = self.api(GET_OUTAGES, silent)
        # The first one has sent the list when its report blocks. The other one blocks
        # while it says that the deadline has passed.
        first = self.spawn(healthy.url, "--deadline", "0.7", stdout=full_pipe)
        other = self.spawn(stuck.url, "--deadline", "0.7", stderr=full_pipe)
        self.assertEqual(first.wait(20), 0)
        self.assertEqual(other.wait(20), 1)

    @needs_full_device
    def test_closed_and_full_streams_do_not_stop_a_run(self) -> None:
        reader, closed = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, closed)
        full = self.use(open("/dev/full", "w"))
        no_space = r"^kf_backend: \[Errno 28\] No space left on device\. "
        runs = []
        accepted = "The list was accepted"
        for stdout, option, ended_in in (
            (closed, "-v", (0, "POST .*200")),
            (closed, "--dry-run", (0, "would be sent")),
            (full, "-v", (0, f"(?m){no_space}{accepted}")),
            (full, "--dry-run", (1, no_space + NOT_REPORTED)),
        ):
            process = self.spawn(self.api().url, option, stdout=stdout)
            runs.append((process, *ended_in))
        for process, code, message in runs:
            ended = self.end(process)
            self.assertEqual(ended.code, code, ended)
            self.assertRegex(ended.stderr, message)
        succeeding = self.spawn(self.api().url, "-v", stderr=full)
        failing = self.spawn(self.api().url, "--site=x", stderr=full)
        self.assertEqual(self.end(succeeding).code, 0)
        self.assertEqual(self.end(failing).code, 1)

    def test_a_run_without_any_streams_sends_the_list(self) -> None:
        def close_all() -> None:
            os.closerange(0, 3)

        api = self.api()
        process = self.spawn(api.url, stdout=None, stderr=None, preexec_fn=close_all)
        self.assertEqual(process.wait(30), 0)
        self.assertEqual(api.posted, [SITE_OUTAGES])

    def test_the_report_is_as_wide_as_its_own_terminal(self) -> None:
        import pty
        import termios

        for stream, argv in (("stdout", ""), ("stderr", "--dry-run")):
            try:
                terminal, device = pty.openpty()
            except OSError:
                # Some containers are run without /dev/ptmx.
                self.skipTest("has no terminals")
            self.addCleanup(os.close, terminal)
            size = struct.pack("HHHH", 24, 100, 0, 0)
            __import__("fcntl").ioctl(device, termios.TIOCSWINSZ, size)
            process = self.spawn(self.api().url, *argv.split(), **{stream: device})
            self.end(process)
            os.close(device)
            shown = os.read(terminal, 10_000).decode()
            self.assertEqual(max(map(len, shown.splitlines())), 100)

    def test_the_library_is_silent_and_its_import_changes_nothing(self) -> None:
        api = self.api(GET_OUTAGES, response(status=500))
        program = f"""if True:
            import logging, signal, threading
            before = signal.getsignal(signal.SIGINT)
            from kf_backend import KFClient
            with KFClient({api.url!r}, {KEY!r}) as client:
                assert len(client.handler({kf.SITE!r}, "2022-01-01")) == 2
            assert before == signal.getsignal(signal.SIGINT)
            assert threading.active_count() == 1
            assert not logging.getLogger().handlers
        """
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
        process = self.spawn("", args=command, cwd=SCRIPT.parent)
        self.assertEqual(self.end(process), (0, "", ""))


class ReadmeTests(TestCase):
    """README.md, requirements.txt and the script agree."""

    README = SCRIPT.with_name("README.md").read_text("utf-8")

    def test_the_example_is_what_the_demo_prints(self) -> None:
        ended = self.run_main("--demo", KF_BASE_URL="https://api.invalid")
        self.assertEqual(ended.code, 0)
        shown = without_times(f"```text\n{ended.stderr}{ended.stdout}```\n")
        self.assertIn(shown, without_times(self.README))
        self.assertLessEqual(max(map(len, shown.splitlines())), 80)

    def test_every_option_default_and_variable_is_in_the_readme(self) -> None:
        shown = self.run_main("--help", COLUMNS="200").stdout.partition("\n\n")[2]
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown):
            self.assertTrue(f"`{option}" in self.README, option)
        for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", shown):
            self.assertTrue(name in self.README, name)
        for default in (kf.SITE, kf.SINCE, kf.BASE_URL, "30", "600"):
            self.assertTrue(f"(default: `{default}`)" in self.README, default)

    def test_every_exit_code_is_in_the_readme(self) -> None:
        shown = self.run_main("--help").stdout
        codes = re.findall(r"(?m)^  ([0-9]+)  ", shown)
        self.assertEqual(codes, ["0", "1", "2", "3", "130", "143", "129"])
        for code in codes:
            self.assertRegex(
                self.README, rf"(?m)^\| ([0-9, ]+, )?{code}(, [0-9, ]+)? \|"
            )

    def test_the_python_example_runs_as_is(self) -> None:
        [program] = re.findall(r"(?ms)^```python\n(.*?)^```$", self.README)
        os.environ["KF_API_KEY"] = KEY
        handler = self.use(mock.patch.object(kf.KFClient, "handler"))
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
        handler.assert_called_once_with("norwich-pear-tree", "2022-06-01")

    def test_requirements_and_the_inline_metadata_agree(self) -> None:
        listed = re.findall(r'(?m)^#   "(.+)",$', SCRIPT.read_text("utf-8"))
        required = SCRIPT.with_name("requirements.txt").read_text("utf-8")
        self.assertEqual(listed, required.split())


if __name__ == "__main__":
    unittest.main()
