"""Exports the notebooks with the nbdev of this environment and compares the modules with those of the repository.

Run by `make nbdev3` in an environment of its own; it needs nothing but nbdev 3."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules(folder: Path) -> dict[str, str]:
    "Path inside the package -> text. The index of names that nbdev keeps for itself holds its settings, which differ."
    found = {p.relative_to(folder).as_posix(): p for p in (folder / "llmfact_nb").rglob("*.py")}
    return {name: p.read_text(encoding="utf-8") for name, p in found.items() if p.name != "_modidx.py"}


def main() -> str:
    "What is different, or an empty text."
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for folder in ("nbs", "llmfact_nb"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / file, copy)
        for path in (copy / "llmfact_nb").rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):  # kept by hand
                path.unlink()
        subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=copy, check=True)
        ours, theirs = modules(ROOT), modules(copy)
    return ", ".join(sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)))


if __name__ == "__main__":
    import nbdev

    different = main()
    sys.exit(
        f"nbdev {nbdev.__version__} exports differently: {different}"
        if different
        else print(f"nbdev {nbdev.__version__} exports the same")
    )
