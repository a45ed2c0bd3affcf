"""Code in a process of its own, where it is the first to import and to call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """A fresh process. Its working directory is the tests' folder, so that nothing depends on the root."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run_cases(script: str, folder: Path, cases: Iterable[Any]) -> tuple[list[dict[str, Any]], str]:
    """A file of this folder as a process of its own: what it says of each case, and what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(folder)],
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def run_ranks(code: str, folder: Path, ranks: int = 2) -> list[str]:
    """A process for each rank, which gets its number and a folder where the ranks can meet; what each printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parent,
            text=True,
        )
        for rank in range(ranks)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for _, error in results)
    return [output for output, _ in results]
