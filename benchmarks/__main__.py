"""`python -m benchmarks`: measure everything beside the peers, and write tables, plots and JSON into benchmarks/results/cpu.

`python -m benchmarks report` makes tables and plots again from the JSON files, `python -m benchmarks docs` docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import document, plots, report
from benchmarks.contenders import CONTENDERS, PEERS
from benchmarks.driver import Found, Run
from benchmarks.environments import NoEnvironment, installed_torch
from benchmarks.results import FOLDER, Result, machine
from benchmarks.workload import Workload
from benchmarks.workloads import WORKLOADS


def main() -> None:
    """`run`, which does the others behind it, `report` or `docs`."""
    arguments = parse()
    if arguments.verb == "run":
        measure(arguments)
    if arguments.verb != "docs":
        plots.write(arguments.folder)
        print(f"written: {report.write(arguments.folder)}")
    if arguments.folder == FOLDER:
        document.write()
        print(f"written: {document.PAGE}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("verb", nargs="?", choices=["run", "report", "docs"], default="run")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", dest="effort", action="store_const", const="quick", default="full", help="few rounds")
    effort.add_argument("--tiny", dest="effort", action="store_const", const="tiny", help="two rounds, and no peers: a trial")
    parser.add_argument("--large", action="store_true", help="the 6 GiB checkpoints too")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME", help="workloads")
    parser.add_argument("--against", nargs="+", choices=PEERS, metavar="NAME", help="only these peers; needs --folder")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (default: benchmarks/results/cpu)")
    parser.add_argument(
        "--scratch", type=Path, help="where checkpoints are made (default: a new folder in that for temporary files)"
    )
    parser.add_argument("--torch", default=installed_torch(), help="what pip installs as torch for the peers")
    arguments = parser.parse_args()
    if arguments.folder == FOLDER and arguments.verb == "run" and (arguments.against or arguments.effort == "tiny"):
        parser.error("these would stand in benchmarks/results as if they were all: give another --folder")
    return arguments


def measure(arguments: argparse.Namespace) -> None:
    """Run the workloads, writing what is there after every case."""
    peers = () if arguments.effort == "tiny" else arguments.against or PEERS
    taking_part = [name for name, contender in CONTENDERS.items() if not contender.peer or name in peers]
    try:
        pythons = {name: CONTENDERS[name].environment.python(arguments.torch) for name in taking_part}
    except NoEnvironment as error:
        raise SystemExit(f"{error}") from None
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    def save(workload: Workload, cases: dict[str, dict[str, Found]]) -> None:
        Result(workload.name, arguments.effort, machine(), cases).save(arguments.folder)

    if arguments.scratch:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shardwise-", dir=arguments.scratch) as scratch:
        run = Run(pythons, Path(scratch), arguments.effort, say)
        run.measure([WORKLOADS[name] for name in arguments.only], arguments.large, save)
    say("done")


if __name__ == "__main__":
    main()
