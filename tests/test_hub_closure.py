"""The code that travels with a checkpoint, its stamps, and folders published by older releases."""

import json
import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
import transformers
from freeze_release import input_ids_of, outputs_of
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import tiny_config, tiny_model
from tiny_processor import tiny_processor
from transformers.dynamic_module_utils import get_relative_imports

from uground import UGroundConfig, UGroundForReferringSegmentation, UGroundProcessor
from uground.hub.publish.closure import complete_folder, main
from uground.hub.weights.code_files import AUTO_MAP, ENTRY_FILES, PACKAGE, code_files, stamp_config
from uground.modeling_uground import configuration_uground
from uground.modeling_uground.checkpoint_files import is_inside
from uground.modeling_uground.configuration_uground import CODE_VERSION, CUSTOM_PIPELINES, TESTED_TRANSFORMERS

RELEASES = sorted(path for path in (Path(__file__).parent / "releases").iterdir() if path.is_dir())


def test_closure_is_flat_and_closed():
    files = code_files()
    for name, source in files.items():
        assert source.parent.name in ("modeling_uground", "processing")
        assert {f"{module}.py" for module in get_relative_imports(source)} <= set(files), name
    assert {Path(entry).name for entry in ENTRY_FILES} <= set(files)
    assert "__init__.py" not in files


def test_code_knows_the_version_of_its_package():
    project = re.search(r'^version = "(.+)"$', (PACKAGE / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert project[1] == version("uground") == CODE_VERSION
    floor = Version(TESTED_TRANSFORMERS)
    assert Requirement(f"transformers>={floor}") in map(Requirement, requires("uground"))
    assert Version(transformers.__version__) >= floor, "the tests run with a tested version"


def test_saving_leaves_all_code_and_the_stamp(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    saved = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py")}
    assert saved == {name: source.read_text(encoding="utf-8") for name, source in code_files().items()}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["uground_version"] == CODE_VERSION
    assert config["custom_pipelines"] == CUSTOM_PIPELINES
    assert config["auto_map"] == {name: AUTO_MAP[name] for name in AUTO_MAP if name != "AutoProcessor"}


def test_stamps_of_another_repository_are_replaced(tmp_path):
    config = tiny_config()
    config.custom_pipelines["referring-segmentation"]["impl"] = "someone/base--pipeline_uground.Other"
    config.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == CUSTOM_PIPELINES

    for name, key in (("config.json", "AutoModel"), ("processor_config.json", "AutoProcessor")):
        content = json.loads((tmp_path / name).read_text())
        content["auto_map"] = {key: "someone/base--elsewhere.Class"}
        content["uground_version"] = "0.0.1"
        (tmp_path / name).write_text(json.dumps(content))
    stamp_config(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["auto_map"] == AUTO_MAP
    assert content["uground_version"] == CODE_VERSION
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    assert "someone/base" not in json.dumps([content, processor])


def test_completing_a_folder_keeps_what_the_user_wrote(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (tmp_path / "README.md").write_text("mine")
    complete_folder(tmp_path, example=False)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    (tmp_path / "elsewhere.yaml").write_text("max_steps: 3\n")
    command = [
        str(tmp_path),
        "--replace-card",
        "--license",
        "apache-2.0",
        "--recipe",
        str(tmp_path / "elsewhere.yaml"),
    ]
    assert main(command) == 0
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "max_steps: 3" in card
    assert (tmp_path / "recipe.yaml").read_text() == "max_steps: 3\n"
    assert {"example.png", "example_overlay.png", "example.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("installed", "warns"),
    [
        ("5.23.0", False),
        ("5.24.0.dev0", False),
        ("6.0.0", False),
        ("5.22.2", True),
        ("5.9.1", True),
        ("4.99.0", True),
    ],
)
def test_only_older_versions_of_transformers_warn(installed, warns, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_uground.transformers, "__version__", installed)
    monkeypatch.setattr(configuration_uground.logger, "warning_once", said.append)
    UGroundConfig.from_dict(tiny_config().to_dict())
    assert [TESTED_TRANSFORMERS in text and installed in text for text in said] == [True] * warns


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("shards/model.safetensors", True),
        ("../model.safetensors", False),
        ("shards/../../model.safetensors", False),
        ("/etc/passwd", False),
        ("C:/model.safetensors", False),
        ("..\\model.safetensors", False),
        ("", False),
        (".", False),
        (None, False),
    ],
)
def test_paths_that_leave_the_folder(name, inside):
    assert is_inside(name) is inside


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../../x.safetensors"}}', '{"weight_map": []}', "[]", "{"])
def test_index_that_leads_out_of_the_folder_is_not_followed(index, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="must name files beside it|is no index of weights"):
        UGroundForReferringSegmentation.from_pretrained(tmp_path)


def test_the_first_release_is_kept():
    assert "0.1.0" in [path.name for path in RELEASES]


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_older_releases_load_and_compute_the_same(release):
    expected = json.loads(release.with_name(f"{release.name}.json").read_text(encoding="utf-8"))
    model = UGroundForReferringSegmentation.from_pretrained(release, dtype=torch.float32).eval()
    for name, values in outputs_of(model).items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected[name]), atol=1e-4, rtol=1e-4)
    assert input_ids_of(UGroundProcessor.from_pretrained(release)) == expected["input_ids"]
    assert sum(path.stat().st_size for path in release.iterdir()) < 300_000
