"""
What we lean on of libraries without its being documented, each with why: a release that breaks us shows here by name.

The docstring of a check says why it stands. `HOOKS` are methods of libraries that we override and that nothing but the
library calls: one that was renamed would be passed over in silence.
"""

import ast
import copy
import inspect
import re
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import bitsandbytes
import pytest
import torch
import trl
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from evaluate import Metric
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from PIL import Image
from tiny import IMAGE_TOKEN, SEGMENT_TOKEN, tiny_config, tiny_inputs, tiny_model, tiny_sam2_config
from tiny_processor import tiny_processor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    AutoModel,
    GenerationConfig,
    Pipeline,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    Trainer,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files
from transformers.generation import GenerationMode
from transformers.integrations import TensorBoardCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.tokenization_utils_base import generate_merges
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import cached_file
from transformers.utils.hub import PushInProgress, PushToHubMixin, cached_files
from trl import SFTTrainer
from trl.trainer.base_trainer import _BaseTrainer

import uground
from uground.modeling_uground.layer_states import LayerHooks
from uground.modeling_uground.library_compat import CACHE_NAME, HUB_KERNEL_MESSAGE
from uground.modeling_uground.shared_prefix import cache_of_rows
from uground.training.metric_modules.counting_metric import CountingMetric
from uground.training.trainer import UGroundTrainer

ROOT = Path(uground.__file__).parent
PARTS = ("modeling_uground", "processing", "training", "hub")
ATTENTION_FLAGS = {
    "_sdpa_can_dispatch": "_supports_sdpa",
    "_flash_attn_can_dispatch": "_supports_flash_attn",
}
PROMPT = torch.tensor([[1] + [IMAGE_TOKEN] * 16 + [5, 6]])

# Owner and name of the method that is overridden, its parameters, who calls it, and what would go wrong in silence.
HOOKS = [
    (Trainer, "_save_checkpoint", "model trial", Trainer._maybe_log_save_evaluate, "half checkpoints would count"),
    (Trainer, "_push_from_checkpoint", "checkpoint_folder", Trainer._save_checkpoint, "half ones would be pushed"),
    (Trainer, "_load_from_checkpoint", "resume_from_checkpoint model", Trainer.train, "a LLaVA resumes from nothing"),
    (Trainer, "_load_best_model", "", Trainer._finalize_training, "the best model would be the first weights"),
    (Trainer, "_save", "output_dir state_dict", Trainer.save_model, "sharded models would be saved without code"),
    (Trainer, "get_batch_samples", "epoch_iterator num_batches device", Trainer._run_epoch, "sums undivided"),
    (Trainer, "evaluation_loop", "dataloader metric_key_prefix", Trainer.evaluate, "no figures of answers"),
    (_BaseTrainer, "create_model_card", "model_name", SFTTrainer._save_checkpoint, "TRL's card would be pushed"),
    (PushToHubMixin, "_upload_modified_files", "working_dir repo_id", PushToHubMixin.push_to_hub, "an empty card"),
    (
        ProcessorMixin,
        "_get_arguments_from_pretrained",
        "processor_dict",
        ProcessorMixin.from_pretrained,
        "torchvision",
    ),
    (
        PreTrainedModel,
        "_load_pretrained_model",
        "model state_dict checkpoint_files load_config",
        PreTrainedModel.from_pretrained,
        "weights of another type would be cast",
    ),
    (PreTrainedModel, "_init_weights", "module", PreTrainedModel._initialize_weights, "gates would begin at random"),
    (Pipeline, "_sanitize_parameters", "", Pipeline.__call__, "arguments of a call would go nowhere"),
    (Pipeline, "_forward", "input_tensors", Pipeline.forward, "a pipeline would not segment"),
    (Pipeline, "get_iterator", "inputs num_workers batch_size", Pipeline.__call__, "batches would be cut by rows"),
    (Pipeline, "run_single", "inputs preprocess_params", Pipeline.__call__, "one item would go another way"),
    (Metric, "_info", "", Metric.__init__, "a metric would not know its protocol"),
    (Metric, "_compute", "", Metric.compute, "counts would not become figures"),
]


def _names_in(code) -> set[str]:
    """Names and strings that a function uses, in the functions inside of it too."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return set(code.co_names) | strings | {name for one in inner for name in _names_in(one)}


def uses(function, name: str) -> bool:
    return name in _names_in(inspect.unwrap(function).__code__)


def takes(function, *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize(("owner", "name", "parameters", "caller", "loss"), HOOKS, ids=[row[1] for row in HOOKS])
def test_hook(owner, name, parameters, caller, loss):
    hook = getattr(owner, name, None)
    assert hook is not None and uses(caller, name), f"nothing calls {name}: {loss}"
    assert takes(hook, *parameters.split()), f"{name} takes {inspect.signature(hook)}: {loss}"


CHECKS = []


def check(function):
    """A contract; `model` is a tiny one, `folder` holds it with its processor."""
    CHECKS.append(function)
    return function


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def _lmm_inputs(model) -> dict:
    inputs = tiny_inputs([[5, 6]])
    images = model.get_image_embeddings(**{k: v for k, v in inputs.items() if "size" in k or "pixel" in k})
    return model.prepare_rows(inputs["input_ids"], inputs["attention_mask"], None, images).lmm_inputs()


# --- transformers: language models and their cache


@check
def keys_and_values_have_one_name(model, folder):
    """Forwards and outputs use the name that `prepare_inputs_for_generation` shows."""
    assert takes(type(model.lmm).forward, CACHE_NAME)
    assert isinstance(model.lmm(**_lmm_inputs(model), use_cache=True)[CACHE_NAME], Cache)


class _Passing(LayerHooks):
    """All states that pass, in order."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def take(self, layer, states):
        self.seen.append((layer, states))


@check
def layer_states_pass_by_hooks(model, folder):
    """Forward hooks of decoder layers and norm see what `output_hidden_states` gives: only what is read is kept."""
    adapter = model.adapter
    with _Passing(adapter.decoder_layers(model.lmm), adapter.final_norm(model.lmm)) as passing:
        states = model.lmm(**_lmm_inputs(model), output_hidden_states=True).hidden_states
    assert [layer for layer, _ in passing.seen] == list(range(len(states))) == list(range(5))
    assert all(torch.equal(seen, state) for (_, seen), state in zip(passing.seen, states, strict=True))


class _Told(StoppingCriteria):
    def __init__(self):
        self.tokens, self.passes = [], 0

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens.append((self.passes, input_ids[:, -1].tolist()))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@check
def a_criterion_is_told_of_every_token(model, folder):
    """Each written token is shown to stopping criteria once, right after the pass that predicted it, the last too."""
    told = _Told()

    def count(*_):
        told.passes += 1

    hook = model.lmm.register_forward_hook(count)
    settings = GenerationConfig(max_new_tokens=3, suppress_tokens=[2], pad_token_id=0)
    written = model.lmm.generate(**_lmm_inputs(model), generation_config=settings, stopping_criteria=[told])
    hook.remove()
    assert told.tokens == [(step + 1, [token]) for step, token in enumerate(written[0, -3:].tolist())]


@check
def generate_calls_the_module(model, folder):
    """`generate` calls the LMM and not its `forward` alone, so that hooks see its logits before any processor."""
    seen = []
    hook = model.lmm.register_forward_hook(lambda _module, _args, output: seen.append(output.logits[:, -1]))
    settings = GenerationConfig(
        max_new_tokens=3, suppress_tokens=[2, 5], pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    logits = model.lmm.generate(**_lmm_inputs(model), generation_config=settings).logits
    hook.remove()
    assert len(seen) == len(logits) == 3
    assert all(torch.equal(one.float(), other) for one, other in zip(seen, logits, strict=True))


@check
def a_cache_is_copied_by_its_layers(model, folder):
    """`cache.layers` are plain objects whose `batch_select_indices` binds new tensors: the shared prefix stays."""
    cache = DynamicCache()
    cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    chosen = cache_of_rows(cache, torch.tensor([1, 1, 0]))
    assert len(chosen.layers[0].keys) == len(chosen.layers[0].values) == 3
    assert len(cache.layers[0].keys) == len(cache.layers[0].values) == 2 and chosen.get_seq_length() == 3


@check
def generate_reads_only_what_a_cache_lacks(model, folder):
    """With a cache, `hidden_states[0]` begins behind it and each later step has one column: there we read."""
    inputs = _lmm_inputs(model)
    names = ("input_ids", "attention_mask", "position_ids")
    prefix = {name: inputs[name][:, :17] for name in names}
    cache = model.lmm(**prefix, mm_encoder_outputs=inputs["mm_encoder_outputs"], use_cache=True)[CACHE_NAME]
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_hidden_states": True}
    steps = model.lmm.generate(
        **{name: inputs[name] for name in names}, **{CACHE_NAME: cache}, **settings, return_dict_in_generate=True
    ).hidden_states
    assert [step[-1].shape[1] for step in steps] == [2, 1]
    assert len(steps[0]) == model.config.num_layers


@check
def encoded_images_are_handed_in(model, folder):
    """`mm_encoder_outputs` stands for `pixel_values`: images are encoded once for many rows."""
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = list(model.lmm.get_image_features(pixels, return_dict=True).pooler_output)
    given = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    by_pixels, by_features = model.lmm(PROMPT, pixel_values=pixels), model.lmm(PROMPT, mm_encoder_outputs=given)
    torch.testing.assert_close(by_features.logits, by_pixels.logits)


@check
def the_vision_tower_takes_a_mask(model, folder):
    """`get_image_features(attention_mask=)` reaches CLIP: padded patches are hidden by it."""
    pixels, mask = torch.ones(1, 3, 32, 32), torch.zeros(1, 1, 1, 17)
    features = [
        model.lmm.get_image_features(pixels, return_dict=True, attention_mask=mask + hidden).pooler_output[0]
        for hidden in (0.0, torch.tensor([0.0] * 9 + [-1e9] * 8))
    ]
    assert not torch.allclose(*features)


@check
def logits_are_kept_where_asked(model, folder):
    """`_supports_logits_to_keep` says whether a prefix can be read without the logits of all its tokens."""
    assert (
        model.lmm._supports_logits_to_keep() and not inspect.signature(model.lmm._supports_logits_to_keep).parameters
    )
    assert model.lmm(PROMPT, logits_to_keep=1).logits.shape[1] == 1


@check
def the_loss_shifts_and_divides(model, folder):
    """`loss_function` shifts the labels by itself and divides by `num_items_in_batch`."""
    logits, labels = torch.zeros(1, 3, 40), torch.tensor([[-100, 1, 2]])
    loss = model.lmm.loss_function(logits=logits, labels=labels, vocab_size=40, num_items_in_batch=4)
    torch.testing.assert_close(loss, torch.tensor(40.0).log() * 2 / 4)


@check
def settings_of_generation_are_merged(model, folder):
    """`GenerationConfig.update` fills gaps with `defaults_only`, and returns what is no setting."""
    settings = GenerationConfig(max_new_tokens=3)
    settings.update(max_new_tokens=5, eos_token_id=7, defaults_only=True, allow_custom_entries=True)
    assert (settings.max_new_tokens, settings.eos_token_id) == (3, 7)
    assert settings.update(do_sample=True, streamer=None) == {"streamer": None}
    assert settings.get_generation_mode(None) is GenerationMode.SAMPLE


# --- transformers: loading, saving, code that travels


@check
def loading_tells_what_did_not_fit(model, folder):
    """`output_loading_info` names missing, unexpected and mismatched tensors, these with both shapes."""
    other = tiny_config()
    other.lmm_config.vision_config.num_hidden_layers = 4
    loaded = PreTrainedModel.from_pretrained.__func__
    _, info = loaded(type(model), folder, config=other, output_loading_info=True, ignore_mismatched_sizes=True)
    assert info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    small = tiny_config()
    small.lmm_config.text_config.vocab_size = 41
    _, info = loaded(type(model), folder, config=small, output_loading_info=True, ignore_mismatched_sizes=True)
    assert sorted(info["mismatched_keys"])[0][1:] == (torch.Size([40, 16]), torch.Size([41, 16]))


@check
def dropped_tensors_are_not_unexpected(model, folder):
    """Names in `_keys_to_ignore_on_load_unexpected` are left out without a word: those of release 0.1.0 are ours."""
    weights = {**model.state_dict(), "layer_policy.reward_ema": torch.zeros(()), "other": torch.zeros(())}
    loaded = PreTrainedModel.from_pretrained.__func__
    _, info = loaded(type(model), None, config=tiny_config(), state_dict=weights, output_loading_info=True)
    assert [*info["unexpected_keys"]] == ["other"] and not info["missing_keys"]


@check
def renamings_know_whether_they_were_used(model, folder):
    """`_weight_conversions` holds the renamings of a load: unused ones would be undone at saving under ZeRO-3."""
    conversions = type(model).from_pretrained(folder)._weight_conversions
    assert conversions and all(conversion.was_used() for conversion in conversions)


@check
def devices_are_spread_without_the_cache(model, folder):
    """`_skip_keys_device_placement` is gathered from the parts: ours need not name the cache."""
    assert CACHE_NAME in model._skip_keys_device_placement


@check
def what_was_loaded_is_not_drawn_anew(model, folder):
    """`transformers.initialization` passes over tensors marked `_is_hf_initialized`."""
    loaded, fresh = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    loaded._is_hf_initialized = True
    init.zeros_(loaded), init.zeros_(fresh)
    assert (float(loaded), float(fresh)) == (1.0, 0.0)


@check
def one_revision_for_all_that_is_loaded(model, folder):
    """Auto classes resolve `revision` once and hand it to `from_pretrained`, where we keep it for the processor."""
    assert uses(AutoModel.from_pretrained.__func__, "resolve_revision")
    assert not uses(AutoModel.from_pretrained.__func__, "commit_hash")
    pinned = type(model).from_pretrained(folder, revision="v1")
    assert (pinned.revision, copy.deepcopy(pinned).revision) == ("v1", "v1")


@check
def a_missing_file_is_no_error(model, folder):
    """`cached_file` says `None` with its private switches: code that is nowhere is left out."""
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    switches = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    assert takes(cached_files, *switches)
    assert cached_file("nobody/nothing", "processing_uground.py", **switches) is None


@check
def configurations_are_read_by_one_method(model, folder):
    """`_dict_from_json_file` reads every config.json, and `_decode_special_floats` its infinities."""
    assert uses(PreTrainedConfig._get_config_dict.__func__, "_dict_from_json_file")
    assert PreTrainedConfig._decode_special_floats({"a": {"__float__": "Infinity"}}) == {"a": float("inf")}


@check
def classes_say_what_they_can(model, folder):
    """Attention is admitted by `_supports_…` and told by `_attn_implementation`; `_no_split_modules` stay whole."""
    assert model.config.lmm_config.text_config._attn_implementation in ("eager", "sdpa")
    assert all(uses(getattr(PreTrainedModel, method), flag) for method, flag in ATTENTION_FLAGS.items())
    assert hasattr(PreTrainedModel, "_supports_attention_backend") and "SamHead" in model._no_split_modules


@check
def hidden_states_are_collected_by_hooks(model, folder):
    """Hooks of `output_capturing` lie in `_forward_hooks`, with `_output_capturing_hooks_installed`: no pickle."""
    fresh = tiny_model()
    fresh.lmm(PROMPT, pixel_values=torch.ones(1, 3, 32, 32), output_hidden_states=True)
    hooks = [hook for module in fresh.modules() for hook in module._forward_hooks.values()]
    assert hooks and all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)
    assert any("_output_capturing_hooks_installed" in vars(module) for module in fresh.modules())


@check
def imports_are_followed(model, folder):
    """`get_relative_import_files` gives the files of all relative imports, at any depth: the Hub closure."""
    files = {Path(path).name for path in get_relative_import_files(folder / "modeling_uground.py")}
    assert {"generation_uground.py", "shared_prefix.py", "library_compat.py"} <= files


@check
def code_is_saved_with_objects(model, folder):
    """`custom_object_save` copies the code of a class with an `_auto_class`; processors call it by themselves."""
    assert takes(custom_object_save, "obj", "folder", "config")
    assert uses(custom_object_save, "_auto_class") and uses(ProcessorMixin.save_pretrained, "custom_object_save")
    assert (folder / "processing_uground.py").is_file()


@check
def tokenizers_load_by_themselves(model, folder):
    """`_load_tokenizer_from_pretrained` loads the tokenizer of a processor, so that its image processors need not."""
    tokenizer = ProcessorMixin._load_tokenizer_from_pretrained("tokenizer", str(folder))
    assert tokenizer.convert_tokens_to_ids("[SEG]") == SEGMENT_TOKEN


@check
def sentencepiece_models_are_read(model, folder):
    """`import_protobuf` and `generate_merges` turn LLaMA's `tokenizer.model` into a fast tokenizer."""
    assert import_protobuf().ModelProto().pieces is not None
    assert generate_merges({"a": 0, "b": 1, "ab": 2}) == [("a", "b")]


# --- transformers: SAM, pipeline


@check
def letterboxing_runs_on_pil(model, folder):
    """`SamImageProcessorPil` scales the longest side, pads below and right, and tells `reshaped_input_sizes`."""
    letterbox = tiny_processor().sam_image_processor
    assert isinstance(letterbox, SamImageProcessorPil)
    features = letterbox([Image.new("RGB", (10, 7), "white")])
    pixels = torch.as_tensor(features["pixel_values"][0])
    assert list(features["reshaped_input_sizes"][0]) == [45, 64]
    assert pixels.shape == (3, 64, 64) and pixels[:, :45].all() and not pixels[:, 45:].any()


@check
def sam_is_called_by_its_parts(model, folder):
    """SAM's prompt encoder takes mask prompts alone, its decoder sparse prompts alone and gives one mask each."""
    sam = model.mask_decoder.sam
    sparse, dense = sam.prompt_encoder(None, None, None, torch.zeros(2, 1, 16, 16))
    assert sparse is None and dense.shape == (2, 16, 4, 4)
    positions = sam.get_image_wide_positional_embeddings()
    masks, scores = sam.mask_decoder(
        image_embeddings=torch.zeros(2, 16, 4, 4),
        image_positional_embeddings=positions.expand(2, -1, -1, -1),
        sparse_prompt_embeddings=torch.zeros(2, 1, 1, 16),
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    assert masks.shape == (2, 1, 1, 16, 16) and scores.shape == (2, 1, 1)
    assert sam.vision_encoder.patch_embed.projection.weight.dtype == sam.mask_decoder.iou_token.weight.dtype


@check
def sam2_is_called_by_its_parts(model, folder):
    """
    SAM 2 encodes to three maps from fine to coarse, its decoder swaps masks in evaluation only if told, and gives
    masks, IoU, tokens and presence; its prompt encoder gives no sparse prompt for a mask alone.
    """
    sam = tiny_model(sam_config=tiny_sam2_config()).mask_decoder.sam
    maps = sam.vision_encoder(torch.zeros(1, 3, 64, 64)).fpn_hidden_states
    assert [tuple(values.shape) for values in maps] == [(1, 16, side, side) for side in (16, 8, 4)]
    assert sam.prompt_encoder(None, None, None, torch.zeros(1, 1, 16, 16))[0] is None
    assert sam.prompt_encoder.mask_input_size == (16, 16) and sam.no_memory_embedding.shape == (1, 1, 16)
    decoder = sam.mask_decoder
    assert uses(type(decoder).forward, "dynamic_multimask_via_stability") and uses(type(decoder).forward, "training")
    found = decoder(
        image_embeddings=maps[2],
        image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=torch.zeros(1, 1, 1, 16),
        dense_prompt_embeddings=torch.zeros(1, 16, 4, 4),
        multimask_output=False,
        high_resolution_features=[decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1])],
    )
    assert [tuple(values.shape) for values in found] == [(1, 1, 1, 16, 16), (1, 1, 1), (1, 1, 1, 16), (1, 1, 1)]


@check
def a_pipeline_says_what_it_loads(model, folder):
    """`_load_…` switches keep a pipeline from loading a tokenizer twice; the others hold what it was made with."""
    switches = ("_load_processor", "_load_tokenizer", "_load_image_processor", "_load_feature_extractor")
    assert all(getattr(Pipeline, switch, "gone") is None for switch in (*switches, "_load_video_processor"))
    for name in ("_forward_params", "_postprocess_params", "_batch_size", "_num_workers"):
        assert uses(Pipeline.__init__, name) and uses(Pipeline.__call__, name)


# --- transformers, TRL, peft: training


@check
def rotation_and_pushes_are_ours(model, folder):
    """`rotate_checkpoints` and `push_in_progress` are called by us, after a checkpoint is complete."""
    assert takes(rotate_checkpoints, "output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime")
    assert PushInProgress([]).jobs == [] and PushInProgress([]).is_done()
    assert uses(Trainer._finish_current_push, "push_in_progress") and uses(Trainer.init_hf_repo, "push_in_progress")
    assert takes(Trainer.save_model, "_internal_call") and takes(Trainer._get_output_dir, "trial")


@check
def the_loss_is_taken_as_it_is(model, folder):
    """`loss_is_scaled_for_ga` says that losses are divided by the whole step already."""
    assert hasattr(Trainer, "loss_is_scaled_for_ga") and uses(Trainer.training_step, "loss_is_scaled_for_ga")


@check
def sft_logs_and_leaves_pictures_alone(model, folder):
    """`SFTTrainer` logs the means in `_metrics`, and does not tokenise datasets with an `image` column."""
    assert uses(SFTTrainer.log, "_metrics") and uses(SFTTrainer.__init__, "_metrics")
    assert uses(SFTTrainer.__init__, "_is_vision_dataset") and uses(SFTTrainer.__init__, "image")
    assert uses(SFTTrainer.__init__, "_tag_names") and hasattr(TensorBoardCallback([]), "tb_writer")


@check
def peft_wraps_and_unwraps(model, folder):
    """`get_base_model` gives the model back; rows of new tokens and whole modules are trained beside an adapter."""
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["layer_policy"],
        trainable_token_indices={"embed_tokens": [38]},
    )
    base = tiny_model()
    adapted = get_peft_model(base, config)
    assert adapted.get_base_model() is base and takes(load_peft_weights, "model_id", "device")
    names = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for part in ("lora_A", "layer_policy.gates", "trainable_tokens_delta"):
        assert any(part in name for name in names), part


@check
def marks_of_training_are_known(model, folder):
    """What training leaves on modules, for us to take off: accelerate's two, and those of checkpointing."""
    assert uses(Accelerator.prepare_model, "_original_forward")
    assert uses(Accelerator.prepare_model, "_is_accelerate_prepared")
    checkpointed = tiny_model()
    checkpointed.activation_checkpointing_enable()
    marked = [vars(module) for module in checkpointed.modules() if "_gradient_checkpointing_func" in vars(module)]
    assert marked and all(marks["gradient_checkpointing"] for marks in marked)


@check
def bitsandbytes_packs_for_cpus(model, folder):
    """`support_avx512bf16_for_cpu` of a 4-bit layer says whether its weights are packed anew in evaluation."""
    assert hasattr(bitsandbytes.nn.Linear4bit(8, 8), "support_avx512bf16_for_cpu")


@check
def old_names_of_checkpointing_are_still_read(model, folder):
    """peft and TRL read what transformers warns of: once they do not, `is_gradient_checkpointing` of ours can go."""
    assert uses(PeftModel.__init__, "is_gradient_checkpointing")
    with warnings.catch_warnings(action="error"):
        assert not model.is_gradient_checkpointing
    assert {"activation_checkpointing", "gradient_checkpointing"} <= set(trl.SFTConfig.__dataclass_fields__)


# --- the others


@check
def bitsandbytes_asks_the_hub_in_these_words(model, folder):
    """The one line of bitsandbytes that is hushed is told by logger and words."""
    source = Path(find_spec("bitsandbytes").origin).with_name("backends") / "cpu" / "ops.py"
    assert HUB_KERNEL_MESSAGE in source.read_text(encoding="utf-8")


@check
def a_process_finds_its_job_anew(model, folder):
    """accelerate takes `cpu=` and resets its states: a job on CPUs would be as many jobs of one process."""
    assert takes(AcceleratorState._reset_state, "reset_partial_state") and takes(parse_flag_from_env, "key")
    assert callable(GradientState._reset_state) and callable(PartialState._reset_state)
    assert uses(PartialState.__init__, "cpu") or takes(PartialState.__init__, "cpu")


@check
def a_sharded_class_stands_before_its_own(model, folder):
    """`fully_shard` derives from `FSDPModule` and the class it was, in this order: saving gives that back."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()
    assert type(sharded).__mro__[1:3] == (FSDPModule, torch.nn.Linear)


@check
def a_transform_sees_rows_as_lists(model, folder):
    """`datasets` hands a transform a dict of lists, for one row too: the mixture reads `rows["index"]`."""
    seen = []
    data = Dataset.from_dict({"index": [3]}).with_transform(lambda rows: seen.append(rows) or rows)
    assert data[0] == {"index": 3} and seen == [{"index": [3]}]


@pytest.mark.parametrize("contract", CHECKS, ids=lambda contract: contract.__name__)
def test_contract(contract, model, folder):
    print(contract.__doc__)
    with torch.no_grad():
        contract(model, folder)


# --- nothing left out

# Documented, made by Python, or a word of labelme's files.
PUBLIC = {"_asdict", "_abc_impl", "_background_"}
OURS = (
    uground.UGroundForReferringSegmentation,
    uground.UGroundConfig,
    uground.UGroundProcessor,
    uground.ReferringSegmentationPipeline,
    UGroundTrainer,
    CountingMetric,
)


def _foreign_names() -> set[str]:
    """Private names that the package uses and does not define."""
    used, own = set(), set()
    for path in [*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]:
        if "checkpoints" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        pieces = {piece for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                (used if isinstance(node.ctx, ast.Load) else own).add(name)
            elif isinstance(node, (ast.keyword, ast.arg)):
                (used if isinstance(node, ast.keyword) else own).add(node.arg or "")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
                used.add(node.value)
    return {name for name in used - own if re.fullmatch(r"_[a-z]\w+", name)}


def _overridden_names() -> set[str]:
    """Private names of libraries that our classes define anew."""
    found = set()
    for cls in OURS:
        own = [base for base in cls.__mro__ if base.__module__.startswith("uground.")]
        foreign = {name for base in cls.__mro__ if base not in own for name in vars(base)}
        found |= {name for base in own for name in vars(base) if re.fullmatch(r"_[a-z]\w+", name)} & foreign
    return found


def test_every_private_name_of_a_library_stands_here():
    here = set(re.findall(r"\w+", Path(__file__).read_text(encoding="utf-8")))
    names = _foreign_names() | _overridden_names()
    assert len(names) > 20
    assert names - PUBLIC <= here | {f"_raise_exceptions_for_{kind}" for kind in here}


def test_the_floors_are_the_bounds_of_setup():
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    floors = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-floor.txt").read_text(encoding="utf-8"), re.M)
    assert len(bounds) == len(floors) > 20
    assert {name: Version(bound) for name, bound in bounds} == {name: Version(floor) for name, floor in floors}
    for name, floor in floors:
        assert Version(version(name)) >= Version(floor), f"{name} is older than its floor {floor}"
