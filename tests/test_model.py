"""The model is GPT-2: names, sizes, logits, loss and gradients against independent ones."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import train_improved as ti
from training.chunked_loss import chunked_cross_entropy, next_token_losses


def small_model(seq_len=32):
    torch.manual_seed(0)
    return ti.GPT(n_layer=2, n_head=2, n_embd=32, seq_len=seq_len)


@pytest.mark.parametrize(
    "preset, published",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, published):
    with torch.device("meta"):
        model = ti.GPT(**ti.PRESETS[preset])
    assert model.num_params() == published


@pytest.fixture(scope="module")
def hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # biases and gains away from 0 and 1, or a missing one would not show
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed by Hugging Face


def test_logits_and_loss_equal_transformers(hugging_face):
    ours = ti.GPT(n_layer=3, n_head=4, n_embd=64, seq_len=64)
    theirs = hugging_face.state_dict()
    assert set(ours.state_dict()) == set(theirs), "the names a Hugging Face GPT-2 knows"
    ours.load_state_dict({k: v.T if k.endswith(CONV1D) else v for k, v in theirs.items()})
    ids = torch.randint(0, 50257, (3, 64))
    with torch.no_grad():
        expected = hugging_face(ids, labels=ids)
        got = ours.logits(ours.features(ids))
        assert (got - expected.logits).abs().max() < 1e-4
        loss = ours(ids[:, :-1], ids[:, 1:])
    assert abs(loss - expected.loss) < 1e-5


def test_initialisation():
    model = ti.GPT(n_layer=8, n_head=2, n_embd=128, seq_len=64)
    weights = dict(model.named_parameters())
    assert abs(weights["transformer.wte.weight"].std() - 0.02) < 2e-4
    assert abs(weights["transformer.h.3.mlp.c_fc.weight"].std() - 0.02) < 4e-4
    for name in ("attn", "mlp"):
        residual = weights[f"transformer.h.5.{name}.c_proj.weight"].std()
        assert abs(residual - 0.02 / math.sqrt(16)) < 2e-4, "scaled by 1/sqrt(2 n_layer)"
    assert all(not p.any() for name, p in weights.items() if name.endswith("bias"))
    ids = torch.randint(0, 50257, (4, 64))
    assert abs(model(ids[:, :-1], ids[:, 1:]) - math.log(50257)) < 0.15


def test_output_matrix_is_the_embedding():
    model = small_model()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" in model.state_dict()


@pytest.mark.parametrize("tokens", [7, 64, 2 * 64 + 5])
def test_chunked_loss_and_gradients_are_exact(tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50257, 16, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 50257, (tokens,))
    expected = F.cross_entropy(x @ w.T, y)
    (3 * expected).backward()
    x32, w32 = (t.detach().float().requires_grad_() for t in (x, w))
    loss = chunked_cross_entropy(x32, w32, y)
    (3 * loss).backward()
    assert abs(loss - expected) < 1e-5
    for ours, exact in ((x32.grad, x.grad), (w32.grad, w.grad)):
        assert (ours - exact).norm() < 1e-5 * exact.norm()
    with torch.no_grad():
        each = next_token_losses(x32, w32, y)
    assert torch.allclose(each.double(), F.cross_entropy(x @ w.T, y, reduction="none"), atol=1e-4)


def test_chunked_loss_in_bf16_keeps_a_float32_sum():
    torch.manual_seed(0)
    x, w = torch.randn(1000, 64), 0.02 * torch.randn(50257, 64)
    y = torch.randint(0, 50257, (1000,))
    exact = F.cross_entropy(x @ w.T, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x.requires_grad_(), w.requires_grad_(), y)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 1e-3, "bf16 sums would be off by more than 0.01"
    loss.backward()
    assert w.grad.dtype == torch.float32


def test_learning_rate_is_the_formula():
    cfg = ti.Config(max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073)
    assert ti.learning_rate(1, cfg) == pytest.approx(6e-4 / 715)
    assert ti.learning_rate(715, cfg) == pytest.approx(6e-4)
    middle = (715 + 19073) // 2
    assert ti.learning_rate(middle, cfg) == pytest.approx(3.3e-4, rel=1e-3)
    assert ti.learning_rate(19073, cfg) == pytest.approx(6e-5)
    flat = ti.Config(max_lr=1e-3, min_lr=1e-3, warmup_steps=0, max_steps=5)
    assert ti.learning_rate(1, flat) == 1e-3


def test_decay_on_matrices_only():
    model = small_model()
    optimizer = ti.make_optimizer(model, ti.Config())
    decayed, not_decayed = optimizer.param_groups
    assert all(p.dim() == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in not_decayed["params"]) and not_decayed["weight_decay"] == 0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_flops_per_token_of_gpt2():
    with torch.device("meta"):
        model = ti.GPT(**ti.PRESETS["gpt2"])
    # 6 per weight without the positions, and 12 L C T for attention (PaLM, appendix B)
    assert model.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_the_compiled_loss_has_no_float32_logits():
    """A chunk becomes its gradient in one pass; its product is added at once."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    x, w = torch.randn(2048, 32), 0.1 * torch.randn(50257, 32)
    y = torch.randint(0, 50257, (2048,))

    def losses(function):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(a, b, y)
        loss.backward()
        return loss, a.grad, b.grad

    eager = losses(chunked_cross_entropy)
    compiled, code = run_and_get_code(lambda: losses(torch.compile(chunked_cross_entropy)))
    assert abs(compiled[0] - eager[0]) < 1e-3
    for ours, right in zip(compiled[1:], eager[1:], strict=True):
        assert (ours - right).norm() < 1e-3 * right.norm()
    code = "\n".join(code)
    logits = re.findall(r"empty_strided_cpu\(\(1024, 50304\), \(50304, 1\), torch.bfloat16", code)
    assert len(logits) == 1, "of one chunk at a time"
    assert not re.search(r"\(\(1024, 50\d{3}\), \(\d+, 1\), torch.float32", code)
    assert "add_product" in code
