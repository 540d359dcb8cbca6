"""Write README.md from nbs/index.ipynb: prose as it is, code in fences, cells marked `#| hide` left out."""

import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def from_the_top(link: re.Match) -> str:
    "A link of a notebook in nbs/, as it is from the top of the repository."
    return "](" + posixpath.normpath(posixpath.join("nbs", link[1]))


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> str:
    """Return the README's text."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        lines = source.splitlines()
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)([^)#\s]+)", from_the_top, source))
        elif not any(line.startswith("#| hide") for line in lines):
            code = "\n".join(line for line in lines if not line.startswith("#|"))
            parts.append(f"```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
