"""Options of every test, and the figures that tests record."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "only tests that have a long form, in their long form: more repeats, more clients, more time"
    parser.addoption("--slow", action="store_true", help=text)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether a test that takes this runs in its long form."""
    return bool(request.config.getoption("--slow"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        return
    has_long_form = {item: "long" in getattr(item, "fixturenames", ()) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not has_long_form[item]])
    items[:] = [item for item in items if has_long_form[item]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured (`record_property`), whether they passed or not."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call" and report.user_properties
    ]
    if reports:
        terminalreporter.section("figures")
    for report in reports:
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.nodeid}: {figures}")
