"""Measures the notebooks as reading matter: how long the exported cells are, how soon each definition is used, how
headings stand.

`python tests/book.py [--worst N] [FOLDER or NOTEBOOK]` prints what test_book.py holds them to. It reads files and runs
nothing."""

import argparse
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+)")
EXPORTS = {"export", "exports", "exporti"}
# Words of our own that the field has better ones for.
REPLACED = re.compile(
    r"\b(yardstick|matched shuffle|as loud as|louder|whoever|wreck|lesion|silenc|rooms?\b|broken perplexit)", re.I
)
WIDTH = 120  # columns


@dataclass
class Book:
    "What was measured on some notebooks."

    cells: list[tuple[int, str]] = field(default_factory=list)  # lines of each exported cell, and where it stands
    shown: int = 0  # definitions used before the next one is made
    unshown: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)  # headings that share a cell with prose
    replaced: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)  # lines beyond WIDTH
    without_figure: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[int]:
        return sorted(n for n, _ in self.cells)

    @property
    def nine_in_ten(self) -> int:
        return self.lines[int(0.9 * len(self.lines))]

    @property
    def share_shown(self) -> float:
        return self.shown / max(1, self.shown + len(self.unshown))


def is_import(line: str) -> bool:
    return re.match(r"(from|import) |\)$|    [\w ]+,?$", line) is not None


def read(notebook: Path, book: Book) -> None:
    "Add one notebook to what is measured."
    name = notebook.relative_to(ROOT / "nbs").as_posix()
    pending, exported, figures = "", False, 0
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
        if not lines:
            continue
        if cell["cell_type"] == "markdown":
            where = f"{name}: {lines[0][:60]}"
            if re.match(r"#{2,} ", lines[0]) and len(lines) > 1:
                book.mixed.append(where)
            book.replaced += [f"{name}: {m[0]} in {line[:90]!r}" for line in lines for m in REPLACED.finditer(line)]
            continue
        figures += any("image/png" in o.get("data", {}) for o in cell["outputs"])
        said = {m[1] for line in lines if (m := DIRECTIVE.match(line))}
        code = [line for line in lines if not DIRECTIVE.match(line)]
        book.wide += [f"{name}: {line.strip()[:60]}" for line in code if len(line) > WIDTH]
        if said & EXPORTS:
            if not all(map(is_import, code)):
                book.cells.append((len(code), f"{name}: {code[0][:70]}"))
                book.unshown += [pending] if pending else []
                pending, exported = f"{name}: {code[0][:70]}", True
        elif code and "hide" not in said and pending:
            book.shown, pending = book.shown + 1, ""
    book.unshown += [pending] if pending else []
    if exported and not figures:
        book.without_figure.append(name)


def measure(folder: Path = ROOT / "nbs") -> Book:
    book = Book()
    for notebook in sorted(folder.rglob("*.ipynb")) if folder.is_dir() else [folder]:
        if ".ipynb_checkpoints" not in notebook.parts:
            read(notebook.resolve(), book)
    return book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=ROOT / "nbs", type=Path)
    parser.add_argument("--worst", type=int, default=8, help="how many examples of each kind are printed")
    wanted = parser.parse_args()
    book = measure(wanted.folder)
    print(
        f"{len(book.cells)} exported cells: median {statistics.median(book.lines)} lines, nine in ten below "
        f"{book.nine_in_ten}, longest {book.lines[-1]}; {book.share_shown:.0%} of definitions used before the next"
    )
    for title, found in {
        "longest": [f"{n} {where}" for n, where in sorted(book.cells, reverse=True)],
        "defined and not used before the next": book.unshown,
        "heading and prose in one cell": book.mixed,
        "words the field has better ones for": book.replaced,
        f"lines beyond column {WIDTH}": book.wide,
        "no figure": book.without_figure,
    }.items():
        print(f"\n{title}: {len(found)}", *found[: wanted.worst], sep="\n  ")


if __name__ == "__main__":
    main()
