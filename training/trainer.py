"""`UGroundTrainer`: TRL's SFT trainer with mask, similarity-map and REINFORCE terms added to the text loss."""

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from trl import SFTTrainer

from uground.hub.publish.run_files import COMPLETE_FILE
from uground.hub.publish.trainer_push import HubPushMixin
from uground.matrix_optimizer import build_optimizer
from uground.modeling_uground import UGroundForReferringSegmentation, UGroundOutput
from uground.modeling_uground.hub_files import give_usual_mode
from uground.processing import UGroundProcessor
from uground.training.adapters import trainable_in_float32
from uground.training.checkpoints import mark_complete, run_record
from uground.training.collator import IGNORED_LABEL, TARGET_KEYS, GroundingCollator, packs_queries
from uground.training.data.mixture import Mixture
from uground.training.evaluation.during_training import AnswerEvaluation
from uground.training.evaluation.pictures import draw_histogram, send_pictures
from uground.training.model_state import CPU_PACKING, left_as_found, marks_of
from uground.training.objectives.grounding_terms import GROUNDING_TERMS, Geometry, connected_zero, grounding_terms
from uground.training.objectives.policy_draws import PolicyLoss, policy_loss, segment_uniforms
from uground.training.objectives.reward_baseline import BaselineTraining, RewardBaseline
from uground.training.repeated_items import count_only, own_images
from uground.training.resume import ResumeMixin
from uground.training.running_means import RunningMeans
from uground.training.sam_cache import SamEmbeddingCache, join_images
from uground.training.training_config import UGroundTrainingConfig, freeze, freeze_unused

# Rules that draw layers; evaluation takes the likeliest instead, so that its figures do not hang on the draws.
DRAWING_RULES = ("sample", "mc")
# Samples named in an error message; more would hide the sentence.
NAMES_SHOWN = 10


class UGroundTrainer(HubPushMixin, ResumeMixin, SFTTrainer):
    """
    Trains `UGroundForReferringSegmentation` on examples of the common schema.

    Logged besides the loss, as means over all segments (text: tokens) of all processes since the last log: every term
    before its weight, reward, baseline and advantage, the entropy of the layer policy in nats, and the share of
    segments that left at each layer (`layer/0` … `layer/L`, and as a picture in TensorBoard).

    Evaluation gives the same figures in any number of processes and with any batch size: means over all segments
    (text: tokens) of the data, each item once and none left out. Layers are those of the config's rule; where that one
    draws, the likeliest.

    What rewards are held against, a moving average or a critic, is the trainer's own (`baseline_training`) and lies in
    its checkpoints beside the weights. A checkpoint ends with a list of its files, without which it does not count;
    see [`resumable_checkpoint`].

    The model is left as it came, but for its weights, its device and `requires_grad`, which says what was trained: no
    hook or flag outlives [`train`] or [`evaluate`], however they end.

    Args:
        model: the model, or a peft model of it; adapters also come through `peft_config` as with `SFTTrainer`.
        args: a [`UGroundTrainingConfig`].
        processing_class: the `UGroundProcessor`.
        train_dataset, eval_dataset: of items that [`GroundingCollator`] takes.
        data_record: what the data are, as plain JSON; a run whose record has changed is not resumed.
        mixture: the [`Mixture`] behind `train_dataset`, if any, told of each epoch and asked what it skipped.
        kwargs: as for `SFTTrainer`.
    """

    _tag_names = ["uground", "referring-segmentation"]
    # Every term is a sum over the micro-batch divided by what the whole step holds.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: UGroundTrainingConfig,
        processing_class: UGroundProcessor,
        data_record: dict | None = None,
        mixture: Mixture | None = None,
        **kwargs: Any,
    ):
        draws_layers = args.train_layer_selection == "sample"
        own = model.get_base_model() if is_peft_model(model) else model
        if draws_layers and own.layer_policy is None:
            raise ValueError(
                "train_layer_selection 'sample' needs a layer policy, which this model has not; expected 'last'"
            )
        if args.cache_sam_embeddings is not None and own.mask_decoder is None:
            raise ValueError("cache_sam_embeddings needs a mask head, which this model has not; expected None")
        if kwargs.get("peft_config") is None and not is_peft_model(model):
            freeze(model, args.trainable, args.loss_weights(), draws_layers)
        collator = kwargs.pop("data_collator", None) or GroundingCollator(
            processing_class,
            args.loss_size,
            pack_queries=packs_queries(own),
            max_length=args.max_length,
            frame_keys=args.cache_sam_embeddings is not None,
        )
        if args.ddp_find_unused_parameters is None:
            # Every trained parameter is used in every batch: `connected_zero` and the collator see to it.
            args.ddp_find_unused_parameters = False
        use_cache = marks_of(model.config, ("use_cache",))
        with left_as_found(model):
            super().__init__(
                model=model, args=args, processing_class=processing_class, data_collator=collator, **kwargs
            )
        if is_peft_model(self.model):
            # `SFTTrainer` turns what is trained on quantised weights to bfloat16.
            trainable_in_float32(self.model)
        bare = self.bare_model
        vars(bare.config).pop("use_cache", None)
        vars(bare.config).update(use_cache)
        if args.gradient_checkpointing:
            bare.disable_input_require_grads()
        freeze_unused(bare, args.loss_weights(), draws_layers)
        # What accelerate has put around the model, kept from one call to the next.
        self._preparation: dict = {}
        self.mixture = mixture
        self.run_record = run_record(args, data_record)
        self._weights = args.loss_weights()
        self._map_target = args.map_target()
        self._sam_cache = None
        if args.cache_sam_embeddings is not None:
            encoder = bare.mask_decoder.sam.vision_encoder
            self._sam_cache = SamEmbeddingCache(args.cache_sam_embeddings, encoder, args.cache_limit_gb)
        layers = [f"layer/{layer}" for layer in range(bare.config.num_layers)]
        by_segment = [*(f"loss/{name}" for name in GROUNDING_TERMS if name != "entropy"), "policy/entropy"]
        drawn = ["loss/policy", "loss/critic", "policy/reward", "policy/baseline", "policy/advantage", *layers]
        self._denominators = {
            "loss/text": "tokens",
            **dict.fromkeys(by_segment, "segments"),
            **dict.fromkeys(drawn, "drawn segments"),
        }
        self._gathers_to_segment = False
        self._begin()

    def _begin(self) -> None:
        """Forget what an earlier, perhaps broken-off call has added up."""
        self._means = {mode: RunningMeans(self._denominators) for mode in ("train", "eval")}
        # Learnt tokens and masks of the step, over all its micro-batches and processes.
        self._step_totals = torch.ones(2)
        self._rewards = torch.zeros(2)
        self.baseline_training = self._new_baseline()

    def _new_baseline(self) -> BaselineTraining | None:
        """What rewards are held against, before any; the critic's weights depend on the seed alone."""
        args = self.args
        if args.train_layer_selection != "sample":
            return None
        kind = (args.policy_baseline, args.policy_ema_decay, args.critic_hidden_size)
        with torch.random.fork_rng([]):
            torch.manual_seed(args.seed)
            baseline = RewardBaseline(self.bare_model.config.num_layers, *kind)
        baseline.to(self.accelerator.device)
        return BaselineTraining(baseline, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with Muon for the matrices of hidden layers where `muon` asks for it."""
        if not self.args.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        if self.is_sharded:
            raise ValueError("muon needs whole matrices, and this run shards them; expected muon false")
        decayed = self.get_decay_parameter_names(model)
        self.optimizer = build_optimizer(model, self.bare_model.adapter.names.head, decayed, self.args)
        return self.optimizer

    @property
    def bare_model(self) -> UGroundForReferringSegmentation:
        """The `UGroundForReferringSegmentation`, without wrappers of distribution and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As `Trainer.train`, but a checkpoint of a run that has made all its steps is loaded and not trained further.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the [`resumable_checkpoint`].

        Raises:
            ValueError: it is `True` and there is none, or that is of another run.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.resumable_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        self._begin()
        self._preparation.clear()
        with ExitStack() as stack:
            stack.enter_context(left_as_found(self.model, self._preparation))
            if self.args.gradient_checkpointing:
                # Gradients must pass through what is checkpointed, also where all that it reads is frozen.
                self.bare_model.enable_input_require_grads()
                stack.callback(self.bare_model.disable_input_require_grads)
            if resume_from_checkpoint and self._is_finished(resume_from_checkpoint):
                return self._load_end(resume_from_checkpoint)
            if resume_from_checkpoint:
                self._load_baseline(resume_from_checkpoint)
            else:
                self._begin_baseline()
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.is_in_train = False
                if (noise := getattr(self, "neftune_hook_handle", None)) is not None:
                    noise.remove()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Also count what the step holds over all its micro-batches and processes: what sums are divided by."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and not self.args.dataloader_drop_last:
            samples[-1] = self._without_repeats(samples[-1], self.train_dataset)
        tokens = sum(int((batch["labels"][..., 1:] != IGNORED_LABEL).sum()) for batch in samples)
        masks = sum(len(batch["segment_keys"]) for batch in samples)
        totals = torch.tensor([float(tokens), float(masks)], device=device)
        self._step_totals = self.accelerator.reduce(totals, reduction="sum").clamp_min(1.0)
        return samples, self._step_totals[0]

    def _without_repeats(self, batch: dict, dataset) -> dict:
        """A batch in which nothing counts that other batches hold already; only the last of an epoch can be such."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1 or not accelerator.gradient_state.end_of_dataloader:
            return batch
        place = (accelerator.num_processes, accelerator.process_index)
        return count_only(batch, own_images(len(batch["original_sizes"]), len(dataset), *place))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._step_baseline()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the weighted terms; see [`UGroundTrainingConfig`]."""
        groups, keys = inputs["target_groups"], inputs["segment_keys"]
        tokens = (inputs["labels"][..., 1:] != IGNORED_LABEL).sum()
        if model.training:
            # Gradients are averaged over processes, but sums over the whole step are wanted.
            step_tokens, step_masks = self._step_totals.to(keys.device) / self.accelerator.num_processes
        else:
            step_tokens, step_masks = tokens.clamp_min(1), max(1, len(keys))
        outputs = self._forward(model, inputs, step_tokens)
        geometry = Geometry.of(self.bare_model.config, inputs)
        other_maps = outputs.other_maps
        grounding = grounding_terms(outputs, groups, step_masks, self._map_target, geometry, other_maps)
        rewards = torch.cat([grounding.rewards[None], grounding.other_rewards])
        terms, policy, values = {"text": outputs.loss, **grounding.terms}, None, None
        if outputs.layer_draws is not None:
            values = self.baseline_training.baseline.segment_values(outputs.layer_logits)
            policy = self._policy_loss(outputs.draw_log_probs, rewards, values)
            terms["policy"] = (policy.reinforce + self.args.critic_beta * policy.critic) / step_masks
        loss = self._weights.total(terms)
        if self.accelerator.num_processes > 1 or not groups:
            loss = loss + connected_zero(outputs, self._weights)
        self._check_finite(loss, terms, inputs["example_ids"])
        sums = {name: term * (step_tokens if name == "text" else step_masks) for name, term in terms.items()}
        self._record("train" if model.training else "eval", sums, tokens, rewards, outputs.layer_draws, policy)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model, inputs, step_tokens) -> UGroundOutput:
        """The model's outputs; in training with a policy, with layers drawn for each segment."""
        model_inputs = {name: value for name, value in inputs.items() if name not in TARGET_KEYS}
        if not model.training:
            model_inputs["layer_selection"] = self._evaluated_layers()
        elif self.baseline_training is None:
            model_inputs["layer_selection"] = self.args.train_layer_selection
        else:
            args, step = self.args, self.state.global_step
            uniforms = segment_uniforms(inputs["segment_keys"], args.seed, step, args.policy_samples)
            # An array: sharded models in mixed precision round every tensor of numbers with a fraction.
            model_inputs["layer_uniforms"] = uniforms.cpu().numpy()
        cache, keys, found = self._sam_cache, inputs.get("frame_keys", []), None
        if cache is not None:
            found = cache.look_up(keys, self.accelerator.device)
            if self._all_found(all(embedding is not None for embedding in found)):
                model_inputs["sam_embeddings"] = join_images(found)
        outputs = model(**model_inputs, num_items_in_batch=step_tokens)
        if cache is not None and "sam_embeddings" not in model_inputs:
            cache.keep(keys, found, outputs.sam_embeddings)
        return outputs

    def _evaluated_layers(self) -> str | int:
        rule = self.bare_model.config.layer_selection
        return "argmax" if rule in DRAWING_RULES else rule

    def _all_found(self, found: bool) -> bool:
        """Whether all processes found their images cached, where parameters are sharded; elsewhere this one."""
        if not self.is_sharded:
            return found
        missing = torch.tensor(float(not found), device=self.accelerator.device)
        return self.accelerator.reduce(missing, reduction="sum").item() == 0

    def _policy_loss(self, log_probs, rewards: torch.Tensor, values: torch.Tensor | None) -> PolicyLoss:
        """REINFORCE with a reward per segment; remembers the rewards for the moving average."""
        count = rewards.shape[1]
        sums = torch.stack([rewards.mean(0).sum(), rewards.new_tensor(float(count))])
        self._rewards = self._rewards.to(sums) + sums
        average = self.baseline_training.baseline.moving_average()
        # Without any segment, the lone one the collator added is drawn but not judged.
        return policy_loss(log_probs[:, :count], rewards, average, None if values is None else values[:count])

    def _step_baseline(self) -> None:
        """One step of the moving average and of the critic per optimizer step, with what all processes found."""
        if self.baseline_training is None:
            return
        total, count = self.accelerator.reduce(self._rewards, reduction="sum")
        self._rewards = torch.zeros_like(self._rewards)
        if count > 0:
            self.baseline_training.baseline.update(total / count)
        self.baseline_training.step(self.optimizer.param_groups[0]["lr"], self._mean_gradient)

    def _mean_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Mean over all processes, free of the factor that half precision scales losses by."""
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        return self.accelerator.reduce(gradient, reduction="mean") / scale

    def _check_finite(self, loss: torch.Tensor, terms: dict[str, torch.Tensor], example_ids: list[str]) -> None:
        """Stop at a loss that is no number, before it spoils the weights."""
        if torch.isfinite(loss):
            return
        values = ", ".join(f"{name} {float(term.detach()):.4g}" for name, term in terms.items())
        more = f" and {len(example_ids) - NAMES_SHOWN} more" if len(example_ids) > NAMES_SHOWN else ""
        raise ValueError(
            f"the loss is {float(loss.detach())} in step {self.state.global_step + 1} ({values}); the samples of the "
            f"batch are {', '.join(example_ids[:NAMES_SHOWN])}{more}"
        )

    def _record(self, mode: str, sums, tokens, rewards, draws, policy: PolicyLoss | None) -> None:
        """Add a micro-batch to what `log` tells; `draws` `(k, N)` are the layers drawn, if any."""
        segments = rewards.shape[1]
        added = {f"loss/{name}": value for name, value in sums.items() if name != "entropy"}
        added |= {"policy/entropy": sums["entropy"], "tokens": tokens, "segments": segments}
        if draws is not None:
            added |= {
                "drawn segments": segments,
                "loss/critic": policy.critic,
                "policy/reward": rewards.mean(0).sum(),
                "policy/baseline": policy.baseline.mean(0).sum(),
                "policy/advantage": (rewards - policy.baseline).mean(0).sum(),
            }
            layers = self.bare_model.config.num_layers
            drawn = torch.bincount(draws[:, :segments].flatten(), minlength=layers) / len(draws)
            added |= {f"layer/{layer}": share for layer, share in enumerate(drawn)}
        self._means[mode].add(added, tokens.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            means = self._means["train"].reduce(self.accelerator)
            if self.mixture is not None:
                skipped = torch.tensor(float(self.mixture.skipped), device=self.accelerator.device)
                skipped = self.accelerator.reduce(skipped, reduction="sum").item()
                means |= {"data/skipped": skipped} if skipped else {}
            self._metrics["train"].update({name: [value] for name, value in means.items()})
            shares = [value for name, value in means.items() if name.startswith("layer/")]
            if shares:
                pictures = {"layers": draw_histogram(shares)}
                send_pictures(self.callback_handler.callbacks, pictures, self.state.global_step)
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All of the data, also where training leaves out the rest of an epoch that fills no batch."""
        with self._dropping_nothing():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As [`get_eval_dataloader`]."""
        with self._dropping_nothing():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _dropping_nothing(self):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`."""
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.predict`."""
        with self._evaluating():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _evaluating(self):
        with left_as_found(self.model, self._preparation):
            for module in self.model.modules():
                if hasattr(module, CPU_PACKING):
                    setattr(module, CPU_PACKING, False)
            yield

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._without_repeats(inputs, self.callback_handler.eval_dataloader.dataset)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Also the exact means of every term, and figures of generated answers."""
        device = self.accelerator.device
        devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
        # Evaluating must not change what the training draws next.
        with torch.random.fork_rng(devices, device_type=kind):
            self._means["eval"] = RunningMeans(self._denominators)
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            figures = self._means["eval"].reduce(self.accelerator)
            terms = {name: figures.get(f"loss/{name}", 0.0) for name in ("text", *GROUNDING_TERMS)}
            terms["entropy"] = figures.get("policy/entropy", 0.0)
            figures["loss"] = float(self._weights.total(terms))
            if self.args.eval_generate_count:
                figures |= self._evaluate_answers(dataloader.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _evaluate_answers(self, dataset) -> dict[str, float]:
        """Figures of generated answers to some items of a dataset; pictures of them go to TensorBoard."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled and not self._gathers_to_segment:
            # `segment` is no forward pass by itself, so nothing would gather the root's weights for it.
            register_fsdp_forward_method(model, "segment")
            self._gathers_to_segment = True
        evaluation = AnswerEvaluation(
            self.processing_class,
            self.data_collator,
            self.args.eval_batch_size,
            self.args.eval_max_new_tokens,
            self.args.eval_overlays,
            self._evaluated_layers(),
        )
        count = self.args.eval_generate_count
        figures, pictures = evaluation(model, dataset, count, self.accelerator, in_step=self.is_sharded)
        named = {f"answers/{number}": picture for number, picture in enumerate(pictures)}
        send_pictures(self.callback_handler.callbacks, named, self.state.global_step)
        return figures

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        with _own_class(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)
        for weights in Path(output_dir or self.args.output_dir).glob("*.safetensors"):
            give_usual_mode(weights)

    def _save_checkpoint(self, model, trial) -> None:
        """Save, say that it is whole, and only then push it and delete what is older."""
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.baseline_training is not None:
                self.baseline_training.save(checkpoint)
            mark_complete(checkpoint, self.run_record)
            if self.args.push_to_hub:
                self.push_checkpoint(checkpoint)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=folder, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


@contextmanager
def _own_class(model):
    """Give a sharded model its own class back while it is saved: the code of its class is saved with it."""
    sharded = type(model)
    if isinstance(model, FSDPModule):
        # Its class is derived from `FSDPModule` and, behind that, from the class it was.
        model.__class__ = sharded.__mro__[2]
    try:
        yield
    finally:
        model.__class__ = sharded


__all__ = ["UGroundTrainer", "UGroundTrainingConfig", "freeze"]
