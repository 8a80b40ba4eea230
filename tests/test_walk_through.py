"""The walk through the model, as docs/architecture.md points to it."""

import runpy
from pathlib import Path

WALK = Path(__file__).parents[1] / "examples" / "walk_through.py"


def test_it_prints_the_shape_of_every_step(capsys):
    assert len(WALK.read_text(encoding="utf-8").splitlines()) <= 70
    main = runpy.run_path(str(WALK))["main"]
    main(str(WALK.with_name("scene.png")), "the small red boat")
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.endswith("]"))
    assert lines["layer of each segment (N,)"] == "[2]"
    assert float(lines["scores"].strip("[]")) > 0.8
