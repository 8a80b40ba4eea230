"""The architecture of the bundled tiny checkpoint, and how an untrained one is put together.

Purpose: a UGround of a few million weights that keeps every part of the real one (CLIP tower, projector, Llama, layer
policy, SAM), so that everything the package does can be run offline. Non-goal: to be good at anything but Scenes.

    python -m uground.training.scenes.tiny_model --sam runs/tiny/sam --vision runs/tiny/vision --output runs/tiny/start
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    SamConfig,
    SamModel,
)

from uground.command_line import run_command
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.processing import UGroundProcessor, letterbox_image_processor
from uground.training.scenes import corpus

LMM_SIZE, LMM_PATCH = 192, 16
FRAME_SIZE = 256
VOCAB_SIZE = 640
CONTEXT_LENGTH = 320
PROMPT_SIZE = 96
CORPUS_EXAMPLES = 20000
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}{{- content -}}{%- else -%}
        {%- for part in content -%}{{- "<image>\\n" if part["type"] == "image" else part["text"] -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "USER: " + render(message["content"]) + " " -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "ASSISTANT: " -}}{%- generation -%}{{- render(message["content"]) + eos_token -}}{%- endgeneration -%}
    {%- elif message["role"] == "system" and loop.first -%}
        {{- render(message["content"]) + " " -}}
    {%- else -%}
        {{- raise_exception(
            "the chat template knows the roles user, assistant and, in front, system, got " + message["role"]
        ) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "ASSISTANT:" -}}{%- endif -%}
"""


def sam_config() -> SamConfig:
    """A small SAM: frames of 256 pixels, mask logits of 64 x 64."""
    return SamConfig(
        vision_config={
            "hidden_size": 128,
            "output_channels": PROMPT_SIZE,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": FRAME_SIZE,
            "window_size": 8,
            "global_attn_indexes": [1, 3],
            "mlp_ratio": 3.0,
            "num_pos_feats": PROMPT_SIZE // 2,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": PROMPT_SIZE, "image_size": FRAME_SIZE, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": PROMPT_SIZE,
            "mlp_dim": 256,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 96,
        },
    )


def vision_config() -> CLIPVisionConfig:
    """A small CLIP tower: 12 x 12 image tokens of 16 pixels; LLaVA reads its last layer but one."""
    return CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=LMM_SIZE,
        patch_size=LMM_PATCH,
        projection_dim=128,
    )


def lmm_config(vocab_size: int, image_token_id: int, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """A LLaVA with six decoder layers of width 160."""
    text_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=6,
        num_attention_heads=5,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=(LMM_SIZE // LMM_PATCH) ** 2,
    )


def train_tokenizer(examples: int = CORPUS_EXAMPLES, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE on the texts of Scenes: a word of that world is one token, any other text is several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = ["USER:", "ASSISTANT:"] * examples  # of the prompt, so that each becomes one token
    tokenizer.train_from_iterator(chain(frame, corpus(examples, seed)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
    )
    fast.add_tokens([AddedToken(token, normalized=False) for token in ("[SEG]", "[REJ]")])
    fast.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> UGroundProcessor:
    """The processor of the tiny checkpoint: letterboxes of its own sizes, and a prompt without a system sentence."""
    return UGroundProcessor(
        image_processor=letterbox_image_processor(LMM_SIZE),
        sam_image_processor=letterbox_image_processor(FRAME_SIZE),
        tokenizer=tokenizer,
        patch_size=LMM_PATCH,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(sam: Path, vision: Path, output: Path, seed: int = 0) -> None:
    """Put pretrained SAM and vision tower, a new language model, policy and projection together and save them."""
    trained_sam, trained_vision = _trained(SamModel, sam), _trained(CLIPVisionModel, vision)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    processor = build_processor(tokenizer)
    config = UGroundConfig(
        lmm_config=lmm_config(len(tokenizer), processor.image_token_id, tokenizer),
        sam_config=sam_config(),
        segment_token_id=processor.segment_token_id,
        reject_token_id=processor.reject_token_id,
        similarity_scaling="scaled",
    )
    model = UGroundForReferringSegmentation(config)
    model.mask_decoder.sam.load_state_dict(trained_sam.state_dict())
    model.lmm.model.vision_tower.load_state_dict(trained_vision.state_dict())
    model.save_pretrained(output)
    processor.save_pretrained(output)


def _trained(model_class, folder: Path):
    """The model that `uground.training.scenes.pretrain` left in a folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {str(folder)!r} holds no pretrained model: there is no config.json")
    return model_class.from_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m uground.training.scenes.tiny_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sam", type=Path, required=True, help="folder of the pretrained SAM")
    parser.add_argument("--vision", type=Path, required=True, help="folder of the pretrained vision tower")
    parser.add_argument("--output", type=Path, required=True, help="folder for the untrained checkpoint")
    options = parser.parse_args(argv)
    return run_command("tiny_model", lambda: assemble(options.sam, options.vision, options.output))


if __name__ == "__main__":
    sys.exit(main())
