"""pytest-benchmark runs the benches; what they found is printed and written at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import harness
import peers
import report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rayfuse")
    group.addoption("--device", default="cpu", help="where everything is timed (default: cpu)")
    group.addoption("--page", type=Path, help="write all tables there, and none into docs/")
    group.addoption(
        "--rehearse", action="store_true", help="run, but so short that it tells nothing"
    )
    group.addoption("--seconds", type=float, help="how long the contenders of a column take turns")
    group.addoption(
        "--without", default=[], nargs="*", help="contenders whose names begin like one of these"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # its table knows of one contender; the one printed below shows all
    config.option.benchmark_quiet = True
    peers.device = torch.device(config.option.device)
    report.own_page = config.option.page
    if peers.device.type != "cpu":
        harness.for_gpu()
    harness.TEST_SECONDS = config.option.seconds or harness.TEST_SECONDS
    harness.left_out = tuple(config.option.without)


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> None:
    if collector.config.option.rehearse and isinstance(obj, type) and "Bench" in name:
        harness.rehearse(obj)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.cls
    if "workload" in metafunc.fixturenames:
        times = 1 if peers.device.type == "cpu" else bench.gpu_times
        metafunc.parametrize("workload", [w.with_rays(times) for w in bench.workloads], ids=str)
    if "wants" in metafunc.fixturenames:
        metafunc.parametrize("wants", bench.directions, ids=harness.direction_name)


def pytest_collection_finish(session: pytest.Session) -> None:
    report.pages = {item.cls().stem: item.cls.page for item in session.items if item.cls}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in report.finish():
        terminalreporter.write_line(line)
