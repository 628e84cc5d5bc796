"""The page at `/` in a real Chromium: by keyboard, on a phone, in the dark, and when something goes wrong."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.e2e.conftest import RunningServer, Start
from tests.programs import program

KEY = "page-key"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
METHODS = ["target", "speculative", "mmtad"]
PROMPT = "an ä and a €"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def locked(browser: Browser, start: Start) -> Iterator[RunningServer]:
    """A server that asks for a key; not started where there is no browser."""
    with start("--api-key", KEY, "--energy-source", "none") as running:
        yield running


def opened(browser: Browser, server: RunningServer, **context: Any) -> Page:
    page = browser.new_page(**context)
    page.set_default_timeout(30_000)
    page.goto(server.url)
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Max tokens").fill("24")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    expect(page.locator("#models")).to_have_text(re.compile("tiny with .*tiny-draft"))
    return page


@pytest.fixture
def page(browser: Browser, locked: RunningServer) -> Iterator[Page]:
    page = opened(browser, locked)
    yield page
    page.close()


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Run")).to_be_enabled(timeout=60_000)


def figures(page: Page, column: int) -> list[str]:
    return page.locator(".column").nth(column).locator("dd").all_inner_texts()


def asked(server: RunningServer, path: str, **fields: Any) -> Any:
    """What the server answers to a request as the page sends it, whole."""
    body = {"model": "tiny", "temperature": 0, "seed": 0, "logprobs": 0, **fields}
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60).json()


def test_columns_show_what_the_server_says(page: Page, locked: RunningServer) -> None:
    page.get_by_label("Send as").select_option("completion")
    page.get_by_role("button", name="Run").click()
    finished(page)
    for column, method in enumerate(METHODS):
        speculative = {"method": method, "num_speculative_tokens": 4, "beam_width": 4, "metrics": "detailed"}
        body = asked(locked, "/v1/completions", prompt=PROMPT, max_tokens=24, speculative=speculative)
        output = page.locator(".output").nth(column)
        (choice,) = body["choices"]
        assert output.text_content() == choice["text"]
        shown = [
            origin
            for origin, start, end in zip(
                choice["logprobs"]["origins"],
                choice["logprobs"]["text_offset"],
                [*choice["logprobs"]["text_offset"][1:], len(choice["text"])],
                strict=True,
            )
            if end > start
        ]
        classes = [span.get_attribute("class") for span in output.locator("span").all()]
        assert classes == shown
        assert ("draft" in classes) == (method != "target")
        speed, length, quality, joules = figures(page, column)
        assert float(speed) > 0
        assert joules == "not measured"
        assert quality.replace("−", "-") == f"{body['metrics']['target_logprob_mean']:.2f}"
        steps = body["metrics"]["speculative_decoding"]
        assert length == (f"{steps['mean_acceptance_length']:.2f}" if steps else "no draft")


def test_chat_shows_the_message(page: Page, locked: RunningServer) -> None:
    page.get_by_role("button", name="Run").click()
    finished(page)
    fields = {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 24}
    fields |= {"logprobs": True, "speculative": {"method": "target"}}
    body = asked(locked, "/v1/chat/completions", **fields)
    assert page.locator(".output").first.text_content() == body["choices"][0]["message"]["content"]


def test_by_keyboard_alone(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).focus()
    for _ in range(10):  # the controls, then the button
        page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    page.keyboard.press("Enter")
    finished(page)
    expect(page.locator(".state").last).to_have_text(re.compile("24 tokens, at the limit|tokens, complete"))
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    finished(page)


def test_every_control_has_a_name(page: Page) -> None:
    for control in page.locator("input, select, textarea, button").all():
        assert control.evaluate("each => each.labels?.length || each.textContent.trim().length")
    expect(page.get_by_role("status")).to_have_count(4)
    expect(page.get_by_role("region", name="Text of mmtad")).to_be_visible()


def test_stop_ends_what_runs_and_what_waits(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that never comes
    page.get_by_role("button", name="Run").press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".state").all_inner_texts() == ["Stopped", "Not started", "Not started"]


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Max tokens", "100000", "maximum context length"),
        ("Depth", "99", "num_speculative_tokens"),
        ("Temperature", "3", "temperature"),
        ("Seed", "1.5", "seed"),
    ],
)
def test_a_refusal_stands_beside_its_control(page: Page, label: str, value: str, message: str) -> None:
    page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Run").click()
    finished(page)
    control = page.get_by_label(label)
    expect(control).to_have_attribute("aria-invalid", "true")
    beside = control.locator("xpath=following-sibling::p")
    expect(beside).to_contain_text(message)
    assert page.locator(".column .error").first.inner_text() == beside.inner_text()
    control.fill("3" if label == "Depth" else "1")
    page.get_by_role("button", name="Run").click()
    finished(page)
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    expect(page.locator(".column .error:visible")).to_have_count(0)


def test_what_is_no_number_is_not_sent(page: Page) -> None:
    page.get_by_label("Width").press_sequentially("e")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_label("Width")).to_be_focused()
    expect(page.get_by_role("alert").filter(has_text="Enter a number.")).to_be_visible()


def test_a_missing_key_is_said_at_the_key(browser: Browser, locked: RunningServer) -> None:
    page = browser.new_page()
    page.goto(locked.url)
    expect(page.locator("#key-error")).to_contain_text("API key")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#models")).to_contain_text("tiny with")
    expect(page.locator("#key-error")).to_have_count(0)
    page.close()


def test_a_broken_stream_is_no_answer(page: Page) -> None:
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body="")
    )
    page.get_by_role("button", name="Run").click()
    finished(page)
    expect(page.locator(".column .error").first).to_contain_text("ended before the answer did")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Run").click()
    finished(page)
    expect(page.locator(".column .error").first).to_contain_text("cannot be reached")


def test_joules_are_shown_as_measured(page: Page) -> None:
    report = {"tokens_per_second": None, "speculative_decoding": None, "target_logprob_mean": -1.5}
    report |= {"energy": {"joules_per_output_token": 0.0004217}, "speculative": {"method": "target"}}
    body = f"data: {json.dumps({'choices': [], 'metrics': report})}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    page.get_by_role("button", name="Run").click()
    finished(page)
    assert figures(page, 0) == ["not measured", "no draft", "−1.50", "0.000422"]


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, locked: RunningServer) -> None:
    page = opened(browser, locked, viewport={"width": 320, "height": 640})
    page.get_by_label("Depth").fill("99")
    page.get_by_role("button", name="Run").click()
    finished(page)
    assert page.locator("html").evaluate("each => each.scrollWidth") == 320
    for control in page.locator("form input, form select, button").all():
        assert (control.bounding_box() or {"height": 0})["height"] >= 40
    page.close()


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)` as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Browser, locked: RunningServer, scheme: str) -> None:
    page = opened(browser, locked, color_scheme=scheme)
    background = page.locator("body").evaluate("each => getComputedStyle(each).backgroundColor")
    assert (luminance(background) < 0.2) == (scheme == "dark")
    style = """each => {
        const color = getComputedStyle(each).color;
        let box = each;
        while (getComputedStyle(box).backgroundColor === "rgba(0, 0, 0, 0)") box = box.parentElement;
        return [color, getComputedStyle(box).backgroundColor];
    }"""
    for selector in ("#models", "#run", ".legend .draft", ".legend .target", "dt", "label", ".state"):
        pair = sorted(map(luminance, page.locator(selector).first.evaluate(style)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, selector
    page.close()


def test_only_the_server_is_asked(browser: Browser, locked: RunningServer) -> None:
    page = browser.new_page()
    requests: list[Request] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(locked.url)
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Max tokens").fill("4")
    page.get_by_role("button", name="Run").click()
    finished(page)
    assert len(requests) > 8
    assert all(request.url.startswith(locked.url + "/") for request in requests)
    assert problems == []
    page.close()
