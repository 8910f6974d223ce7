"""The command line: its options, what it prints, and how it fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import shardwise
from shardwise import cli
from shardwise.demo.settings import Settings
from shardwise.verify import Check, Verification

OPTIONS = {
    (): {"--version", "--help"},
    ("demo",): {"--tp", "--steps", "--output", "--seed", "--text", "--fast", "--help"},
    ("freeze",): {"--check", "--folder", "--help"},
    ("generate",): {
        "--tp",
        "--prompt",
        "--ids",
        "--new-tokens",
        "--temperature",
        "--seed",
        "--dtype",
        "--chat",
        "--layers",
        "--random",
        "--plan",
        "--help",
    },
    ("plan",): {
        "--tp",
        "--batch",
        "--sequence",
        "--dtype",
        "--optimizer",
        "--inference",
        "--checkpointing",
        "--sequence-parallel",
        "--device",
        "--ep",
        "--plan",
        "--prove",
        "--html",
        "--help",
    },
    ("profile",): {
        *("--tp", "--compile", "--against", "--random", "--layers", "--mode", "--dtype", "--batch", "--sequence"),
        *("--steps", "--warmup", "--stacks", "--output", "--help"),
    },
    ("trace",): {
        "--tp",
        "--mode",
        "--compile",
        "--check",
        "--plan",
        "--batch",
        "--sequence",
        "--layers",
        "--random",
        "--json",
        "--html",
        "--against",
        "--help",
    },
    ("verify",): {
        *("--tp", "--ep", "--dtype", "--compile", "--layers", "--random", "--plan", "--import", "--sequence-parallel"),
        *("--batch", "--sequence", "--timeout", "--html", "--json", "--help"),
    },
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with nothing in it but the config of a Llama with 4 KV heads."""
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4
    ).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["shardwise", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: " ".join(command) or "shardwise")
def test_options_are_these(command: tuple[str, ...]) -> None:
    """Guards: an option that appears, vanishes or is renamed without anyone deciding so."""
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    shown = re.findall(r"^\W*(?:-\w[, ]+)?(--[a-z-]+)|(?<=\s)(--[a-z-]+)(?=\s{2,}|,? +-h\b)", result.output, re.MULTILINE)
    assert {first or second for first, second in shown} == OPTIONS[command]


def test_commands_are_these() -> None:
    """Guards: a command that appears or vanishes without anyone deciding so."""
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert commands == {"demo", "freeze", "generate", "plan", "profile", "trace", "verify"}


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a version that is written down twice and drifts apart."""
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"shardwise {shardwise.__version__}\n"


def test_plan_of_a_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: `plan` reading weights (there are none here), or showing full shapes as local ones."""
    page = tmp_path / "plan.html"
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--html", page) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "gate_proj" in line and "colwise" in line)
    assert "48 x 32" in row
    assert "24 x 32" in row
    assert "colwise" in row
    assert "gate_proj" in page.read_text(encoding="utf-8")


def test_plan_of_several_sizes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: one size that can't be hiding the others, or its reason; success where no size can be; sizes that are none;
    headings that are cut in a narrow terminal.
    """
    page = tmp_path / "sizes.html"
    assert run(monkeypatch, "plan", tiny, "--tp", "1,2,5", "--html", page) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if re.match(r" *[125] ", line)] == ["1", "2", "5"]
    assert "tp=5 cannot be: model.layers.0.self_attn" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "cannot be" in page.read_text(encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "60")
    assert run(monkeypatch, "plan", tiny, "--tp", "1,2") == 0
    shown = capsys.readouterr().out
    assert {"activations", "share", "collectives"} <= set(shown.split())  # none is cut, or in two lines
    assert "…" not in shown
    assert run(monkeypatch, "plan", tiny, "--tp", "5,7") == 1
    assert run(monkeypatch, "plan", tiny, "--tp", "2,x") == 2
    assert run(monkeypatch, "plan", tiny, "--tp", "0") == 2


def test_plan_with_options(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: an option that the command does not hand on."""
    monkeypatch.setenv("COLUMNS", "120")
    rules = tmp_path / "rules.json"
    rules.write_text('{"layers.*.mlp": "replicate"}', encoding="utf-8")
    given = ("--batch", 3, "--sequence", 20, "--dtype", "bfloat16", "--optimizer", "sgd", "--device", "cuda", "--checkpointing")
    assert run(monkeypatch, "plan", tiny, "--tp", 2, *given, "--plan", rules) == 0
    shown = capsys.readouterr().out
    for word in ("3 x 20 tokens on cuda, sgd", "bfloat16", "recompute", "layers.*.mlp: whole on every rank"):
        assert word in shown
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--inference") == 0
    assert "KV cache" in capsys.readouterr().out
    rules.write_text("[1]", encoding="utf-8")
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--plan", rules) == 1
    assert "a JSON object of patterns and styles" in capsys.readouterr().err


def test_plan_that_cannot_be(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: rules that don't go together, told as a model that can't be simulated; a directory with a broken config, told as
    no directory.
    """
    rules = tmp_path / "rules.json"
    rules.write_text('{"layers.*.mlp.up_proj": "replicate"}', encoding="utf-8")
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--plan", rules) == 1
    assert re.search(r"The plan is wrong: .*, in model\.layers\.\d\.mlp\.", capsys.readouterr().err)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert run(monkeypatch, "plan", tmp_path, "--tp", 2) == 1
    assert "there is no config.json in the directory that transformers can read" in capsys.readouterr().err


def test_plan_inferred_and_proven(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: `--plan infer` that is taken for a file; a proof that passes everything, or leaves with 0 all the same."""
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--plan", "infer", "--prove") == 0
    shown = capsys.readouterr().out
    assert "inferred" in shown
    assert "proven  tp=2: outputs within" in shown
    rules = tmp_path / "rules.json"
    rules.write_text('{"layers.*.mlp.down_proj": "rowwise_split_input"}', encoding="utf-8")
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--plan", rules, "--prove") == 1
    assert "The plan is wrong" in capsys.readouterr().err
    assert run(monkeypatch, "plan", tiny, "--tp", 2, "--plan", tmp_path / "other.json") == 1
    assert "there is no such file" in capsys.readouterr().err


def test_plan_of_what_cannot_be_simulated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a model whose code asks for values, of which not even the rules are shown."""
    assert run(monkeypatch, "plan", "longcat_flash", "--tp", 2) == 0
    shown = capsys.readouterr().out
    assert "can't be simulated" in shown
    assert "kv_b_proj" in shown


def test_plan_of_a_model_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a model type taken for a hub id, which would ask the network."""
    assert run(monkeypatch, "plan", "qwen3", "--tp", 2) == 0
    assert "q_proj" in capsys.readouterr().out


def test_unknown_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback, or a network error alone, for a name that is mistyped."""
    assert run(monkeypatch, "plan", "lama", "--tp", 2) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert re.search(r"lama: no directory .*\n(.*\n)*.*\bllama\b", captured.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "llama", "--tp", 2, "--html", "FILE/page.html"),
        ("verify", "llama", "--random", "--json", "FILE/numbers.json"),
        ("trace", "llama", "--random", "--against", "nosuch.json"),
        ("profile", "llama", "--random", "--output", "FILE/folder"),
        ("demo", "--output", "FILE/folder"),
        ("demo", "--text", "nosuch"),
    ],
    ids=lambda given: " ".join(map(str, given)),
)
def test_files_that_cannot_be(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: minutes of work, and then a traceback, because what was found can't be written."""
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert "Invalid value for" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("plan", "TINY", "--tp", 5), ("demo", "--tp", 5)], ids=["plan", "demo"])
def test_sizes_that_cannot_be(
    arguments: tuple[object, ...],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards: heads that do not divide being reported by workers, as tracebacks, after seconds; or not at all."""
    monkeypatch.delenv("RANK", raising=False)
    assert run(monkeypatch, *(tiny if a == "TINY" else a for a in arguments)) == 1
    message = capsys.readouterr().err
    assert message.startswith("PlanError: model.layers.0.")
    assert "tp=5" in message
    assert "Traceback" not in message


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the demo's answer lost on its way to the shell; and its default size taken from nowhere."""
    asked: list[Settings] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for code in (0, 1):
        monkeypatch.setattr(cli.demo, "start", lambda settings, code=code: asked.append(settings) or code)
        assert run(monkeypatch, "demo", "--fast", "--steps", 12) == code
    assert asked == [Settings(tp=2, steps=12, fast=True)] * 2


def test_verify_answers_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a failed verification that leaves with 0, options that do not arrive, a plan that is no plan."""
    asked: list[dict[str, object]] = []
    for measured, code in ((0.0, 0), (1.0, 1)):
        result = Verification("a model", (), (Check("logits", measured, 1e-4, "", "noise"),))
        monkeypatch.setattr(shardwise, "verify", lambda *_, result=result, **options: asked.append(options) or result)
        assert run(monkeypatch, "verify", "llama", "--random", "--ep", 2, "--layers", 3, "--dtype", "bfloat16") == code
    assert {key: asked[1][key] for key in ("random", "ep_size", "layers", "dtype", "compile")} == {
        "random": True,
        "ep_size": 2,
        "layers": 3,
        "dtype": "bfloat16",
        "compile": False,
    }
    capsys.readouterr()
    for text in ("[1]", "{", '{"a": 1}'):
        (tmp_path / "plan.json").write_text(text)
        assert run(monkeypatch, "verify", "llama", "--random", "--plan", tmp_path / "plan.json") == 1
        assert "it has to be a JSON object" in capsys.readouterr().err


def test_torchrun_decides_the_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: ranks that torchrun has started each starting their own, or running at another size than was asked for."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(monkeypatch, "demo", "--tp", 2) == 1
    assert "--tp 2 was asked for, and 4 processes" in capsys.readouterr().err


def test_runs_as_a_module(tiny: Path) -> None:
    """Guards: an import that only works in the test process."""
    done = subprocess.run(
        [sys.executable, "-m", "shardwise.cli", "plan", str(tiny), "--tp", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "12 x 32" in done.stdout
