"""`python -m benchmarks.gpu FOLDER`: measure every backend, and write report.json, report.md and traces into FOLDER."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.backends import BACKENDS
from benchmarks.gpu.driver import Case, Options, Result, run
from benchmarks.gpu.report import write
from benchmarks.gpu.steps import CELLS


def main() -> None:
    """Measure one dtype after the other, and write down what is there after each."""
    arguments = parse()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + arguments.seconds
    options = Options(
        device=arguments.device,
        size="tiny" if arguments.tiny else "llama-3b",
        jobs=arguments.jobs,
        threads=arguments.threads,
        rounds=arguments.rounds,
        runs=arguments.runs,
        cells=tuple(cell for cell in CELLS if arguments.device == "cuda" or not cell.endswith("graphs")),
    )
    results: list[Result] = []

    def save(more: list[Result]) -> None:
        write([*results, *more], asdict(options), folder)

    for dtype in arguments.dtype:
        print(f"{dtype}: building and compiling", flush=True)
        results += run(cases(arguments, dtype), options, folder, until, save)
    print((folder / "report.md").read_text())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"])
    parser.add_argument("--tp", nargs="+", type=int, default=[2, 8], help="sizes of the axis")
    parser.add_argument("--backend", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=FOLDER", help="transformers as it lies in a folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5, help="in a round")
    parser.add_argument("--jobs", type=int, default=3, help="backends built and compiled at a time")
    parser.add_argument("--threads", type=int, default=4, help="with which each compiles")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which nothing more is compiled")
    return parser.parse_args()


def cases(arguments: argparse.Namespace, dtype: str) -> list[Case]:
    """Every backend on every size of the axis; one process has none."""
    found = [Case("one", "one", 1, dtype)] if "one" in arguments.backend else []
    for tp in arguments.tp:
        found += [Case(backend, backend, tp, dtype) for backend in arguments.backend if backend != "one"]
        for peer in arguments.peer:
            name, _, site = peer.partition("=")
            found.append(Case(name, "transformers", tp, dtype, str(Path(site).resolve())))
    return found


if __name__ == "__main__":
    main()
