"""Tests for kf_backend.py, in the order of the script: from errors to the command line.

They talk to `API`, a real HTTP server on 127.0.0.1. Each test has one, `self.api`. By
default, it replies correctly, but a test can queue other replies to a request. A reply
is bytes to send or, to simulate a fault, a function that is given the socket.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.message
import faulthandler
import gc
import gzip
import io
import itertools
import json
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
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from fractions import Fraction
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import requests

import kf_backend as kf

SCRIPT = Path(kf.__file__)
KEY = "s3cret-key!"

#: The requests of a run in which nothing goes wrong.
GET_OUTAGES = "GET /outages"
GET_SITE_INFO = f"GET /site-info/{kf.SITE}"
POST_SITE_OUTAGES = f"POST /site-outages/{kf.SITE}"
HEALTHY = [GET_OUTAGES, GET_SITE_INFO, POST_SITE_OUTAGES]

SITE_INFO: kf.SiteInfo = {
    "id": kf.SITE,
    "name": "Norwich Pear Tree",
    "devices": [
        {"id": "b1", "name": "Battery 1"},
        {"id": "b2", "name": "Batterie №2"},
        {"id": "b3", "name": "Battery 3"},
    ],
}


def outage(device_id, begin="2022-05-01T00:00:00Z", end="2022-05-02T00:00:00Z"):
    return {"id": device_id, "begin": begin, "end": end}


def named(outage, name):
    return {**outage, "name": name}


#: The last begins exactly at the default date; the third, a millisecond before it.
OUTAGES = [
    outage("b2", "2022-03-01T00:00:00.000Z", "2022-03-04T04:00:00.000Z"),
    outage("elsewhere", "not", "checked"),
    outage("b1", "2021-12-31T23:59:59.999Z", "2022-06-01T00:00:00.000Z"),
    outage("b1", "2022-01-01T00:00:00.000Z", "2022-01-11T12:00:00.000Z"),
]
OUTAGES_BODY = json.dumps(OUTAGES).encode()
SITE_OUTAGES = [
    named(OUTAGES[0], "Batterie №2"),
    named(OUTAGES[3], "Battery 1"),
]
#: The list as the user sees it: indented, and in ASCII.
LIST = json.dumps(SITE_OUTAGES, indent=2) + "\n"
REPORT = """\
Norwich Pear Tree (norwich-pear-tree): outages since 2022-01-01

Device       Outages      Downtime  2022-01-01                        2022-03-04
Battery 1          1     10 d 12 h  ########....................................
Batterie №2        1       3 d 4 h  .........................................###
Battery 3          0         0 min  ............................................

"""

#: What the last line of a run says about the list.
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

#: Windows has no SIGALRM, and its signals work differently.
needs_unix = unittest.skipUnless(hasattr(signal, "SIGALRM"), "needs Unix signals")

#: /dev/full is a device that is always full. macOS and Windows have nothing like it.
needs_full_device = unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")

# A server that can misbehave


def response(body=b"", status=200, **headers):
    """Return an HTTP response. `body` becomes JSON, unless it is bytes.

    `Content_Length=None` leaves out that header.
    """
    if not isinstance(body, bytes):
        body = json.dumps(body, ensure_ascii=False).encode()
    headers = {"Content_Length": len(body), **headers}
    head = f"HTTP/1.1 {status} Reason\r\n"
    for name, value in headers.items():
        if value is not None:
            head += f"{name.replace('_', '-')}: {value}\r\n"
    return head.encode() + b"\r\n" + body


def chunked(body):
    """Return a response with `body` as a single chunk."""
    head = response(Content_Length=None, Transfer_Encoding="chunked")
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def reset(sock):
    """Reply with a reset rather than an orderly close."""
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    # sock.close() would not take effect until the server closes its file objects.
    socket.close(sock.detach())


def stall(start=b""):
    """Return a reply that sends only `start` and waits until the client hangs up."""

    def reply(sock):
        sock.sendall(start)
        sock.recv(1)

    return reply


def endless(start, rest=b" " * 65536, pause=0.0):
    """Return a reply that sends `start` and then `rest` until the client hangs up."""

    def reply(sock):
        sock.sendall(start)
        while True:
            sock.sendall(rest)
            time.sleep(pause)

    return reply


def late(seconds):
    """Return a correct reply to GET /outages that is sent after this many seconds."""

    def reply(sock):
        time.sleep(seconds)
        sock.sendall(response(OUTAGES))

    return reply


class Request(NamedTuple):
    line: str  # such as "GET /outages"
    headers: email.message.Message
    body: bytes


class Connection(BaseHTTPRequestHandler):
    """Serves one request, and closes the connection."""

    server: API
    timeout = 20

    def handle(self):
        with contextlib.suppress(OSError):  # The client may hang up.
            super().handle()

    def do_GET(self):
        line = f"{self.command} {self.path}"
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        reply = self.server.reply_to(Request(line, self.headers, body))
        if callable(reply):
            reply(self.connection)
        else:
            self.connection.sendall(reply)

    do_POST = do_GET
    do_CONNECT = do_GET  # A client sends this to a proxy.

    def log_message(self, *args):
        """Leave stderr to the tests."""


class API(socketserver.ThreadingTCPServer):
    """A mock of the KrakenFlex API. It refuses connections until it is started."""

    request_queue_size = 50
    daemon_threads = True
    tls = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Connection, bind_and_activate=False)
        self.server_bind()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.connections = 0
        self.received = []
        self.queued = {}
        self.healthy = {
            GET_OUTAGES: response(OUTAGES),
            GET_SITE_INFO: response(SITE_INFO),
            POST_SITE_OUTAGES: response({}),
        }

    def get_request(self):
        self.connections += 1
        sock, address = super().get_request()
        if self.tls:
            sock = self.tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
        return sock, address

    def queue(self, line, *replies):
        """Forget what was queued and received, and queue these replies to `line`."""
        self.received.clear()
        self.queued = {line: list(replies)}

    def reply_to(self, request):
        self.received.append(request)
        if self.queued.get(request.line):
            return self.queued[request.line].pop(0)
        no_site = response({"message": "No site"}, 404)
        return self.healthy.get(request.line, no_site)

    @property
    def request_lines(self):
        """The requests that were made, in the same form as `HEALTHY`."""
        return [request.line for request in self.received]

    @property
    def posted(self):
        """The lists that were sent."""
        return [json.loads(request.body) for request in self.received if request.body]


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    stdout: str
    stderr: str


class TestCase(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        """Start an API, and keep the caller's environment out."""
        # If a test hangs, stop and show where.
        faulthandler.dump_traceback_later(30, exit=True, file=2)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.use(mock.patch.dict(os.environ))
        ours = "(?i)^KF_|_PROXY$|NETRC|COLUMNS|CA_BUNDLE|COLOR|UNBUFFERED"
        for name in list(os.environ):
            if re.search(ours, name):
                del os.environ[name]
        os.environ.update(KF_API_KEY=KEY, PYTHONIOENCODING="utf-8")
        # Keep the waits before retries short.
        self.use(mock.patch.dict(kf.KFClient.__init__.__kwdefaults__, backoff=0.001))
        self.serve()

    def use(self, manager):
        """Enter a context manager, and exit it when the test ends."""
        return self.stack.enter_context(manager)

    def patch(self, **values):
        """Replace these attributes of the script until the end of the test."""
        self.use(mock.patch.multiple(kf, **values))

    def serve(self, line=GET_OUTAGES, *replies):
        """Start an API with these replies to `line` queued."""
        self.api = self.use(API())
        self.api.queue(line, *replies)
        os.environ["KF_BASE_URL"] = self.api.url
        self.start(self.api)

    def start(self, api):
        """Let `api` accept connections until the end of the test."""
        api.server_activate()
        thread = threading.Thread(target=api.serve_forever, args=[0.001])
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(api.shutdown)

    def file(self, name, text):
        """Return the path of a file that contains this text."""
        path = Path(self.use(tempfile.TemporaryDirectory()), name)
        path.write_text(text)
        return str(path)

    def client(self, **options):
        return self.use(kf.KFClient(self.api.url, KEY, **options))

    def error(self, call, *args):
        """Return the KFError that `call` raises."""
        with self.assertRaises(kf.KFError) as caught:
            call(*args)
        return caught.exception

    def run_main(self, *argv):
        """Run `main` in this process."""
        stdout = io.StringIO()
        stderr = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            with contextlib.redirect_stderr(stderr):
                try:
                    code = kf.main(list(argv))
                except SystemExit as exit:
                    code = int(exit.code or 0)
        return Ended(code, stdout.getvalue(), stderr.getvalue())

    def assert_reported(self, line=GET_OUTAGES, *replies):
        """Assert that a run reports the right list after these replies to `line`."""
        self.api.queue(line, *replies)
        self.assertEqual(self.client().handler(), SITE_OUTAGES)
        self.assertEqual(self.api.posted[-1], SITE_OUTAGES)

    def assert_not_reported(self, message, line=GET_OUTAGES, *replies):
        """Assert that after these replies to `line`, no outages are reported.

        The error has this message.
        """
        self.api.queue(line, *replies)
        client = self.client()
        error = self.error(client.handler)
        self.assertRegex(str(error), message)
        self.assertIs(error.outcome, kf.NOT_REPORTED)
        self.assertIs(client.outcome, kf.NOT_REPORTED)

    def assert_unknown(self, message, *replies, **options):
        """Assert that after these replies to the POST, the outcome is unknown.

        The error has this message and the list. The POST was made once per reply.
        """
        self.api.queue(POST_SITE_OUTAGES, *replies)
        client = self.client(**options)
        error = self.error(client.handler)
        self.assertRegex(str(error), f"^{POST_SITE_OUTAGES}: {message}$")
        self.assertIs(error.outcome, kf.UNKNOWN)
        self.assertIs(client.outcome, kf.UNKNOWN)
        self.assertEqual(error.site_outages, SITE_OUTAGES)
        self.assertEqual(self.api.request_lines.count(POST_SITE_OUTAGES), len(replies))


class ErrorTests(TestCase):
    def test_untrusted_text_becomes_one_printable_line(self):
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

    def test_a_reason_describes_the_innermost_error_and_names_its_file(self):
        reset_by_peer = ConnectionResetError(104, "Reset by peer")
        missing = FileNotFoundError(2, "No such file", "/a/b")
        for error, expected in (
            (requests.ConnectionError(reset_by_peer), "[Errno 104] Reset by peer"),
            (missing, "[Errno 2] No such file: '/a/b'"),
            (ValueError(), "ValueError"),
        ):
            self.assertEqual(kf.reason(error), expected)

    def test_neither_a_traceback_nor_a_client_shows_the_key(self):
        client = self.client()
        self.api.queue(POST_SITE_OUTAGES, f"{KEY}\r\n\r\n".encode())
        try:
            client.handler()
        except kf.KFError:
            shown = traceback.format_exc()
        self.assertNotIn(KEY, shown + repr(client))

    def test_no_part_of_a_key_that_comes_back_in_a_broken_answer_is_shown(self):
        for line in HEALTHY:
            for start in ("", "x" * 295):
                self.api.queue(line, f"{start}{KEY}\r\n\r\n".encode())
                error = self.error(self.client().handler)
                self.assertNotIn(KEY[:3], str(error))


class KeyAndAddressTests(TestCase):
    def test_white_space_around_a_key_is_stripped(self):
        for given in ("key", " key\n", "\tkey\r\n", "\u00a0key"):
            self.assertEqual(kf.clean_key(given), "key")

    def test_a_key_that_is_not_a_valid_header_value_is_refused_and_not_shown(self):
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
            with self.assertRaisesRegex(kf.UsageError, f"^{expected}$"):
                kf.clean_key(given)

    def test_base_urls_that_keep_the_key_safe_are_accepted_and_normalized(self):
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

    def test_other_base_urls_are_refused(self):
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
                kf.clean_base_url(given)

    def test_a_site_id_becomes_one_path_segment(self):
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

    def test_an_invalid_site_id_is_refused_before_any_request(self):
        for given in ("", ".", "..", "a\ud800", None):
            error = self.error(self.client().handler, given)
            self.assertIsInstance(error, kf.UsageError)
            self.assertEqual(str(error), f"invalid site ID: {given!a}")
        self.assertEqual(self.api.request_lines, [])


class TimeTests(TestCase):
    NEW_YEAR = dt.datetime(2022, 1, 1, tzinfo=dt.timezone.utc)

    def test_rfc_3339_times_are_read_to_the_microsecond(self):
        microsecond = dt.timedelta(microseconds=1)
        for given, microseconds in (
            ("2022-01-01T00:00:00Z", 0),
            ("2022-01-01t00:00:00z", 0),
            ("2022-01-01 00:00:00.000Z", 0),
            ("2022-01-01T01:00:00+01:00", 0),
            ("2021-12-31T18:30:00.0-05:30", 0),
            ("2022-01-01T00:00:00-00:00", 0),
            ("2022-01-01T23:59:00+23:59", 0),
            ("2021-12-31T23:59:59.999Z", -1000),
            ("2022-01-01T00:00:00.5Z", 500_000),
            ("2022-01-01t00:00:00.50000000z", 500_000),
            ("2022-01-01T00:00:00.0000019999Z", 1),
        ):
            expected = self.NEW_YEAR + microseconds * microsecond
            self.assertEqual(kf.parse_time(given), expected, given)

    def test_other_times_are_refused(self):
        for given in (
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
        ):
            with self.assertRaises(ValueError, msg=given):
                kf.parse_time(given)

    def test_a_date_is_utc_unless_it_has_an_offset(self):
        east = dt.timezone(dt.timedelta(hours=5))
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

    def test_other_dates_are_refused_before_any_request(self):
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
            error = self.error(self.client().handler, kf.SITE, given)
            self.assertIsInstance(error, kf.UsageError)
            expected = "expected an ISO 8601 date or time like 2022-06-01, but got"
            quoted = ascii(str(given))[:50]
            self.assertEqual(str(error), f"{expected} {quoted}")
        self.assertEqual(self.api.request_lines, [])


class SelectTests(TestCase):
    def select(self, *outages):
        """Return the outages that are kept for the site in SITE_INFO."""
        names = kf.device_names(SITE_INFO)
        return list(kf.select(outages, names, TimeTests.NEW_YEAR))

    def test_outages_are_kept_in_order_with_the_name_added(self):
        first = outage("b2", "2022-12-01t01:00:00.5+01:00", "2022-12-02 00:00:00z")
        second = {"more": [{"é": None}], "name": "another", **outage("b1")}
        expected = [
            named(first, "Batterie №2"),
            named(second, "Battery 1"),
            named(first, "Batterie №2"),
        ]
        self.assertEqual(self.select(first, second, first), expected)

    def test_an_outage_that_began_exactly_at_the_date_is_kept(self):
        exactly = outage("b1", "2022-01-01T01:00:00+01:00")
        too_early = outage("b1", "2021-12-31T23:59:59.999999Z")
        kept = [named(exactly, "Battery 1")]
        self.assertEqual(self.select(exactly, too_early), kept)

    def test_errors_in_outages_of_other_sites_do_not_matter(self):
        no_times = {"id": ""}
        wrong_times = outage("x", None, 10)
        self.assertEqual(self.select(no_times, wrong_times), [])

    def test_an_outage_whose_id_is_not_text_is_refused(self):
        for given in (
            None,
            "b1",
            1,
            ["id"],
            {"name": "b1"},
            outage(None),
            outage(1),
            outage(["b1"]),
        ):
            with self.assertRaisesRegex(kf.KFError, "outage 2 has an invalid id: "):
                self.select(outage("x"), given)

    def test_the_error_for_an_invalid_time_names_the_outage_and_the_field(self):
        for field in ("begin", "end"):
            for value in (None, 10, ["a"], {"a": 1}, "2022-01-01"):
                # Both times are checked, even if the outage began too early.
                bad = outage("b1", "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")
                bad[field] = value
                error = self.error(self.select, outage("b2"), bad)
                message = f"GET /outages: outage 2 has an invalid {field}: "
                self.assertEqual(str(error), message + json.dumps(bad))

    def test_the_error_quotes_at_most_300_characters_of_an_outage(self):
        given = {"id": "b1", "more": "x" * 1000}
        error = self.error(self.select, given)
        expected = "GET /outages: outage 1 has an invalid begin: "
        self.assertEqual(str(error), expected + json.dumps(given)[:300])

    def test_an_outage_that_ends_before_it_begins_is_kept_with_a_warning(self):
        backwards = outage("b1", "2022-02-01T00:00:00Z", "2021-02-01T00:00:00Z")
        instant = outage("b1", "2022-02-01T00:00:00Z", "2022-02-01T00:00:00Z")
        with self.assertLogs("kf_backend") as logs:
            self.assertEqual(len(self.select(instant, backwards)), 2)
        message = "GET /outages: outage 2 ends before it begins"
        self.assertEqual(logs.output, [f"WARNING:kf_backend:{message}"])


class ReadArrayTests(TestCase):
    """`read_array` agrees with `json.loads`, however a body is split into pieces."""

    VALID = (
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
    INVALID = (
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

    def read(self, body):
        items = []
        try:
            for batch in kf.read_array(io.BytesIO(body)):
                items += batch
        except ValueError:
            return "refused"
        return items

    def assert_like_json(self, body):
        """Assert that read_array agrees with json.loads, for every piece size."""
        try:
            expected = json.loads(body.decode("utf-8-sig"))
        except ValueError:
            expected = "refused"
        for size in range(1, len(body) + 2):
            with mock.patch.object(kf, "READ_SIZE", size):
                items = self.read(body)
            # As text, because 1 equals 1.0, and NaN does not even equal itself.
            self.assertEqual(repr(items), repr(expected), (body, size))

    def test_they_agree_on_valid_arrays(self):
        for text in self.VALID:
            self.assertNotEqual(self.read(text.encode()), "refused")
            self.assert_like_json(text.encode())

    def test_they_agree_on_invalid_arrays(self):
        for text in self.INVALID:
            self.assertEqual(self.read(text.encode()), "refused")
            self.assert_like_json(text.encode())

    def test_they_agree_on_arrays_that_are_cut_off(self):
        for text in self.VALID:
            body = text.encode()
            for end in range(len(body)):
                self.assert_like_json(body[:end])

    def test_they_agree_on_invalid_utf_8(self):
        for letter in (b"\xff", b"\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\x94"):
            self.assert_like_json(b'[{"a":"' + letter + b'"},{}]')
            self.assert_like_json(b"[{}]" + letter)

    def test_they_agree_on_random_and_damaged_arrays(self):
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
        for _ in range(60):
            text = f"[{','.join(rnd.choices(values, k=5))}]"
            self.assert_like_json(text.encode())
            position = rnd.randrange(len(text))
            damaged = text[:position] + rnd.choice(letters) + text[position + 1 :]
            self.assert_like_json(damaged.encode())

    def test_a_large_array_comes_in_batches(self):
        body = b"[{}" + b",{}" * 100_000 + b"]"
        sizes = [len(batch) for batch in kf.read_array(io.BytesIO(body))]
        self.assertEqual(sum(sizes), 100_001)
        self.assertLess(max(sizes), 30_000)

    def test_too_much_text_without_an_outage_is_refused(self):
        self.patch(TEXT_MAX=500_000)
        for body in (
            b'[{"id": "' + b"}" * 600_000,
            b'[{"id": [' + b"{}," * 200_000,
            b'[{"a":{},"b":' + b"[" * 500 + b"[]" * 300_000,
        ):
            message = "^no outage ends within 500,000 characters$"
            with self.assertRaisesRegex(ValueError, message):
                list(kf.read_array(io.BytesIO(body)))


class RetryTests(TestCase):
    """Rejections and failed connections: what urllib3 retries, and when."""

    def test_each_request_is_retried_up_to_five_times(self):
        for status in (429, 500, 503):
            busy = [response({}, status)] * 5
            for line in HEALTHY:
                self.assert_reported(line, *busy)
                self.assertEqual(self.api.request_lines.count(line), 6)

    def test_the_sixth_rejection_ends_the_run(self):
        busy = [response({}, 503)] * 6
        for line in HEALTHY:
            self.assert_not_reported(f"^{line}: got 503", line, *busy)
            self.assertEqual(self.api.request_lines.count(line), 6)

    def test_a_get_is_retried_after_502_and_504(self):
        for status in (502, 504):
            self.assert_reported(GET_OUTAGES, response({}, status))
            self.assert_reported(GET_SITE_INFO, response({}, status))

    def test_a_413_with_retry_after_is_not_retried(self):
        reply = response({}, 413, Retry_After="0")
        self.assert_not_reported("; the list is too long", GET_OUTAGES, reply)
        self.assertEqual(self.api.request_lines, [GET_OUTAGES])

    def test_each_retry_is_logged_with_its_reason_and_wait(self):
        with self.assertLogs("kf_backend") as logs:
            replies = [response({}, 500), response({}, 429)]
            self.assert_reported(GET_OUTAGES, *replies)
        expected = [
            "WARNING:kf_backend:GET /outages: got 500; retry 1 of 5 in 0 s",
            "WARNING:kf_backend:GET /outages: got 429; retry 2 of 5 in 0 s",
        ]
        self.assertEqual(logs.output, expected)

    def waits(self, **headers):
        """Return how long a client waits before each of five retries, in seconds."""
        busy = [response({}, 503, **headers)] * 5
        self.api.queue(GET_OUTAGES, *busy)
        with mock.patch.object(kf, "sleep") as sleep:
            self.client(backoff=kf.BACKOFF).handler()
        return [call.args[0] for call in sleep.call_args_list]

    def test_waits_double_with_jitter(self):
        totals = set()
        for _ in range(10):
            waits = self.waits()
            totals.add(sum(waits))
            self.assertEqual(waits.pop(0), 0)
            for wait, shortest in zip(waits, (2, 4, 8, 16)):
                self.assertGreaterEqual(wait, shortest)
                self.assertLessEqual(wait, shortest + 1)
        self.assertGreater(len(totals), 5)

    def test_a_retry_after_longer_than_the_wait_is_obeyed(self):
        for retry_after, seconds in (
            ("7", 7),
            ("60", 60),
            (formatdate(time.time() + 40, usegmt=True), 40),
        ):
            third = self.waits(Retry_After=retry_after)[2]
            self.assertAlmostEqual(third, seconds, delta=2)

    def test_a_short_or_malformed_retry_after_is_ignored(self):
        for retry_after in (
            "1",
            "Sat, 01 Jan 2022 00:00:00 GMT",
            "",
            "-5",
            "1.5",
            "soon",
            "NaN",
            "50s",
            "50 s",
            "2022-01-01",
            "Sat, 99 Foo 2022",
            "1 Jan , 2022",
            "Sat, 01 Jan 99999999999 00:00:00 GMT",
        ):
            third = self.waits(Retry_After=retry_after)[2]
            self.assertTrue(4 <= third <= 5, retry_after)

    def test_a_retry_after_over_a_minute_ends_the_run_at_once(self):
        self.patch(sleep=mock.Mock())
        for retry_after in ("61", "1" + "0" * 20, "Fri, 31 Dec 9999 23:59:59 GMT"):
            busy = response({"message": "wait"}, 429, Retry_After=retry_after)
            for line in HEALTHY:
                self.assert_not_reported(r"got 429 \(wait\)", line, busy)
                self.assertEqual(self.api.request_lines.count(line), 1)

    def test_a_rejection_with_an_endless_body_is_not_read_to_the_end(self):
        busy = response(status=503, Content_Length=None)
        self.assert_reported(GET_OUTAGES, endless(busy))

    def test_a_connection_that_fails_is_tried_again(self):
        self.api = self.use(API())

        def start_api(seconds):
            self.start(self.api)

        with mock.patch.object(kf, "sleep", start_api):
            self.client()._post_site_outages(kf.SITE, SITE_OUTAGES)
        self.assertEqual(self.api.posted, [SITE_OUTAGES])

    def test_nothing_is_sent_if_no_connection_succeeds(self):
        self.api = self.use(API())
        client = self.client()
        with self.assertLogs("kf_backend") as logs:
            error = self.error(client._post_site_outages, kf.SITE, SITE_OUTAGES)
        self.assertRegex(str(error), f"^{POST_SITE_OUTAGES}: .* refused( it)?$")
        self.assertIs(client.outcome, kf.NOT_REPORTED)
        self.assertEqual(len(logs.output), 5)

    def test_an_unknown_host_is_looked_up_six_times(self):
        unknown = socket.gaierror(socket.EAI_NONAME, "Name not known")
        client = kf.KFClient("https://api.invalid/v1", KEY)
        with mock.patch("socket.getaddrinfo", side_effect=unknown) as look_up:
            error = self.error(client.handler)
        self.assertRegex(str(error), r"^GET /outages: \[Errno -?\d+\] Name not known$")
        self.assertEqual(look_up.call_count, 6)


class RejectionTests(TestCase):
    """What a rejection means for the list, and what its message says."""

    def test_a_get_that_gets_any_other_status_fails_at_once(self):
        for status in (201, 204, 301, 304, 400, 418, 501):
            reply = response(status=status, Location="/")
            for line in (GET_OUTAGES, GET_SITE_INFO):
                self.assert_not_reported(f"^{line}: got {status} ", line, reply)
                self.assertEqual(self.api.request_lines.count(line), 1)

    def test_after_a_4xx_the_list_was_not_applied(self):
        for status in (400, 403, 404, 408, 413, 499):
            reply = response(status=status)
            self.assert_not_reported(f"got {status}", POST_SITE_OUTAGES, reply)
            self.assertEqual(self.api.request_lines, HEALTHY)

    def test_after_any_other_final_status_the_outcome_is_unknown(self):
        for status in (101, 103, 201, 204, 303, 307, 399, 501, 502, 504, 599):
            reply = response(status=status, Location="/outages")
            self.assert_unknown(f"got {status} [^;]*", reply)  # no advice

    def test_the_message_says_what_to_do(self):
        for status, advice in (
            (302, "check the base URL"),
            (400, "the API rejected the format of the request"),
            (401, "check the API key"),
            (403, "check the API key and the base URL"),
            (404, "check the site ID and the base URL"),
            (413, "the list is too long"),
            (429, "try again later"),
            (500, "try again later"),
            (502, "try again later"),
            (503, "try again later"),
            (504, "try again later"),
        ):
            replies = [response({"message": "no"}, status)] * 6
            message = rf"^GET /outages: got {status} \(no\); {advice}$"
            self.assert_not_reported(message, GET_OUTAGES, *replies)

    def test_a_redirect_is_never_followed(self):
        for status in (301, 302, 303, 307, 308):
            for line in HEALTHY:
                self.api.queue(line, response(status=status, Location="/elsewhere"))
                self.error(self.client().handler)
                self.assertEqual(self.api.request_lines[-1], line)

    def test_the_message_quotes_the_api(self):
        for body, expected in (
            (b'{"message": "Forbidden"}', "Forbidden"),
            (b'{"Message": "Forbidden"}', "Forbidden"),
            (b'{"message": "", "Message": "no"}', "no"),
            (b'{"message": ["a"]}', "['a']"),
            (b"<p>\x1b[31m\r\n no</p>", "<p>?[31m no</p>"),
            (b"[]", "[]"),
            (b"\xff", "\ufffd"),
            (b"", "Reason"),
            (b"x" * 500, "x" * 300),
            (KEY.encode(), "[key]"),
            (b"x" * 290 + KEY.encode() * 9, "x" * 290 + "[key][key]"),
        ):
            message = re.escape(f"got 403 ({expected}); check the API key")
            self.assert_not_reported(message, GET_OUTAGES, response(body, 403))

    def test_a_rejection_with_a_broken_body_is_still_a_rejection(self):
        for reply in (
            response(b'{"mess', 403, Content_Length="99"),
            response(b"no gzip", 403, Content_Encoding="gzip"),
            response(b"[" * 100_000, 403),
            endless(response(status=403, Content_Length=None)),
        ):
            message = r"got 403 \(.*\); check the API key"
            self.assert_not_reported(message, POST_SITE_OUTAGES, reply)


class DownloadTests(TestCase):
    """Responses to a GET that are lost, incomplete or invalid."""

    def assert_repeated(self, reply, line=GET_OUTAGES):
        """Assert that after two such replies, the GET is made a third time."""
        self.assert_reported(line, reply, reply)
        self.assertEqual(self.api.request_lines.count(line), 3)

    def assert_refused(self, message, line, reply):
        """Assert that this reply ends the run at once, with this message."""
        self.assert_not_reported(message, line, reply)
        self.assertEqual(self.api.request_lines.count(line), 1)

    def test_a_get_is_repeated_if_there_is_no_answer(self):
        self.assert_repeated(b"")
        self.assert_repeated(b"", GET_SITE_INFO)

    def test_a_get_is_repeated_if_no_answer_comes_in_time(self):
        cut = response(OUTAGES)[:-9]
        for reply in (stall(), stall(cut)):
            self.api.queue(GET_OUTAGES, reply)
            client = self.client(timeout=0.4)
            self.assertEqual(client.handler(), SITE_OUTAGES)
            self.assertEqual(self.api.request_lines, [GET_OUTAGES, *HEALTHY])

    def test_a_get_is_repeated_after_a_reset(self):
        def cut_and_reset(sock):
            sock.sendall(response(OUTAGES)[:-3])
            reset(sock)

        self.assert_repeated(reset)
        self.assert_repeated(cut_and_reset)

    def test_a_get_is_repeated_if_the_response_headers_are_broken(self):
        self.assert_repeated(b"HTTP/1.1 2")
        self.assert_repeated(b"\x16\x03\x01\x02garbage\r\n\r\n")

    def test_a_get_is_repeated_if_the_response_body_is_cut_off(self):
        self.assert_repeated(response(OUTAGES)[:-3])
        self.assert_repeated(response(OUTAGES, Content_Length=None)[:-1])
        self.assert_repeated(response(SITE_INFO)[:-3], GET_SITE_INFO)
        no_length = response(SITE_INFO, Content_Length=None)
        self.assert_repeated(no_length[:-1], GET_SITE_INFO)

    def test_a_get_is_repeated_if_the_response_chunks_are_cut_off(self):
        self.assert_repeated(chunked(OUTAGES_BODY)[:-9])

    def test_a_get_is_repeated_if_the_response_body_is_not_really_gzip(self):
        body = gzip.compress(OUTAGES_BODY)
        corrupt = body[:40] + b"\xff" * 9 + body[49:]
        for broken in (body[:50], corrupt, b"[not gzip]"):
            self.assert_repeated(response(broken, Content_Encoding="gzip"))

    def test_a_get_is_repeated_if_the_response_body_is_not_json_from_end_to_end(self):
        for body in (
            b"",
            b" \n",
            b"[",
            b"{",
            b"<!DOCTYPE html>",
            b'"' + OUTAGES_BODY + b'"',
            OUTAGES_BODY + b"x",
            json.dumps(OUTAGES).encode("utf-16"),
        ):
            self.assert_repeated(response(body))

    def test_a_get_is_repeated_if_it_returns_an_object_not_a_list_or_vice_versa(self):
        self.assert_repeated(response(SITE_INFO))
        self.assert_repeated(response(OUTAGES), GET_SITE_INFO)

    def test_the_third_broken_response_ends_the_run(self):
        broken = [response(OUTAGES)[:-3]] * 3
        with self.assertLogs("kf_backend") as logs:
            message = r"^GET /outages: IncompleteRead\("
            self.assert_not_reported(message, GET_OUTAGES, *broken)
        self.assertEqual(self.api.request_lines, [GET_OUTAGES] * 3)
        self.assertRegex(logs.output[1], "3 more expected.*; download 3 of 3$")

    def test_a_client_waits_before_it_repeats_a_get(self):
        self.api.queue(GET_OUTAGES, b"")
        with mock.patch.object(kf, "sleep") as sleep:
            self.client(backoff=9).handler()
        sleep.assert_called_once_with(9)

    def test_the_third_web_page_ends_the_run(self):
        pages = [response(b"<!DOCTYPE html>")] * 3
        self.assert_not_reported("incomplete, or not JSON$", GET_OUTAGES, *pages)

    def test_unusual_but_valid_bodies_are_accepted(self):
        blanks = b"\r\n\t " * 99_999
        squeezed = gzip.compress(OUTAGES_BODY)
        for reply in (
            chunked(OUTAGES_BODY),
            response(OUTAGES_BODY, Content_Length=None),
            response(OUTAGES_BODY, Content_Type="text/plain; charset=latin-1"),
            response(squeezed, Content_Encoding="gzip"),
            response(b"\xef\xbb\xbf" + OUTAGES_BODY),
            response(blanks + OUTAGES_BODY + blanks),
        ):
            self.assert_reported(GET_OUTAGES, reply)
            self.assertEqual(self.api.request_lines, HEALTHY)

    def test_site_information_may_begin_with_a_byte_order_mark(self):
        body = b"\xef\xbb\xbf" + json.dumps(SITE_INFO).encode()
        self.assert_reported(GET_SITE_INFO, response(body))
        self.assertEqual(self.api.request_lines, HEALTHY)

    def test_a_complete_body_that_cannot_be_decoded_is_refused(self):
        deep = b"[" * 100_000 + b"]" * 100_000
        for line, body in (
            (GET_OUTAGES, b"[{]"),
            (GET_OUTAGES, b"[] []"),
            (GET_OUTAGES, b'[{"id": "\xe9"}]'),
            (GET_OUTAGES, b'[{"a":{},"b":' + deep + b"}]"),
            (GET_SITE_INFO, b"{]}"),
            (GET_SITE_INFO, b'{"a": "\xed\xa0\x80"}'),
            (GET_SITE_INFO, b'{"a": ' + deep + b"}"),
        ):
            message = rf"^{line}: not valid JSON \(.+\)$"
            self.assert_refused(message, line, response(body))

    def test_nan_in_an_outage_that_is_dropped_does_not_matter(self):
        dropped = b'[{"id": "x", "a": NaN}, '
        self.assert_reported(GET_OUTAGES, response(dropped + OUTAGES_BODY[1:]))

    def test_nan_in_an_outage_that_is_kept_is_refused_even_in_a_dry_run(self):
        reply = response([{**outage("b1"), "more": float("nan")}])
        self.api.queue(GET_OUTAGES, reply)
        error = self.error(self.client(dry_run=True).handler)
        self.assertRegex(str(error), r"^GET /outages: not valid JSON \(.+\)$")

    def test_incomplete_site_information_is_refused(self):
        for field, value in (
            ("id", None),
            ("name", None),
            ("name", 1),
            ("devices", None),
            ("devices", {}),
            ("devices", ""),
            ("devices", [None]),
            ("devices", [{"id": "b2"}]),
            ("devices", [{"name": "x"}]),
            ("devices", [{"id": 2, "name": "x"}]),
            ("devices", [{"id": ["b2"], "name": "x"}]),
            ("devices", [{"id": "b2", "name": None}]),
        ):
            reply = response({**SITE_INFO, field: value})
            message = "^GET /site-info: missing or invalid id, name or devices$"
            self.assert_refused(message, GET_SITE_INFO, reply)

    def test_a_device_may_be_listed_twice(self):
        devices = SITE_INFO["devices"] * 2
        reply = response({**SITE_INFO, "devices": devices})
        self.assert_reported(GET_SITE_INFO, reply)

    def test_a_device_with_two_names_is_refused(self):
        devices = [*SITE_INFO["devices"], {"id": "b1", "name": "another"}]
        reply = response({**SITE_INFO, "devices": devices})
        message = "^GET /site-info: device 'b1' has two names$"
        self.assert_refused(message, GET_SITE_INFO, reply)

    def test_information_on_another_site_is_refused(self):
        reply = response({**SITE_INFO, "id": "\x1b[2J" + "x" * 1000})
        message = rf"asked for site '{kf.SITE}' but got '\\x1b\[2Jx{{90,94}}$"
        self.assert_refused(message, GET_SITE_INFO, reply)

    def test_a_response_that_is_too_long_is_refused(self):
        self.patch(BODY_MAX=200_000)
        reply = endless(response(b"[", Content_Length=None))
        for line in (GET_OUTAGES, GET_SITE_INFO):
            message = f"^{line}: the response is longer than 200,000 bytes$"
            self.assert_refused(message, line, reply)

    #: A response that is kept in a file when MEMORY_MAX is 1,000.
    LARGE = response(b" " * 99_999 + OUTAGES_BODY)

    @needs_full_device
    def test_a_full_disk_makes_the_download_fail(self):
        self.patch(MEMORY_MAX=1000)
        full = self.use(open("/dev/full", "w+b"))
        self.use(mock.patch("tempfile.TemporaryFile", return_value=full))
        message = "^GET /outages: .*No space left on device$"
        self.assert_refused(message, GET_OUTAGES, self.LARGE)

    def test_temporary_files_are_closed(self):
        self.patch(MEMORY_MAX=1000)
        with warnings.catch_warnings(record=True) as unclosed:
            warnings.simplefilter("always", ResourceWarning)
            self.assert_reported(GET_OUTAGES, self.LARGE[:-1], self.LARGE)
            gc.collect()
        self.assertEqual(unclosed, [])

    def assert_needs_little_memory(self, call, *args):
        """Assert that this call needs less than 32 MiB."""
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        call(*args)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2**25)
        tracemalloc.stop()

    def test_a_compressed_response_does_not_fill_memory(self):
        self.patch(BODY_MAX=2**23)
        bomb = gzip.compress(b" " * 2**22) * 16
        for message, line, status in (
            ("longer than", GET_OUTAGES, 200),
            ("longer than", GET_SITE_INFO, 200),
            ("got 403", POST_SITE_OUTAGES, 403),
        ):
            call = self.assert_not_reported
            reply = response(bomb, status, Content_Encoding="gzip")
            self.assert_needs_little_memory(call, message, line, reply)

    def test_outages_of_other_sites_do_not_fill_memory(self):
        body = b"[" + b'{"id": "x"}, ' * 160_000 + OUTAGES_BODY[1:]
        call = self.assert_reported
        self.assert_needs_little_memory(call, GET_OUTAGES, response(body))


class PostTests(TestCase):
    """The answer to the POST."""

    def test_a_200_with_no_body_or_an_empty_object_is_accepted(self):
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
            self.assertEqual(self.api.request_lines, HEALTHY)

    def test_a_200_with_any_other_body_leaves_the_outcome_unknown(self):
        for body, said in (
            (b'{"message": "no"}', "no"),
            (b'{"statusCode": 500}', '{"statusCode": 500}'),
            (b'{"error": "no"}', '{"error": "no"}'),
            (b'{"success": false}', '{"success": false}'),
            (b"false", "false"),
            (b"{}" + b" " * 99_999 + b"x", "{}"),
            (b"<html>Log in</html>", "<html>Log in</html>"),
            (b"\xff", "\ufffd"),
            (b"[" * 100_000, "[" * 300),
        ):
            self.assert_unknown(re.escape(f"got 200 ({said})"), response(body))

    def test_the_outcome_is_unknown_if_there_is_no_answer(self):
        busy = response({}, 503)
        message = "Remote end closed connection without response"
        self.assert_unknown(message, b"")
        self.assert_unknown(message, busy, b"")

    def test_the_outcome_is_unknown_after_a_reset(self):
        self.assert_unknown(r"\[.*Err(no|or) \d+\] .+", reset)

    def test_the_outcome_is_unknown_if_no_answer_comes_in_time(self):
        self.assert_unknown("timed out", stall(), timeout=0.4)

    def test_the_outcome_is_unknown_if_the_answer_is_not_http(self):
        self.assert_unknown(".+", b"\0\xff" * 99)
        self.assert_unknown(".+", b"HTTP/1.1 200 " + b"x" * 70_000)
        self.assert_unknown(".+", b"Tunnel connection failed: 403\r\n\r\n")
        self.assert_unknown(r"\[key\]", f"{KEY}\r\n\r\n".encode())

    def test_the_outcome_is_unknown_if_the_answer_is_cut_off(self):
        self.assert_unknown("IncompleteRead.*", response(b"{}", Content_Length="3"))
        self.assert_unknown(".+", chunked(b"{}")[:-5])

    def test_the_outcome_is_unknown_if_the_answer_is_not_really_gzip(self):
        reply = response(b"no", Content_Encoding="gzip")
        self.assert_unknown("Error -3.*", reply)

    def test_an_endless_answer_is_not_read_to_the_end(self):
        reply = endless(response(b"no", Content_Length=None))
        self.assert_unknown(r"got 200 \(no\)", reply)

    def test_each_request_uses_its_own_connection(self):
        """A reused connection may already hold data that looks like the answer."""
        too_much = response(OUTAGES) + response({}) * 2
        self.assert_reported(GET_OUTAGES, stall(too_much))
        self.assertEqual(self.api.connections, 3)


class ClientTests(TestCase):
    def test_each_request_has_the_key_a_user_agent_and_an_encoding(self):
        self.client().handler()
        for request in self.api.received:
            headers = request.headers
            self.assertEqual(headers.get_all("x-api-key"), [KEY])
            self.assertEqual(headers["User-Agent"], f"kf_backend/{kf.__version__}")
            self.assertEqual(headers["Accept-Encoding"], "gzip")

    def test_the_list_is_sent_as_json_even_when_the_post_is_retried(self):
        self.assert_reported(POST_SITE_OUTAGES, response(status=503))
        for request in self.api.received[2:]:
            self.assertEqual(request.headers["Content-Type"], "application/json")
            self.assertEqual(json.loads(request.body), SITE_OUTAGES)

    def test_the_session_is_a_requests_session_with_a_retry_adapter(self):
        session = self.client().session
        self.assertIs(type(session), requests.Session)
        for url in ("https://h", "http://localhost"):
            retry = session.get_adapter(url).max_retries
            self.assertEqual(set(retry.status_forcelist), {429, 500, 502, 503, 504})

    def test_a_site_id_reaches_the_api_as_one_segment(self):
        site_info = response({**SITE_INFO, "id": "a/b"})
        self.api.healthy["GET /site-info/a%2Fb"] = site_info
        self.api.healthy["POST /site-outages/a%2Fb"] = response({})
        self.assertEqual(self.client().handler("a/b"), SITE_OUTAGES)

    def test_attributes_describe_the_last_run(self):
        client = self.client()
        self.assertEqual(client.outages_received, 0)
        client.handler()
        client.handler()
        self.assertIs(client.outcome, kf.REPORTED)
        self.assertEqual(client.outages_received, 4)
        self.assertEqual(client.site_info, SITE_INFO)
        self.assertEqual(client.site_outages, SITE_OUTAGES)
        self.error(client.handler, "")
        self.assertIs(client.outcome, kf.NOT_REPORTED)

    def test_a_dry_run_does_not_send_the_list(self):
        client = self.client(dry_run=True)
        self.assertEqual(client.handler(), SITE_OUTAGES)
        self.assertEqual(client.site_outages, [])
        self.assertIs(client.outcome, kf.NOT_REPORTED)
        self.assertEqual(self.api.request_lines, [GET_OUTAGES, GET_SITE_INFO])

    def test_each_request_can_be_replaced(self):
        for step, value, expected in (
            ("_get_outages", OUTAGES[3:], SITE_OUTAGES[1:]),
            ("_post_site_outages", "posted", "posted"),
        ):
            client = self.client()
            with mock.patch.object(client, step, return_value=value):
                self.assertEqual(client.handler(), expected)

    def test_a_long_download_is_logged_every_five_seconds(self):
        # A second passes whenever the client looks at the clock.
        self.patch(monotonic=itertools.count().__next__)
        blanks = b" " * 12 * kf.READ_SIZE
        self.api.queue(GET_OUTAGES, response(blanks + OUTAGES_BODY))
        with self.assertLogs("kf_backend") as logs:
            self.client().handler()
        start = f"INFO:kf_backend:{self.api.url}/outages: "
        expected = [f"{start}0.4 MB received", f"{start}0.7 MB received"]
        self.assertEqual(logs.output, expected)

    def some_time(self, rnd):
        """Return a random time, as text and in seconds. Results are often close."""
        # 738,156 is 2022-01-01.
        any_day = rnd.randrange(9, 3_600_000)
        day = rnd.choice([738_155, 738_156, any_day])
        hour = rnd.choice([0, 1, 12, 23])
        fraction = rnd.choice(["", ".0", ".999999", ".000001", ".5"])
        offsets = {"Z": 0, "z": 0, "+01:00": 3600, "-12:30": -45_000}
        offset = rnd.choice(list(offsets))
        text = f"{dt.date.fromordinal(day)}T{hour:02}:00:00{fraction}{offset}"
        seconds = day * 86_400 + hour * 3600 - offsets[offset]
        return text, seconds + Fraction(f"0{fraction}")

    def test_a_run_agrees_with_a_simple_filter(self):
        rnd = random.Random(2022)
        names = {"b1": "Battery 1", "b2": "Batterie №2"}
        for _ in range(40):
            since, exact_since = self.some_time(rnd)
            outages = []
            expected = []
            for _ in range(rnd.randrange(18)):
                device_id = rnd.choice(["b1", "b2", "x"])
                begin, exact_begin = self.some_time(rnd)
                row = outage(device_id, begin)
                outages.append(row)
                if device_id in names and exact_begin >= exact_since:
                    expected.append(named(row, names[device_id]))
            self.api.healthy[GET_OUTAGES] = response(outages)
            self.assertEqual(self.client().handler(kf.SITE, since), expected)
            self.assertEqual(self.api.posted[-1], expected)

    def test_the_outcome_is_correct_and_no_list_is_applied_twice(self):
        rnd = random.Random(11)
        client = self.client()
        busy = response({}, 503)
        outcomes = {
            response({}): kf.REPORTED,
            response({})[:-1]: kf.UNKNOWN,
            reset: kf.UNKNOWN,
            busy: kf.NOT_REPORTED,
        }
        choices = [*outcomes] + [busy] * 5
        for _ in range(30):
            answers = rnd.choices(choices, k=6)
            self.api.queue(POST_SITE_OUTAGES, *answers)
            with contextlib.suppress(kf.KFError):
                client.handler()
            retries = self.api.request_lines.count(POST_SITE_OUTAGES) - 1
            self.assertEqual(answers[:retries], [busy] * retries)
            self.assertIs(client.outcome, outcomes[answers[retries]])


class NetworkTests(TestCase):
    """TLS, proxies, and what the environment may change."""

    def use_tls(self):
        """Make the API use https, and make clients trust its certificate."""
        file = self.file("cert.pem", CERTIFICATE)
        os.environ["REQUESTS_CA_BUNDLE"] = file
        self.api.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.api.tls.load_cert_chain(file)
        self.api.url = self.api.url.replace("http:", "https:")

    def test_https_works_with_a_private_ca(self):
        self.use_tls()
        self.assert_reported()

    def test_an_untrusted_certificate_causes_no_retry(self):
        self.use_tls()
        del os.environ["REQUESTS_CA_BUNDLE"]
        self.assert_not_reported("certificate verify failed")
        self.assertEqual(self.api.connections, 1)

    def test_a_ca_bundle_that_cannot_be_used_is_named(self):
        self.use_tls()
        for bundle in ("/no/ca.pem", self.file("empty.pem", "no certificate")):
            os.environ["REQUESTS_CA_BUNDLE"] = bundle
            self.assert_not_reported(re.escape(bundle))

    def test_a_corrupt_tls_record_never_causes_a_second_post(self):
        def corrupt(sock):
            socket.socket.sendall(sock, b"\x17\x03\x03\x00\x20" + bytes(32))
            sock.recv(1)

        self.use_tls()
        self.assert_unknown(r".*\[SSL.+", corrupt)

    def test_netrc_adds_no_credentials(self):
        login = "default login user password word\n"
        os.environ["NETRC"] = self.file(".netrc", login)
        self.use_tls()
        self.client().handler()
        for request in self.api.received:
            self.assertIsNone(request.headers["Authorization"])

    def use_proxy(self, url):
        os.environ.update(HTTP_PROXY=url, HTTPS_PROXY=url, ALL_PROXY=url)

    def use_tunnel(self):
        """Return a client that uses a proxy. `self.api` plays both proxy and API."""
        self.use_proxy(self.api.url)
        self.use_tls()
        tls = self.api.tls
        self.api.tls = None

        def connect(sock):
            sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with tls.wrap_socket(sock, server_side=True) as secure:
                Connection(secure, None, self.api)

        self.api.healthy["CONNECT 127.0.0.1:443"] = connect
        return self.use(kf.KFClient("https://127.0.0.1", KEY))

    def test_a_proxy_is_used_for_https_and_never_sees_the_key(self):
        client = self.use_tunnel()
        self.assertEqual(client.handler(), SITE_OUTAGES)
        connects = self.api.received[::2]
        self.assertEqual(self.api.request_lines[1::2], HEALTHY)
        for request in connects:
            self.assertRegex(request.line, "^CONNECT ")
            self.assertNotIn(KEY, str(request.headers))

    def test_an_answer_lost_behind_a_proxy_is_handled_like_any_other(self):
        """urllib3 raises a ProxyError, counted as `other`, not `connect` or `read`."""
        client = self.use_tunnel()
        lost = b""
        self.api.queued = {GET_OUTAGES: [lost], POST_SITE_OUTAGES: [lost]}
        error = self.error(client.handler)
        self.assertIs(error.outcome, kf.UNKNOWN)
        after_connects = self.api.request_lines[1::2]
        self.assertEqual(after_connects, [GET_OUTAGES, *HEALTHY])

    def test_no_proxy_is_used_for_plain_http(self):
        self.use_proxy("http://127.0.0.1:1")
        self.assert_reported()

    def test_a_proxy_failure_is_reported_without_the_proxy_password(self):
        down = self.use(API()).url.replace("//", "//user:pass-word@")
        for url, message in (
            (down, ": proxy: .* refused( it)?$"),
            ("http://user:pass-word@h:port", ": proxy: invalid URL$"),
        ):
            self.use_proxy(url)
            error = self.error(kf.KFClient("https://api.invalid/v1", KEY).handler)
            self.assertRegex(str(error), message)
            self.assertNotIn("pass-word", str(error))


class ReportTests(TestCase):
    SINCE = TimeTests.NEW_YEAR

    def spans(self, days):
        """Turn text like "0-1 5-9.5" (days after SINCE) into a device's outages."""
        spans = []
        for span in days.split():
            begin, end = span.split("-")
            first = self.SINCE + dt.timedelta(days=float(begin))
            last = self.SINCE + dt.timedelta(days=float(end))
            spans.append((first, last))
        return spans

    def test_overlapping_outages_count_once_towards_downtime(self):
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

    def test_a_duration_is_shown_in_its_two_largest_units(self):
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

    def test_a_timeline_of_ten_days_marks_each_cell_that_has_an_outage(self):
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

    def report(self, columns, name="Battery 1"):
        """Return the lines of a report on a device that was down for a day in May."""
        site_info: kf.SiteInfo = {
            "id": "s",
            "name": "Site",
            "devices": [{"id": "b1", "name": name}],
        }
        text = kf.report(site_info, [outage("b1")], self.SINCE, columns)
        return text.split("\n")

    def test_the_timeline_fills_the_width(self):
        expected = [
            "Site (s): outages since 2022-01-01",
            "",
            "Device     Outages      Downtime  2022-01-01      2022-05-02",
            "Battery 1        1       1 d 0 h  .........................#",
        ]
        self.assertEqual(self.report(60), expected)

    def test_no_line_is_wider_than_the_terminal(self):
        for columns in (20, 28, 40, 60, 80, 200):
            lines = self.report(columns, "N" * 300)
            self.assertLessEqual(max(map(len, lines)), columns)

    def test_a_narrower_report_drops_the_dates_and_then_the_timeline(self):
        heading, row = self.report(50, "D")[2:]
        self.assertEqual(heading, "Device  Outages      Downtime")
        self.assertRegex(row, r"  \.+#$")
        self.assertNotIn("#", self.report(28, "D")[3])

    def test_names_are_made_printable_and_cut(self):
        lines = self.report(60, "\x1b[31m\n" + "x" * 40)
        self.assertRegex(lines[3], r"^\?\[31m x{14}  ")


class DemoTests(TestCase):
    def test_failing_to_start_a_thread_is_reported_in_one_line(self):
        no_thread = RuntimeError("can't start new thread")
        with mock.patch("threading.Thread.start", side_effect=no_thread):
            ended = self.run_main("--demo")
        problem = "--demo cannot start the thread that it needs"
        self.assertEqual(ended, (1, "", f"kf_backend: {problem}. {NOT_REPORTED}.\n"))


def with_placeholders(text):
    """Return `text` with each port and number of seconds replaced by a placeholder."""
    text = re.sub(r"127\.0\.0\.1:[0-9]+", "127.0.0.1:PORT", text)
    return re.sub(r"\b[0-9.]+ s\b", "N s", text)


class CommandLineTests(TestCase):
    def test_a_run_prints_the_report_on_stdout(self):
        ended = self.run_main()
        verdict = "Sent 2 outages (of 4 received) to http://127.0.0.1:PORT in N s.\n"
        self.assertEqual(with_placeholders(ended.stdout), REPORT + verdict)
        self.assertEqual(ended.stderr, "")
        self.assertEqual(ended.code, 0)
        self.assertEqual(self.api.posted, [SITE_OUTAGES])

    def test_a_dry_run_prints_only_the_list_on_stdout(self):
        ended = self.run_main("--dry-run")
        verdict = "Dry run: 2 outages (of 4 received) would be sent.\n"
        self.assertEqual(ended, (0, LIST, REPORT + verdict))
        self.assertEqual(self.api.posted, [])

    def test_an_unknown_outcome_prints_the_list_on_stdout(self):
        for argv in ([], ["-q"]):
            self.api.queue(POST_SITE_OUTAGES, b"")
            ended = self.run_main(*argv)
            self.assertEqual(ended.code, 3)
            self.assertEqual(ended.stdout, LIST)
            self.assertRegex(ended.stderr, f"^kf_backend: POST .* {UNKNOWN}.\n$")

    def test_a_failure_is_one_line_on_stderr(self):
        ended = self.run_main("--site", "x")
        problem = (
            "GET /site-info/x: got 404 (No site); check the site ID and the base URL"
        )
        self.assertEqual(ended, (1, "", f"kf_backend: {problem}. {NOT_REPORTED}.\n"))

    def test_quiet_hides_the_report_and_warnings(self):
        for option in ("-q", "--quiet"):
            self.api.queue(GET_OUTAGES, response(status=500))  # logs a retry
            self.assertEqual(self.run_main(option), (0, "", ""))

    def test_quiet_does_not_hide_the_list(self):
        self.assertEqual(self.run_main("--dry-run", "-q"), (0, LIST, ""))

    def test_verbose_logs_each_request(self):
        expected = "kf_backend: GET /outages: got 500; retry 1 of 5 in N s\n"
        for line in HEALTHY:
            size = len(self.api.healthy[line].partition(b"\r\n\r\n")[2])
            expected += f"kf_backend: {line}: 200 in N s, {size} bytes\n"
        for option in ("-v", "--verbose"):
            self.api.queue(GET_OUTAGES, response(status=500))
            ended = self.run_main(option)
            self.assertEqual(with_placeholders(ended.stderr), expected)

    def test_since_selects_what_is_sent_and_shown(self):
        for since, count in (
            ("2022-02-01", 1),
            ("2021-01-01", 3),
        ):
            ended = self.run_main("--since", since)
            self.assertEqual(len(self.api.posted[-1]), count)
            self.assertIn(f": outages since {since}\n", ended.stdout)

    def test_white_space_around_a_site_id_is_ignored(self):
        self.assertEqual(self.run_main("--site", f" {kf.SITE}\n").code, 0)

    def test_the_base_url_option_overrides_the_environment(self):
        os.environ["KF_BASE_URL"] = "https://api.invalid"
        ended = self.run_main("--base-url", f" {self.api.url}/\r\n")
        self.assertEqual(ended.code, 0)

    def test_the_default_base_url_and_the_timeout_reach_the_client(self):
        os.environ["KF_BASE_URL"] = ""
        error = kf.KFError("no")
        with mock.patch.object(kf, "KFClient", side_effect=error) as made:
            self.run_main("--timeout=7")
        made.assert_called_with(kf.BASE_URL, KEY, timeout=7, dry_run=False)

    def assert_usage_error(self, message, *argv):
        """Assert that these options cause this usage error, before any request."""
        ended = self.run_main(*argv)
        self.assertEqual(ended.code, 2)
        self.assertEqual(ended.stdout, "")
        self.assertRegex(ended.stderr, message)
        self.assertEqual(self.api.request_lines, [])

    def test_a_number_of_seconds_is_positive_and_at_most_a_day(self):
        self.assertEqual(kf.seconds("86400"), 86_400)
        for number in ("0", "-1", "nan", "inf", "86401"):
            for option in ("--timeout", "--deadline"):
                message = f"argument {option}: must be more than 0 and at most 86400$"
                self.assert_usage_error(message, f"{option}={number}")

    def test_wrong_options_are_usage_errors(self):
        self.assert_usage_error("invalid seconds value: 'x'$", "--timeout", "x")
        self.assert_usage_error("not allowed with", "--demo", "--base-url=https://h")
        self.assert_usage_error(f"only the site {kf.SITE}$", "--demo", "--site=x")

    def test_invalid_values_are_usage_errors(self):
        base_url = (
            "the base URL must begin with https:// (http:// only for this machine),"
            " and have no credentials, query or fragment"
        )
        date = "expected an ISO 8601 date or time like 2022-06-01, but got 'x'"
        for problem, option in (
            ("invalid site ID: '..'", "--site=.."),
            ("invalid site ID: ''", "--site="),
            (date, "--since=x"),
            (base_url, "--base-url=http://h"),
            (base_url, "--base-url="),
        ):
            line = f"kf_backend: {problem}. {NOT_REPORTED}.\n"
            self.assert_usage_error(f"^{re.escape(line)}$", option)

    def test_an_invalid_key_is_a_usage_error(self):
        os.environ["KF_API_KEY"] = "a\nb"
        self.assert_usage_error("the API key may contain only")
        del os.environ["KF_API_KEY"]
        self.assert_usage_error("no API key; set KF_API_KEY")

    HELP = """\
  -h, --help           show this help message and exit
  --site SITE          site ID (default: norwich-pear-tree)
  --since SINCE        drop outages that began before this date or time, as in
                       ISO 8601 (UTC if it has no offset; default:
                       2022-01-01T00:00:00.000Z)
  --dry-run            do not send the list; print it as JSON
  --base-url BASE_URL  API base URL; must be https, or http to this machine
  --demo               use a mock API on this machine; needs no API key or
                       network
  --timeout TIMEOUT    give up on an attempt if no data arrives for this many
                       seconds, or if sending takes longer than that (default:
                       30)
  --deadline DEADLINE  stop the whole run after this many seconds (default:
                       600; ignored on Windows)
  -v, --verbose        log how long each successful request took, and its size
  -q, --quiet          print no report or warnings

environment variables:
  KF_API_KEY     API key (required, except with --demo)
"""

    def test_help_describes_the_options_and_then_the_environment(self):
        os.environ["COLUMNS"] = "80"
        shown = self.run_main("--help").stdout
        self.assertIn(self.HELP, shown)
        self.assertIn(f" {kf.BASE_URL})\n", shown)

    def test_a_name_that_a_stream_cannot_encode_is_escaped(self):
        stream = io.TextIOWrapper(io.BytesIO(), "ascii")
        kf.show("Batterie №2", stream)
        stream.seek(0)
        self.assertEqual(stream.read(), r"Batterie \u21162")

    def test_the_width_is_that_of_the_terminal_or_80(self):
        stream = self.use(open(os.devnull))
        for columns, expected in ((100, 100), (0, 80)):
            size = os.terminal_size((columns, 24))
            with mock.patch("os.get_terminal_size", return_value=size):
                self.assertEqual(kf.columns_of(stream), expected)

    def test_the_outcome_is_correct_whatever_goes_wrong_after_the_post(self):
        for error, problem in (
            (MemoryError(), "MemoryError"),
            (ValueError("no"), "no"),
            (OSError(28, "Full"), "[Errno 28] Full"),
        ):
            with mock.patch.object(kf, "report", side_effect=error):
                ended = self.run_main()
            line = f"kf_backend: {problem}. The list was accepted.\n"
            self.assertEqual(ended, (0, "", line))

    def test_the_outcome_is_correct_whatever_goes_wrong_during_the_post(self):
        with mock.patch.object(kf, "beginning_of", side_effect=MemoryError):
            ended = self.run_main()
        self.assertEqual(ended, (3, LIST, f"kf_backend: MemoryError. {UNKNOWN}.\n"))

    def test_a_bug_keeps_its_traceback_if_nothing_was_sent(self):
        with mock.patch.object(kf, "read_array", side_effect=ZeroDivisionError):
            with self.assertRaises(ZeroDivisionError):
                self.run_main()

    def test_main_works_outside_the_main_thread(self):
        def run():
            self.assertEqual(self.run_main("-q"), (0, "", ""))

        with ThreadPoolExecutor() as threads:
            threads.submit(run).result(20)

    @needs_unix
    def test_main_restores_signals_and_log_handlers(self):
        def state():
            return (
                kf.log.handlers[:],
                [signal.getsignal(number) for number in signal.valid_signals()],
                signal.pthread_sigmask(signal.SIG_BLOCK, []),
                signal.getitimer(signal.ITIMER_REAL),
            )

        blocked = [signal.SIGALRM]
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        self.addCleanup(signal.pthread_sigmask, signal.SIG_UNBLOCK, blocked)
        before = state()
        self.run_main()
        self.run_main("--site=x")
        self.assertEqual(state(), before)


@needs_unix
class ProcessTests(TestCase):
    """The script, run as a separate process."""

    def spawn(self, *argv, **options):
        """Start the script, with the default action for each signal."""

        def use_defaults():
            for number in kf.SIGNALS:
                signal.signal(number, signal.SIG_DFL)

        settings = {
            "args": [sys.executable, str(SCRIPT), *argv],
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "preexec_fn": use_defaults,
            "encoding": "utf-8",
            **options,
        }
        process = self.use(subprocess.Popen(**settings))
        self.stack.callback(process.kill)
        return process

    def end(self, process):
        stdout, stderr = process.communicate(timeout=20)
        return Ended(process.returncode, stdout, stderr)

    def wait_for(self, line):
        """Wait until the API receives this request."""
        while line not in self.api.request_lines:
            time.sleep(0.01)

    def assert_killed(self, number, line, start, sentence):
        """Assert that a signal during this request kills the process.

        By then, the API has sent `start`. The process prints one line with `sentence`.
        """
        self.serve(line, stall(start))
        process = self.spawn()
        self.wait_for(line)
        time.sleep(0.05)
        process.send_signal(number)
        process.send_signal(number)  # A second one changes nothing.
        why = f"interrupted by {signal.Signals(number).name}"
        expected = Ended(-number, "", f"kf_backend: {why}. {sentence}.\n")
        self.assertEqual(self.end(process), expected)

    def test_a_process_killed_by_a_signal_says_what_happened_to_the_list(self):
        cut = response(OUTAGES)[:-9]
        self.assert_killed(signal.SIGINT, GET_OUTAGES, b"", NOT_REPORTED)
        self.assert_killed(signal.SIGTERM, GET_OUTAGES, cut, NOT_REPORTED)
        self.assert_killed(signal.SIGHUP, POST_SITE_OUTAGES, b"", UNKNOWN)
        self.assert_killed(signal.SIGTERM, POST_SITE_OUTAGES, cut, UNKNOWN)

    def test_a_signal_at_any_time_prints_at_most_one_line_and_it_is_true(self):
        rnd = random.Random(3)
        for _ in range(3):
            self.serve()
            process = self.spawn("-q")
            self.wait_for(GET_OUTAGES)
            time.sleep(rnd.random() / 20)
            process.send_signal(signal.SIGTERM)
            ended = self.end(process)
            self.assertIn(ended.code, (0, -signal.SIGTERM))
            line = r"^(kf_backend: interrupted by SIGTERM\. .+\.\n)?$"
            self.assertRegex(ended.stderr, line)
            if self.api.posted:
                self.assertNotIn(NOT_REPORTED, ended.stderr)

    def test_a_signal_that_is_ignored_stays_ignored(self):
        def ignore():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        self.serve(GET_OUTAGES, late(0.3))
        process = self.spawn("-q", preexec_fn=ignore)
        self.wait_for(GET_OUTAGES)
        process.send_signal(signal.SIGHUP)
        self.assertEqual(self.end(process), (0, "", ""))

    def test_the_deadline_ends_a_run_that_is_stuck(self):
        headers = endless(b"HTTP/1.1 200 OK\r\nA: ", b"b", 0.05)
        body = endless(response(b"[", Content_Length=None), b" ", 0.05)
        refusal = endless(response(status=403, Content_Length=None), b" ", 0.05)
        wait = response(status=429, Retry_After="30")
        why = "the --deadline of 1 s has passed"
        not_reported = Ended(1, "", f"kf_backend: {why}. {NOT_REPORTED}.\n")
        unknown = Ended(3, LIST, f"kf_backend: {why}. {UNKNOWN}.\n")
        runs = []
        for expected, line, reply in (
            (not_reported, GET_OUTAGES, headers),
            (not_reported, GET_SITE_INFO, body),
            (not_reported, POST_SITE_OUTAGES, refusal),
            (unknown, POST_SITE_OUTAGES, headers),
            (unknown, POST_SITE_OUTAGES, wait),  # The API may yet accept a retry.
        ):
            self.serve(line, reply)
            process = self.spawn("-q", "--deadline=1")
            runs.append((process, expected))
        for process, expected in runs:
            self.assertEqual(self.end(process), expected)

    def test_the_deadline_holds_even_if_its_signal_is_blocked_and_ignored(self):
        def block():
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])

        self.serve(GET_OUTAGES, late(1.5))
        process = self.spawn("--deadline=0.5", preexec_fn=block)
        why = "the --deadline of 0.5 s has passed"
        expected = (1, "", f"kf_backend: {why}. {NOT_REPORTED}.\n")
        self.assertEqual(self.end(process), expected)

    def full_pipe(self):
        """Return a pipe that nobody reads. Writing to it blocks."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        return writer

    def test_the_deadline_holds_even_if_nobody_reads_what_is_written(self):
        pipe = self.full_pipe()
        # This one has sent the list when its report blocks.
        sent = self.spawn("--deadline=1.5", stdout=pipe)
        # This one blocks while it says that the deadline has passed.
        self.serve(GET_OUTAGES, stall())
        stuck = self.spawn("--deadline=0.2", stderr=pipe)
        why = "the --deadline of 1.5 s has passed"
        expected = (0, None, f"kf_backend: {why}. The list was accepted.\n")
        self.assertEqual(self.end(sent), expected)
        self.assertEqual(stuck.wait(20), 1)

    def assert_ends(self, code, message, stdout, *argv):
        """Assert that a run that writes to `stdout` ends with this code and message."""
        ended = self.end(self.spawn(*argv, stdout=stdout))
        self.assertEqual(ended.code, code)
        self.assertRegex(ended.stderr, message)

    def test_a_closed_stdout_is_ignored(self):
        reader, closed = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, closed)
        self.assert_ends(0, "POST .* 200 in .*\n$", closed, "-v")
        self.assert_ends(0, "would be sent.\n$", closed, "--dry-run")

    @needs_full_device
    def test_a_full_stdout_is_reported_with_the_outcome(self):
        full = self.use(open("/dev/full", "w"))
        why = r"^kf_backend: \[Errno 28\] No space left on device"
        self.assert_ends(0, rf"{why}\. The list was accepted\.\n$", full)
        self.assert_ends(1, rf"{why}\. {NOT_REPORTED}\.\n$", full, "--dry-run")

    @needs_full_device
    def test_a_full_stderr_does_not_change_the_exit_code(self):
        full = self.use(open("/dev/full", "w"))
        for option, code in (("-v", 0), ("--site=x", 1)):
            process = self.spawn(option, stderr=full)
            self.assertEqual(self.end(process).code, code)

    def test_a_run_without_any_streams_sends_the_list(self):
        def close_all():
            os.closerange(0, 3)

        process = self.spawn(stdout=None, stderr=None, preexec_fn=close_all)
        self.assertEqual(process.wait(20), 0)
        self.assertEqual(self.api.posted, [SITE_OUTAGES])

    def test_the_library_is_silent_and_leaves_signals_and_threads_alone(self):
        self.serve(GET_OUTAGES, response(status=500))
        program = f"""if True:
            import logging, signal, threading
            before = signal.getsignal(signal.SIGINT)
            from kf_backend import KFClient
            with KFClient({self.api.url!r}, {KEY!r}) as client:
                assert len(client.handler({kf.SITE!r}, "2022-01-01")) == 2
            assert before == signal.getsignal(signal.SIGINT)
            assert threading.active_count() == 1
            assert not logging.getLogger().handlers
        """
        command = [sys.executable, "-c", program]
        process = self.spawn(args=command, cwd=SCRIPT.parent)
        self.assertEqual(self.end(process), (0, "", ""))


class ReadmeTests(TestCase):
    """README.md, requirements.txt and the script agree."""

    README = SCRIPT.with_name("README.md").read_text("utf-8")

    def test_the_example_is_what_the_demo_prints_in_80_columns(self):
        ended = self.run_main("--demo")
        self.assertEqual(ended.code, 0)
        shown = with_placeholders(f"```text\n{ended.stderr}{ended.stdout}```\n")
        self.assertIn(shown, with_placeholders(self.README))
        self.assertLessEqual(max(map(len, shown.splitlines())), 80)

    def test_options_defaults_and_variables_are_in_the_readme(self):
        for option in re.findall(r"(?<!\S)--?[a-z-]+", CommandLineTests.HELP):
            self.assertIn(f"`{option}", self.README)
        for name in re.findall(r"[A-Z]+_[A-Z_]+", str(kf.__doc__)):
            self.assertIn(f"`{name}`", self.README)
        for default in (kf.SITE, kf.SINCE, kf.BASE_URL, "30", "600"):
            self.assertIn(f"(default: `{default}`)", self.README)

    def test_exit_codes_are_in_the_readme(self):
        codes = re.findall(r"(?m)^  ([0-9]+)  ", str(kf.__doc__))
        self.assertEqual(codes, ["0", "1", "2", "3", "130", "143", "129"])
        for code in codes:
            row = rf"(?m)^\| ([0-9, ]+, )?{code}(, [0-9, ]+)? \|"
            self.assertRegex(self.README, row)

    def test_the_python_example_runs(self):
        [program] = re.findall(r"(?ms)^```python\n(.*?)^```$", self.README)
        handler = self.use(mock.patch.object(kf.KFClient, "handler"))
        self.use(mock.patch("logging.basicConfig"))
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, {})
        handler.assert_called_once_with("norwich-pear-tree", "2022-06-01")

    def test_requirements_and_the_inline_metadata_agree(self):
        listed = re.findall(r'(?m)^#   "(.+)",$', SCRIPT.read_text("utf-8"))
        required = SCRIPT.with_name("requirements.txt").read_text("utf-8")
        self.assertEqual(listed, required.split())


if __name__ == "__main__":
    unittest.main()
