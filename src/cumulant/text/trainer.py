"""Hugging Face's Trainer with our evaluation, schedule, checkpoints and progress lines."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from .carry import CarriedStates
from .evaluate import check_scored, windowed
from .processes import all_agree
from .runs import WHOLE, mark_whole, whole_checkpoints
from .schedule import Leg, rate_at
from .tokens import TokenFile


class Diverged(ValueError):
    """A loss, a gradient or a weight is not finite."""


class LanguageModelTrainer(Trainer):  # type: ignore[misc]
    """Hugging Face's Trainer, evaluating in bits per byte over the whole held-out text.

    It stops before a step whose loss or gradient is not finite, and before it writes weights that
    are not finite.
    """

    def __init__(
        self, *, heldout: TokenFile, context: int, legs: Sequence[Leg], schedule: str, **kwargs: Any
    ):
        super().__init__(eval_dataset=heldout, **kwargs)
        self.heldout, self.context, self.legs, self.schedule = heldout, context, legs, schedule
        self.step_losses: list[Tensor] = []
        self.carried: CarriedStates | None = None
        self.add_callback(StopWhereDiverged(self))
        self.add_callback(ApplyNewSettings(self))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        base = self.legs[0].peak  # the scheduler returns multiples of it
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda done: rate_at(self.legs, self.schedule, done) / base,
        )
        self.lr_scheduler = scheduler
        return scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those with weight decay: without the rates of Mamba-2's decays, as there."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(".A_log")]

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **options)
        self.step_losses.append(loss)
        return loss

    def carry_states(self, start: Path | None) -> None:
        """Let each window start from the state of its row, at first those in checkpoint `start`."""
        with self.compute_loss_context_manager():
            self.carried = CarriedStates(
                self.accelerator.unwrap_model(self.model),
                batch=self.args.per_device_train_batch_size,
                accumulate=self.args.gradient_accumulation_steps,
                context=self.context,
                process=self.args.process_index,
                processes=self.args.world_size,
            )
        if start is not None:
            self.carried.load(start)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        inputs = {**inputs, "skip_logits": True}
        if self.carried is None:
            return super().compute_loss(model, inputs, return_outputs, **options)
        past = self.carried.arguments(inputs["fresh"])
        inputs = {name: value for name, value in inputs.items() if name != "fresh"}
        loss, outputs = super().compute_loss(model, {**inputs, **past}, True, **options)
        self.carried.keep(past["past_key_values"])
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with self.compute_loss_context_manager():
            nats, count = windowed(
                self.model_wrapped if self.is_fsdp_enabled else model,
                self.heldout,
                self.context,
                batch_size=self.args.per_device_eval_batch_size,
                rank=0 if self.is_fsdp_enabled else self.args.process_index,
                processes=1 if self.is_fsdp_enabled else self.args.world_size,
            )
        total = torch.tensor([nats, count], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            total = self.accelerator.reduce(total)
        nats, count = total.tolist()
        if not math.isfinite(nats):
            raise self.diverged(self.state.global_step, f"the held-out loss is {nats:g}")
        check_scored(int(count), self.heldout)
        metrics = {
            f"{metric_key_prefix}_loss": nats / count,
            f"{metric_key_prefix}_bits_per_byte": nats / math.log(2) / self.heldout.text_bytes,
        }
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = control
        return metrics

    def diverged(self, step: int, what: str) -> Diverged:
        """The error for a run that diverged, with advice and the last checkpoint."""
        output = Path(self.args.output_dir)
        whole = whole_checkpoints(output)
        rate = rate_at(self.legs, self.schedule, max(step - 1, 0))
        go_on = (
            f"the last checkpoint before is {whole[-1]}: continue from it with --resume"
            " --learning-rate LOWER"
            if whole
            else "no checkpoint was written before"
        )
        return Diverged(
            f"step {step}: {what}: training diverged; lower --learning-rate (there {rate:.2g}) or"
            f" --clip; {go_on}"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with ``use_cache`` on, which training turns off."""
        config = self.accelerator.unwrap_model(self.model).config
        before, config.use_cache = config.use_cache, True
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            config.use_cache = before

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        step = self.state.global_step
        if not all_agree(all(map(_is_finite, self.model.parameters())), self.args):
            raise self.diverged(step, "the weights are not finite")
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        with remove_if_full(folder, step):
            if self.is_world_process_zero():
                (folder / WHOLE).unlink(missing_ok=True)  # of an earlier checkpoint
            super()._save_checkpoint(*arguments, **options)
            if self.carried is not None:
                self.carried.save(folder)


def _local_shard(tensor: Tensor) -> Tensor:
    """The shard of this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_local_shard(tensor)).all())


@contextmanager
def remove_if_full(folder: Path, step: int) -> Iterator[None]:
    """Remove `folder` if the disk is full, and say so in the error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error, folder.parent):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        for left in folder.parent.glob("*.tmp"):
            left.unlink(missing_ok=True)
        whole = whole_checkpoints(folder.parent)
        last = f"{whole[-1].name} is whole" if whole else "there is no checkpoint yet"
        raise ValueError(
            f"output: no space left for {folder} after step {step}; {last}; make room, then"
            f" continue with: cumulant train --output {folder.parent} --resume"
        ) from error


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether the disk was full: by error number, by message, or by its free space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(
            words in str(error) for words in ("No space left", "quota exceeded", "File too large")
        ):
            return True
        if "unexpected pos" in str(error):  # torch.save found fewer bytes than it wrote
            return True
        if (
            "PytorchStreamWriter failed writing" in str(error)
            and shutil.disk_usage(folder).free < 2**20
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


class StopWhereDiverged(TrainerCallback):  # type: ignore[misc]
    """Stops before an optimizer step if a loss or gradient is not finite in any process."""

    def __init__(self, trainer: LanguageModelTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, **_: Any
    ) -> None:
        losses, self.trainer.step_losses = self.trainer.step_losses, []
        loss = float(torch.stack([x.float() for x in losses]).sum()) if losses else 0.0
        norm = _gradient_norm(p.grad for p in self.trainer.model.parameters() if p.grad is not None)
        if all_agree(math.isfinite(loss) and math.isfinite(norm), args):
            return
        what = f"the loss is {loss:g}" if not math.isfinite(loss) else "the gradient is not finite"
        if math.isfinite(loss) and math.isfinite(norm):
            what = "the loss of another process is not finite"
        raise self.trainer.diverged(state.global_step + 1, what)


def _gradient_norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([_local_shard(t) for t in tensors]))


class ApplyNewSettings(TrainerCallback):  # type: ignore[misc]
    """Replaces the settings that a checkpoint remembers by those of this command."""

    def __init__(self, trainer: LanguageModelTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # between logs, evaluations and checkpoints
        rate = rate_at(self.trainer.legs, self.trainer.schedule, state.global_step)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = rate
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step:  # the folder may have moved
            state.best_model_checkpoint = str(best) if best.is_dir() else None


class MarkWhole(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint as complete once every process has written its files."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        all_agree(True, args)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            with remove_if_full(folder, state.global_step):
                mark_whole(folder, state.global_step)


class ProgressBar(ProgressCallback):  # type: ignore[misc]
    """A progress bar for terminals."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Leave logs to `LossLines`."""


class LossLines(TrainerCallback):  # type: ignore[misc]
    """Prints about twenty lines on the loss, and one for each evaluation."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.next_line = say, 0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs and state.global_step >= self.next_line:
            self.next_line = state.global_step + max(1, state.max_steps // 20)
            loss, rate = float(logs["loss"]), float(logs["learning_rate"])
            self.say(f"step {state.global_step:>6}  loss {loss:.4f}  lr {rate:.2e}")
        elif "eval_bits_per_byte" in logs:
            bits = float(logs["eval_bits_per_byte"])
            self.say(f"step {state.global_step:>6}  held out {bits:.4f} bits per byte")
