"""Checkpoints that an earlier version of the program wrote still resume, and learn on as they did.

tests/data holds step 10 of two runs of 20 steps, of 2026-11-25, one of each optimizer:

    train_improved.py --data_dir data --optimizer adamw --n_layer 1 --n_head 1 --n_embd 2
        --seq_len 16 --total_batch_size 64 --micro_batch_size 2 --max_lr 1e-2 --max_steps 20
        --checkpoint_freq 10 --eval_freq 10 --val_tokens 256 --sample_freq 0 --hellaswag_freq 0
        --histogram_freq 0 --device cpu --dtype float32

EXPECTED is what that version came to at step 20. They are compared as numbers, not bit for bit,
since processors sum in different orders: between SSE, AVX2 and AVX-512 they were 3e-7 apart. Muon's
matrices are orthogonalized in bfloat16 where the processor has it, and were up to 1.4e-3 apart from
those made without. That two versions agree bit for bit on one machine: benchmarks/same_numbers.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import run

DATA = Path(__file__).parent / "data"
EXPECTED = {
    "adamw": {
        "losses": [
            10.683207,
            10.632273,
            10.579773,
            10.600477,
            10.551994,
            10.584826,
            10.552534,
            10.611916,
            10.566163,
            10.657559,
        ],
        "embeddings": [
            [0.1191129, -0.0867435],
            [0.0810940, -0.0906326],
            [0.1107660, -0.0970564],
            [0.1057120, -0.1181585],
        ],
        "c_attn": [
            [-0.0510853, 0.0471854],
            [-0.0532923, 0.0282572],
            [0.0392194, -0.0540866],
            [0.0105520, 0.0211042],
            [-0.0271611, -0.0084755],
            [-0.0260676, -0.0098946],
        ],
    },
    "muon": {
        "losses": [
            10.683329,
            10.632158,
            10.580063,
            10.599687,
            10.552109,
            10.582244,
            10.552374,
            10.612026,
            10.565689,
            10.657571,
        ],
        "embeddings": [
            [0.1192032, -0.0868362],
            [0.0811813, -0.0907221],
            [0.1108564, -0.0971492],
            [0.1058036, -0.1182525],
        ],
        "c_attn": [
            [-0.0083671, -0.0009083],
            [-0.0086742, -0.0148252],
            [0.0021111, -0.0212607],
            [0.0209349, 0.0091978],
            [-0.0199908, -0.0145719],
            [-0.0406103, 0.0061681],
        ],
    },
}


def write_walk(folder: Path) -> None:
    """The data of those runs, in llm.c's format: the checkpoints know its fingerprint."""
    folder.mkdir()
    random = np.random.RandomState(1125)  # of all NumPy's generators the one that never changes
    for split, count in (("train", 5000), ("val", 600)):
        tokens = np.cumsum(random.randint(-3, 4, count)) % 300 + 256
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        content = header.tobytes() + tokens.astype("<u2").tobytes()
        (folder / f"walk_{split}_000000.bin").write_bytes(content)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_old_checkpoint_resumes_and_learns_on_as_it_did(optimizer, tmp_path):
    write_walk(tmp_path / "data")
    old = DATA / f"{optimizer}_2026_11_25.pt"
    flags = ["--resume", old, "--run_name", "on", "--device", "cpu"]
    out, _ = run(*flags, data="data", cwd=tmp_path, small=False)
    assert "finished at step 20 of 20" in out

    end = torch.load(tmp_path / "checkpoints" / "on" / "step_00000020.pt", weights_only=True)
    before = torch.load(old, weights_only=True)
    assert {k: v.shape for k, v in end["model"].items()} == {
        k: v.shape for k, v in before["model"].items()
    }
    expected = EXPECTED[optimizer]
    # Of steps 1 to 20: it went on at step 11, with the next batch and the next learning rate.
    np.testing.assert_allclose(end["state"]["recent_losses"][10:], expected["losses"], atol=2e-5)
    assert end["state"]["recent_losses"][:10] == before["state"]["recent_losses"]
    ids = slice(400, 404)
    np.testing.assert_allclose(
        end["model"]["transformer.wte.weight"][ids], expected["embeddings"], atol=1e-5
    )
    np.testing.assert_allclose(
        end["model"]["transformer.h.0.attn.c_attn.weight"],
        expected["c_attn"],
        atol=1e-5 if optimizer == "adamw" else 3e-3,
    )
