import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "generate" / "image_database.py"


def test_the_example_draws_from_the_new_database(tmp_path, monkeypatch, capsys):
    out = tmp_path / "grid.png"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "200", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(v) for v in lines[0].removeprefix("loss ").split(" -> "))
    assert after < before / 3
    old, new = (float(line.split()[-1]) for line in lines[1:3])
    assert new < old
    assert out.read_bytes().startswith(b"\x89PNG")
