"""Publishing over real HTTP to a Hub on 127.0.0.1, and loading from it in a process without `uground`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from loopback_hub import TOKEN, Fault, LoopbackHub, StoredFile, connected
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_inputs, tiny_model
from tiny_processor import tiny_processor

from uground.hub import publish_data
from uground.hub.publish import main
from uground.hub.publish.card import write_card
from uground.hub.publish.publishing import staged
from uground.hub.weights.code_files import code_files
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.processing import ReferringSegmentationPipeline
from uground.training.scenes import scenes

BASE = "someone/base"
PROCESSOR_FILES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md", *code_files()}
EXAMPLE_FILES = {"example.png", "example_overlay.png", "example.json"}
WITHOUT_UGROUND = "import runpy, sys; sys.modules['uground'] = None; runpy.run_path(sys.argv[1])"
RELEASES = Path(__file__).with_name("releases")
ROWS = [[5, 38, 6], [7, 8, 9, 38]]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint folder as a training run leaves it: model and processor, and a pickle beside them."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    torch.save({"learning_rate": 1.0}, folder / "training_args.bin")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path):
        yield server


@pytest.fixture
def copied(source, tmp_path) -> Path:
    """The checkpoint folder, to be spoilt."""
    return Path(shutil.copytree(source, tmp_path / "copied"))


def publish(folder, repo_id=BASE, *flags) -> int:
    return main([str(folder), "--repo-id", repo_id, "--no-example", *flags])


def error_of(capsys) -> str:
    """The one line that a failed command wrote."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m uground.hub.publish")]
    assert len(lines) == 1
    return lines[0]


def test_figures_on_data_of_the_hub_become_entries(source):
    group = {"queries": 4, "ciou": 0.5, "giou": None, "n_acc": 0.25}
    results = {"figures": {"argmax": {"overall": group}}, "style": "generate", "split": "val", "dataset": "some/refs"}
    for dataset, expected in (("some/refs", {"val_ciou": 0.5, "val_n_acc": 0.25}), ("scenes", None)):
        (source / "results.json").write_text(json.dumps(results | {"dataset": dataset}))
        with staged(source, example=False) as folder:
            path = folder / ".eval_results" / "uground.yaml"
            assert path.is_file() is (expected is not None)
            if expected is not None:
                entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
                assert {entry.task_id: entry.value for entry in entries} == expected
                assert {entry.dataset_id for entry in entries} == {"some/refs"}
                assert entries[0].notes == "cIoU (answers: generate, layer: argmax)"
                card = ModelCard.load(folder / "README.md")
                assert {one.metric_type for one in card.data.eval_results} == {"ciou", "n_acc"}
    (source / "results.json").unlink()


def test_dry_run_lists_everything_without_a_network(source, monkeypatch, tmp_path, capsys):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path, token=None):
        assert main([str(source), "--repo-id", BASE, "--dry-run"]) == 0
        assert server.requests == []
    printed = capsys.readouterr().out
    listed = {line.split()[-1]: line.split()[0] for line in printed.split("\n\n")[0].splitlines()[:-1]}
    assert set(listed) == MODEL_FILES | PROCESSOR_FILES | EXAMPLE_FILES
    assert listed["model.safetensors"] == f"{(source / 'model.safetensors').stat().st_size:,}"
    assert "pipeline_tag: image-segmentation" in printed
    assert not (source / "README.md").exists(), "the folder itself must stay as it is"


def test_everything_goes_in_one_commit_and_weights_are_not_sent_again(source, hub):
    assert publish(source) == 0
    repository = hub.repository(BASE)
    assert [commit.title for commit in repository.commits] == ["initial commit", "Publish checkpoint with uground"]
    assert set(repository.head.files) == MODEL_FILES | PROCESSOR_FILES
    assert hub.uploads() == [(source / "model.safetensors").stat().st_size]
    assert json.loads(repository.head.files["config.json"].data)["uground_version"]

    assert publish(source) == 0
    assert len(hub.uploads()) == 1
    assert len(repository.commits) == 2, "nothing had changed"


def test_shards_of_an_earlier_commit_are_replaced(source, copied, hub):
    UGroundForReferringSegmentation.from_pretrained(copied).save_pretrained(copied, max_shard_size="100KB")
    (copied / "model.safetensors").unlink(missing_ok=True)
    assert publish(copied) == 0
    shards = {name for name in hub.repository(BASE).head.files if name.endswith(".safetensors")}
    assert len(shards) >= 2
    assert "model.safetensors.index.json" in hub.repository(BASE).head.files

    assert publish(source) == 0
    assert {name for name in hub.repository(BASE).head.files if "safetensors" in name} == {"model.safetensors"}
    assert len(hub.repository(BASE).commits) == 3


def test_private_repository(source, hub, capsys):
    assert publish(source, "someone/secret", "--private") == 0
    assert hub.repository("someone/secret").private
    HfApi().create_repo("someone/open")
    assert publish(source, "someone/open", "--private") != 0
    assert "exists already and is public" in error_of(capsys)
    assert hub.repository("someone/open").head.files == {}


def spoil_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_nan(folder):
    spoil_weights(folder, lambda weights: weights["layer_policy.gates"].fill_(float("nan")))


def drop_tensor(folder):
    spoil_weights(folder, lambda weights: weights.pop("layer_policy.gates"))


def make_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_processor(folder):
    (folder / "processor_config.json").unlink()


def drop_metadata(folder):
    (folder / "README.md").write_text("# A model\n")


def spoil_metadata(folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n# A model\n")


def link_outside(folder):
    outside = folder.parent / "secret.png"
    outside.write_bytes(b"private")
    (folder / "example.png").symlink_to(outside)


def index_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"layer_policy.gates": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llava"}')


def add_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (make_nan, "are not finite: layer_policy.gates"),
        (drop_tensor, "missing: layer_policy.gates"),
        (make_pickle, "holds no model.safetensors, only pytorch_model.bin, training_args.bin"),
        (drop_processor, "lacks processor_config.json"),
        (drop_metadata, "it lacks license, library_name, pipeline_tag, tags"),
        (spoil_metadata, "the metadata of the model card cannot be read"),
        (link_outside, "may only hold files of its own, example.png lead out of it"),
        (index_outside, "must name files beside it, got '../elsewhere.safetensors'"),
        (make_other_model, "must be of type 'uground', got 'llava'"),
        (add_adapter, "holds an adapter: publish it with --adapter"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_refused_before_the_first_byte(spoil, expected, copied, hub, capsys):
    spoil(copied)
    assert publish(copied) != 0
    assert expected in error_of(capsys)
    assert hub.requests == []


def test_flags_that_would_be_dropped_in_silence(copied, hub, capsys):
    (copied / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert publish(copied, BASE, "--license", "apache-2.0") != 0
    assert "there is a README.md already, which is taken as it is, so license would go nowhere" in error_of(capsys)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "expected"),
    [
        ("datasets/someone/base", "the kind of repository follows from what is published"),
        ("base", "must be USER/NAME"),
        ("../../etc/passwd", "must be USER/NAME"),
        ("someone/..", "must be USER/NAME"),
    ],
)
def test_wrong_repository_names(repo_id, expected, source, hub, capsys):
    assert publish(source, repo_id) != 0
    assert expected in error_of(capsys)
    assert hub.requests == []


def test_no_token(source, monkeypatch, tmp_path, capsys):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path, token=None):
        assert publish(source) != 0
        assert "there is no token for the Hub" in error_of(capsys)
        assert server.requests == []


def test_token_the_hub_does_not_know_is_not_shown(source, monkeypatch, tmp_path, capsys):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path, token="hf_wrongToken"):
        assert publish(source) != 0
        assert server.repositories == {}
    printed = capsys.readouterr()
    assert "the Hub does not know this token" in printed.err
    assert "hf_wrongToken" not in printed.out + printed.err


def test_namespace_of_somebody_else(source, hub, capsys):
    assert publish(source, "nobody/base") != 0
    assert "may not write to the model nobody/base" in error_of(capsys)


def test_token_is_nowhere(source, hub, capsys):
    assert publish(source) == 0
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert not [name for name, file in hub.repository(BASE).head.files.items() if TOKEN.encode() in file.data]


@pytest.mark.parametrize("status", [409, None])
def test_commit_of_somebody_else_in_between(status, source, hub, capsys):
    HfApi().create_repo(BASE)
    other = {"notes.txt": StoredFile(b"mine", is_lfs=False)}
    commit = rf"POST /api/models/{BASE}/commit"
    if status is None:
        hub.faults = [Fault(commit, before=lambda: hub.repository(BASE).commit("main", "by somebody else", other))]
    else:
        hub.faults = [Fault(commit, status=status, message="a commit is being made")]
    assert publish(source) != 0
    assert "somebody else changed the model someone/base, and nothing was committed" in error_of(capsys)
    assert "model.safetensors" not in hub.repository(BASE).head.files
    assert publish(source) == 0
    assert len(hub.uploads()) == 1
    assert "model.safetensors" in hub.repository(BASE).head.files


def test_connection_lost_at_the_commit(source, hub, capsys):
    hub.faults = [Fault(rf"POST /api/models/{BASE}/commit")]
    assert publish(source) != 0
    assert "the connection to the Hub was lost" in error_of(capsys)
    assert hub.repository(BASE).head.files == {}, "no half commit"
    assert publish(source) == 0
    assert len(hub.uploads()) == 1, "the weights had arrived"
    assert set(hub.repository(BASE).head.files) == MODEL_FILES | PROCESSOR_FILES


def test_connection_lost_within_the_weights(source, hub):
    hub.faults = [Fault("PUT /lfs/")]
    assert publish(source) == 0
    assert len(hub.uploads()) == 2, "sent again by the client"
    assert hub.repository(BASE).head.files["model.safetensors"].data == (source / "model.safetensors").read_bytes()


def tiny_adapter(folder: Path) -> torch.Tensor:
    """Saves an adapter of the tiny model, perturbed; returns mask logits with it."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["segment_projection"])
    model = get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        masks = model(**tiny_inputs(ROWS), layer_selection="last").mask_logits
    model.save_pretrained(folder)
    return masks


def test_adapter_names_its_base(tmp_path, hub, capsys):
    folder = tmp_path / "adapter"
    tiny_adapter(folder)
    assert publish(folder, "someone/lora", "--adapter") != 0
    assert "an adapter must name its base by Hub id" in error_of(capsys)
    assert hub.requests == []
    assert publish(folder, "someone/lora", "--adapter", "--base-model", BASE) == 0
    files = hub.repository("someone/lora").head.files
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] == BASE
    card = files["README.md"].data.decode()
    assert f"base_model: {BASE}" in card
    assert "library_name: peft" in card


def test_adapter_keeps_figures_and_recipe(tmp_path, hub):
    folder = tmp_path / "adapter"
    tiny_adapter(folder)
    recipe = tmp_path / "given.yaml"
    recipe.write_text("train_data: [scenes]\n")
    results = tmp_path / "given.json"
    results.write_text(json.dumps({"figures": {"last": {"all": {"ciou": 0.5}}}}))
    flags = ("--base-model", BASE, "--license", "mit", "--recipe", str(recipe), "--results", str(results))
    assert publish(folder, "someone/lora", "--adapter", *flags) == 0
    files = hub.repository("someone/lora").head.files
    assert files["recipe.yaml"].data == recipe.read_bytes()
    assert files["results.json"].data == results.read_bytes()
    assert "license: mit" in files["README.md"].data.decode()
    assert not (folder / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("flag", "value", "fact"),
    [
        ("--license", "mit", "license"),
        ("--dataset", "scenes", "datasets"),
        ("--recipe", "given.yaml", "recipe"),
        ("--results", "given.json", "results_json"),
    ],
)
def test_flags_beside_the_card_of_an_adapter(flag, value, fact, tmp_path, hub, capsys):
    folder = tmp_path / "adapter"
    tiny_adapter(folder)
    write_card(folder, base_models=[BASE])
    given = ("--adapter", "--base-model", BASE)
    assert publish(folder, "someone/lora", *given, flag, value) != 0
    assert f"so {fact} would go nowhere" in error_of(capsys)
    assert hub.requests == []
    assert publish(folder, "someone/lora", *given) == 0


@pytest.mark.parametrize("spoilt", ["nan", "whole checkpoint"])
def test_adapters_that_are_refused(spoilt, source, tmp_path, hub, capsys):
    folder = tmp_path / "adapter"
    if spoilt == "nan":
        tiny_adapter(folder)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(
            {name: tensor * float("nan") for name, tensor in weights.items()}, folder / "adapter_model.safetensors"
        )
    assert publish(folder if spoilt == "nan" else source, "someone/lora", "--adapter", "--base-model", BASE) != 0
    assert ("are not finite" if spoilt == "nan" else "holds no adapter") in error_of(capsys)
    assert hub.requests == []


@pytest.fixture(scope="module")
def clean(source, tmp_path_factory):
    """What a process without `uground` makes of repositories pushed in every way, and what it should make of them."""
    folder = tmp_path_factory.mktemp("clean")
    inputs = tiny_inputs(ROWS)
    with LoopbackHub() as server, pytest.MonkeyPatch.context() as patch, connected(server, patch, folder):
        model, processor = tiny_model(), tiny_processor()
        with torch.no_grad():
            expected = {"masks": model(**inputs, layer_selection="last").mask_logits}
        assert publish(source) == 0
        first = server.repository(BASE).head
        model.push_to_hub("someone/pieces")
        pieces = set(server.repository("someone/pieces").head.files)
        processor.push_to_hub("someone/pieces")
        ReferringSegmentationPipeline(model=model, processor=processor).push_to_hub("someone/pipe")
        expected["adapted"] = tiny_adapter(folder / "adapter")
        assert publish(folder / "adapter", "someone/lora", "--adapter", "--base-model", BASE) == 0
        assert publish_data.main(["scenes", "--repo-id", "someone/scenes", "--count", "2"]) == 0
        jobs = [
            ["published", "masks", {"repo_id": BASE}],
            ["untrusted", "masks", {"repo_id": BASE, "trust_remote_code": False}],
            ["pieces", "masks", {"repo_id": "someone/pieces"}],
            ["pipe", "masks", {"repo_id": "someone/pipe"}],
            *([f"answers {name}", "answers", {"repo_id": f"someone/{name}"}] for name in ("base", "pieces", "pipe")),
            ["words", "words", {"repo_id": "someone/pieces"}],
            ["adapted", "adapted", {"repo_id": "someone/lora", "base": BASE}],
            ["frozen", "frozen", {"folder": str(RELEASES / "0.1.0")}],
            ["resaved hub", "resaved", {"repo_id": "someone/pieces"}],
            ["resaved folder", "resaved", {"repo_id": str(RELEASES / "0.1.0")}],
            ["adapted at once", "masks", {"repo_id": "someone/lora"}],
            ["examples", "examples", {"repo_id": "someone/scenes"}],
            ["warned", "warned", {"repo_id": BASE, "version": "5.9.0"}],
        ]
        later = dict(first.files)
        later["modeling_uground.py"] = StoredFile(b'raise RuntimeError("the later code")\n', is_lfs=False)
        server.repository("someone/pipe").commit("later", "later code", later)
        oid = server.repository("someone/pipe").head.oid
        other = dict(first.files)
        settings = json.loads(other["tokenizer_config.json"].data) | {"model_max_length": 123}
        other["tokenizer_config.json"] = StoredFile(json.dumps(settings).encode(), is_lfs=False)
        other["processing_uground.py"] = StoredFile(
            other["processing_uground.py"].data + b"# of another revision\n", is_lfs=False
        )
        server.repository("someone/pieces").commit("other", "another processor", other)
        jobs += [
            ["other", "of_a_revision", {"repo_id": "someone/pieces", "revision": "other"}],
            ["later", "masks", {"repo_id": "someone/pipe", "revision": "later"}],
            ["pinned", "masks", {"repo_id": "someone/pipe", "revision": oid}],
        ]
        torch.save(inputs, folder / "inputs.pt")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environment = {**os.environ, **server.environment(str(folder / "home")), "OMP_NUM_THREADS": "1"}
        names = ("inputs.pt", "results.pt", "jobs.json")
        script = str(Path(__file__).with_name("clean_load.py"))
        command = [sys.executable, "-c", WITHOUT_UGROUND, script, *(str(folder / name) for name in names)]
        ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr
        cards = {
            name: server.repository(f"someone/{name}").head.files["README.md"].data for name in ("pieces", "pipe")
        }
    results = torch.load(folder / "results.pt")
    return {"results": results, "expected": expected, "pieces": pieces, "cards": cards, "stderr": ran.stderr}


@pytest.mark.parametrize("name", ["published", "pieces", "pipe", "pinned"])
def test_models_load_without_uground(name, clean):
    torch.testing.assert_close(clean["results"][name], clean["expected"]["masks"])
    assert clean["results"]["modules"] == []


def test_adapter_loads_without_uground(clean):
    for name in ("adapted", "adapted at once"):
        torch.testing.assert_close(clean["results"][name], clean["expected"]["adapted"])
    assert not torch.allclose(clean["expected"]["adapted"], clean["expected"]["masks"])


@pytest.mark.parametrize("name", ["base", "pieces", "pipe"])
def test_processor_and_pipeline_load_without_uground(name, clean):
    result = clean["results"][f"answers {name}"]
    assert result["rows"] == 2
    assert isinstance(result["answer"], str) and result["drawn"][0] >= 384


def test_words_are_written_without_uground(clean):
    said = clean["results"]["words"]
    assert "error" not in said and said["words"] == said["answer"] and len(said["words"]) > 0


def test_older_release_loads_without_uground(clean):
    expected = json.loads((RELEASES / "0.1.0.json").read_text())["mask_logits"]
    torch.testing.assert_close(clean["results"]["frozen"], torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["hub", "folder"])
def test_saving_again_without_uground_leaves_all_code(name, clean):
    released = sorted(path.name for path in (RELEASES / "0.1.0").glob("*.py"))
    assert clean["results"][f"resaved {name}"] == (sorted(code_files()) if name == "hub" else released)


def test_dataset_loads_without_uground(clean):
    expected = [(example["query"], example["image"].size) for example in scenes("test", 2, seed=0)]
    assert clean["results"]["examples"] == expected


def test_nothing_runs_unless_trusted(clean):
    assert "trust_remote_code=True" in clean["results"]["untrusted"]["error"]


def test_revision_pins_the_code(clean):
    assert clean["results"]["later"]["error"] == "RuntimeError: the later code"


def test_revision_pins_what_is_loaded_later(clean):
    other = clean["results"]["other"]
    assert other.get("longest") == 123, other
    assert other["code"].endswith(b"# of another revision\n")


def test_an_older_transformers_warns_once_naming_both(clean):
    (warning,) = clean["results"]["warned"]
    assert "tested with transformers 5.23 and later" in warning
    assert "5.9.0" in warning


def test_push_to_hub_leaves_all_files_and_a_card_of_ours(clean):
    assert clean["pieces"] == MODEL_FILES
    for card in clean["cards"].values():
        assert b"OSU-NLP-Group/UGround" in card
