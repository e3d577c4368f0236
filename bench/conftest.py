"""pytest-benchmark runs the benches; what they found is printed and written at the end."""

from __future__ import annotations

import pytest

import harness
import report


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # its table knows of one contender; the one printed below shows all
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values, ids in (
        ("workload", "workloads", str),
        ("wants", "directions", harness.direction_name),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, getattr(metafunc.cls, values), ids=ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    report.pages = {item.cls.op.op.name: item.cls.page for item in session.items if item.cls}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in report.finish():
        terminalreporter.write_line(line)
