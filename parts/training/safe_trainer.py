"""A Trainer that loses nothing: checkpoints count only when whole, a signal is obeyed, and weights that are
no numbers are never written. Knows nothing of what is trained."""

import copy
import math
import shutil
import sys
from pathlib import Path

import torch
import transformers

from parts.run import checkpoints
from parts.terminal import explain_failed_write


class SafeTrainer(transformers.Trainer):
    """Trainer whose checkpoints count only when they are complete, that saves nothing after a loss that is no
    number, and that takes no further step when it continues from its last one."""

    sealing: checkpoints.Sealer | None = None
    state_bytes: float = 0  # of the optimizer, that go into each checkpoint
    saved_step = -1  # of the checkpoint last written, or continued from
    interruption = None  # the Interruption that this training listens to, if any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args = copy.copy(self.args)  # Trainer's own, in which what is done here is switched off
        # It would delete before there is a manifest.
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.add_callback(Stopping(self))

    def interrupted(self) -> bool:
        """Whether any process was asked to stop; all call this together."""
        return self.interruption is not None and self.interruption.requested()

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        stopped = self.interruption is not None and self.interruption.acted
        if stopped and self.is_world_process_zero():
            where = f"第 {self.saved_step} 步的检查点在 {self.args.output_dir}"
            print(f"\n已中断：{where}；同一命令会从这里继续。", file=sys.stderr)
        if not (stopped or self.state.global_step):  # such weights are the base's
            raise SystemExit("错误：一步也没有训练，什么都没有保存；请检查数据的行数和 --max_steps。")
        return output

    def check_space(self) -> None:
        """Raises SystemExit when the disk will not hold the checkpoints that are kept (at most `limit`, but
        the best and the newest always), the one that is written before an older one goes, and the final
        weights."""
        most = max(self.limit or math.inf, 2) + 1  # the best, the newest, the one being written
        count = min(most, math.ceil(self.state.max_steps / self.state.save_steps))
        weights = self.trained_bytes()
        checkpoints.check_space(self.args.output_dir, count, weights + self.state_bytes, weights)

    def trained_bytes(self) -> int:
        """Return the bytes of the trained weights, and so of their gradients."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def finish_checkpoint(self) -> None:
        """Wait for the manifest of the last checkpoint."""
        if self.sealing:
            self.sealing.join()
            with explain_failed_write(self.sealing.checkpoint):
                if self.sealing.error:
                    raise self.sealing.error

    def _save_checkpoint(self, model, trial):
        args, step = self.args, self.state.global_step
        self.saved_step = step
        self.check_weights()
        checkpoint = Path(args.output_dir, f"checkpoint-{step}")
        if not args.process_index:
            self.finish_checkpoint()
            for folder in checkpoints.folders(args.output_dir):
                if checkpoints.step_of(folder) >= step:  # this run went on from an older one
                    shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        try:
            with explain_failed_write(checkpoint):
                super()._save_checkpoint(model, trial)
        except SystemExit:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if not args.process_index:
            self.sealing = checkpoints.Sealer(checkpoint, self.state.best_model_checkpoint, self.limit)

    def _run_epoch(self, *args, **kwargs):
        # Continued from its last checkpoint, Trainer would take one step more.
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        if self.interrupted():
            self.control.should_training_stop = self.interruption.acted = True
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)
        self.finish_checkpoint()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        self.check_finite(logs)

    def check_weights(self) -> None:
        sums = [p.detach().sum(dtype=torch.float32) for p in self.model.parameters() if p.requires_grad]
        self.check_finite({"weights": torch.stack(sums).sum().item()})

    def check_finite(self, numbers: dict[str, float]) -> None:
        """Stop before anything is saved when one of these is infinite or no number: the weights are ruined,
        or will be at the next step."""
        for name in ("loss", "grad_norm", "eval_loss", "weights"):
            if not math.isfinite(numbers.get(name, 0)):
                self.finish_checkpoint()
                good = checkpoints.find_intact(self.args.output_dir)
                rate = numbers.get("learning_rate", self._get_learning_rate())
                if self.args.process_index:  # all processes stop, the first one says why
                    raise SystemExit(1)
                raise SystemExit(
                    f"错误：到第 {self.state.global_step} 步 {name} 成了 {numbers[name]}（学习率 {rate:g}），"
                    f"训练停止，这之后的权重没有保存。最近的好检查点：{good[-1] if good else '还没有'}。"
                    "请用更小的 --learning_rate 和另一个 --output_dir 重新训练。"
                )


class Stopping(transformers.TrainerCallback):
    """Ends training where a signal asks for it; before it begins, looks whether the disk has room for
    checkpoints."""

    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.saved_step = state.global_step
        if state.is_world_process_zero:
            self.trainer.check_space()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.trainer.interrupted()  # and it is saved when the epoch is left

    def on_epoch_end(self, args, state, control, **kwargs):
        cut_off = state.epoch % 1 > 0 and state.global_step < state.max_steps
        if cut_off and self.trainer.interrupted():  # Trainer would evaluate and save, as at an end
            control.should_evaluate = control.should_save = False


class BestCheckpoint(transformers.EarlyStoppingCallback):
    """Early stopping with the patience of this command, not of the one that was interrupted; and the best
    checkpoint is looked for where the output folder is now, not where it was then. A state that evaluates
    better than all before is saved, whatever --save_steps says: else the best weights would be lost."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        control.should_save |= state.best_metric is None or metrics["eval_loss"] < state.best_metric

    def on_train_begin(self, args, state, control, **kwargs):
        self.early_stopping_patience = args.early_stopping_patience or sys.maxsize
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)


def same_random_states(device: torch.device):
    """Return a context behind which, also after an error, torch draws as if nothing had been drawn inside."""
    devices = [] if device.type == "cpu" else [device]  # beside the CPU
    return torch.random.fork_rng(devices, device_type=device.type)
