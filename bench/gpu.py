"""What bench/gpu.sh runs: the contract on the GPU backends, then the benches, then one page."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import rayfuse
from rayfuse.ops import STEMS

ROOT = Path(__file__).parent.parent
REHEARSAL = (
    "**A rehearsal without a GPU: emulated kernels, tiny inputs, times of a CPU. No number on this"
    " page is a result.**"
)


def contract(backends: Sequence[str], folder: Path, only: str) -> tuple[list[str], bool]:
    """Run tests of the ops on these backends, all or `only`: a table, and whether all passed."""
    xml = folder / "contract.xml"
    tests = [f"tests/test_{stem}.py" for stem in STEMS]
    chosen = f"({' or '.join(backends)}) and ({only})" if only else " or ".join(backends)
    # what takes long is Triton's compiler, on the CPU
    parallel = ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    pytest(*tests, *parallel, "-k", chosen, f"--junitxml={xml}", "-o", "junit_family=xunit1")
    counts: Counter[tuple[str, str, str]] = Counter()
    for case in ElementTree.parse(xml).iter("testcase"):
        ids = re.search(r"\[(.*)\]", case.get("name", ""))
        ran_on = [name for name in (ids[1].split("-") if ids else ()) if name in backends]
        bad = case.find("failure") is not None or case.find("error") is not None
        what = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        stem = case.get("classname", "").split(".")[-2 if ids else -1].removeprefix("test_")
        for name in ran_on:
            counts[stem, name, what] += 1
    lines = ["| op | backend | passed | failed | skipped |", "|---|---|--:|--:|--:|"]
    for stem, name in sorted({key[:2] for key in counts}):
        numbers = [counts[stem, name, what] for what in ("passed", "failed", "skipped")]
        lines.append(f"| `{stem}` | {name} | {' | '.join(map(str, numbers))} |")
    missing = [
        (stem, name) for stem in STEMS for name in backends if not counts[stem, name, "passed"]
    ]
    lines += ["", *(f"- `{stem}` passed no test on {name}" for stem, name in missing)]
    failed = any(what == "failed" for _, _, what in counts)
    return lines, not (failed or missing)


def pytest(*arguments: str) -> bool:
    """Whether it passed; its output is shown as it comes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse, with a GPU or without")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="as pytest -k takes it")
    parser.add_argument(
        "--benches", nargs=argparse.REMAINDER, default=[], help="what follows is for pytest bench"
    )
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not (dry or torch.cuda.is_available()):
        sys.exit("bench/gpu.sh: torch sees no CUDA GPU; `bench/gpu.sh --dry-run` rehearses without")
    backends = ("simt", "triton") if dry else ("cuda", "triton")
    reasons = {name: rayfuse.backends()[name] for name in backends}
    wrong = [f"{name}: {reason}" for name, reason in reasons.items() if reason != "available"]
    if wrong and not dry:
        sys.exit(f"bench/gpu.sh: {'; '.join(wrong)}")
    gpu = "rehearsal" if dry else torch.cuda.get_device_name()
    slug = "-".join(re.findall(r"[a-z0-9]+", gpu.lower()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if dry:
            # as where there is no GPU, also if there is one
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        else:
            # a minute of compiling for a backend that is not asked for
            os.environ["RAYFUSE_SIMT"] = "0"
        # one test an op and backend shows that all would be collected, run and counted
        rehearsed = "test_backend_that_was_forced_is_the_one_that_runs"
        table, right = contract(backends, folder, arguments.tests or (rehearsed if dry else ""))
        tables = folder / "tables.md"
        short = ["--device=cpu", "--rehearse"] if dry else ["--device=cuda"]
        right &= pytest("bench", f"--page={tables}", *short, *arguments.benches)
        lines = [f"# Results on {gpu}", "", *([REHEARSAL, ""] if dry else [])]
        command = shlex.join(["bench/gpu.sh", *sys.argv[1:]])
        lines += [f"Written by `{command}`.", "", "## The contract", "", *table, ""]
        text = (
            "\n".join(lines) + "\n" + (tables.read_text() if tables.exists() else "No bench ran.")
        )
        if dry:
            print(text)
            print(f"bench/gpu.sh: rehearsed, no result: {'all is well' if right else 'failed'}")
        else:
            page = ROOT / "docs" / f"results-{slug}.md"
            page.write_text(text)
            rows = tables.with_suffix(".json")
            if rows.exists():
                (ROOT / "bench" / "results" / f"{slug}.json").write_text(rows.read_text())
            print(f"bench/gpu.sh: written: {page.relative_to(ROOT)}")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
