"""List and verify checkpoints.

    python src/checkpoint_files.py [DIR=checkpoints] [--verify]     what is there, and is it whole?

The files themselves: checkpointing/files.py.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import terminal, words
from checkpointing.files import CheckpointError, read_info, verify
from checkpointing.run_folders import list_checkpoints, run_folders, saved_at


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Return 0 if all that is there is whole, 1 if something is not, 2 for wrong usage."""
    parser = terminal.Parser(description="List checkpoints: step, loss, size, age, state.")
    parser.add_argument("dir", nargs="?", default="checkpoints", help="of all runs, or of one")
    parser.add_argument("--verify", action="store_true", help="read every file and check its sum")
    args = parser.parse_args(argv)
    if not Path(args.dir).is_dir():
        raise ValueError(f"{args.dir} is not a folder: name the one given as --checkpoint_dir")
    bad = listed = 0
    for folder in (Path(args.dir), *run_folders(args.dir)):
        checkpoints = list_checkpoints(folder)
        if checkpoints:
            print(f"{folder}\n{'step':>10} {'val loss':>9} {'size':>9} {'age':>9}  state")
        for c in checkpoints:
            listed += 1
            info, state = {}, "ok" if args.verify else "ok (not verified)"
            try:
                info = read_info(c.path)
                if args.verify:
                    verify(c.path)
            except CheckpointError as e:
                bad, state = bad + 1, e.reason
            loss = info.get("val_loss")
            loss = f"{loss:.4f}" if isinstance(loss, float) else "-"
            age = words.duration(time.time() - saved_at(c))
            print(f"{c.step:>10} {loss:>9} {words.size(c.bytes):>9} {age:>9}  {state}")
    if not listed:
        print(f"no checkpoints in {args.dir}")
    terminal.check_output()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
