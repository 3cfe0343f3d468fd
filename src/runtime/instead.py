"""What a command may do instead of training: print its configuration, show the plan, examine.

`program` is handed in by the script, which alone knows its flags, its defaults and its model.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

from basics import terminal
from basics.words import marked
from monitoring import summary
from runtime import machine
from runtime.flags import CommandLine, to_toml


@dataclass(frozen=True)
class Program:
    """What is to be planned and tried."""

    command: CommandLine
    config_class: type
    set_up: Callable  # flags -> (planned run, checkpoint); ValueError, OSError if it cannot begin
    resolve: Callable  # (config, device type, training tokens): decide what was not given
    recipes: dict  # name -> its flags and shares
    reference: dict  # flags of the reference run
    sample_dir: str
    model_class: type
    make_optimizer: Callable  # (model, config) -> optimizer
    prepare_pass: Callable  # (run, whether compiling was asked for) -> training pass
    forward_backward: Callable  # (run, training pass, ids, poll): one micro-batch's gradients

    @property
    def flags(self):
        """Return a configuration of the flags given, undecided."""
        return self.config_class(**self.command.values())

    def plan(self):
        """Return the planned run of this command; nothing is built."""
        return self.set_up(self.command.values() | {"dry_run": True})[0]

    def new_model(self, cfg):
        """Return (model, optimizer) of a configuration."""
        model = self.model_class(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
        return model, self.make_optimizer(model, cfg)


def print_config(program: Program) -> None:
    """Print every flag as decided, as TOML on stdout; what else is said goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        run = program.plan()
    if run.dist.is_main:
        decided = dataclasses.replace(run.cfg, run_name=program.flags.run_name)
        title = "for --config; in comments what is decided anew where this is read"
        print(to_toml(decided, run.flags_ever_given, title), end="")
        terminal.check_output()
    run.dist.leave()


def show_plan(program: Program, run) -> None:
    """Print the rest of --dry_run: whether memory suffices, a new plan under each recipe, and every
    flag as decided."""
    if run.dist.is_main and (warning := summary.memory_warning(run)):
        print(marked(f"\nWARNING {warning}"), flush=True)
    if run.dist.is_main and run.resumed_from is None:
        print(f"\n{summary.recipes(compare_recipes(program, run))}", flush=True)
    if run.dist.is_main:
        flags = summary.every_flag(run.cfg, program.command.values())
        print(f"\nevery flag as decided:\n{flags}", flush=True)
    run.dist.leave()


def compare_recipes(program: Program, run) -> dict[str, tuple]:
    """Return {recipe: (this command's plan under it, its hours at a speed measured now)}."""
    device, plans = run.dist.device, {}
    speed = machine.measure_speed(program.model_class, run.cfg, device, run.autocast)
    kept = ("model", "n_layer", "n_head", "n_embd", "seq_len", "data_dir")
    kept = {name: getattr(run.cfg, name) for name in kept}
    for name, recipe in program.recipes.items():
        cfg = program.config_class(**recipe["flags"] | program.command.values(recipe=name) | kept)
        program.resolve(cfg, device.type, run.train_data.num_tokens)
        tokens = cfg.max_steps * cfg.total_batch_size
        plans[name] = cfg, tokens / (speed * run.dist.world_size) / 3600
    return plans
