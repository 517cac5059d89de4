"""Check that programs that use kf_backend can be tested with two popular mocking
libraries, responses and requests-mock.

Each check prints a line; the first failure ends the script.
"""

from __future__ import annotations

import datetime as dt
import faulthandler
import json

import requests_mock
import responses
from responses import matchers

import kf_backend as kf

OUTAGES_URL = f"{kf.BASE_URL}/outages"
SITE_INFO_URL = f"{kf.BASE_URL}/site-info/{kf.SITE}"
SITE_OUTAGES_URL = f"{kf.BASE_URL}/site-outages/{kf.SITE}"
SITE_INFO = {
    "id": kf.SITE,
    "name": "Norwich Pear Tree",
    "devices": [{"id": "ours", "name": "Battery 1"}],
}

#: 3,001 outages of the site's device, one per hour, and as many of another
#: device. Each device's first one began too early.
OUTAGES = []
for hour in range(-1, 3000):
    begin = dt.datetime(2022, 1, 1) + dt.timedelta(hours=hour)
    for device in ("ours", "another"):
        time = f"{begin:%Y-%m-%dT%H:%M:%S.000Z}"
        OUTAGES.append({"id": device, "begin": time, "end": time})

SITE_OUTAGES = []
for outage in OUTAGES[2:]:
    if outage["id"] == "ours":
        SITE_OUTAGES.append({**outage, "name": "Battery 1"})


def run() -> list[kf.SiteOutage]:
    return kf.KFClient(kf.BASE_URL, "mock-key-123", backoff=0).handler()


def failure() -> str:
    """Return the message of the KFError that ends a run."""
    try:
        run()
    except kf.KFError as error:
        return str(error)
    raise AssertionError("expected a KFError")


def passed(what: str) -> None:
    print(f"passed: {what}", flush=True)


faulthandler.dump_traceback_later(60, exit=True)  # so that endless retries fail
assert len(SITE_OUTAGES) == 3000

with responses.RequestsMock() as mock:
    mock.get(OUTAGES_URL, json=OUTAGES)
    mock.get(SITE_INFO_URL, json=SITE_INFO)
    mock.post(SITE_OUTAGES_URL, json={})
    assert run() == SITE_OUTAGES
    assert json.loads(mock.calls[-1].request.body) == SITE_OUTAGES
    for call in mock.calls:
        assert call.request.headers["x-api-key"] == "mock-key-123"
    passed("responses: the body of the last call is the list")

with responses.RequestsMock() as mock:
    mock.get(OUTAGES_URL, status=500)
    mock.get(OUTAGES_URL, json=OUTAGES)
    mock.get(SITE_INFO_URL, json=SITE_INFO)
    mock.post(SITE_OUTAGES_URL, match=[matchers.json_params_matcher(SITE_OUTAGES)])
    assert run() == SITE_OUTAGES
    passed("responses: a 500 is retried")
    passed("responses: json_params_matcher sees the list")

with responses.RequestsMock() as mock:
    mock.get(OUTAGES_URL, body="<html>Please log in</html>", content_type="text/html")
    assert "not JSON" in failure()
    assert len(mock.calls) == 3
    passed("responses: a GET whose response is always broken is made three times")

with requests_mock.Mocker() as mock:
    mock.get(OUTAGES_URL, json=OUTAGES)
    mock.get(SITE_INFO_URL, json=SITE_INFO)
    mock.post(SITE_OUTAGES_URL, json={})
    assert run() == SITE_OUTAGES
    assert mock.last_request.json() == SITE_OUTAGES
    passed("requests-mock: the last request contains the list")

with requests_mock.Mocker() as mock:
    mock.get(OUTAGES_URL, text="<html>Please log in</html>")
    assert "not JSON" in failure()
    assert mock.call_count == 3
    passed("requests-mock: a GET whose response is always broken is made three times")
