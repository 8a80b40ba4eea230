"""The notebook of first steps runs from top to bottom as it stands, and carries no outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_stored_without_outputs(cells):
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert NOTEBOOK.stat().st_size < 12_000


def test_its_cells_run(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    (segment,) = names["boat"]["segments"]
    assert segment["score"] > 0.8 and names["boat"]._repr_png_().startswith(b"\x89PNG")
    assert len(names["results"]) == 2 and all(result["segments"] for result in names["results"])
    assert names["absent"]["segments"] == []
    assert names["drawn"].size[0] >= names["image"].size[0] and names["annotation"]["area"] == segment.area
    assert (tmp_path / "runs" / "tiny-own-data" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    for begin in ("2 ", "4 ", "last ", "argmax ", "mc ", "the small red boat -> ", "the yellow car -> "):
        assert f"\n{begin}" in printed, begin
