"""Console, TensorBoard and JSON lines behind one object: every tag and line of output is here.

`run` is train_improved.Run, with every default of its configuration decided.
"""

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from basics import words
from basics.words import marked, plain
from checkpointing import run_folders
from monitoring import energy, health, jsonl_log, notify, summary
from training import sharding
from training.schedule import last_stable_step


def due(freq: int, state, cfg) -> bool:
    """Return whether this step number is a multiple of `freq` (0: never), or the last."""
    return freq > 0 and (state.step % freq == 0 or state.step == cfg.max_steps)


def evaluation_due(state, cfg) -> bool:
    """Return whether this step number has an evaluation that is not complete yet."""
    freqs = (cfg.eval_freq, cfg.hellaswag_freq, cfg.sample_freq)
    return state.evaluated_step != state.step and any(due(freq, state, cfg) for freq in freqs)


def checkpoint_due(state, cfg) -> bool:
    """Return whether this step number gets a checkpoint, whatever else asks for one."""
    at_the_end_at_least = cfg.checkpoint_freq or cfg.max_steps
    regular = state.step > 0 and due(at_the_end_at_least, state, cfg)
    return regular or state.step == last_stable_step(cfg)


def indented(sample: str) -> str:
    """Return what a model wrote, for a screen and a log file: it knows all control characters, and
    with one of them in it grep takes the file for binary."""
    return "\n".join(f"    {line}" for line in plain(sample).splitlines())


class NoLog:
    """Stands for a log that nobody asked for: takes everything and keeps nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Monitor:
    """Prints and logs what a run does; on ranks other than 0 nothing.

    `peak_flops`: what one device can do, FLOP/s.
    """

    # Groups and charts of the custom-scalars tab.
    LAYOUT: ClassVar = {
        "Training": {
            "Loss": ["Loss/train", "Loss/validation"],
            "Learning rate": ["Learning_Rate/lr"],
            "Tokens seen": ["Training/tokens"],
        },
        "Stability": {
            "Gradient norm": ["Gradient/norm", "Gradient/norm_unclipped"],
            "Skipped updates and roll-backs": ["Training/skipped_updates", "Training/rollbacks"],
            "Update-to-weight ratio": ["Update_Ratio/.*"],
            "Warnings": ["Health/warnings", "Performance/warnings"],
        },
        "Speed": {
            "Tokens per second": ["Performance/tokens_per_sec"],
            "Step time (ms)": ["Performance/step_time_ms"],
            "MFU": ["Performance/mfu"],
            "Hours left": ["Performance/eta_hours"],
            "Cost so far": ["Performance/device_hours", "Performance/kwh"],
        },
        "Evaluation": {
            "HellaSwag": ["Evaluation/hellaswag_accuracy"],
            "Validation loss by position": ["Loss_by_Position/.*"],
        },
    }
    METRICS = ("Loss/validation", "Loss/validation_best", "Evaluation/hellaswag_accuracy")
    COLUMNS = ("max_lr", "max_steps", "model", "optimizer", "total_batch_size")  # HParams at first
    POSITIONS = 8  # parts of the context in Loss_by_Position
    LINE_EVERY = 10  # steps between lines where there is no progress bar
    BAR = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt}{postfix}"  # fits into 80 columns

    def __init__(self, run, peak_flops: float, outside: notify.Outside):
        cfg, state = run.cfg, run.state
        self.cfg, self.state, self.active = cfg, state, run.dist.is_main
        self.peak_flops = peak_flops * run.dist.world_size
        self.flops_per_token = run.model.flops_per_token()
        self.tensorboard, self.json_lines, self.lines_from = NoLog(), NoLog(), state.step
        # With a bar there are no lines. `> train.log` and `| tee` get lines.
        self.has_bar = self.active and sys.stderr.isatty() and sys.stdout.isatty()
        self.bar = tqdm(
            total=cfg.max_steps,
            initial=state.step,
            bar_format=self.BAR,
            dynamic_ncols=True,
            disable=not self.has_bar,
        )
        self.recent_seconds = deque(maxlen=100)  # of steps: the time that is left is not their last
        self.micro_batch_size = cfg.micro_batch_size
        self.outside, self.best_hellaswag = NoLog(), state.hellaswag
        if not self.active:
            return
        self.outside = outside
        outside.open(cfg.run_name, self.say)
        self.health = health.Health(run, summary.speed_depends_on(run))
        self.meter = energy.EnergyMeter(run.dist.device)
        self.folder = run_folders.run_folder(Path(cfg.tensorboard_dir), cfg.run_name)
        fresh = state.step == 0 and state.evaluated_step < 0
        first_step = 0 if fresh else state.step + 1
        elsewhere = run.resumed_from is not None and not run.resumes_own_name
        if cfg.log_jsonl:
            self.json_lines = jsonl_log.JsonLinesLog(
                self.folder / "metrics.jsonl", first_step, self.of_log, new_timeline=elsewhere
            )
        if cfg.use_tensorboard:
            from monitoring.tensorboard_log import TensorBoardLog  # not loaded without the flag

            self.tensorboard = TensorBoardLog(
                self.folder, first_step, self.of_log, new_timeline=elsewhere
            )
            charts = {
                # tags are regular expressions there: without $ validation brings validation_best
                group: {
                    title: ["Multiline", [f"{t}$" for t in tags]] for title, tags in charts.items()
                }
                for group, charts in self.LAYOUT.items()
            }
            self.tensorboard.layout(charts)
            fields = [f for f in dataclasses.fields(cfg) if f.metadata["in_file"]]
            numeric = [f.name for f in fields if f.type in (int | None, float | None)]
            values = {f.name: getattr(cfg, f.name) for f in fields}
            self.tensorboard.hparams(values, self.METRICS, numeric, self.COLUMNS)

    def say(self, text: str) -> None:
        """Print a text on rank 0; in a log file with the time of day."""
        if not self.active:
            return
        if self.has_bar:
            tqdm.write(marked(text))
        elif "\n" in text:
            print(marked(text), flush=True)
        else:
            print(f"{datetime.now():%m-%d %H:%M:%S}  {marked(text)}", flush=True)

    def tell(self, event: str, text: str) -> None:
        """Print a text, and tell it to whom --notify names."""
        self.say(text)
        self.outside.tell(event, text, self.state.step)

    def begin(self, run) -> None:
        """Tell that training begins, from where, and what is missing."""
        if not self.active:
            return
        cfg, step = self.cfg, self.state.step
        text = f"{cfg.model}, {cfg.max_steps:,} steps of {cfg.total_batch_size:,} tokens, on "
        text += f"{run.dist.world_size} x {summary.device_name(run.dist.device)}"
        if run.resumed_from is not None:
            text += f"; from step {step:,} of {run.resumed_from}"
            with contextlib.suppress(OSError):  # it may be on another machine's disk
                age = words.duration(time.time() - run.resumed_from.stat().st_mtime)
                text += f", saved {age} ago: what came after it is done again"
        self.outside.start("resumed" if run.resumed_from else "started", text, step)
        if not run.hellaswag_items and cfg.hellaswag_freq:
            self.say(
                f"HellaSwag is off, {cfg.hellaswag_file} is not there: get it (12 MB) with "
                "python src/hellaswag.py --download"
            )

    def leave(self, event: str, text: str, well: bool) -> None:
        """Tell how the run ended; `well`: as somebody wanted."""
        self.outside.end(event, text, self.state.step, well)

    def announce(self, text: str) -> None:
        """Take a word from what runs behind the loop; a warning is told, too."""
        self.tell("not saved", text) if text.startswith("WARNING") else self.say(text)

    def of_log(self, text: str) -> None:
        """Take a word from a log: that it stopped at a full disk, and that it is back, is told."""
        if " stopped (" in text:
            self.tell("logging paused", text)
        elif " is back " in text:
            self.tell("over: logging paused", text)
        else:
            self.say(text)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.tensorboard.scalars(values, step)
        self.json_lines.scalars(values, step)

    def warnings_and_cost(self, run) -> dict[str, float]:
        """Return how many warnings are on, and the cost so far: for every check and evaluation."""
        state = run.state
        values = {
            "Health/warnings": self.health.active(timed=False),
            "Performance/warnings": self.health.active(timed=True),
            "Performance/device_hours": state.device_seconds / 3600,
        }
        if self.meter.works:
            values["Performance/kwh"] = state.watt_seconds / 3.6e6
        return values

    def energy(self) -> float:
        """Return the joules that the devices used since the last call; 0 if they do not report."""
        return self.meter.take() if self.active else 0.0

    def print_and_log_warnings(self, warnings: list[tuple[health.Check, str]], step: int) -> None:
        """Say warnings; log those about speed under another tag, as two equal runs differ there."""
        for check, text in warnings:
            begins = text.startswith("WARNING")
            self.tell(f"{'warning' if begins else 'over'}: {check.name}", text)
        for timed, tag in ((False, "Health/warnings"), (True, "Performance/warnings")):
            texts = [text for check, text in warnings if check.timed == timed]
            if texts:
                self.tensorboard.text(tag, "\n".join(texts), step)

    def step(
        self, run, loss: float, norm: float, bad: bool, lr: float, seconds: float,
        norms: list[float],
    ) -> None:  # fmt: skip
        """Report a finished step. norms: of its update and of the weights at a check, else []."""
        cfg, state = self.cfg, run.state
        if not self.active:
            return
        self.recent_seconds.append(seconds)
        if cfg.micro_batch_size != self.micro_batch_size:
            text = f"--micro_batch_size {self.micro_batch_size} did not fit, now it is "
            self.outside.tell("out of memory", f"{text}{cfg.micro_batch_size}", state.step)
            self.micro_batch_size = cfg.micro_batch_size
        rate = cfg.total_batch_size / seconds
        mfu = rate * self.flops_per_token / self.peak_flops
        left = (cfg.max_steps - state.step) * statistics.median(self.recent_seconds)
        applied = min(norm, cfg.grad_clip) if cfg.grad_clip and not math.isnan(norm) else norm
        values = {
            "Loss/train": loss,
            "Learning_Rate/lr": lr,
            "Gradient/norm": 0.0 if bad else applied,
            "Gradient/norm_unclipped": norm,
            "Performance/step_time_ms": 1000 * seconds,
            "Performance/tokens_per_sec": rate,
            "Performance/mfu": mfu,
            "Performance/eta_hours": left / 3600,
            "Performance/goodput": state.train_seconds / max(state.total_seconds, 1e-9),
            "Training/epoch": state.position / run.train_data.num_windows,
            "Training/tokens": state.tokens,
            "Training/skipped_updates": state.skipped_updates,
            "Training/rollbacks": state.rollbacks,
        }
        if run.dist.device.type == "cuda":
            values["Performance/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        warnings = self.health.step(loss, norm, bad, lr, seconds, norms)
        if run.dist.peers is not None and health.check_due(state.step):
            warnings += self.health.compare(run.dist.peers.work_by_process())
        if norms and not bad:
            ratios = self.health.layer_ratios(norms)
            values |= {f"Update_Ratio/{layer}": ratio for layer, ratio in ratios.items()}
        if health.check_due(state.step) and not evaluation_due(state, cfg):
            values |= self.warnings_and_cost(run)
        self.scalars(values, state.step)
        self.print_and_log_warnings(warnings, state.step)
        self.outside.step(state.step, loss, seconds, lambda: self.numbers(loss, rate, left))
        time_left = words.duration(left)
        if self.has_bar:
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, {rate:,.0f} tok/s, {time_left} left", refresh=False
            )
            self.bar.update(state.step - self.bar.n)
        elif state.step % self.LINE_EVERY == 0 or state.step - self.lines_from <= 3:
            self.say(
                f"step {state.step:>5}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} "
                f"| norm {norm:.2f} | {1000 * seconds:,.0f} ms | {rate:,.0f} tok/s "
                f"| {time_left} left"
            )

    def numbers(self, loss: float, rate: float, left: float) -> str:
        """Return where the run is, for a digest."""
        state = self.state
        text = f"step {state.step:,} of {self.cfg.max_steps:,}, loss {loss:.4f}"
        if math.isfinite(state.validation_loss):
            text += f", validation loss {state.validation_loss:.4f}"
        if state.hellaswag >= 0:
            text += f", HellaSwag {state.hellaswag:.4f}"
        return f"{text}; {rate:,.0f} tokens/s, {words.duration(left)} left"

    def evaluation(self, run, by_position, texts: list[str], seconds: float) -> None:
        """Report what `evaluate` found: validation loss (T,) or None, sample texts."""
        state, cfg, line = run.state, self.cfg, []
        if not self.active:
            return
        values = {}
        if by_position is not None:
            values["Loss/validation"] = state.validation_loss
            values["Loss/validation_best"] = state.best_loss
            line.append(f"validation loss {state.validation_loss:.4f}")
            if state.step and state.validation_loss == state.best_loss:
                self.outside.best("validation loss", state.step, state.best_loss)
            for part in torch.arange(cfg.seq_len).tensor_split(min(self.POSITIONS, cfg.seq_len)):
                name = "-".join(f"{position:04d}" for position in part[[0, -1]].tolist())
                values[f"Loss_by_Position/{name}"] = float(by_position[part].mean())
        scored = bool(run.hellaswag_items) and due(cfg.hellaswag_freq, state, cfg)
        if scored:
            values["Evaluation/hellaswag_accuracy"] = state.hellaswag
            line.append(f"HellaSwag {state.hellaswag:.4f} of {len(run.hellaswag_items)} items")
        if scored and state.hellaswag > self.best_hellaswag:
            self.best_hellaswag = state.hellaswag
            self.outside.best("HellaSwag", state.step, state.hellaswag)
        loss = None if by_position is None else state.validation_loss
        warnings = self.health.evaluation(loss, state.hellaswag if scored else None)
        self.scalars(values | self.warnings_and_cost(run), state.step)
        if line:
            self.say(f"step {state.step:>5}: {', '.join(line)} ({seconds:.1f} s)")
        self.print_and_log_warnings(warnings, state.step)
        for text in texts:
            self.say(f"step {state.step:>5} sample:\n{indented(text)}")
        if texts:
            self.tensorboard.text("Generated_Samples/text", "\n\n---\n\n".join(texts), state.step)

    def histograms(self, model, step: int) -> None:
        """Log the distributions of every weight, and of its gradient as it was applied."""
        tensors = {}
        for name, p in model.named_parameters():
            tensors[f"Parameters/{name}"] = p.detach()
            if p.grad is not None:
                tensors[f"Gradients/{name}"] = p.grad
        if sharding.is_sharded(model):  # on all ranks: put together, for rank 0, on its host
            tensors = {name: self._gathered(tensor) for name, tensor in tensors.items()}
        if not self.active:
            return
        self.tensorboard.histograms(tensors, step)

    def _gathered(self, tensor):
        tensor = sharding.whole(tensor)
        return tensor.cpu() if self.active else None

    def rewind(self, first_step: int) -> None:
        """Go on at first_step after a roll-back: what was logged beyond it disappears."""
        self.tensorboard.rewind(first_step)
        self.json_lines.rewind(first_step)
        self.bar.n = first_step - 1

    def flush(self) -> None:
        self.tensorboard.flush()
        self.json_lines.flush()

    def close(self, finished: bool) -> None:
        if self.active:
            self.meter.close()
        if finished:
            self.tensorboard.hparams_end()
        self.tensorboard.close()
        self.json_lines.close()
        self.bar.close()
