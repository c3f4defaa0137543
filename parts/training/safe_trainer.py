"""A Trainer that loses nothing: checkpoints count only when they are complete, a signal is obeyed, and
weights that are no numbers are never written. It knows nothing of what is trained."""

import copy
import math
import shutil
import sys
import time
from pathlib import Path

import accelerate
import psutil
import torch
import transformers
from torch.utils.serialization import config

from parts.run import checkpoints
from parts.terminal import explain_failed_write

SHORT_RUN = 100  # steps: as many as the recipe has between two evaluations
SAVING = 0.05  # of a training's time at most, where the user does not say how often


def evaluation_steps(args, max_steps: int) -> float:
    """Return the number of steps between evaluations. The recipe's number would leave a run that is no longer
    with one evaluation, at its end, and so with nothing to choose the best weights from: it gets five."""
    if args.eval_steps == SHORT_RUN >= max_steps:
        return math.ceil(max_steps / 5)
    return args.eval_steps


class SafeTrainer(transformers.Trainer):
    """It is a Trainer whose checkpoints count only when they are complete, that saves nothing after a loss
    that is no number, and that takes no further step when it continues from its last one.

    The best weights so far are kept in the CPU's memory, and go to the disk, without an optimizer's states,
    together with the next checkpoint: a run that is killed before finds the same ones again on its way from
    the last checkpoint. So a new best costs nearly nothing, and checkpoints are written as often as their
    share of the time allows.
    """

    sealing: checkpoints.Sealer | None = None  # the thread that writes the last checkpoint's manifest
    state_bytes: float = 0  # of the optimizer, that go into each checkpoint
    kept: list[torch.Tensor] | None = None  # `parts` as they were at the best evaluation
    unsaved: list[Path] = []  # the folder of what is kept, as long as it is not there yet
    # By the clock of the first process, which decides: when the training began or the last save ended, when
    # that one began, and the seconds that one takes.
    rested_since = save_begun = save_seconds = 0.0
    saved_step = -1  # of the checkpoint last written, or continued from
    interruption = None  # the Interruption that this training listens to, if any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Trainer's own arguments, in which what is done here is switched off; the user's are not written to.
        self.args = copy.copy(self.args)
        # It would delete an older checkpoint before the new one has its manifest; the Sealer does so later.
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.add_callback(Stopping(self))

    def interrupted(self) -> bool:
        """Return whether any process was asked to stop; all call this together."""
        return self.interruption is not None and self.interruption.requested()

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        stopped = self.interruption is not None and self.interruption.acted
        if stopped and self.is_world_process_zero():
            saved = f"第 {self.saved_step} 步的检查点在 {self.args.output_dir}"
            print(f"\n已中断：{saved}；同一命令会从这里继续。", file=sys.stderr)
        # Without a step the weights are the base model's, and would be saved as if they were trained.
        if not (stopped or self.state.global_step):
            raise SystemExit("错误：一步也没有训练，什么都没有保存；请检查数据的行数和 --max_steps。")
        if not stopped:
            self.take_best()
        return output

    def check_space(self) -> None:
        """Raise SystemExit when the disk will not hold the checkpoints that are kept (at most `limit`, but
        the best and the newest always), the one that is written before an older one goes, and the final
        weights."""
        most = max(self.limit or math.inf, 2) + 1  # the best, the newest, the one being written
        count = min(most, math.ceil(self.state.max_steps / (self.state.save_steps or self.state.eval_steps)))
        weights = self.trained_bytes()
        # Beside the final ones, or while a checkpoint is written an older best, there are the best weights.
        checkpoints.check_space(self.args.output_dir, count, weights + self.state_bytes, 2 * weights)

    def describe_saving(self, folder: str | Path, eval_steps: float) -> str:
        """Try what a checkpoint takes on the disk of `folder`, and say it, and what a kill costs at most."""
        size, lost = self.trained_bytes() + self.state_bytes, f" {self.args.save_steps:.0f} 步"
        with explain_failed_write(folder):
            self.save_seconds = checkpoints.seconds_to_save(folder, size)
        if not self.args.save_steps:
            lost = f"约 {math.ceil(self.save_seconds / SAVING / 60)} 分钟再加 {eval_steps:.0f} 步"
        takes = f"一个检查点 {size / 1e9:.2f} GB，约 {self.save_seconds:.1f} 秒"
        return f"保存：{takes}；kill -9 或断电最多损失{lost}的训练，Ctrl-C 不损失。"

    def _determine_best_metric(self, metrics, trial) -> bool:
        # Trainer asks this after each evaluation of a training, and then looks whether it should save.
        better, state = super()._determine_best_metric(metrics, trial), self.state
        # At the end a checkpoint would be for nothing, and one that is still written would be waited for.
        due = not (self.control.should_training_stop or (self.sealing and self.sealing.is_alive()))
        if due:
            self.finish_checkpoint()
            due = self.save_seconds <= SAVING * (time.perf_counter() - self.rested_since)
        room = bool(self.kept) or psutil.virtual_memory().available > 2 * self.trained_bytes()
        # The first process decides for all, by its clock and its memory.
        due, room = accelerate.utils.broadcast_object_list([due, room])
        if not self.args.save_steps:
            self.control.should_save = due
        if better:
            # Where the weights are, or will be once they are written
            state.best_model_checkpoint = str(Path(self.args.output_dir, f"checkpoint-{state.global_step}"))
            self.control.should_save |= not room
            if room:
                self.keep()
        return better

    def parts(self) -> list[torch.Tensor]:
        """Return the trained weights, or what this process holds of them."""
        return [p.detach() for p in self.model.parameters() if p.requires_grad]

    def keep(self) -> None:
        """Copy the weights, as the best ones so far, into the CPU's memory."""
        self.kept = self.kept or [torch.empty_like(part, device="cpu") for part in self.parts()]
        for kept, part in zip(self.kept, self.parts()):
            kept.copy_(part)
        self.unsaved = [Path(self.state.best_model_checkpoint)]

    def exchange(self) -> None:
        """Let the model's weights and those that are kept change places."""
        for kept, part in zip(self.kept, self.parts()):
            now = part.to("cpu", copy=True)
            part.copy_(kept)
            kept.copy_(now)

    def take_best(self) -> None:
        """Give the model the best weights: those that are kept, else a checkpoint's from before this command.
        Where that was damaged meanwhile the last step's stay, and all that is said is of them."""
        best = self.state.best_model_checkpoint
        if self.kept:
            self.exchange()
        elif best and (damage := checkpoints.find_damage(Path(best), hashes=True)):
            print(f"最好的检查点 {best} {damage}：改为保存最后一步的权重。")
            self.state.best_model_checkpoint = None
        elif best:
            self._load_from_checkpoint(best)

    def trained_bytes(self) -> int:
        """Return the bytes of the trained weights, and so of their gradients."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def finish_checkpoint(self) -> None:
        """Wait for the manifest of the last checkpoint. Raise SystemExit where it could not be written."""
        if self.sealing:
            self.sealing.join()
            with explain_failed_write(self.sealing.checkpoint):
                if self.sealing.error:
                    raise self.sealing.error
            self.rested_since, self.sealing = self.sealing.ended, None
            self.save_seconds = self.rested_since - self.save_begun

    def _save_checkpoint(self, model, trial):
        step = self.saved_step = self.state.global_step
        self.check_weights()
        checkpoint = Path(self.args.output_dir, f"checkpoint-{step}")
        # The best weights first, as the checkpoint counts only with them; they may be its own.
        written = list(dict.fromkeys([*self.unsaved, checkpoint]))
        if not self.args.process_index:
            self.finish_checkpoint()
            self.save_begun = time.perf_counter()
            for folder in checkpoints.folders(self.args.output_dir):
                # An earlier attempt was here already: this run went on from an older checkpoint.
                if checkpoints.step_of(folder) >= step or folder in written:
                    shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        try:
            # torch.save is held up by its CRC (0.5 GB/s against 1.5), and the manifest has better checksums.
            with explain_failed_write(checkpoint), config.patch("save.compute_crc32", False):
                for best in written[:-1]:
                    # To be asked, not to be continued from: the weights alone
                    self.exchange()
                    self.save_model(str(best), _internal_call=True)
                    self.exchange()
                    if not self.args.process_index:
                        self.state.save_to_json(str(best / checkpoints.FINISHED_MARK))
                super()._save_checkpoint(model, trial)
        except SystemExit:
            # A disk that is full needs the room of the part that was written.
            for folder in written:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self.unsaved = []
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if not self.args.process_index:
            self.sealing = checkpoints.Sealer(written, self.state.best_model_checkpoint, self.limit)

    def _run_epoch(self, *args, **kwargs):
        # Continued from its last checkpoint, Trainer would take one step more.
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        # This is behind the evaluation that may be due at the step, whose checkpoint may be there already.
        if self.interrupted():
            self.control.should_training_stop = self.interruption.acted = True
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)
        self.finish_checkpoint()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        self.check_finite(logs)

    def check_weights(self) -> None:
        """Raise SystemExit when one of the trained weights is infinite or no number."""
        # A loss is that of the weights before its step; what the last step made of them, they alone tell.
        sums = [part.sum(dtype=torch.float32) for part in self.parts()]
        # Else the process with the ruined part would stop alone.
        total = accelerate.utils.reduce(torch.stack(sums).sum())
        self.check_finite({"weights": total.item()})

    def check_finite(self, numbers: dict[str, float]) -> None:
        """Raise SystemExit, before anything is saved, when one of these is infinite or no number: the weights
        are ruined, or will be at the next step."""
        names, remedy = ["loss", "grad_norm", "eval_loss", "weights"], "更小的 --learning_rate"
        if scaler := self.accelerator.scaler:
            remedy += " 或 --fast_kernels false（float32）"
            # A step that overflows in float16 is skipped, and the loss is scaled by half as much from then
            # on. It starts at 65,536: after 17 steps in a row there is nothing left to gain.
            if scaler.get_scale() >= 1:
                names = ["eval_loss", "weights"]
        for name in names:
            if not math.isfinite(numbers.get(name, 0)):
                self.finish_checkpoint()
                good = checkpoints.find_intact(self.args.output_dir)
                rate = numbers.get("learning_rate", self._get_learning_rate())
                if self.args.process_index:  # all processes stop, the first one says so
                    raise SystemExit(1)
                raise SystemExit(
                    f"错误：到第 {self.state.global_step} 步 {name} 成了 {numbers[name]}（学习率 {rate:g}），"
                    f"训练停止，这之后的权重没有保存。最近的好检查点：{good[-1] if good else '还没有'}。"
                    f"请用{remedy}，并换一个 --output_dir 重新训练。"
                )


class Stopping(transformers.TrainerCallback):
    """It ends a training where a signal asks for it, and looks before the first step whether the disk has
    room for its checkpoints."""

    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.saved_step = state.global_step
        state.eval_steps = evaluation_steps(args, state.max_steps)
        if state.is_world_process_zero:
            self.trainer.check_space()
            print(self.trainer.describe_saving(args.output_dir, state.eval_steps))
        self.trainer.rested_since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        # The checkpoint is written in _run_epoch, behind the evaluation that may be due at this step.
        control.should_training_stop |= self.trainer.interrupted()

    def on_epoch_end(self, args, state, control, **kwargs):
        cut_off = state.epoch % 1 > 0 and state.global_step < state.max_steps
        # Trainer takes a loop that was left for the end of an epoch, and would evaluate and save.
        if cut_off and self.trainer.interrupted():
            control.should_evaluate = control.should_save = False


class BestCheckpoint(transformers.EarlyStoppingCallback):
    """It stops early with the patience of this command, not of the one that was interrupted, and looks for
    the best checkpoint where the output folder is now, not where it was then."""

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer has restored the interrupted command's patience by now, and its count, which goes on.
        self.early_stopping_patience = args.early_stopping_patience or sys.maxsize
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)


def same_random_states(device: torch.device):
    """Return a context behind which, also after an error, torch draws as if nothing had been drawn inside."""
    devices = [] if device.type == "cpu" else [device]  # beside the CPU, which is always one of them
    return torch.random.fork_rng(devices, device_type=device.type)
