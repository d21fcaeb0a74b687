"""The report as a table: python -m bench.gpu.table outputs/gpu/gpu.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "time": "ms",
    "speed": "per s",
    "rate": "TFLOP/s",
    "peak": "GB peak",
    "added": "GB added",
    "extra": "GB extra",
}


def table(parts: dict[str, Any]) -> str:
    """Lines for every part: its pieces, their candidates, and what else was found."""
    lines = []
    for name, part in parts.items():
        lines.append(f"\n== {name}: {part['status']}, {part.get('seconds', 0):.0f} s")
        for piece, entry in part["pieces"].items():
            lines += _piece(piece, entry)
    return "\n".join(lines)


def _piece(piece: str, entry: dict[str, Any]) -> list[str]:
    lines = [f"  {piece}: {entry['status']}" + (f"  VOID: {entry['void']}" if entry.get("void") else "")]
    if rows := entry.get("rows"):
        shown = [key for key in COLUMNS if any(key in row for row in rows.values())]
        lines.append(f"    {'':30}" + "".join(f"{COLUMNS[key]:>12}" for key in shown))
        for candidate, row in rows.items():
            cells = "".join(f"{row[key]['value']:>12,.5g}" if key in row else f"{'':>12}" for key in shown)
            lines.append(f"    {candidate:30}{cells}" + ("" if row["status"] == "ok" else f"  {row['status']}"))
    if gemm := entry.get("gemm"):
        before, after = gemm
        lines.append(f"    matmul rate before and after: {before['value']:.4g}, {after['value']:.4g} {before['unit']}")
    for what, found in entry.get("figures", {}).items():
        lines.append(f"    {what}: {found['value']:.5g} {found['unit']} ({found['how']})")
    return lines


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    facts = ("device", "commit", "started", "versions", "state before", "state after")
    print("\n".join(f"{key}: {report.get(key)}" for key in facts) + table(report["parts"]))
