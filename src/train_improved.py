# PYTHON_ARGCOMPLETE_OK
"""Pre-train GPT-2 from scratch on one machine or several, and watch it learn in TensorBoard.

    python src/train_improved.py --use_tensorboard
    torchrun --standalone --nproc_per_node=4 src/train_improved.py --use_tensorboard
    python src/train_improved.py --resume latest --use_tensorboard

Reads from top to bottom: flags and their defaults, model, optimizer, training, set-up. Mechanisms
that stand alone live in the folders beside this file: runtime (how is this process run?),
monitoring (what does a person see?), checkpointing (what is on disk?), training (what acts on
tensors?), tokens (how does text become batches?), basics.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import terminal
from basics.inputs import about
from runtime import flags
from runtime.flags import COMMAND, SAME_MACHINE, flag
from runtime.supervisor import Poll, StopRequested, Supervisor, begin, end, is_lost_peer, reading

if __name__ == "__main__":
    begin()  # before the slow imports: from here on Ctrl-C leaves without a traceback

# --- Flags ----------------------------------------------------------------------------------------
# The fields of Config are the flags: one place for type, default, help and unit. None means
# "decided for you": `resolve` decides, and the start-up summary and config.json say what.

SHAPE = ("n_layer", "n_head", "n_embd", "seq_len")
PRESETS = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "seq_len": 128},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "seq_len": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "seq_len": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "seq_len": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "seq_len": 1024},
}
# The reference run (GPT-3 paper, table 2.1, for the learning rates), and a run for a laptop.
REFERENCE = {"total_batch_size": 524_288, "epochs": 5, "max_lr": 6e-4}
REFERENCE |= {"eval_freq": 250, "val_tokens": 2_097_152}
TINY = {"total_batch_size": 1024, "max_steps": 600, "max_lr": 2e-3}
TRAINING = {
    "tiny": TINY | {"eval_freq": 50, "val_tokens": 16_384},
    "gpt2": REFERENCE,
    "gpt2-medium": REFERENCE | {"max_lr": 3e-4},
    "gpt2-large": REFERENCE | {"max_lr": 2.5e-4},
    "gpt2-xl": REFERENCE | {"max_lr": 2e-4},
}
# The sample corpus is a first look: enough steps of the larger models to see the loss fall.
SAMPLE_RUN = {"total_batch_size": 16_384, "max_steps": 200, "eval_freq": 50, "val_tokens": 65_536}
# Complete recipes: flags, the peak learning rate relative to the one above, and the share of the
# length above. `fast` needs 0.35 to 0.5 of the tokens for the same loss in small runs, more in the
# longer ones (LAB_NOTES.md); that 0.6 suffice for 124M is a prediction until someone has run it.
RECIPES = {
    "reference": {"flags": {}, "max_lr": 1.0, "length": 1.0},
    "fast": {"flags": {"optimizer": "muon", "schedule": "linear"}, "max_lr": 3.0, "length": 0.6},
}
FINEWEB_DIR, SAMPLE_DIR = "data/fineweb_edu_10B", "data/sample"
WARMUP_TOKENS = 375e6  # 715 steps of the reference run
WSD_WARMUP = 100  # steps at most: where a run can be extended its length must not matter


@dataclass
class Config:
    """The fields are the flags. None: decided for you, as the help says [in brackets]."""

    # fmt: off
    model: str | None = flag(None, "size [gpt2 on a GPU, else tiny]",
        group="what most runs need", choices=tuple(PRESETS), overrides=SHAPE)
    data_dir: str | None = flag(None,
        "folder of token shards, or a mixture, a:0.7 b:0.3 "
        "[data/fineweb_edu_10B if prepared, else a small sample corpus]", several=True, path=True)
    max_steps: int | None = flag(None,
        "steps of the whole run; wins over --epochs [from it; tiny 600; else 200 on the sample]",
        least=1, derived_from="model epochs total_batch_size data_dir")
    run_name: str | None = flag(None, "of the run's folders [model and time]", resume=COMMAND)
    use_tensorboard: bool = flag(False, "log to TensorBoard", resume=COMMAND)
    resume: str | None = flag(None,
        "latest, auto (fresh if there is none) or a checkpoint's path [a new run]",
        path=True, resume=COMMAND)

    recipe: str = flag("reference",
        "reference, or fast: Muon for 0.6 of the length, a bet for gpt2; other flags win over it",
        group="model", choices=tuple(RECIPES), overrides=flags.under_recipe(RECIPES))
    n_layer: int | None = flag(None, "blocks [of the model]", least=1, derived_from="model")
    n_head: int | None = flag(None, "heads per block [of the model]", least=1, derived_from="model")
    n_embd: int | None = flag(None, "width, channels [of the model]", least=1, derived_from="model")
    seq_len: int | None = flag(None, "context length, in tokens [of the model]",
        least=1, derived_from="model")
    init_from: str | None = flag(None,
        "begin with these weights: gpt2 ... gpt2-xl or another hub id, a Hugging Face folder, a "
        "checkpoint, latest [random ones]", path=True)

    allow_data_change: bool = flag(False, "resume although the data is not what the checkpoint saw",
        group="data", resume=COMMAND)
    verify_data: bool = flag(False, "check each shard's SHA-256 before step 0", resume=COMMAND)

    total_batch_size: int | None = flag(None,
        "tokens per step, over all processes and micro-batches "
        "[524288; tiny 1024; else 16384 on the sample corpus]",
        group="batch and length", least=1, derived_from="model data_dir")
    micro_batch_size: int | None = flag(None,
        "sequences per forward pass and process [the largest that fits]",
        least=1, derived_from="total_batch_size", resume=SAME_MACHINE, learned=False)
    epochs: float | None = flag(None, "passes over the training data [5]",
        above=0, derived_from="model", overrides=("max_steps",))
    max_hours: float | None = flag(None, "save and stop cleanly after this many hours [no limit]",
        above=0, resume=COMMAND)
    seed: int = flag(1337, "of initial weights, data order and samples")

    optimizer: str = flag("adamw",
        "adamw; muon for the matrices inside the blocks; soap_muon, scaled by SOAP before that",
        group="optimizer", choices=("adamw", "muon", "soap_muon"))
    max_lr: float | None = flag(None,
        "peak learning rate [6e-4 for gpt2; tiny 2e-3; a tenth with --init_from]",
        above=0, derived_from="model")
    min_lr: float | None = flag(None,
        "learning rate of the last step [cosine a tenth of max_lr, else 0]",
        derived_from="max_lr schedule")
    schedule: str = flag("cosine",
        "after the warm-up: cosine to min_lr, linear to it, or wsd: stable, then linear to it",
        choices=("cosine", "linear", "wsd"))
    decay_share: float = flag(0.2, "share of the run in which wsd decays", above=0)
    warmup_steps: int | None = flag(None,
        "steps of linear warm-up [375M tokens, at most a tenth of the run, wsd 100 steps]",
        derived_from="max_steps total_batch_size schedule")
    weight_decay: float = flag(0.1, "share of the matrices taken away at learning rate 1")
    momentum: float = flag(0.95, "decay of Muon's momentum")
    beta1: float = flag(0.9, "decay of AdamW's first moment")
    beta2: float = flag(0.95, "decay of AdamW's second moment")
    grad_clip: float = flag(1.0, "largest gradient norm applied; 0 = no clipping")

    skip_spikes: bool = flag(False,
        "skip updates whose loss is a far outlier, not only non-finite ones", group="guard")
    spike_sigmas: float = flag(6.0, "standard deviations above the last 128 losses that are far",
        above=0)
    max_skips: int = flag(10, "skipped updates in a row before going back to a checkpoint", least=1)
    max_rollbacks: int = flag(3, "times to go back before giving up")
    hang_timeout: float = flag(900.0, "seconds without progress before a process gives up",
        above=0, resume=COMMAND)

    eval_freq: int | None = flag(None,
        "steps between evaluations; 0 = off [250; tiny and sample run 50]",
        group="evaluation", derived_from="model data_dir", learned=False)
    val_tokens: int | None = flag(None, "validation tokens read each time [2097152; tiny 16384]",
        least=1, derived_from="model data_dir", learned=False)
    hellaswag_freq: int | None = flag(None, "steps between HellaSwag scores [as sample_freq]",
        derived_from="eval_freq", learned=False)
    hellaswag_file: str = flag("data/hellaswag/hellaswag_val.jsonl",
        "HellaSwag items as JSON lines", path=True, learned=False)
    sample_freq: int | None = flag(None, "steps between text samples [eval_freq if given, or 250]",
        derived_from="eval_freq", learned=False)
    sample_prompt: str = flag("Hello, I'm a language model,", "what samples go on from",
        learned=False)
    sample_tokens: int | None = flag(None, "longest sample, in tokens [64, or what fits]",
        least=1, derived_from="sample_prompt seq_len", learned=False)
    num_samples: int = flag(2, "samples each time", least=1, learned=False)

    tensorboard_dir: str = flag("runs", "logs go to this folder/RUN_NAME",
        group="output", path=True, resume=COMMAND)
    log_jsonl: bool = flag(False, "log scalars to metrics.jsonl in that folder as JSON lines",
        resume=COMMAND)
    histogram_freq: int = flag(1000, "steps between weight and gradient histograms; 0 = off",
        learned=False)
    checkpoint_dir: str = flag("checkpoints", "checkpoints go to this folder/RUN_NAME",
        path=True, resume=COMMAND)
    checkpoint_freq: int = flag(250, "steps between checkpoints; 0 = only at the end",
        learned=False)
    keep_checkpoints: int = flag(3, "newest checkpoints kept, beside the best one",
        least=1, learned=False)
    keep_every: int = flag(0, "also keep every checkpoint at a multiple of this step; 0 = off",
        learned=False)
    decay_from: str | None = flag(None,
        "branch off a wsd run: decay at once from this checkpoint, as a new run [do not branch]",
        path=True, resume=COMMAND,
        overrides=("run_name", "recipe", "epochs", "max_steps", "warmup_steps", "decay_share"))

    notify: str | None = flag(None,
        "tell someone: addresses of Apprise (ntfy, mail, chat ...), $NAME from the environment, or "
        "'cmd: ...' [nobody]", group="when nobody looks", several="again", resume=COMMAND)
    notify_every: str = flag("24h", "time between digests with the numbers, as 24h",
        resume=COMMAND)
    heartbeat: str | None = flag(None,
        "URL to fetch once a minute while steps are made; healthchecks.io, Uptime Kuma [none]",
        resume=COMMAND)

    device: str | None = flag(None, "cuda, cpu or mps [the best there is]",
        group="machine", resume=COMMAND)
    dtype: str = flag("auto", "precision of products; auto is bfloat16 where the device has it",
        choices=("auto", "float32", "bfloat16", "float16"), resume=SAME_MACHINE)
    shard: bool = flag(False,
        "each process keeps a share of weights, gradients and moments (FSDP2), not all of them",
        resume=COMMAND)
    activation_checkpointing: bool = flag(False,
        "compute each block again in the backward pass: less memory, a third more work",
        resume=COMMAND)
    compile: bool | None = flag(None, "torch.compile the training pass [on CUDA]", resume=COMMAND)
    profile: bool = flag(False, "write a trace of steps 4 to 6 of this command to the log folder",
        resume=COMMAND)

    config: str | None = flag(None, "TOML file of flags; the command line wins [none]",
        group="before the run", path=True, resume=COMMAND, in_file=False)
    print_config: bool = flag(False, "print every flag as decided, for --config, and stop",
        resume=COMMAND, in_file=False)
    dry_run: bool = flag(False, "print the whole plan and stop", resume=COMMAND, in_file=False)
    doctor: bool = flag(False, "check machine and plan, measure speed, say what to fix, and stop",
        resume=COMMAND, in_file=False)
    # fmt: on


def read_flags() -> flags.CommandLine:
    """Read the command line and its file, once; exit code 2 and a sentence for what is wrong."""
    return flags.read_command_line(Config, (__doc__ or "").rsplit("\n\n", 1)[0], sys.argv[1:])


# PyTorch takes a second or more to load: --help and typing errors do not wait for it.
COMMAND_LINE = read_flags() if __name__ == "__main__" else None

# Threads that wait should sleep, not spin: with anything else running on the machine a CPU step is
# 2.2 times as fast (LAB_NOTES.md). Read once, when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from checkpointing import background, files, run_folders
from monitoring import health, notify, summary
from monitoring.clock import Clock
from monitoring.monitor import Monitor, checkpoint_due, due, evaluation_due
from runtime import doctor, instead, launch, machine, planning
from runtime.distributed import Distributed
from runtime.in_flight import InFlight
from runtime.passes import prepare_pass, take_less_memory
from runtime.planning import merge_config, validate
from runtime.profiling import StepWatch
from runtime.rollback import roll_back
from runtime.state import (
    TrainState,
    checkpoint_of,
    info_of,
    make_moments,
    read_checkpoint,
    restore,
    state_of,
)
from tokens import tokenizer
from tokens.loader import StepLoader
from tokens.stream import WindowSource
from tokens.tokenizer import VOCAB_SIZE
from training import evaluation, muon, sharding, soap
from training.chunked_loss import chunked_cross_entropy
from training.generation import KVCache
from training.guard import AdamW, Guard, GuardGaveUp, LossScale
from training.schedule import last_stable_step, learning_rate

# --- Configuration --------------------------------------------------------------------------------


def resolve_model(cfg: Config, device: str) -> None:
    """Decide what follows from the model's size, the device and the data there is."""
    cfg.model = cfg.model or ("gpt2" if device == "cuda" else "tiny")
    if cfg.data_dir is None:
        cfg.data_dir = FINEWEB_DIR if Path(FINEWEB_DIR, "manifest.json").exists() else SAMPLE_DIR
    defaults = PRESETS[cfg.model] | TRAINING[cfg.model]
    if cfg.data_dir == SAMPLE_DIR and cfg.model != "tiny":
        defaults |= SAMPLE_RUN
        del defaults["epochs"]  # max_steps says it
    recipe = RECIPES[cfg.recipe]
    # --init_from: what is learned already is easily lost
    rate = defaults["max_lr"] * recipe["max_lr"] * (0.1 if cfg.init_from else 1.0)
    defaults["max_lr"] = float(f"{rate:.6g}")  # 6e-05, not 5.9999999999999995e-05
    if "max_steps" in defaults:
        defaults["max_steps"] = round(defaults["max_steps"] * recipe["length"])
    if "epochs" in defaults:
        defaults["epochs"] *= recipe["length"]
    rarely = 250 if cfg.eval_freq is None else cfg.eval_freq  # for what takes longer than a loss
    for name, value in defaults.items():
        if getattr(cfg, name) is None and not (name == "max_steps" and cfg.epochs is not None):
            setattr(cfg, name, value)
    cfg.hellaswag_freq = rarely if cfg.hellaswag_freq is None else cfg.hellaswag_freq
    cfg.sample_freq = rarely if cfg.sample_freq is None else cfg.sample_freq
    if cfg.min_lr is None:
        cfg.min_lr = 0.1 * cfg.max_lr if cfg.schedule == "cosine" else 0.0
    if cfg.sample_tokens is None:
        prompt = len(tokenizer.get_tokenizer().encode_ordinary(cfg.sample_prompt))
        cfg.sample_tokens = max(1, min(64, cfg.seq_len - prompt))


def resolve_length(cfg: Config, train_tokens: int, step: int = 0, seen: int = 0) -> None:
    """Decide what follows from the amount of data, of which `seen` tokens are behind `step`."""
    if cfg.max_steps is None:
        cfg.max_steps = planning.steps_of_epochs(cfg, train_tokens, step, seen)
    if cfg.warmup_steps is None:
        longest = cfg.max_steps // 10
        if cfg.schedule == "wsd":
            longest = min(WSD_WARMUP, cfg.max_steps // 2)
        cfg.warmup_steps = min(round(WARMUP_TOKENS / cfg.total_batch_size), longest)


# --- Model ----------------------------------------------------------------------------------------
# GPT-2 as published (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, biases,
# tied embeddings. Parameter names are those of Hugging Face's GPT2LMHeadModel; linear weights are
# nn.Linear's (out, in), the transpose of Hugging Face's Conv1D.
# Shapes: B sequences, T positions, C = n_embd, V = vocabulary, N = B*T tokens.


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, mask=None, cache: KVCache | None = None, layer: int = 0):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        causal = mask is None and T > 1  # a single query may look at every key there is
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x, mask=None, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: ids (B, T) -> features (B, T, C) -> logits (..., V), or the mean loss in training."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, seq_len: int):
        super().__init__()
        self.n_layer, self.n_head, self.n_embd, self.seq_len = n_layer, n_head, n_embd, seq_len
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB_SIZE, n_embd),
                "wpe": nn.Embedding(seq_len, n_embd),
                "h": nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)]),
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, VOCAB_SIZE, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.activation_checkpointing = False
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # Two additions to the residual stream per layer: scaled so that its variance at
                # the output does not grow with depth (GPT-2 paper, section 2.3).
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Count forward and backward: 6 per weight of a product, and attention (PaLM, app. B)."""
        positions = self.transformer.wpe.weight.numel()  # looked up, not multiplied
        return 6 * (self.num_params() - positions) + 12 * self.n_layer * self.n_embd * self.seq_len

    def features(self, idx_BT, positions=None, mask=None, cache: KVCache | None = None):
        """Return the final hidden states (B, T, C), to be given to `logits` or to a loss.

        `mask` (True = may look) and `positions` (B, T) replace the causal mask and 0..T-1;
        with `cache` the ids continue what the cache holds.
        """
        start = cache.length if cache is not None else 0
        T = idx_BT.shape[1]
        assert positions is not None or start + T <= self.seq_len, (start, T, self.seq_len)
        if positions is None:
            positions = torch.arange(start, start + T, device=idx_BT.device)
        x = self.transformer.wte(idx_BT) + self.transformer.wpe(positions)
        for layer, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Return scores (..., V) in float32 for hidden states (..., C)."""
        return self.lm_head(x).float()

    def forward(self, idx_BT, targets_BT):
        """Return the mean cross-entropy of the next token, in nats, as a float32 scalar."""
        x_NC = GPT.features(self, idx_BT).view(-1, self.n_embd)  # not FSDP's (sharding.shard)
        return chunked_cross_entropy(x_NC, self.lm_head.weight, targets_BT.reshape(-1))


# --- Optimizer ------------------------------------------------------------------------------------


def make_optimizer(model: GPT, cfg: Config) -> torch.optim.Optimizer:
    """Give matrices (embeddings too) weight decay, vectors none, as GPT-3 and nanoGPT do."""
    hidden = []  # the matrices inside the blocks
    if cfg.optimizer != "adamw":
        hidden = [p for p in model.transformer.h.parameters() if p.dim() >= 2]
    taken = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Fused: one kernel, and it can skip an update without asking the host (`found_inf`, below).
    adamw = AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)
    if cfg.optimizer == "adamw":
        return adamw
    fused_qkv = {id(block.attn.c_attn.weight) for block in model.transformer.h}
    common = {"weight_decay": cfg.weight_decay, "momentum": cfg.momentum}
    muon_groups = [
        {"params": [p for p in hidden if id(p) in fused_qkv], "parts": 3, **common},
        {"params": [p for p in hidden if id(p) not in fused_qkv], "parts": 1, **common},
    ]
    precision = getattr(torch, machine.best_dtype(hidden[0].device))
    kind = muon.MuonAdamW if cfg.optimizer == "muon" else soap.SoapMuonAdamW
    return kind(muon_groups, adamw, precision)


# --- Training -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the parts of a run share."""

    cfg: Config
    flags_ever_given: set[str]  # names: by this command, or by those before it
    dist: Distributed
    train_data: WindowSource
    val_data: WindowSource
    hellaswag_items: list
    dtype: torch.dtype
    model: GPT | None = None
    optimizer: torch.optim.Optimizer | None = None
    loss_scale: LossScale | None = None
    state: TrainState = dataclasses.field(default_factory=TrainState)
    resumed_from: Path | None = None
    changes: list = dataclasses.field(default_factory=list)  # of this resume, that change learning
    restarted: bool = False  # by torchrun, after an earlier attempt
    resumes_own_name: bool = False  # the checkpoint is of a run of this name: one timeline
    checkpoint_folder: Path | None = None
    config_to_save: dict = dataclasses.field(default_factory=dict)  # where a shortage changed cfg
    locks: list = dataclasses.field(default_factory=list)  # held as long as the run
    last_micro: bool = False  # of this step: the pass that synchronises gradients

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.dist.device.type, self.dtype)


def evaluate(run: Run, monitor: Monitor, poll: Poll) -> None:
    """Do all that is due at this step number, and log it together when it is complete."""
    cfg, state, start = run.cfg, run.state, time.monotonic()
    by_position, texts = None, []
    if due(cfg.eval_freq, state, cfg):
        state.validation_loss, by_position = evaluation.validation_loss(run, poll, reading)
    if run.hellaswag_items and due(cfg.hellaswag_freq, state, cfg):
        state.hellaswag = evaluation.hellaswag_accuracy(run, poll)
    if due(cfg.sample_freq, state, cfg):
        texts = evaluation.samples(run, poll)
    if due(cfg.eval_freq, state, cfg) and state.validation_loss < state.best_loss:
        state.best_loss = state.validation_loss
    monitor.evaluation(run, by_position, texts, time.monotonic() - start)
    state.evaluated_step = state.step


def forward_backward(run: Run, train_model: nn.Module, batch, poll: Poll) -> torch.Tensor:
    """Compute the gradients of a step's mean loss over all ranks; return that loss, (), fp32.

    batch (sequences, T+1) is this rank's share. Gradients are synchronised once, in the last
    backward pass, while it runs. Out of memory: once more, with a smaller micro-batch.
    """
    run.optimizer.zero_grad(set_to_none=True)
    try:
        return accumulate_gradients(run, train_model, batch, poll)
    except RuntimeError as error:
        take_less_memory(run, error)
        if run.dist.world_size > 1 and run.last_micro:
            raise  # the other ranks have summed half of the gradients: only a restart helps
    machine.empty_cache(run.dist.device)
    return forward_backward(run, train_model, batch, poll)


def accumulate_gradients(run: Run, train_model: nn.Module, batch, poll: Poll) -> torch.Tensor:
    """Make one forward and backward pass for each micro-batch; return the mean loss, ()."""
    micro_batches = batch.split(run.cfg.micro_batch_size)
    mean_loss = torch.zeros((), device=batch.device)
    for i, micro in enumerate(micro_batches):
        poll()
        run.last_micro = i + 1 == len(micro_batches)
        with sharding.synchronising(train_model, run.last_micro):
            with run.autocast():
                loss = train_model(micro[:, :-1], micro[:, 1:]) / len(micro_batches)
            (loss * run.loss_scale.scale).backward()
        mean_loss += loss.detach()
    return run.dist.sum(mean_loss) / run.dist.world_size


class Training:
    """The loop, and what it keeps from one step to the next."""

    def __init__(self, run: Run, train_model, loader, saver, monitor: Monitor, supervisor):
        cfg, state = run.cfg, run.state
        self.run, self.train_model, self.loader, self.saver = run, train_model, loader, saver
        self.monitor, self.supervisor = monitor, supervisor
        self.params = list(run.model.parameters())
        self.sharded = sharding.is_sharded(run.model)
        self.guard = Guard(state, cfg.spike_sigmas, cfg.skip_spikes)
        self.clock = Clock(state, run.dist.world_size, monitor.energy)
        traces = Path(cfg.tensorboard_dir, cfg.run_name)
        profiled = cfg.profile and run.dist.is_main
        self.watch = StepWatch(traces if profiled else None, cfg.compile, monitor.say)
        self.in_flight: InFlight | None = None
        self.mid_update = False  # weights and moments may not belong together
        self.all_here = not self.sharded  # what a checkpoint takes: all ranks, if they are sharded
        self.saved_at = (state.step, state.evaluated_step)

    def train(self) -> None:
        """Train until the run is complete; raise StopRequested when it must end before that."""
        run, cfg, state = self.run, self.run.cfg, self.run.state
        try:
            while True:
                # Evaluation comes first: a checkpoint of this step knows its loss.
                if evaluation_due(state, cfg):
                    self.read_last_metrics()
                    self.clock.count_as_overhead()
                    with sharding.put_together(run.model):
                        evaluate(run, self.monitor, self.poll_alone)
                    self.clock.count_as_overhead()
                if checkpoint_due(state, cfg):
                    self.save()
                if state.step >= cfg.max_steps:
                    self.read_last_metrics()
                    return
                self.step()
        except (StopRequested, RuntimeError) as error:
            stop = self.supervisor.stop_for(error)
            if not machine.answers(run.dist.device):  # NCCL waits for a process that has died
                self.monitor.say("the device does not answer: nothing is saved but what was before")
            elif self.all_here and not self.mid_update:
                self.save()
            raise stop from None
        finally:
            self.watch.close()

    def step(self) -> None:
        """Take a batch to an update of the weights. Nothing here waits for the device but the
        reading of the step before, whose metrics are there by now."""
        run, cfg, state, optimizer = self.run, self.run.cfg, self.run.state, self.run.optimizer
        run.dist.work.begin_step()
        with reading():
            batch = self.loader.next_batch(lambda: self.poll_alone(waiting=True))
        loss = forward_backward(run, self.train_model, batch, self.poll)
        self.read_last_metrics(self.poll)  # while the device works
        if state.consecutive_skips >= cfg.max_skips:
            roll_back(run, self.loader, self.saver, self.monitor, Config)
            self.saved_at = (state.step, state.evaluated_step)
            self.clock.restart()
            return

        # Clip, judge, update. `found_inf` makes the fused kernel leave weights and moments alone
        # where the verdict is bad: no host round-trip, the same on all ranks.
        grads = [p.grad for p in self.params]
        run.loss_scale.unscale([sharding.local(grad) for grad in grads])
        norm = sharding.whole(nn.utils.get_total_norm(grads))
        if cfg.grad_clip:
            nn.utils.clip_grads_with_norm_(self.params, cfg.grad_clip, norm)
        limit, lr = self.guard.limit(), learning_rate(state.step + 1, cfg)
        bad = self.guard.is_bad(loss, norm, limit)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = bad.float()
        check = (run.dist.is_main or self.sharded) and health.check_due(state.step + 1)
        norms = health.UpdateNorms(run.model, optimizer) if check else None
        self.mid_update = True
        optimizer.step()
        run.loss_scale.update(bad)
        state.step += 1
        self.mid_update = False

        metrics = [torch.stack([loss, norm, bad.float()])]
        if norms is not None:
            metrics.append(norms.measure())
        self.in_flight = InFlight(torch.cat(metrics), lr, limit, first_window=state.position)
        state.position = self.loader.position
        state.tokens += cfg.total_batch_size
        if self.in_flight.arrived is None:
            self.read_last_metrics()  # nothing runs behind the host's back
        self.watch.step(state.step)
        if due(cfg.histogram_freq, state, cfg) or (cfg.histogram_freq and state.step == 1):
            self.read_last_metrics()
            self.monitor.histograms(run.model, state.step)
            self.clock.count_as_overhead()

    def read_last_metrics(self, poll: Poll = lambda: None) -> None:
        """Read the metrics in flight: the one place where the host waits for the device, one step
        late, when the next step's work is already queued."""
        if self.in_flight is None:
            return
        self.in_flight.wait(poll)  # which may raise: then they are still to be read
        flight, self.in_flight = self.in_flight, None
        loss, norm, bad, *norms = flight.values.tolist()
        seconds = self.clock.count_as_training()
        state = self.run.state
        if verdict := self.guard.observe(loss, bool(bad), flight.limit):
            windows = f"windows {flight.first_window:,} to {state.position - 1:,} of the data order"
            self.monitor.say(f"WARNING step {state.step}: {verdict}; {windows}")
            if state.consecutive_skips == min(3, self.run.cfg.max_skips):
                self.monitor.outside.tell("updates skipped", verdict, state.step)
        self.monitor.step(self.run, loss, norm, bool(bad), flight.lr, seconds, norms)

    def save(self, say_so: bool = False) -> None:
        """Save a checkpoint of the last finished step, unless there is one."""
        self.read_last_metrics()
        run, cfg, state = self.run, self.run.cfg, self.run.state
        folder = run.checkpoint_folder
        saved = self.saved_at == (state.step, state.evaluated_step)
        if saved or not (run.dist.is_main or self.sharded):
            return
        if state.consecutive_skips and not sharding.all_finite(self.params, run.dist):
            self.monitor.say(
                f"WARNING step {state.step}: weights are not finite, no checkpoint written"
            )
            return
        evaluated = state.evaluated_step == state.step and due(cfg.eval_freq, state, cfg)
        retention = (cfg.keep_checkpoints, cfg.keep_every, last_stable_step(cfg))
        path = files.step_path(folder, state.step)

        def written() -> list[str]:
            if say_so:
                self.monitor.say(f"saved {path}")
            return run_folders.retain(folder, *retention)

        self.monitor.flush()
        self.clock.count_as_overhead()
        content = checkpoint_of(run)
        if run.dist.is_main:
            self.saver.save(
                path,
                content,
                info_of(run, evaluated),
                on_done=written,
                on_full=lambda: run_folders.make_room(folder, *retention),
            )
        self.saved_at = (state.step, state.evaluated_step)
        self.clock.count_as_overhead()

    def poll(self) -> None:
        """Notice what was asked for meanwhile: called often, raises StopRequested on rank 0; on all
        ranks at the same call if they are sharded, as a checkpoint takes them all."""
        agree = self.run.dist.any if self.sharded else bool
        try:
            self.supervisor.poll(agree=agree, all_ranks=self.sharded)
        except StopRequested:
            self.all_here = True
            raise
        if agree(self.supervisor.take_save_request()):
            self.monitor.say(f"step {self.run.state.step:>5}: SIGUSR1, saving")
            self.save(say_so=True)

    def poll_alone(self, waiting: bool = False) -> None:
        """Poll where each rank calls as often as it likes: a sharded run stops a step later."""
        if self.sharded:
            self.supervisor.alive(waiting)
        elif waiting:
            self.supervisor.poll(waiting)
        else:
            self.poll()


# --- Set-up ---------------------------------------------------------------------------------------


def set_up(flags_now: dict, dist: Distributed) -> tuple[Run, dict | None]:
    """Decide all that a run needs; return it and the checkpoint it goes on from, or None.

    Nothing is written but the sample corpus. Raise ValueError for what the user has to change.
    """
    # From where: afresh, from a checkpoint, or as a branch of one.
    early = Config(**flags_now)  # for what must be known before the checkpoint is
    dist.agree_to_start(flags_now)
    start, checkpoint = planning.find_start(early, dist), None
    if start.path is not None:
        with about(*start.flag):
            checkpoint = read_checkpoint(dist, start.path, start.rank, Config)
        saved, _ = flags.merge(Config, {}, checkpoint["config"], {*checkpoint["asked"]}, True)
        stable = last_stable_step(saved)
        flags_now = planning.of_branch(start, flags_now, saved, checkpoint["step"], stable)

    # What: flags over the checkpoint, or over the recipe, over defaults.
    cfg, flags_ever_given = Config(**RECIPES[early.recipe]["flags"] | flags_now), {*flags_now}
    if checkpoint is not None:
        device_type = dist.device.type
        cfg, flags_ever_given = merge_config(
            Config, PRESETS, flags_now, checkpoint, device_type, dist.world_size
        )
    flags.check_ranges(cfg)  # before anything follows from a number that makes no sense
    weights = {}
    if cfg.init_from and checkpoint is None:
        weights = planning.take_init(cfg, PRESETS, flags_now, dist)
    resolve_model(cfg, dist.device.type)
    validate(cfg, dist.world_size)
    cfg.run_name = planning.run_name(start, checkpoint, cfg, dist)

    # On which data, and for how long.
    if cfg.data_dir == SAMPLE_DIR:
        planning.build_sample_corpus(SAMPLE_DIR, dist)
    train_data, val_data, items = planning.open_data(cfg, dist)
    state = TrainState()
    if checkpoint is not None:
        if planning.is_other_data(cfg, checkpoint["data"], train_data):
            for name in flags.derived(Config, {"data_dir"}, flags_ever_given):
                setattr(cfg, name, None)
            resolve_model(cfg, dist.device.type)
        state = state_of(checkpoint, cfg, train_data)
        if state.step >= saved.warmup_steps and cfg.warmup_steps is None:
            cfg.warmup_steps = saved.warmup_steps  # it is over and does not come again
    resolve_length(cfg, train_data.num_tokens, state.step, state.position * cfg.seq_len)
    validate(cfg, dist.world_size)
    cfg.dtype = machine.best_dtype(dist.device) if cfg.dtype == "auto" else cfg.dtype
    dtype = getattr(torch, cfg.dtype)
    run = Run(cfg, flags_ever_given, dist, train_data, val_data, items, dtype, state=state)
    run.resumed_from, run.restarted = start.path, start.restarted
    run.resumes_own_name = checkpoint is not None and checkpoint["run_name"] == cfg.run_name
    run.checkpoint_folder = run_folders.run_folder(Path(cfg.checkpoint_dir), cfg.run_name)
    planning.check_length(run, SAMPLE_DIR)

    # The model, and how much of a batch fits at a time.
    torch.manual_seed(cfg.seed)
    with torch.device("meta") if cfg.dry_run else contextlib.nullcontext():
        run.model = GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    run.model.activation_checkpointing = cfg.activation_checkpointing
    if not cfg.dry_run:
        run.model.to(dist.device)
        if weights:  # rank 0; the others get them from DDP, which begins with rank 0's weights
            run.model.load_state_dict(weights)
    if "micro_batch_size" not in flags_now:
        cfg.micro_batch_size = dist.on_main(lambda: machine.choose_micro_batch(run))
    if checkpoint is not None:
        planning.say_changes(run, checkpoint, flags_now)
    return run, checkpoint


def distributed(flags_now: dict) -> Distributed:
    return Distributed(flags_now.get("device"), flags_now.get("hang_timeout", Config.hang_timeout))


def program(command: flags.CommandLine) -> instead.Program:
    """Return what a command other than training is to plan and try."""

    def plan(flags_now: dict):
        return set_up(flags_now, distributed(flags_now))

    def resolve(cfg: Config, device: str, train_tokens: int):
        resolve_model(cfg, device)
        resolve_length(cfg, train_tokens)

    reference = {"model": "gpt2"} | PRESETS["gpt2"] | REFERENCE
    data = (RECIPES, reference, SAMPLE_DIR)
    tried = (GPT, make_optimizer, prepare_pass, forward_backward)
    return instead.Program(command, Config, plan, resolve, *data, *tried)


def build(run: Run, checkpoint: dict | None, outside: notify.Outside):
    """Make what a planned run trains with; return (training pass, loader, saver, monitor)."""
    cfg, dist = run.cfg, run.dist
    torch.set_float32_matmul_precision("highest" if run.dtype == torch.float32 else "high")
    if cfg.shard and dist.world_size > 1:
        sharding.shard(run.model)
    run.optimizer = make_optimizer(run.model, cfg)
    run.loss_scale = LossScale(run.dtype, dist.device)
    if checkpoint is not None:
        restore(run, checkpoint)
    if not run.optimizer.state:
        make_moments(run)
    asked_to_compile = cfg.compile
    if cfg.compile is None:
        cfg.compile = dist.device.type == "cuda"
    train_model = prepare_pass(run, asked_to_compile)
    windows = cfg.total_batch_size // cfg.seq_len
    loader = StepLoader(
        run.train_data, windows, dist.rank, dist.world_size, dist.device, run.state.position
    )
    peak = machine.measure_peak_flops(dist.device, run.dtype) if dist.is_main else 1.0
    if dist.device.type == "cuda":
        torch.accelerator.reset_peak_memory_stats(dist.device)  # not of the trial
    monitor = Monitor(run, peak, outside)
    saver, content = None, checkpoint_of(run)
    if dist.is_main:
        saver = background.BackgroundSaver(monitor.announce)
        saver.allocate(content)
    return train_model, loader, saver, monitor


def main(command: flags.CommandLine | None = None) -> int:
    """Return 0: finished as asked, 2: wrong input, 128 + signal: stopped and saved, 1: a fault."""
    command, dist = command or read_flags(), None
    try:
        outside = notify.Outside(command.typed, command.in_file)
        flags_now = command.values()
        launch.adopt_slurm(os.environ)
        launch.check_environment(os.environ)
        if flags_now.get("doctor"):
            return doctor.examine(program(command), outside)
        if flags_now.get("print_config"):
            instead.print_config(program(command))
            return 0
        dist = distributed(flags_now)
        run, checkpoint = set_up(flags_now, dist)
        if dist.is_main:
            print(summary.plan(run), flush=True)
        if run.cfg.dry_run:
            instead.show_plan(program(command), run)
            return 0
        dist.on_main(lambda: planning.preflight(run, checkpoint))
        dist.remember(run.cfg.run_name)
        train_model, loader, saver, monitor = build(run, checkpoint, outside)
        checkpoint = None  # its memory, and its disk space once the file is deleted
    except (ValueError, OSError) as error:
        if dist is not None and dist.peers is not None:
            dist.peers.close()
        if dist is not None and not dist.is_node_main:
            time.sleep(3)  # another says the same and ends us, unless the trouble is here alone
        terminal.print_error(error)
        return 2
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print("error: another process ended while this one was starting", file=sys.stderr)
        return 1
    limits = run.cfg.hang_timeout, run.cfg.max_hours
    supervisor = Supervisor(dist.rank, dist.world_size, dist.peers, *limits)
    supervisor.tell = lambda event, text: monitor.leave(event, text, well=False)
    supervisor.outlived = lambda: planning.outlived(run)
    if saver is not None:
        saver.progress = supervisor.written  # a long write is no hang
    code, how, why, lost = 0, "finished", "", ""
    monitor.begin(run)
    try:
        Training(run, train_model, loader, saver, monitor, supervisor).train()
    except StopRequested as stop:
        code, how, why = stop.code, "stopped", f"{stop}\n"
        monitor.say(f"{stop}: saving and leaving")
    except GuardGaveUp as story:
        code, how, why = 1, "gave up", f"{story}\n"
        monitor.say(f"ERROR {story}")
    except BaseException as error:
        monitor.leave("crashed", f"{type(error).__name__}: {error}", well=False)
        raise
    loader.close()
    if saver is not None and not saver.close():
        code, (path, reason) = 1, saver.failure
        lost = f"ERROR {path} is NOT SAVED ({reason}): mend that, then resume\n"
    finished = run.state.step >= run.cfg.max_steps and not evaluation_due(run.state, run.cfg)
    monitor.close(finished)
    again = planning.next_command(run, command, finished, last_stable_step(run.cfg))
    words = lost + summary.farewell(run, finished, again)
    monitor.say(words)
    monitor.leave(how, why + words, well=code != 1)
    supervisor.leave(code)
    return code


if __name__ == "__main__":
    end(main(COMMAND_LINE))
