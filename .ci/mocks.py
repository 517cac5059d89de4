"""Check that programs that use kf_backend can be tested with two popular mocking libraries, responses and
requests-mock. Each check prints a line; the first failure ends the script.
"""

from __future__ import annotations

import datetime as dt
import faulthandler
import json

import requests_mock
import responses
from responses import matchers

import kf_backend as kf

OUTAGES = f"{kf.BASE_URL}/outages"
SITE_INFO = f"{kf.BASE_URL}/site-info/{kf.SITE}"
SITE_OUTAGES = f"{kf.BASE_URL}/site-outages/{kf.SITE}"
INFO = {"id": kf.SITE, "name": "Norwich Pear Tree", "devices": [{"id": "ours", "name": "Battery 1"}]}
HOURS = [f"{dt.datetime(2022, 1, 1) + dt.timedelta(hours=hour):%Y-%m-%dT%H:%M:%S.000Z}" for hour in range(3001)]
SPANS = [("2021-12-31T23:59:59.999Z", HOURS[0]), *zip(HOURS, HOURS[1:])]  # the first one began too early
ALL = [{"id": id, "begin": begin, "end": end} for begin, end in SPANS for id in ("ours", "another")]
DUE = [{**outage, "name": "Battery 1"} for outage in ALL[2:] if outage["id"] == "ours"]
LOGIN_PAGE = {"body": "<html>Please log in</html>", "content_type": "text/html"}


def run() -> list[kf.SiteOutage]:
    return kf.KFClient(kf.BASE_URL, "mock-key-123", backoff=0).handler()


def failure() -> kf.KFError:
    try:
        run()
    except kf.KFError as error:
        return error
    raise AssertionError("expected a KFError")


def passed(what: str) -> None:
    print(f"passed: {what}", flush=True)


faulthandler.dump_traceback_later(60, exit=True)  # so endless retries fail
assert len(DUE) == 3000

with responses.RequestsMock() as mock:
    mock.get(OUTAGES, json=ALL)
    mock.get(SITE_INFO, json=INFO)
    mock.post(SITE_OUTAGES, json={})
    assert run() == DUE
    assert json.loads(mock.calls[-1].request.body) == DUE
    assert [call.request.headers["x-api-key"] for call in mock.calls] == ["mock-key-123"] * 3
    passed("responses: the body of the last call is the list")

with responses.RequestsMock() as mock:
    mock.get(OUTAGES, status=500)
    mock.get(OUTAGES, json=ALL)
    mock.get(SITE_INFO, json=INFO)
    mock.post(SITE_OUTAGES, match=[matchers.json_params_matcher(DUE)])
    assert run() == DUE
    passed("responses: a 500 is retried")
    passed("responses: json_params_matcher sees the list")

with responses.RequestsMock() as mock:
    mock.get(OUTAGES, **LOGIN_PAGE)
    assert "(6 attempts)" in str(failure())
    assert len(mock.calls) == 6
    passed("responses: a response that is always broken raises KFError after six requests")

with requests_mock.Mocker() as mock:
    mock.get(OUTAGES, json=ALL)
    mock.get(SITE_INFO, json=INFO)
    mock.post(SITE_OUTAGES, json={})
    assert run() == DUE
    assert mock.last_request.json() == DUE
    passed("requests-mock: the last request has the list")

with requests_mock.Mocker() as mock:
    mock.get(OUTAGES, text=LOGIN_PAGE["body"])
    assert "(6 attempts)" in str(failure())
    assert mock.call_count == 6
    passed("requests-mock: a response that is always broken raises KFError after six requests")
