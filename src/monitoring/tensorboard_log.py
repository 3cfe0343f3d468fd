"""TensorBoard event files of one run: written live, never in training's way, whole after a crash.

    log = TensorBoardLog("runs/my_run", first_step=0)  # on a resume: the checkpoint's step + 1
    log.hparams({"max_lr": 6e-4, "compile": True}, metrics=["Loss/validation"])
    log.layout({"training": {"loss": ["Multiline", ["Loss/train", "Loss/validation"]]}})
    log.scalars({"Loss/train": 3.2, "Gradient/norm": 0.8}, step=1)
    log.text("Generated_Samples/text", "Once upon", step=1)
    log.histograms({"Parameters/wte": p, "Gradients/wte": g}, step=1)
    log.flush()  # at checkpoints
    log.hparams_end(), log.close()  # at the end

The records are TensorBoard's own: its protocol buffers, built by torch.utils.tensorboard.summary
where that has a function for it. The file is written here and not by SummaryWriter, because that
  * names its file by the clock: after a clock jump a resumed file sorts before the old one, and
    TensorBoard hides its points;
  * writes in a thread that dies at the first full disk, leaves half a record, and raises in every
    later add, flush and close, even after there is space again;
  * keeps up to a queue of records in memory, which kill -9 loses.

Sections: Cleaning · Log
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import metadata as custom_scalars_metadata
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import summary as torch_summary

from basics.durable import flush_folder
from monitoring import histograms
from monitoring.event_files import Place, as_code, event_files, frame, next_path, read_records
from monitoring.log_file import LogFile, set_aside


def _version_record() -> bytes:
    """Return what begins every file: "purge by session start records", not by step order."""
    return Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()


def _start_record(step: int) -> bytes:
    """Return what says: all that older files hold at or behind `step` is void."""
    session = SessionLog(status=SessionLog.START)
    return Event(wall_time=time.time(), step=step, session_log=session).SerializeToString()


# --- Cleaning -------------------------------------------------------------------------------------
# A crash leaves points behind the checkpoint that the run resumes from. Start records alone do not
# hide them: the default loader of TensorBoard ignores start records, and drops a stale point only
# when its tag is next written, which for a validation loss can be hours later. So the points are
# removed.

# Written anew by every start, as flags may have changed: the first record of a tag wins for good. A
# finished run that goes on is running again.
OF_A_START = {
    hparams_metadata.EXPERIMENT_TAG,
    hparams_metadata.SESSION_START_INFO_TAG,
    hparams_metadata.SESSION_END_INFO_TAG,
    custom_scalars_metadata.CONFIG_SUMMARY_TAG,
}
EMPTY_SECONDS = 600  # how long a TensorBoard may take to notice that a file is empty
MERGE_NAME = "merging.tmp"  # no "tfevents" in it: TensorBoard does not look inside


@dataclass
class _Merged:
    """Says what _clean did and found."""

    stale: int = 0  # events dropped
    damage: list[str] = field(default_factory=list)  # one phrase per damaged file
    last: set[tuple[int, str]] = field(default_factory=set)  # (step, tag) kept of the last step


def _start_step(path: Path) -> float:
    """Return the step of a file's start record, from which on it replaces older files, or inf."""
    for record in next(read_records(path, Place()), [])[:3]:
        with contextlib.suppress(DecodeError):
            event = Event.FromString(record[12:-4])
            if event.session_log.status == SessionLog.START:
                return event.step
    return float("inf")


def _keep(record: bytes, limit: float, merged: _Merged, place: Place) -> bool:
    """Tell if a record stays; note in `merged` and `place` what was seen."""
    try:
        event = Event.FromString(record[12:-4])
    except DecodeError:
        place.bad += 1
        return False
    if event.HasField("session_log") or event.HasField("file_version"):
        return False  # the new file has its own
    tags = {value.tag for value in event.summary.value}
    if event.step >= limit or (tags and tags <= OF_A_START):
        merged.stale += 1
        return False
    if event.step == limit - 1:
        merged.last |= {(event.step, tag) for tag in tags}
    return True


def _clean(log_dir: Path, first_step: int) -> _Merged:
    """Remove what is stale from the folder's event files: events at or behind `first_step`, events
    at or behind the start of a later file (an earlier cleaning that could not be done), damaged
    records, and what every start says anew. Raise OSError; then nothing is lost and the old files
    stand.

    If there is anything to remove, all files become one new file *with a new name* that begins with
    a start record of step 0: so all loaders, also of a TensorBoard that is running and has the
    stale points in memory, read the timeline afresh. A crash at any point leaves a readable folder:
    the new file voids the old ones, and the next cleaning drops them.
    """
    merged, broken = _Merged(), []
    old = event_files(log_dir)
    if not old:
        return merged
    starts = [_start_step(path) for path in old]
    temporary = log_dir / MERGE_NAME
    try:
        with open(temporary, "wb") as out:
            out.write(frame([_version_record(), _start_record(0)]))
            for i, path in enumerate(old):
                limit = min([first_step, *starts[i + 1 :]])
                place = Place()
                for batch in read_records(path, place):
                    keep = (r for r in batch if _keep(r, limit, merged, place))
                    out.write(b"".join(keep))
                if place.bad or place.tail:
                    merged.damage.append(
                        f"{path.name}: {place.bad} damaged records, "
                        f"{place.tail} unreadable bytes at its end"
                    )
                    if place.bad or not place.cut:
                        broken.append(path)
            out.flush()
            os.fsync(out.fileno())
        if not merged.stale and not merged.damage:
            temporary.unlink()
            return merged
        os.rename(temporary, next_path(log_dir))
        flush_folder(log_dir)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):
        for path in broken:  # more than a killed writer's half record: somebody may want to look
            set_aside(path, "damaged")
        for path in old:
            # Emptied, and removed by a later cleaning: if the file vanishes that the Python loader
            # of a running TensorBoard is at, it never gets on to the next one.
            if not path.exists() or path.stat().st_size:
                path.write_bytes(b"")
            elif time.time() - path.stat().st_mtime > EMPTY_SECONDS:
                path.unlink()
    return merged


# --- Log ------------------------------------------------------------------------------------------


class TensorBoardLog(LogFile):
    """Writes the event files of one run folder. After construction no method raises for what the
    disk does."""

    def __init__(
        self,
        log_dir: str | os.PathLike,
        first_step: int,
        announce: Callable[[str], None] = print,
        retry_every: float = 30.0,
        new_timeline: bool = False,
    ):
        """first_step: 0 for a fresh run: event files of an earlier attempt in the folder are set
        aside under names that TensorBoard does not read. Else the first step that will be logged,
        checkpoint step + 1: what the folder says at or behind that step is removed.
        new_timeline: treat the folder as for a fresh run although first_step is not 0.
        Raise ValueError if the folder cannot be written to (a full disk: announced instead)."""
        self.log_dir, self.first_step = Path(log_dir), first_step
        super().__init__(f"TensorBoard logging to {log_dir}", announce, retry_every)
        self._waiting = [_start_record(first_step)]  # for the next file: not lost, unlike points
        self._of_the_start: list[Summary] = []
        self._kept = _Merged()

        def prepare():
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if first_step == 0 or new_timeline:
                self._set_earlier_attempt_aside()
            else:
                self._resume()

        self._begin(prepare, f"--tensorboard_dir: cannot write TensorBoard events to {log_dir}")

    def rewind(self, first_step: int) -> None:
        """Go on at first_step, after a roll-back: points of that step and later disappear."""
        self.close()
        said = self._of_the_start
        self.__init__(self.log_dir, first_step, self.announce, self.retry_every)
        self._log_of_the_start(said)

    def _set_earlier_attempt_aside(self) -> None:
        earlier = [path for path in event_files(self.log_dir) if path.stat().st_size]
        for path in earlier:
            set_aside(path, "earlier")
            path.touch()  # empty, for a running TensorBoard: see _clean
        if earlier:
            self.announce(
                f"{self.log_dir} held {len(earlier)} event files of an earlier attempt: kept as "
                "earlier.*, which TensorBoard does not read"
            )

    def _resume(self) -> None:
        try:
            self._kept = _clean(self.log_dir, self.first_step)
        except OSError as error:
            self.announce(
                f"stale points from step {self.first_step} on could not be removed from "
                f"{self.log_dir} ({error.strerror or error}): they show until written again"
            )
        for phrase in self._kept.damage:
            self.announce(f"repaired the TensorBoard event file {phrase}")

    def _open(self) -> None:
        """Begin a new file: a running TensorBoard may be amid the old one."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        path = next_path(self.log_dir)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed in _shut)
        self._size = 0
        try:
            self._append(frame([_version_record(), *self._waiting]))
            flush_folder(self.log_dir)
        except OSError:
            self._shut()
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self._waiting.clear()

    def _log(self, step: int, summaries: Iterable[Summary], once: bool = False) -> None:
        """Write an event for each summary. `once`: where that cannot be done they wait until
        logging is back; else their points are lost, and counted."""
        now = time.time()  # shown; nothing is computed from it
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        records = [event.SerializeToString() for event in events]
        points = 0 if once else sum(len(event.summary.value) for event in events)
        if not self._write(frame(records), step, points) and once:
            self._waiting += records

    def _log_of_the_start(self, summaries: list[Summary]) -> None:
        """Write what a roll-back has to write again."""
        self._of_the_start += summaries
        self._log(0, summaries, once=True)

    # A checkpoint may have been saved in the middle of an evaluation, which was then completed and
    # logged before the crash. The resume repeats it: what the timeline has of that step stays.

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log a point for each tag, all in one record: about 30 bytes a tag. NaN and inf are
        fine."""
        points = [
            Summary.Value(tag=tag, simple_value=float(v))
            for tag, v in values.items()
            if (step, tag) not in self._kept.last
        ]
        if points:
            self._log(step, [Summary(value=points)])

    def text(self, tag: str, text: str, step: int) -> None:
        """Log text exactly as it is, whatever is in it; nothing is rendered (see as_code)."""
        if (step, f"{tag}/text_summary") not in self._kept.last:
            self._log(step, [torch_summary.text(tag, as_code(text))])

    def histograms(self, tensors: dict[str, Tensor], step: int) -> None:
        """Log the distribution of each tensor's finite values (see histograms.py)."""
        self._log(step, histograms.summaries(tensors))

    def hparams(
        self,
        values: dict[str, object],
        metrics: Sequence[str],
        numeric: Iterable[str] = (),
        first: Iterable[str] = (),
    ) -> None:
        """Log the run's row in the HParams tab, in the run itself, once after every start.

        metrics: tags of scalars shown as columns; the same in all runs (TensorBoard takes the
        columns of the first run it finds). numeric: names that are numbers in some runs and None in
        others: None leaves their cell empty. (Sorting or filtering by a column of numbers and words
        is an error of the server.) Other None values become "none", booleans "true"/"false" with
        tick boxes, lists and everything else text. first: names that come before the others, in the
        order of the alphabet; TensorBoard shows the first five columns until others are ticked."""
        numeric, first = set(numeric), set(first)
        row: dict[str, float | str] = {}
        ticks = {}
        for name, value in values.items():
            if isinstance(value, bool):
                row[name] = str(value).lower()
                ticks[name] = ["false", "true"]
            elif value is None and name in numeric:
                row[name] = float("nan")  # declares the column; TensorBoard leaves the cell empty
            elif isinstance(value, int | float) and np.isfinite(value):
                row[name] = value
            elif value is None:
                row[name] = "none"
            elif isinstance(value, list | tuple):
                row[name] = ", ".join(map(str, value))
            else:  # a folder's name need not be UTF-8
                row[name] = str(value).encode(errors="backslashreplace").decode()
        experiment, start, _ = torch_summary.hparams(row, dict.fromkeys(metrics, 0.0), ticks)
        plugin_data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in first  # what TensorBoard sorts by, before the name
        plugin_data.content = content.SerializeToString()
        self._log_of_the_start([experiment, start])

    def hparams_end(self) -> None:
        """Mark the run as finished in the HParams tab. Only at true completion."""
        _, _, end = torch_summary.hparams({}, {})
        self._log(0, [end], once=True)

    def layout(self, layout: dict[str, dict[str, list]]) -> None:
        """Lay out the Custom Scalars tab: {group: {chart: ["Multiline", [regular expression]]}}."""
        self._log_of_the_start([torch_summary.custom_scalars(layout)])
