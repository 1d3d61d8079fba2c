"""The leaderboard as one HTML page that needs nothing else: verdicts, tables, figures, explanations."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from kappaflow.dataset.schemas import LEADERBOARD
from kappaflow.dataset.tables import replacing
from kappaflow.surrogates.leaderboard import verdicts

_MARKS = {"yes": ("yes", "better"), "no": ("no", "worse"), "unclear": ("unclear", "unclear"), None: ("none", "")}
_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}

# Header, columns of the leaderboard (value, then ends of its interval), digits, whether small is good (None: neither).
_SHOWN: tuple[tuple[str, tuple[str, ...], int, bool | None], ...] = (
    ("MAE", ("mae_ln", "mae_ln_low", "mae_ln_high"), 3, True),
    ("± seeds", ("mae_ln_seed_std",), 3, None),
    ("MAE / constant", ("mae_ratio", "mae_ratio_low", "mae_ratio_high"), 2, True),
    ("RMSE", ("rmse_ln",), 3, True),
    ("RMSE / constant", ("rmse_ratio", "rmse_ratio_low", "rmse_ratio_high"), 2, True),
    ("R²", ("r2_ln",), 2, False),
    ("Spearman", ("spearman",), 2, False),
    ("weighted", ("weighted_error",), 3, True),
    ("weighted / constant", ("weighted_ratio", "weighted_ratio_low", "weighted_ratio_high"), 2, True),
    ("enriched low", ("enrichment_low",), 1, False),
    ("enriched high", ("enrichment_high",), 1, False),
    ("68 %", ("coverage_68",), 2, None),
    ("95 %", ("coverage_95",), 2, None),
    ("NLL", ("nll",), 2, True),
    ("area", ("miscalibration_area",), 2, True),
    ("MAE of κ", ("mae",), 2, True),
    ("factor 2", ("within_factor_2",), 2, False),
    ("fit / s", ("fit_seconds",), -1, True),
    ("predict / s", ("predict_seconds",), -1, True),
    ("seeds", ("n_seeds",), 0, None),
)

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 88rem; padding: 0.8rem; background: #fff; color: #1b1b1b;
  font: 15px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.3rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.3rem; }
h3 { font-size: 1rem; margin: 1.1rem 0 0.3rem; }
p, li, dd { overflow-wrap: anywhere; } a { color: #00558f; } nav a { margin-right: 0.9rem; white-space: nowrap; }
ul.verdicts { padding: 0; list-style: none; margin: 0.6rem 0; }
ul.verdicts li { padding: 0.3rem 0.6rem; margin: 0.25rem 0; border-left: 5px solid #8a8a8a; background: #f6f6f6; }
ul.verdicts li.better { border-color: #009e73; } ul.verdicts li.worse { border-color: #d55e00; }
.scroll { overflow-x: auto; } div.scroll:has(table) { border: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; background: #fff; }
th, td { padding: 0.22rem 0.55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e8e8e8; }
thead th { background: #f0f0f0; vertical-align: bottom; font-weight: 600; }
th:nth-child(2) { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; z-index: 1; background: inherit; text-align: left; }
tbody tr { background: #fff; } tbody tr:hover { background: #eef5fa; } td.text { text-align: left; }
thead tr { background: #f0f0f0; } tr.constant { color: #5c5c5c; font-style: italic; }
thead button { all: unset; cursor: pointer; } thead button:focus-visible { outline: 2px solid #0072b2; }
thead button::after { content: " ↕"; color: #999; }
th[aria-sort=ascending] button::after { content: " ↑"; color: #000; }
th[aria-sort=descending] button::after { content: " ↓"; color: #000; }
td small { color: #555; } td.best { font-weight: 700; } .mark { padding: 0 0.35rem; border-radius: 3px; }
.yes { background: #cdeee3; } .no { background: #fbdcc8; } .unclear { background: #eee; }
.note { color: #444; font-size: 13px; } figure { margin: 0.8rem 0; } figcaption { color: #333; font-size: 13px; }
figure img { max-width: 100%; height: auto; }
dl.columns { font-size: 13px; } dl.columns dt { font-weight: 600; } dl.columns dd { margin: 0 0 0.4rem 1rem; }
@media (min-width: 60rem) { dl.columns { columns: 2; } }
@media (max-width: 30rem) { body { padding: 0.5rem; font-size: 14px; }
  th:first-child, td:first-child { min-width: 6rem; max-width: 7.5rem; white-space: normal; }
  figure img { max-width: none; width: 46rem; } }
"""

# Cells without a value stay last in either order.
_SCRIPT = """
document.querySelectorAll("thead button").forEach(button => button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const i = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => row.cells[i].dataset.v, number = body.rows[0] && !body.rows[0].cells[i].classList.contains("text");
  head.parentNode.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return (up ? 1 : -1) * (number ? x - y : x.localeCompare(y));
  }).forEach(row => body.appendChild(row));
}));
"""


def write(
    path: str | Path,
    board: Iterable[Mapping],
    figures: Sequence[tuple[str, str, str | Path]] = (),
    title: str = "Leaderboard",
) -> None:
    """Write the page; see `page`."""
    text = page(board, figures, title)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(
    board: Iterable[Mapping], figures: Sequence[tuple[str, str, str | Path]] = (), title: str = "Leaderboard"
) -> str:
    """The page as text, of rows of the leaderboard and of figures (title, caption, path of an .svg or .png).

    The figures are embedded. Raises ValueError for a figure of another kind.
    """
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for row in board:
        groups.setdefault((row["split"], row["scope"]), []).append(row)
    splits = list(dict.fromkeys(split for split, _ in groups))
    links = [(f"split-{number}", split) for number, split in enumerate(splits)]
    links += [(f"figure-{number}", name) for number, (name, *_) in enumerate(figures)] + [("columns", "columns")]
    parts = [
        f"<h1>{escape(title)}</h1>",
        _verdicts(groups) if groups else "<p>The labelled table is empty.</p>",
        "<p class=note>Errors are of ln κ on the test materials, means over seeds; brackets are 95 % bootstrap "
        "intervals over test materials. A model beats the best constant if the whole interval of the ratio of their "
        "errors is below 1. Of many models, the best is flattered a little by having been chosen on the test set.</p>",
        "<nav>" + " ".join(f"<a href='#{anchor}'>{escape(name)}</a>" for anchor, name in links) + "</nav>",
    ]
    for number, split in enumerate(splits):
        parts.append(f'<h2 id="split-{number}">{escape(split)}</h2>')
        parts += [_scope(scope, rows) for (of, scope), rows in groups.items() if of == split]
    parts += [_figure(number, *figure) for number, figure in enumerate(figures)]
    parts.append(_explanations())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _verdicts(groups: Mapping[tuple[str, str], Sequence[Mapping]]) -> str:
    items = []
    for rows in groups.values():
        (line,) = verdicts(rows)
        beaten = {row["beats_constant"] for row in rows} - {None}
        kind = "better" if "yes" in beaten else "worse" if beaten else ""
        items.append(f'<li class="{kind}">{escape(line)}</li>')
    return f"<ul class=verdicts>{''.join(items)}</ul>"


def _scope(scope: str, rows: Sequence[Mapping]) -> str:
    """The table of one split and scope, and below it the models without a score."""
    scored = [row for row in rows if row["mae_ln"] is not None]
    silent = [row for row in rows if row["mae_ln"] is None]
    most = {name: max((row[name] or 0 for row in rows), default=0) for name in ("n_train", "n_validation", "n_test")}
    words = "test materials" if scope == "all" else "test materials with phonons"
    parts = [
        f"<h3>{most['n_test']} {words} <span class=note>(train {most['n_train']}, validation {most['n_validation']})"
        "</span></h3>"
    ]
    if scored:
        parts.append(_table(scored))
        oracle = scored[0]["mae_oracle_constant"]
        notes = [f"For reference, the median of the test labels would have an MAE of {oracle:.3f}."]
        notes += [f"{row['model']}: {row['reason']}." for row in scored if row["reason"]]
        parts.append(f"<p class=note>{escape(' '.join(notes))}</p>")
    if silent:
        reasons: dict[str, list[str]] = {}
        for row in silent:
            reasons.setdefault(row["reason"] or "no reason known", []).append(row["model"])
        told = [f"<li>{escape(', '.join(models))}: {escape(why)}</li>" for why, models in reasons.items()]
        parts.append(f"<p class=note>Without a score:</p><ul class=note>{''.join(told)}</ul>")
    return "".join(parts)


def _table(rows: Sequence[Mapping]) -> str:
    heads = ["model", "family", *(head for head, *_ in _SHOWN)]
    columns = ["model", "family", *(names[0] for _, names, *_ in _SHOWN)]
    meanings = {column.name: column.description for column in LEADERBOARD.columns}
    header = "".join(
        f'<th scope="col" title="{escape(meanings[name])}"><button type="button">{escape(head)}</button></th>'
        for head, name in zip(heads, columns, strict=True)
    )
    best = {names[0]: _best(rows, names[0], small) for _, names, _, small in _SHOWN}
    body = "".join(_line(row, best) for row in rows)
    return f"<div class=scroll tabindex=0><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"


def _best(rows: Sequence[Mapping], name: str, small: bool | None) -> float | None:
    values = [row[name] for row in rows if row[name] is not None and not row["is_constant"]]
    if small is None or not values or name.endswith("_seconds"):
        return None
    return min(values) if small else max(values)


def _line(row: Mapping, best: Mapping[str, float | None]) -> str:
    told = ' <small title="was told the value that bounds the test labels">told the bound</small>'
    model = escape(row["model"]).replace("_", "_<wbr>") + (told if row["told_bound"] else "")
    cells = [_cell(row["model"], model, "text"), _cell(row["family"], escape(row["family"]), "text")]
    for _, names, digits, _ in _SHOWN:
        value = row[names[0]]
        text = _number(value, digits)
        if len(names) == 3 and row[names[1]] is not None:
            text += f" <small>[{_number(row[names[1]], digits)}, {_number(row[names[2]], digits)}]</small>"
        if names[0] == "mae_ratio" and row["beats_constant"]:
            kind, word = _MARKS[row["beats_constant"]]
            text += f' <span class="mark {kind}">{word}</span>'
        if names[0] == "mae_ratio" and row["is_constant"] and row["model"] == row["best_constant"]:
            text += ' <span class="mark">best constant</span>'
        cells.append(_cell(value, text, "best" if value is not None and value == best[names[0]] else ""))
    return f"<tr{' class=constant' if row['is_constant'] else ''}>{''.join(cells)}</tr>"


def _cell(value: str | float | None, text: str, kind: str) -> str:
    key = "" if value is None else escape(str(value))
    return f'<td class="{kind}" data-v="{key}">{text}</td>'


def _number(value: float | None, digits: int) -> str:
    """A number with so many decimals; two significant digits where ``digits`` is negative."""
    if value is None:
        return "–"
    if digits < 0:
        return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"
    return f"{value:.1e}" if abs(value) >= 1e4 else f"{round(value, digits) + 0.0:.{digits}f}"  # no minus zero


def _figure(number: int, title: str, caption: str, path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _MEDIA:
        raise ValueError(f"{path}: unknown kind of figure; allowed: {', '.join(_MEDIA)}")
    # As an image and not inline, so that identifiers of one figure do not meet those of another.
    data = base64.b64encode(Path(path).read_bytes()).decode()
    image = f'<img alt="{escape(title)}" src="data:{_MEDIA[suffix]};base64,{data}">'
    text = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure id="figure-{number}"><h2>{escape(title)}</h2><div class=scroll>{image}</div>{text}</figure>'


def _explanations() -> str:
    """What each column of the tables shows, and what the CSV file has besides."""
    heads = {names[0]: head for head, names, *_ in _SHOWN}
    items = []
    for column in LEADERBOARD.columns:
        head = f"{heads[column.name]} ({column.name})" if column.name in heads else column.name
        unit = f" in {escape(column.unit)}" if column.unit else ""
        items.append(f"<dt>{escape(head)}{unit}</dt><dd>{escape(column.description)}</dd>")
    return f'<h2 id="columns">Columns</h2><dl class=columns>{"".join(items)}</dl>'
