"""Model cards: everything in them is read from files, and nothing incomplete is let through."""

import json

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, connected
from tiny import tiny_config

from uground.hub.publish.card import build_card, main, write_card
from uground.hub.publish.model_card import CardFacts, build_model_card, check_card

GROUP = {"queries": 4, "ciou": 0.615, "giou": 0.625, "n_acc": None, "t_acc": 1.0}
RESULTS = {
    "figures": {
        "last": {"overall": GROUP | {"ciou": 0.11}, "res": GROUP},
        "argmax": {"res": GROUP, "overall": GROUP | {"ciou": 0.7431}},
    },
    "style": "generate",
    "dataset": "scenes",
    "split": "test",
    "count": 4,
    "seed": 3,
    "versions": {"uground": "0.1.0"},
    "date": "2026-01-02",
    "command": "python -m uground.training.evaluate --count 4",
}


@pytest.fixture
def folder(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    return tmp_path


def test_figures_are_those_of_the_results(folder):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    card = build_card(folder, repo_id="someone/tiny")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"ciou", "giou", "t_acc"}, "what was not measured is not listed"
    assert results["ciou"].metric_value == 0.7431, "of the layers the configuration chooses"
    assert results["ciou"].metric_name == "cIoU (answers: generate, layer: argmax)"
    assert results["ciou"].dataset_split == "test"
    assert results["ciou"].dataset_args == {"count": 4, "seed": 3}
    assert card.data.model_name == "tiny"
    assert [line for line in card.text.splitlines() if line.startswith("| argmax")] == [
        "| argmax | overall | 4 | 0.743 | 0.625 | – | 1.000 |",
        "| argmax | res | 4 | 0.615 | 0.625 | – | 1.000 |",
    ]
    for text in ("python -m uground.training.evaluate --count 4", "answers: generate", "uground 0.1.0 on 2026-01-02"):
        assert text in card.text


def test_changed_results_change_the_card(folder):
    path = folder / "elsewhere.json"
    for value in (0.5, 0.25):
        results = json.loads(json.dumps(RESULTS))
        results["figures"]["argmax"]["overall"]["ciou"] = value
        path.write_text(json.dumps(results))
        card = build_card(folder, results_json=path)
        assert [result.metric_value for result in card.data.eval_results][0] == value


def test_what_nobody_recorded_is_said_to_be_unrecorded(folder):
    text = build_card(folder).text
    for line in ("- Base models: not recorded", "- Data: not recorded", "- Recipe: not recorded", "Not measured yet."):
        assert line in text


def test_what_is_told_is_said(folder):
    (folder / "recipe.yaml").write_text("learning_rate: 1.0e-3\n")
    card = build_card(folder, base_models=["a/llava", "b/sam"], datasets=["refcoco", "c/boats"], license="llama2")
    assert card.data.base_model == ["a/llava", "b/sam"]
    assert card.data.datasets == ["c/boats"], "ids of the Hub only"
    assert "- Data: refcoco, c/boats" in card.text
    assert card.data.license == "llama2"
    assert "learning_rate: 1.0e-3" in card.text
    assert "- `a/llava`: see its own card" in card.text
    assert "none, every weight was trained from nothing" in build_card(folder, base_models=[]).text


def test_card_explains_itself(folder):
    card = build_card(folder, repo_id="someone/tiny")
    assert "unrelated GUI-grounding model, `OSU-NLP-Group/UGround`" in card.text
    for section in ("## Use", "## Parts", "## Training", "## Figures", "## Limits", "## Licence of the parts"):
        assert section in card.text
    assert 'pipeline("referring-segmentation", model="someone/tiny", trust_remote_code=True)' in card.text
    assert "4 layers of width 16" in card.text
    assert "4 × 4 tokens" in card.text


def test_snippet_is_python(folder):
    for facts in (CardFacts(), CardFacts(is_adapter=True, base_models=["a/base"])):
        text = build_model_card(tiny_config(), facts).text
        compile(text.split("```python\n")[1].split("```")[0], "snippet", "exec")


def test_settings_show(folder):
    tiny_config(prompts=("embedding",), reject_token_id=None).save_pretrained(folder)
    text = build_card(folder).text
    assert "prompted by the projected segment state. Where" in text
    assert "it has no token to say so" in text


def test_parts_that_are_left_out_show(folder):
    for settings, present, absent in (
        (
            {},
            ["- layer policy over 5 layer states", "- SAM `sam` with a frame of 64 pixels, prompted by embedding"],
            "no ",
        ),
        ({"sam_config": None}, ["- layer policy over", "- no mask head: a segment is its similarity map"], "- SAM"),
        (
            {"layer_policy": False, "layer_selection": 3},
            ['- no layer policy, `layer_selection="3"` of 5 layer states', "- SAM `sam` with a frame"],
            "- layer policy",
        ),
    ):
        tiny_config(**settings).save_pretrained(folder)
        parts = build_card(folder).text.split("## Parts")[1].split("## ")[0]
        assert all(text in parts for text in [*present, "images of 32 pixels as 4 × 4 tokens"])
        assert absent not in parts


def test_card_survives_the_library(folder):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    card = ModelCard.load(write_card(folder, repo_id="someone/tiny"))
    assert str(check_card(str(card))) == str(card)
    assert len(card.data.eval_results) == 3


def test_card_passes_the_validation_of_the_hub(folder, tmp_path, monkeypatch):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    with LoopbackHub() as hub, connected(hub, monkeypatch, tmp_path):
        build_card(folder, repo_id="someone/tiny").validate()
        assert [request.path for request in hub.requests][-1] == "/api/validate-yaml"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("# only text", "it lacks license, library_name, pipeline_tag, tags"),
        ("---\nlicense: mit\ntags: []\n---\n", "it lacks library_name, pipeline_tag, tags"),
        ("---\nlicense: [\n---\n", "cannot be read"),
        ("---\n- license\n---\n", "cannot be read"),
    ],
)
def test_incomplete_cards_are_refused(content, expected):
    with pytest.raises(ValueError, match=expected):
        check_card(content)


@pytest.mark.parametrize("results", [{}, {"figures": {}}, {"figures": {"argmax": 0.7}}, {"figures": {"argmax": {}}}])
def test_results_that_are_none(results, folder):
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="results must be as uground.training.evaluate writes them"):
        build_card(folder)


def test_command_previews_and_writes(folder, capsys):
    assert main([str(folder), "--license", "mit", "--from-nothing"]) == 0
    assert "license: mit" in capsys.readouterr().out
    assert not (folder / "README.md").exists()
    assert main([str(folder), "--license", "mit", "--write"]) == 0
    assert "license: mit" in (folder / "README.md").read_text()
    assert main([str(folder)]) == 0
    assert "license: mit" in capsys.readouterr().out, "the card that is there"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/nowhere"], "is no folder"),
        (["{folder}", "--results", "/nowhere.json"], "is no file"),
        (["{folder}", "--base-model", "a/b", "--from-nothing"], "not both"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, folder, capsys):
    assert main([argument.format(folder=folder) for argument in arguments]) != 0
    printed = capsys.readouterr()
    assert expected in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
