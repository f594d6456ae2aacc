"""Write the tables of verdicts in README.md and docs/results.md, and pictures, from results/.

    python tools/tables.py

They stand between ``<!-- verdicts -->`` and ``<!-- end of verdicts -->``; a test compares them. The
pictures are the figures of the cards, as docs/NAME.svg.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from stiefel.atlas.record import load_all
from stiefel.atlas.result import Result, combine, plus_minus
from stiefel.papers import Judgement, Scale, all_papers, get

# docs/NAME.svg: the figure of which paper.
PICTURES = {
    "adapters": "orthogonal-adaptation",
    "compatible": "lambda-orthogonality",
    "designs": "dpp-least-squares",
    "dictionary": "online-dictionary",
    "logah": "logah",
    "neural_operators": "neural-operators",
    "orthogonal_conv": "orthogonal-conv",
    "orthomerge": "orthomerge",
    "poincare": "poincare-resnet",
    "s5": "ptd",
    "state_spaces": "s4d",
    "tensor_product": "tensor-product-pde",
}
ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(?<=<!-- verdicts -->\n).*?(?=<!-- end of verdicts -->)", re.DOTALL)
HEAD = "| paper | claim | measured | bound | verdict |\n|---|---|---|---|---|\n"


def results() -> list[Result]:
    """Reference results of every paper that has any, in the order of the page."""
    found = []
    for paper in all_papers():
        records = load_all(ROOT / "results", paper.slug, Scale.LAPTOP)
        if records:
            found.append(combine(paper, Scale.LAPTOP, records))
    return found


def draw(folder: Path) -> None:
    """Every picture whose paper has results, as SVG on white, the same bytes for the same data."""
    import matplotlib as mpl

    for name, slug in PICTURES.items():
        records = load_all(ROOT / "results", slug, Scale.LAPTOP)
        if records:
            figure = get(slug).figure([record.measurement for record in records])
            with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})


def row(slug: str, judgement: Judgement, *, bold: bool) -> str:
    """One claim."""
    claim, verdict = judgement.claim, judgement.verdict.value
    text = claim.text.replace("|", "\\|")
    verdict = f"**{verdict}**" if bold else verdict
    bound = f"{claim.relation} {claim.bound:g}".replace("-", "−")
    return f"| {slug} | {text} | {plus_minus(judgement)} | {bound} | {verdict} |\n"


def tables() -> dict[str, str]:
    """File → its table: headlines in the README, every claim in the documentation."""
    headlines, claims = HEAD, HEAD
    for result in results():
        slug = f"`{result.slug}`"
        headlines += row(slug, result.claims[0], bold=True)
        claims += row(slug, result.claims[0], bold=True)
        claims += "".join(row("", judgement, bold=False) for judgement in result.claims[1:])
    return {"README.md": headlines, "docs/results.md": claims}


def main() -> int:
    """Write the tables, draw the pictures."""
    for name, table in tables().items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        changed, places = PLACE.subn(lambda _, table=table: table, text)
        if places != 1:
            print(f"{name} has {places} places for the verdicts, not one", file=sys.stderr)
            return 1
        path.write_text(changed, encoding="utf-8")
    draw(ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
