"""What a run prints: one table a case."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench import record
from bench.measure import Case
from bench.record import Row

COLUMNS = {
    "wall_ms": "ms",
    "wall_p20_ms": "p20",
    "wall_p80_ms": "p80",
    "cpu_ms": "CPU ms",
    "gb_per_s": "GB/s",
    "percent_of_copy": "% of copy",
    "percent_of_exp2": "% of exp2",
    "percent_of_matmul": "% of matmul",
    "times_eager": "x eager",
    "times_compiled": "x compiled",
    "cpu_times_eager": "CPU x eager",
    "extra_mib": "extra MiB",
    "error": "error",
}


def show(console: Console, case: Case, rows: Sequence[Row]) -> None:
    if rows:
        console.print(_table(case, rows))
    for row in filter(record.is_wide, rows):
        spread = f"p20 {row['wall_p20_ms']} to p80 {row['wall_p80_ms']} ms"
        console.print(
            f"  {row['provider']} spreads widely ({spread}): run it again on a quieter machine", style="yellow"
        )
    for name, reason in case.absent.items():
        console.print(f"  {name} did not run: {reason}", style="yellow")


def _table(case: Case, rows: Sequence[Row]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in case.labels.items())
    table = Table(title=title, caption=_roofs(rows[0]), title_justify="left", caption_justify="left")
    table.add_column("provider")
    columns = {key: heading for key, heading in COLUMNS.items() if any(row.get(key) for row in rows)}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        who = f"{row['provider']} ({row['impl']})" if row["impl"] else str(row["provider"])
        table.add_row(who, *(str(row[key]) for key in columns))
    return table


def _roofs(row: Row) -> str:
    lines = []
    if row["least_mb"]:
        lines.append(f"at least {row['least_mb']} MB moved; a copy runs at {row['copy_gb_per_s']} GB/s")
    if row["least_mexp"]:
        lines.append(f"at least {row['least_mexp']} M exponentials; exp2 runs at {row['exp2_gexp_per_s']} G/s")
    if row["least_gflop"]:
        rate = f"the matmuls alone run at {row['matmul_gflop_per_s']} GFLOP/s"
        lines.append(f"at least {row['least_gflop']} GFLOP in matmuls; {rate}")
    return "\n".join(lines)
