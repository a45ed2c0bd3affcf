"""The command line: what it prints, and the one sentence it fails with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd import cli, demo

Captured = pytest.CaptureFixture[str]


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [folder for folder in sys.path if folder]
    code = (
        f"import runpy, sys; sys.path[:0] = {paths!r}; runpy.run_module('fastkd', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastkd {fastkd.__version__}\n"


def test_versions_name_what_a_report_needs() -> None:
    versions = cli.versions()
    assert versions["torch"] == torch.__version__
    assert {"fastkd", "triton", "numpy", "python", "platform", "cpu kernels"} <= versions.keys()
    assert cli._version("no-such-package") == "not installed"


def test_without_arguments_versions_and_what_runs() -> None:
    run = run_module()
    assert run.returncode == 0, run.stderr
    assert f"torch             {torch.__version__}" in run.stdout
    assert "kd_loss" in run.stdout
    assert "<- runs" in run.stdout


def test_module_takes_the_same_arguments() -> None:
    run = run_module("explain", "no_such_operation")
    assert run.returncode == 2
    assert "no_such_operation" in run.stderr


@pytest.mark.native
def test_an_instruction_set_that_is_refused_is_said_and_not_thrown() -> None:
    refused = "FASTKD_CPU_ISA must be one of "
    run = run_module(FASTKD_CPU_ISA="bogus")
    assert (run.returncode, run.stderr) == (0, "")
    assert "cpu kernels       none" in run.stdout
    assert f"  native     {refused}" in run.stdout
    run = run_module("demo", FASTKD_CPU_ISA="bogus")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"fastkd demo: {refused}")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("operation", [None, "cross_entropy"])
def test_explain(operation: str | None, capsys: Captured) -> None:
    assert cli.main(["explain", *([operation] if operation else [])]) == 0
    printed = capsys.readouterr().out
    fastkd.explain(operation)
    assert printed == capsys.readouterr().out


def test_explain_unknown_operation(capsys: Captured) -> None:
    assert cli.main(["explain", "softmax"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("explain: op must be one of kd_loss")


def test_unknown_command(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["distil"])
    assert exit_.value.code == 2
    assert "invalid choice: 'distil'" in capsys.readouterr().err


def test_bench_without_a_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastkd" / "cli.py"))
    assert cli.main(["bench", "kd"]) == 2
    assert "the benches live in the source tree" in capsys.readouterr().err


def test_bench_hands_every_argument_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "kd", "--vocab", "5", "--help"]) == 7
    assert capfd.readouterr().out.strip() == "['kd', '--vocab', '5', '--help']"


def test_bench_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "checkout" / "bench" / "run.py"
    script.parent.mkdir(parents=True)
    script.touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "checkout" / "fastkd" / "cli.py"))
    assert cli.find_bench() == script


@pytest.mark.parametrize(("command", "module"), [("demo", "tokenizers"), ("bench", "tqdm")])
def test_missing_package_names_the_extra(
    command: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "DEMO_NEEDS", (module,))
    monkeypatch.setattr(cli, "BENCH_NEEDS", (module,))
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == f"fastkd {command} needs {module}: pip install 'fastkd[{command}]' brings it\n"


def test_demo_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(demo, "run", lambda *arguments: seen.append(arguments) or 1)
    assert cli.main(["demo", "--out", str(tmp_path), "--seeds", "3", "4", "--only", "digits"]) == 1
    assert seen == [(tmp_path, ("digits",), demo.Settings(seeds=(3, 4)))]
    cli.main(["demo", "--all"])
    plain, everything = demo.Settings(), seen.pop()[2]
    text = replace(plain.text, heads=True, int8=True)
    assert everything == replace(plain, digits=replace(plain.digits, terms=True, methods=True), text=text, int8=True)
    cli.main(["demo"])
    assert seen[1] == (Path("fastkd-demo"), demo.PARTS, demo.Settings())
