"""Optimizers and schedules: the formulas, and that every pair of them resumes exactly."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

import train_improved as ti
from conftest import run
from monitoring import summary
from runtime import planning
from test_training import assert_same_training, checkpoint, logged
from training import muon, soap

QUIET = "--eval_freq 0 --sample_freq 0 --histogram_freq 0 --use_tensorboard".split()


# --- Schedules ------------------------------------------------------------------------------------


def config(**values):
    defaults = {"max_lr": 1.0, "min_lr": 0.0, "max_steps": 100, "warmup_steps": 10}
    return ti.Config(**(defaults | values))


def test_cosine_is_the_curve_of_the_guide():
    cfg = config(min_lr=0.1)
    assert [ti.learning_rate(s, cfg) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert ti.learning_rate(55, cfg) == pytest.approx(0.55), "half-way down"
    assert ti.learning_rate(100, cfg) == pytest.approx(0.1)
    for step in range(10, 100):
        expected = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert ti.learning_rate(step, cfg) == pytest.approx(expected)


def test_linear_ends_at_zero():
    cfg = config(schedule="linear")
    assert [ti.learning_rate(s, cfg) for s in (1, 10)] == pytest.approx([0.1, 1.0])
    for step in range(10, 101):
        assert ti.learning_rate(step, cfg) == pytest.approx((100 - step) / 90)
    assert ti.learning_rate(100, config(schedule="linear", min_lr=0.25)) == 0.25


def test_wsd_is_flat_until_the_decay():
    cfg = config(schedule="wsd", decay_share=0.3)
    assert [ti.learning_rate(s, cfg) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert ti.last_stable_step(cfg) == 70
    for step in range(10, 71):
        assert ti.learning_rate(step, cfg) == 1.0
    for step in range(70, 101):
        assert ti.learning_rate(step, cfg) == pytest.approx((100 - step) / 30)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_no_schedule_leaves_its_bounds_or_divides_by_zero(schedule):
    for max_steps in (1, 2, 7, 50):
        for warmup in {0, 1, max_steps // 2, max_steps}:
            for min_lr in (0.0, 0.1, 1.0):
                cfg = config(
                    schedule=schedule, max_steps=max_steps, warmup_steps=warmup, min_lr=min_lr
                )
                rates = [ti.learning_rate(s, cfg) for s in range(1, max_steps + 1)]
                assert all(0 <= r <= 1 for r in rates), (max_steps, warmup, rates)
                assert warmup == max_steps or rates[-1] == pytest.approx(min_lr)


def test_a_longer_wsd_run_has_the_same_rates_before_the_decay():
    short, long = (config(schedule="wsd", max_steps=n, warmup_steps=None) for n in (210, 400))
    for cfg in (short, long):
        cfg.total_batch_size = 256
        ti.resolve_length(cfg, train_tokens=10**6)
    for step in range(1, ti.last_stable_step(short) + 1):
        assert ti.learning_rate(step, short) == ti.learning_rate(step, long)


# --- Muon -----------------------------------------------------------------------------------------


def small_model(seed=0):
    torch.manual_seed(seed)
    return ti.GPT(n_layer=2, n_head=2, n_embd=32, seq_len=16)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def optimizer_of(model, **values):
    cfg = ti.Config(**{"optimizer": "muon", "n_head": 2} | values)
    optimizer = ti.make_optimizer(model, cfg)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer


def test_orthogonalized_matrices_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 16, 48), (2, 64, 16), (1, 32, 32)):
        x = torch.randn(shape, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            y = muon.orthogonalized(x, dtype)
            assert y.shape == x.shape and y.dtype == dtype
            values = torch.linalg.svdvals(y.float())
            assert values.min() > 0.6 and values.max() < 1.3, values
        # the directions stay: what is changed is how far each is followed
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        assert ((u @ vh) * y.float()).sum((1, 2)).min() > 0.8 * min(shape[1:])
    assert torch.equal(
        muon.orthogonalized(torch.zeros(1, 4, 4), torch.float32), torch.zeros(1, 4, 4)
    )


def test_the_arithmetic_is_that_of_torch_and_each_third_of_c_attn_is_a_matrix():
    ours, theirs = small_model(), small_model()
    optimizer = optimizer_of(ours, weight_decay=0.1, momentum=0.9)
    hidden, third = {}, {}
    for name, p in theirs.transformer.h.named_parameters():
        if p.dim() == 2:
            pieces = p.detach().chunk(3) if "c_attn" in name else [p.detach()]
            third[name] = [torch.nn.Parameter(x.clone()) for x in pieces]
            hidden[name] = p
    reference = torch.optim.Muon(
        [x for pieces in third.values() for x in pieces],
        lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        gradients(ours, step)
        for name, p in ours.transformer.h.named_parameters():
            if p.dim() == 2:
                pieces = p.grad.chunk(len(third[name]))
                for x, grad in zip(third[name], pieces, strict=True):
                    x.grad = grad.clone()
        optimizer.step()
        reference.step()
    for name, p in ours.transformer.h.named_parameters():
        if p.dim() == 2:
            expected = torch.cat(third[name])
            moved = (expected - hidden[name]).norm()
            assert (p - expected).norm() < 0.02 * moved, name  # both round to bf16 on the way


def test_the_rest_is_adamw_exactly():
    ours, theirs = small_model(), small_model()
    both = optimizer_of(ours)
    adamw = ti.make_optimizer(theirs, ti.Config(n_head=2))
    for group in adamw.param_groups:
        group["lr"] = 0.01
    for step in range(3):
        for model, optimizer in ((ours, both), (theirs, adamw)):
            gradients(model, step)
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        is_hidden = ".h." in name and p.dim() == 2
        assert torch.equal(p, q) != is_hidden, name


def test_a_bad_update_changes_nothing_and_the_next_ones_are_as_if_it_had_not_been():
    models = [small_model(), small_model()]
    optimizers = [optimizer_of(m) for m in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            if model is models[1]:
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                for poison in (math.nan, math.inf):
                    gradients(model, 100 + step)
                    for p in model.parameters():
                        p.grad[0] = poison
                    optimizer.found_inf = torch.tensor(1.0)
                    optimizer.step()
                assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
                optimizer.found_inf = torch.tensor(0.0)
            gradients(model, step)
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_soap_divides_by_the_root_mean_square_in_the_basis_of_the_eigenvectors():
    """Of gradients Z diag(s) U': the basis becomes U, and what is orthogonalized is white."""
    model = small_model()
    optimizer = optimizer_of(model, optimizer="soap_muon", momentum=0.0)
    block, generator = model.transformer.h[0], torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -3, 32)
    U = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    # Where the columns are the shorter side, where the rows are, and three in one.
    shapes = {block.mlp.c_fc.weight: (1, 128), block.mlp.c_proj.weight: (1, 128)}
    shapes[block.attn.c_attn.weight] = (3, 32)
    gradients(model, 0)
    seen = {p: [] for p in shapes}
    for step in range(400):
        for p, shape in shapes.items():
            G = torch.randn(*shape, 32, generator=generator) * scale @ U.mT
            p.grad = G[0].mT.contiguous() if p.size(0) == 32 else G.reshape(p.shape)
        optimizer.step()
        for p, (parts, _) in shapes.items() if step >= 300 else ():
            D = optimizer._direction(p, {"parts": parts, "momentum": 0.0}).view(
                parts, -1, p.size(1)
            )
            seen[p].append(D.mT if p.size(0) == 32 else D)
    for p, (parts, _) in shapes.items():
        basis = optimizer.state[p]["basis"]
        overlap = (U.mT @ basis).abs()
        assert overlap[:, :8, :8].diagonal(dim1=1, dim2=2).min() > 0.8
        assert torch.equal(overlap.argmax(1)[:, :8], torch.arange(8).expand(parts, 8))
        directions = torch.cat(seen[p], 1)
        covariance = directions.mT @ directions / directions.size(1)
        values = torch.linalg.eigvalsh(covariance)  # of the gradients' own: 1 to 1e-6
        assert values.min() > 0.3 and values.max() < 3, values


@pytest.mark.parametrize("name", ["adamw", "muon", "soap_muon"])
def test_moments_made_before_the_first_step_change_nothing(name):
    cfg = config(optimizer=name)
    models = [small_model(), small_model()]
    optimizers = [ti.make_optimizer(model, cfg) for model in models]
    before = {n: p.detach().clone() for n, p in models[1].named_parameters()}
    dist = SimpleNamespace(device=torch.device("cpu"))
    ti.make_moments(SimpleNamespace(model=models[1], optimizer=optimizers[1], dist=dist))
    assert all(torch.equal(p, before[n]) for n, p in models[1].named_parameters())
    made = optimizers[1].state_dict()["state"]
    assert len(made) == len(before)
    assert not any(
        t.any() for moments in made.values() for name, t in moments.items() if name != "basis"
    )
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model, step)
            optimizer.found_inf = torch.tensor(0.0)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["adamw", "muon", "soap_muon"])
def test_a_fused_kernel_that_does_not_look_at_the_verdict(monkeypatch, name):
    """That of mps does not: what is skipped there is skipped by the host."""
    kernel = torch._fused_adamw_

    def blind(*args, found_inf, **kwargs):
        kernel(*args, found_inf=None, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", blind)
    monkeypatch.setattr(ti.AdamW, "LOOK", ())
    model = small_model()
    optimizer = ti.make_optimizer(model, config(optimizer=name))
    dist = SimpleNamespace(device=torch.device("cpu"))
    ti.make_moments(SimpleNamespace(model=model, optimizer=optimizer, dist=dist))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for poison, same in ((math.nan, True), (1.0, False)):
        gradients(model, 0)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for p in model.parameters():
            p.grad[0] *= poison
        optimizer.found_inf = torch.tensor(float(math.isnan(poison)))
        # Over the time at which soap_muon renews its bases.
        for _ in range(soap.RENEWED_EVERY):
            optimizer.step()
        after = (model.state_dict(), optimizer.state_dict())
        for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
            if isinstance(old, torch.Tensor):
                assert torch.equal(old, new) == same, old


# --- Runs -----------------------------------------------------------------------------------------

LENGTH = "--max_steps 20 --warmup_steps 3 --run_name a".split()


@pytest.mark.parametrize(
    "optimizer, schedule",
    [("muon", "cosine"), ("soap_muon", "linear"), ("adamw", "linear"), ("adamw", "wsd")],
)
def test_resume_is_exact_and_the_chart_is_the_formula(tmp_path, data, optimizer, schedule):
    flags = [*QUIET, *LENGTH, "--optimizer", optimizer, "--schedule", schedule]
    flags += ["--checkpoint_freq", "7", "--keep_checkpoints", "9"]
    run(*flags, cwd=tmp_path, data=data)
    saved = torch.load(checkpoint(tmp_path, 20), weights_only=True)
    cfg = ti.Config(**saved["config"])
    assert cfg.min_lr == pytest.approx(1e-3 if schedule == "cosine" else 0)
    assert_chart_is_the_formula(tmp_path / "runs" / "a", cfg)
    gpt2 = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len).state_dict()
    assert {k: v.shape for k, v in saved["model"].items()} == {k: v.shape for k, v in gpt2.items()}
    with torch.device("meta"):
        model = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    planned = summary.checkpoint_bytes(SimpleNamespace(cfg=cfg, model=model))
    assert abs(checkpoint(tmp_path, 20).stat().st_size - planned) < 50_000

    resume = ["--resume", str(checkpoint(tmp_path, 7)), "--run_name", "b", "--use_tensorboard"]
    run(*resume, cwd=tmp_path, small=False)
    assert_same_training(checkpoint(tmp_path, 20), checkpoint(tmp_path, 20, "b"))
    one, two = (logged(tmp_path / "runs" / name)["Loss/train"] for name in "ab")
    assert one[7:] == two


def assert_chart_is_the_formula(folder, cfg):
    rates = logged(folder)["Learning_Rate/lr"]
    assert [step for step, _ in rates] == list(range(1, cfg.max_steps + 1))
    for step, lr in rates:
        assert lr == pytest.approx(ti.learning_rate(step, cfg), rel=1e-6)


def test_a_wsd_run_can_be_extended_and_branched_off(tmp_path, data):
    flags = [*QUIET, "--optimizer", "muon", "--schedule", "wsd", "--warmup_steps", "3"]
    flags += ["--checkpoint_freq", "0", "--keep_checkpoints", "1"]
    run(*flags, "--max_steps", "10", "--run_name", "short", cwd=tmp_path, data=data)
    run(*flags, "--max_steps", "20", "--run_name", "long", cwd=tmp_path, data=data)
    out, _ = run("--resume", "latest", "--run_name", "short", cwd=tmp_path, small=False)
    longer = "--max_steps 20 --run_name short-longer --resume checkpoints/short/step_00000008.pt"
    assert longer in out
    stable = checkpoint(tmp_path, 8, "short")
    assert stable.exists(), "the end of the stable part is kept"
    planned = checkpoint(tmp_path, 20, "long")
    cfg = ti.Config(**torch.load(planned, weights_only=True)["config"])
    assert_chart_is_the_formula(tmp_path / "runs" / "long", cfg)

    resume = ["--resume", stable, "--max_steps", "20", "--run_name", "extended"]
    run(*resume, cwd=tmp_path, small=False)
    assert_same_training(checkpoint(tmp_path, 20, "extended"), planned, changed=True)

    branch = ["--decay_from", checkpoint(tmp_path, 16, "long")]
    run(*branch, "--resume", "auto", cwd=tmp_path, small=False)
    assert_same_training(checkpoint(tmp_path, 20, "long-step_00000016-decayed"), planned)
    _, err = run(*branch, cwd=tmp_path, small=False, expect=2)
    assert "long-step_00000016-decayed" in err and "already" in err
    _, err = run(*branch, "--run_name", "long", cwd=tmp_path, small=False, expect=2)
    assert "--run_name long: is the run itself" in err

    again = ["--decay_from", stable, "--decay_share", "0.3", "--run_name", "again"]
    again += ["--checkpoint_freq", "1", "--keep_checkpoints", "9", "--resume", "auto"]
    run(*again, cwd=tmp_path, small=False)
    end = checkpoint(tmp_path, 11, "again")
    whole = end.rename(tmp_path / "whole.pt")
    checkpoint(tmp_path, 10, "again").unlink()
    run(*again, cwd=tmp_path, small=False)
    assert_same_training(end, whole)


def of_step(step, **values):
    cfg = ti.Config(schedule="wsd", warmup_steps=3, max_steps=100, optimizer="muon")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "seq_len": 32}
    made_on = {"device_type": "cpu", "world_size": 1}
    values = dataclasses.asdict(cfg) | shape | values
    return {"step": step, "config": values, "asked": [], "machine": made_on}


def test_what_can_be_branched_off():
    given = {"decay_from": "x.pt"}
    saved = ti.Config(**of_step(0)["config"])

    def plan(given, step, saved=saved):
        return planning.plan_decay(given, saved, step, ti.last_stable_step(saved))

    assert plan(given, 40) == {"max_steps": 50, "decay_share": 0.2}
    assert plan(given | {"decay_share": 0.5}, 40)["max_steps"] == 80
    flags = plan(given | {"max_steps": 60}, 45)
    cfg = config(schedule="wsd", warmup_steps=3, **flags)
    assert ti.learning_rate(45, cfg) == 1.0 and ti.learning_rate(46, cfg) < 1.0
    for flags, what in (
        ({"epochs": 2.0}, "--epochs 2.0: a branch is"),
        ({"schedule": "cosine"}, "--schedule cosine: a branch is"),
        ({"max_steps": 60, "decay_share": 0.5}, "--max_steps and --decay_share: "),
        ({"decay_share": 1.0}, "--decay_share 1.0: must be above 0 and below 1"),
        ({"decay_share": math.nan}, "--decay_share nan: must be above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=what):
            plan(given | flags, 40)
    for step in (2, 81, 100):
        with pytest.raises(ValueError, match=rf"x.pt: .* step {step}; .* from step 3 to 80"):
            plan(given, step)
    with pytest.raises(ValueError, match=r"x.pt: .* of --schedule cosine"):
        plan(given, 40, ti.Config(schedule="cosine"))


def test_another_optimizer_on_resume_is_refused():
    with pytest.raises(ValueError, match=r"--optimizer adamw: does not fit .* muon"):
        planning.merge_config(ti.Config, ti.PRESETS, {"optimizer": "adamw"}, of_step(4), "cpu", 1)
    cfg, _ = planning.merge_config(ti.Config, ti.PRESETS, {}, of_step(4), "cpu", 1)
    assert cfg.optimizer == "muon"


def test_another_recipe_on_resume_is_refused():
    given, saved = {"recipe": "fast"}, of_step(4)
    with pytest.raises(ValueError, match=r"--recipe fast: .* has recipe reference"):
        planning.merge_config(ti.Config, ti.PRESETS, given, saved, "cpu", 1)
    saved["config"]["recipe"] = "fast"
    cfg, _ = planning.merge_config(ti.Config, ti.PRESETS, given, saved, "cpu", 1)
    assert cfg.schedule == "wsd"  # given to the first command, though not to this one


@pytest.mark.parametrize("optimizer, numbers", [("muon", (2,)), ("soap_muon", (2, 4))])
def test_muon_is_the_same_on_several_processes(tmp_path, data, optimizer, numbers):
    flags = [*QUIET, *LENGTH, "--optimizer", optimizer, "--checkpoint_freq", "0"]
    losses = {}
    for nproc in (None, *numbers):
        cwd = tmp_path / str(nproc)
        cwd.mkdir()
        run(*flags, "--micro_batch_size", "1", cwd=cwd, data=data, nproc=nproc)
        losses[nproc] = [v for _, v in logged(cwd / "runs" / "a")["Loss/train"]]
    for nproc in numbers:
        assert losses[nproc] == pytest.approx(losses[None], rel=2e-4)


def test_a_scaling_that_is_whole_is_not_sharded():
    cfg = ti.Config(model="tiny", total_batch_size=1024, optimizer="soap_muon", shard=True)
    ti.resolve_model(cfg, "cpu")
    with pytest.raises(ValueError, match=r"--optimizer soap_muon: has .* whole .* with --shard"):
        planning.validate(cfg, 2)
