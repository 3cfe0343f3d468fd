"""What the guard asks for after too many skipped updates: back to a checkpoint, past that data."""

from checkpointing import run_folders
from runtime import planning
from runtime.state import read_checkpoint, restore
from training.guard import GuardGaveUp


def roll_back(run, loader, saver, monitor, config_class: type) -> None:
    """Go back to the last good checkpoint's weights, and on from the data after the bad stretch.

    Raise GuardGaveUp if that was done --max_rollbacks times, or there is no checkpoint.
    """
    state, cfg, folder = run.state, run.cfg, run.checkpoint_folder
    story = (
        f"{state.consecutive_skips} updates in a row were skipped up to step {state.step} "
        f"(--max_skips {cfg.max_skips})"
    )
    if state.rollbacks >= cfg.max_rollbacks:
        raise GuardGaveUp(
            f"{story}, after going back {state.rollbacks} times (--max_rollbacks). The checkpoints "
            f"in {folder} are good. Look at Gradient/norm_unclipped before step {state.step}; a "
            "lower --max_lr or --dtype float32 are the usual remedies."
        )
    if saver is not None:  # rank 0
        saver.wait()
    path, rank = planning.newest(
        run.dist, lambda: run_folders.find_latest(folder)[0] or run.resumed_from
    )
    if path is None:
        raise GuardGaveUp(f"{story}, and there is no checkpoint yet to go back to: lower --max_lr.")
    names = ("skipped_updates", "train_seconds", "total_seconds", "device_seconds", "watt_seconds")
    carried = {name: getattr(state, name) for name in (*names, "health_seconds")}
    carried |= {
        "rollbacks": state.rollbacks + 1,
        "position": loader.position,
        "consecutive_skips": 0,
    }
    restore(run, read_checkpoint(run.dist, path, rank, config_class))
    for name, value in carried.items():
        setattr(state, name, value)
    loader.seek(state.position)
    where = f"on from data window {state.position:,}"
    monitor.tell("rolled back", f"WARNING {story}: back to {path}, {where}")
    monitor.rewind(state.step + 1)
