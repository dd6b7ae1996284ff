"""Figures with their range, goals with their verdicts, and the table and JSON that show them."""
import json
import statistics
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import commands

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


class Figure(NamedTuple):
    """The median of some rounds, the smallest and the largest of them."""
    median: float
    low: float
    high: float
    rounds: int


class Row(NamedTuple):
    """A line of the table.

    what: what was measured; measured, against: the two sides, with units; figure: what the goal is about, a ratio of the two
    or a number with a unit; at_least, at_most: the goal, if there is one; note: what the reader must know to judge.
    """
    job: str
    what: str
    measured: str
    against: str = ""
    figure: Optional[Figure] = None
    unit: str = ""
    at_least: Optional[float] = None
    at_most: Optional[float] = None
    note: str = ""


def figure(values: Sequence[float]) -> Figure:
    """Median and range of the values of all rounds; ValueError if there are none."""
    if not values:
        raise ValueError("A figure needs at least one value")
    return Figure(statistics.median(values), min(values), max(values), len(values))


def ratios(values: Sequence[float], others: Sequence[float]) -> Figure:
    """The median of the values by that of the others; the range is that of the rounds' own ratios.

    The median of the rounds' ratios would vary more from run to run, where a machine is disturbed for less than a round.
    """
    rounds = figure([value / other for value, other in zip(values, others)])
    return rounds._replace(median=statistics.median(values) / statistics.median(others))


def verdict(row: Row) -> str:
    """'met' or 'missed' by the median, 'failed' if there is no figure for a goal, '' if there is no goal."""
    if row.at_least is None and row.at_most is None:
        return ""
    if row.figure is None:
        return "failed"
    met = ((row.at_least is None or row.figure.median >= row.at_least)
           and (row.at_most is None or row.figure.median <= row.at_most))
    return "met" if met else "missed"


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return "%.0f" % value if abs(value) >= 100 else "%.3g" % value


def spread(shown: Optional[Figure], unit: str = "") -> str:
    """For example `0.973 (0.961 to 0.98)`."""
    if shown is None:
        return ""
    text = number(shown.median) + unit
    return text if shown.rounds == 1 else "%s (%s to %s)" % (text, number(shown.low), number(shown.high))


def goal(row: Row) -> str:
    """For example `at least 0.97`."""
    parts = ["%s %g%s" % (word, limit, row.unit) for word, limit in (("at least", row.at_least), ("at most", row.at_most))
             if limit is not None]
    return " and ".join(parts)


def markdown(rows: Sequence[Row], about: Sequence[str]) -> str:
    """The whole report: what it was measured on, the table, and the notes below it."""
    lines = [BEGIN] + ["%s  " % line for line in about] + [""]
    lines += ["| what | measured | compared with | ratio or figure (range) | goal | verdict |", "|---|---|---|---|---|---|"]
    notes = []  # type: List[str]
    for row in rows:
        what = row.what
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            what += " [%d]" % (notes.index(row.note) + 1)
        cells = (what, row.measured, row.against, spread(row.figure, row.unit), goal(row), verdict(row))
        lines.append("| %s |" % " | ".join(cell.replace("|", "/") for cell in cells))
    if notes:
        lines += [""] + ["[%d] %s  " % (i + 1, note) for i, note in enumerate(notes)]
    return "\n".join(lines + [END, ""])


def as_json(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """The rows with their verdicts, fit for JSON."""
    return [dict(row._asdict(), figure=row.figure._asdict() if row.figure else None, verdict=verdict(row)) for row in rows]


def write(path: str, rows: Sequence[Row], about: Sequence[str], result: Dict[str, Any]) -> str:
    """Write the table as path.md and all figures as path.json, each all of it or nothing. Returns the table."""
    text = markdown(rows, about)
    commands.write_atomically(path + ".md", text)
    commands.write_atomically(path + ".json", json.dumps(dict(result, rows=as_json(rows)), indent=2, sort_keys=True) + "\n")
    return text
