"""Scores as people read them: tables of 80 columns, and what explains them. Knows figures, not how they came about."""

from parts.intervals import Difference, Line

Table = tuple[str, list[str], list[list[str]]]  # heading, names of the columns, rows of cells
DIGITS = {"%": 1, "字": 0, "0–1": 3, "0–100": 1, "token/秒": 1}  # of each unit, behind the point
FLOOR = "乱配：同样的回答各与另一题的参考比，是底线。重合只比字面，不是医学上的对错。"
NEW = "（新题）：不算 seen 的行，那些在训练集里有近似的题。"
DIFFERS = "差：前减后。不同：差的 95 % 区间（成对自助法）不含 0，且至少六题不一样。"
JUDGED = "评审看问题、参考和两个回答，两种先后各问一次，两次都选同一个才算较好。评审也是模型，不是医生。"


def number(value: float | None, unit: str, sign: str = "") -> str:
    """A figure in its unit's digits, shares in percent; — where there is none."""
    return "—" if value is None else f"{value * (100 if unit == '%' else 1):{sign}.{DIGITS[unit]}f}"


def interval(low: float | None, high: float | None, unit: str, sign: str = "") -> str:
    return "—" if low is None else f"[{number(low, unit, sign)}, {number(high, unit, sign)}]"


def label(row: Line | Difference) -> str:
    """The measure's name, and its unit where the name does not tell it."""
    return f"{row.name} %" if row.unit == "%" else row.name


def of_scores(heading: str, lines: list[Line]) -> Table:
    """One model's scores."""
    rows = []
    for line in lines:
        floor = number(line.floor, line.unit) if line.floor is not None else ""
        value, between = number(line.value, line.unit), interval(line.low, line.high, line.unit)
        rows.append([label(line), str(line.n), value, between, floor])
    return heading, ["指标", "条数", "值", "95 % 区间", "乱配"], rows


def of_differences(heading: str, differences: list[Difference]) -> Table:
    """Two models' scores and how they differ."""
    rows = []
    for each in differences:
        values = [number(each.value, each.unit), number(each.other, each.unit), number(each.difference, each.unit, "+")]
        between = interval(each.low, each.high, each.unit, "+")
        rows.append([label(each), *values, between, "不同" if each.differs else "分不出"])
    return heading, ["指标", "前", "后", "差", "差的 95 % 区间", "判断"], rows


def show(console, table: Table, *notes: str) -> None:
    """Print a table and what explains it."""
    from rich.table import Table as RichTable

    heading, columns, rows = table
    grid = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        grid.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(f"\n{heading}", style="bold", markup=False)
    console.print(grid)
    console.print("\n".join(notes), style="dim", markup=False)
