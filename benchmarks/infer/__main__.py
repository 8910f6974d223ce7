"""`python -m benchmarks.infer`: infer a plan for the tiny model of every causal-LM type, and write infer.json and infer.md."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.infer.measure import Found, measure

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure one type after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infer", description=__doc__)
    parser.add_argument("types", nargs="*", help="some of the types; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "infer")
    parser.add_argument("--tp", type=int, default=2, help="ranks")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a type")
    arguments = parser.parse_args()
    results: dict[str, Found] = {}
    for name in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[name] = found = run(name, arguments.tp, arguments.limit)
        print(f"{name}: {found}", flush=True)
    print(summary(results))
    if not arguments.types:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        facts = {"torch": torch.__version__, "transformers": transformers.__version__, "tp": arguments.tp}
        figures = {**facts, "types": {name: asdict(found) for name, found in results.items()}}
        name = "infer" if arguments.tp == 2 else f"infer_tp{arguments.tp}"
        (arguments.folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        (arguments.folder / f"{name}.md").write_text(page(results, facts))


def run(name: str, size: int, limit: float) -> Found:
    """What is found of a type, by a process that is ended after `limit` seconds."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send, args=(theirs, name, size))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(limit) else Found(None, limit, None, f"not done in {limit:.0f} seconds")
    except EOFError:
        return Found(None, 0.0, None, "its process ended")
    finally:
        process.kill()
        process.join()


def _send(connection: Connection, name: str, size: int) -> None:
    torch.set_num_threads(1)
    connection.send(measure(name, size))


def summary(results: dict[str, Found]) -> str:
    """How many types, in words."""
    proven = [found for found in results.values() if found.share is not None]
    known = [found for found in proven if found.known is not None]
    counts = {
        "types": len(results),
        "with a proven plan": len(proven),
        "that cuts at least half of the body": sum(found.share >= 0.5 for found in proven),
        "that cuts at least 80 % of it": sum(found.share >= 0.8 for found in proven),
        "as much as `auto` or more, cut and computed apart, of those that have a plan": sum(
            one.deficit < 0.005 for one in known
        ),
        "with a plan already": len([found for found in results.values() if found.known is not None]),
    }
    times = sorted(found.seconds for found in proven) or [0.0]
    lines = [f"- {count} {what}" for what, count in counts.items()]
    less = {name: found for name, found in results.items() if found.deficit >= 0.005}
    behind = [f"- less than `auto`: {name}, by {100 * found.deficit:.0f} % of the body" for name, found in less.items()]
    return "\n".join([*lines, f"- {median(times):.1f} s in the median, {times[-1]:.1f} s at most", *behind])


def page(results: dict[str, Found], facts: dict[str, object]) -> str:
    """The table."""
    rows = [
        f"| {name} | {_share(found.share)} | {_share(found.known)} | {_share(found.apart)} | {_share(found.known_apart)} | "
        f"{found.seconds:.1f} | {_short(found.note)} |"
        for name, found in results.items()
    ]
    head = ["| type | cut | auto | apart | auto | s | stays whole |", "|---|---:|---:|---:|---:|---:|---|"]
    words = "Shares of the body: what is cut, and of it what each rank computes for itself, without gathering; beside `auto`'s."
    return "\n".join(
        ["# Plans inferred for tiny models", "", str(facts), "", summary(results), "", words, "", *head, *rows, ""]
    )


def _short(note: str) -> str:
    return note.replace("|", "/")[:160]


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    main()
