"""`--metrics-port`: the metrics on a port of their own, which ends with the server."""

import socket

import httpx
import pytest

from tests.e2e.conftest import Start, free_port
from tests.e2e.test_serving import complete

pytestmark = pytest.mark.slow


def test_metrics_on_a_port_of_their_own(start: Start) -> None:
    port = free_port()
    with start("--metrics-port", str(port)) as server:
        complete(server, max_tokens=4)
        scraped = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
        assert scraped.status_code == 200
        assert 'mmtad_requests_total{finish_reason="length"' in scraped.text
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=30).status_code == 404
        assert httpx.get(f"{server.url}/metrics", timeout=30).status_code == 404
        assert server.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_metrics_port_that_is_taken_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start("--metrics-port", str(port), wait=False) as refused:
            assert refused.process.wait(60) == 1
    assert f"--metrics-port {port} on --host 127.0.0.1 cannot be used" in refused.log.read_text()
