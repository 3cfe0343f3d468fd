"""The files of a corpus: found, told apart by name and content, and signed so that a change shows.

Sources: data sets of the Hugging Face hub and folders laid out like one, resolved by `datasets`;
folders that its save_to_disk wrote; files, folders of them (links are followed) and globs; pipes
and standard input. Made for prepare_data.py; content.py reads what is found here.

Sections: files, one source, content, the hub.
"""

import bz2
import codecs
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

# --- Files ----------------------------------------------------------------------------------------

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
FORMATS |= {".txt": "text", ".text": "text", ".csv": "csv", ".tsv": "csv"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
KNOWN = f"{' '.join(FORMATS)} (text also as {' '.join(COMPRESSIONS)})"
BESIDE = re.compile(  # no part of a corpus, and not missed
    r"(readme|licen[cs]e|notice)(\.md|\.rst)?|(dataset_infos?|dataset_dict|state)\.json", re.I
)
SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|validation|valid|val|test|dev)(?![a-z])")
SAMPLE = 8 << 20  # bytes of a file that its fingerprint covers
HEAD = 1 << 16  # bytes of its content that tell what a file is


@dataclasses.dataclass
class SourceFile:
    """One file of the corpus (or a pipe, or a data set that only `datasets` can read)."""

    path: str  # a local path, the hub's hf://..., "-" for standard input, or the data set
    name: str  # the path below the source's folder: what is compared at a restart
    split: str  # "train" or "val"
    kind: str  # "parquet", "jsonl", "json", "csv", "text", "datasets"; of a pipe: "auto"
    compression: str = ""  # "gz", "zst", "xz", "bz2"
    size: int = 0  # bytes; 0 if unknown
    mtime_ns: int = 0  # 0 where sha256 covers the whole file
    sha256: str = ""  # of a file of up to 8 MiB, or of 128 parts of it; of a URL: the server's ETag
    load: dict = dataclasses.field(default_factory=dict)  # "datasets": for dataset_records
    pipe: bool = False  # can be read once, from its beginning
    encoding: str = ""  # of text that is not UTF-8
    inode: tuple = ()  # the same for all names and links of one file

    def identity(self) -> list:
        """Return what must not change until the preparation is finished."""
        return [self.split, self.name, self.kind, self.size, self.mtime_ns, self.sha256]


@dataclasses.dataclass
class Found:
    """The files of all sources, and what was seen on the way to them."""

    files: list[SourceFile] = dataclasses.field(default_factory=list)
    commits: dict = dataclasses.field(default_factory=dict)  # source -> the hub's commit
    left_out: dict = dataclasses.field(default_factory=dict)  # path -> bytes
    notes: list[str] = dataclasses.field(default_factory=list)


def find_all(args, commits: dict) -> Found:
    """Find the files behind --val_source and --source, each once.

    args: source, val_source, name, split, val_split, revision, format, encoding, text_key. commits:
    what an earlier start of this preparation found. Raise ValueError if there is nothing to read.
    """
    found, seen, contents = Found(), {}, {}
    for split, sources in (("val", args.val_source), ("train", args.source)):
        for source in sources:
            files, commit = find_files(source, split, args, commits.get(source, ""), found.left_out)
            for file in files:
                first = seen.setdefault(file.inode or (file.path, str(file.load)), file)
                if first is file:
                    found.files.append(file)
                elif first.split != split:
                    found.notes.append(f"{file.path} is validation, and left out of training")
                else:
                    found.notes.append(f"{file.path} is named twice, and read once")
            found.commits |= {source: commit} if commit else {}
        if sources and not any(file.split == split for file in found.files):
            raise ValueError("--source: nothing is left for training, all of it is --val_source")
    for file in found.files:
        twin = contents.setdefault((file.size, file.sha256), file)
        if file.size and file.sha256 and twin is not file:
            found.notes.append(f"{file.path} holds the same as {twin.path}; both are read")
    names = " ".join(os.path.basename(f.name).lower() for f in found.files if f.split == "train")
    marks = sorted(set(SPLIT_IN_NAME.findall(names)))
    if "train" in marks and len(marks) > 1:
        found.notes.append(
            f"files named {', '.join(marks)} are all read as training text: give --split train, or "
            "name the files that you mean"
        )
    for number, file in enumerate(file for file in found.files if file.pipe):
        file.name = f"pipe {number}" if file.path != "-" else "-"
    return found


# --- One source -----------------------------------------------------------------------------------


def find_files(
    source: str, split: str, args, commit: str, left_out: dict
) -> tuple[list[SourceFile], str]:
    """Find the files behind `source`, and the hub's commit ("" for what is not of the hub).

    split: what they become, "train" or "val". left_out: takes {path: bytes} of files in folders
    whose endings say nothing. Raise ValueError if there is nothing to read.
    """
    path = Path(os.path.expanduser(source))
    if not source:
        raise ValueError("--source '': name a file, a folder or a data set")
    if source == "-" or is_pipe(path):
        name = "-" if source in ("-", "/dev/stdin", "/dev/fd/0") else source
        return [SourceFile(name, name, split, args.format or "auto", pipe=True)], ""
    if path.is_file():
        return [named_file(path, path.name, split, args)], ""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return saved_by_datasets(path, split, args), ""
        if args.name or hub_split(split, args) or has_configs(path / "README.md"):
            return hub_files(str(path), split, args, None), ""
        return folder_files(path, split, args, left_out), ""
    if glob.has_magic(source):
        matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        inside = [] if "**" in source else [p for p in matched if p.is_dir()]
        paths = [p for p in matched if not p.is_dir()]
        for folder in inside:
            paths += [p for p in walk(folder) if usable(p, args, left_out)]
        if not paths:
            raise ValueError(f"--source {source}: no file has such a name")
        return below_common_folder(sorted(paths) if inside else paths, split, args), ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not classify(source)[0]:
        commit = hub_commit(source, args.revision or commit or None)
        return hub_files(source, split, args, commit), commit
    hint = " (download it first)" if "://" in source else ""
    raise ValueError(f"--source {source}: there is no such file or folder{hint}")


def is_pipe(path: Path) -> bool:
    return path.is_fifo() or path.is_char_device() or path.is_socket()


def classify(path: str) -> tuple[str, str]:
    """Return (kind, compression) by the name's endings; kind "" if they say nothing."""
    base, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(base)[1]
    return FORMATS.get(ending, ""), compression


def named_file(path: str | Path, name: str, split: str, args) -> SourceFile:
    kind, compression = classify(str(path))
    kind = args.format or kind
    if not kind:
        raise ValueError(f"{path}: not one of {KNOWN}; unpack an archive, or give --format")
    if kind == "parquet" and compression:
        raise ValueError(f"{path}: unpack it first; Parquet is compressed inside")
    file = sign(SourceFile(str(path), name, split, kind, compression))
    if kind != "parquet" and "://" not in file.path:
        with open(path, "rb") as raw:
            look_inside(file, raw, args)
    return file


def walk(folder: Path) -> list[Path]:
    """Find all files below a folder, sorted by path. Links are followed, circles cut."""

    def refuse(error: OSError):
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        above = {os.path.realpath(p) for p in (parent, *Path(parent).parents)}
        below = [n for n in folders if os.path.realpath(os.path.join(parent, n)) not in above]
        folders[:] = [name for name in below if not name.startswith(".")]
        found += [Path(parent, name) for name in names]
    return sorted(found)


def usable(path: Path, args, left_out: dict) -> bool:
    """Say if this file of a folder is read; if not, and it may be missed, add it to `left_out`."""
    shard = path.suffix == ".bin" or path.name == "manifest.json"
    if shard and path.parent.resolve() == args.out.resolve():
        return False  # of an earlier run
    if path.name.startswith(".") or BESIDE.fullmatch(path.name):
        return False
    if not path.exists():
        raise ValueError(f"{path} is a link to nothing: mend or remove it")
    if not path.is_file():
        return False
    if args.format or classify(path.name)[0]:
        return True
    left_out[str(path)] = path.stat().st_size
    return False


def folder_files(folder: Path, split: str, args, left_out: dict) -> list[SourceFile]:
    paths = [path for path in walk(folder) if usable(path, args, left_out)]
    if not paths:
        there = ", ".join(os.path.basename(path) for path in [*left_out][:3])
        there = f": there is {there}; --format says what they are" if there else ""
        raise ValueError(f"--source {folder}: this folder holds no files of {KNOWN}{there}")
    return [named_file(p, p.relative_to(folder).as_posix(), split, args) for p in paths]


def saved_by_datasets(folder: Path, split: str, args) -> list[SourceFile]:
    """Return the one "file" that a folder of save_to_disk of `datasets` is."""
    import datasets

    data, wanted = datasets.load_from_disk(str(folder)), ""
    if isinstance(data, dict):
        wanted = hub_split(split, args) or "train"
        if wanted not in data:
            raise ValueError(f"--split {wanted}: {folder} has {', '.join(data)}")
        data = data[wanted]
    if args.text_key not in data.column_names:
        raise ValueError(missing_key(folder, args.text_key, data.column_names))
    file = SourceFile(str(folder), wanted or folder.name, split, "datasets")
    file.load = {"saved": True, "split": wanted}
    file.size = data.data.nbytes
    file.sha256 = signature(f["filename"] for f in data.cache_files)
    return [file]


def signature(paths) -> str:
    """Return one signature for several files."""
    signed = [sign(SourceFile(path, path, "", "")).identity()[3:] for path in paths]
    return hashlib.sha256(repr(signed).encode()).hexdigest()


def missing_key(path, key: str, keys) -> str:
    return f"--text_key {key}: {path} has no such column; it has {', '.join(map(str, keys))}"


def below_common_folder(paths: list, split: str, args) -> list[SourceFile]:
    paths = [str(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(p) for p in paths])
    return [named_file(p, p[len(root) :].lstrip("/"), split, args) for p in paths]


def sign(file: SourceFile) -> SourceFile:
    """Fill in what tells whether a file is still the same later on."""
    try:
        if "://" in file.path:
            import fsspec

            filesystem, path = fsspec.url_to_fs(file.path)
            info = filesystem.info(path)
            file.size, file.sha256 = int(info.get("size") or 0), str(info.get("ETag") or "")
            if not file.size:
                raise OSError("the server does not tell its size")
            return file
        with open(file.path, "rb") as f:
            status, sha256 = os.fstat(f.fileno()), hashlib.sha256()
            file.size, file.inode = status.st_size, (status.st_dev, status.st_ino)
            if file.size <= SAMPLE:
                sha256.update(f.read())
            else:
                file.mtime_ns = status.st_mtime_ns
                for i in range(128):
                    f.seek(i * (file.size - SAMPLE // 128) // 127)
                    sha256.update(f.read(SAMPLE // 128))
            file.sha256 = sha256.hexdigest()
            return file
    except Exception as e:  # httpx, fsspec and the hub's client share no ancestor
        raise ValueError(
            f"{file.path} cannot be read: {getattr(e, 'strerror', None) or e}"
        ) from None


# --- Content --------------------------------------------------------------------------------------

MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\0": "xz", b"BZh": "bz2"}
BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
TOO_LONG = "too much memory"  # says pyarrow where zstd's window is longer than 128 MiB
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what unpacking raises


def look_inside(file: SourceFile, raw, args) -> None:
    """Set what the beginning of a file decides: its compression, its encoding, and its kind where
    the name says too little. Raise ValueError with what cannot be read, and the way around.

    raw: a binary file at its beginning, whose position is not kept.
    """
    head = raw.read(HEAD)
    packed = [name for magic, name in MAGIC.items() if head.startswith(magic)]
    if packed or is_text(head):  # whatever the name says
        file.compression = packed[0] if packed else ""
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file.path} only points to a file of Git LFS: run git lfs pull")
    if head.startswith(b"PAR1") and file.kind != "parquet":
        raise ValueError(f"{file.path} is Parquet: give the file itself, with --format parquet")
    if file.compression:
        raw.seek(0)
        head, problem = first_bytes(raw, file.compression)
        if TOO_LONG in problem:
            if file.pipe or not shutil.which("zstd"):
                raise ValueError(long_window(file.path))
            file.compression = "zst-long"
            with open(file.path, "rb") as again:  # the other was closed
                head, _ = first_bytes(again, file.compression)
    if head.startswith(b"PK\3\4") or head[257:262] == b"ustar":
        raise ValueError(f"{file.path} is an archive: unpack it, and give the files in it")
    file.encoding = args.encoding or ""
    for mark, encoding in BOMS.items():
        if head.startswith(mark):
            file.encoding = "" if encoding == "utf-8" else encoding
            head = head[len(mark) :]
            break
    else:
        if not args.encoding and head.count(0) * 4 > len(head):
            raise ValueError(
                f"{file.path}: more than a quarter of its beginning is NUL bytes: damaged, or "
                "UTF-16 without a mark (then give --encoding utf-16-le)"
            )
    look_at_text(file, head.decode(file.encoding or "utf-8", "ignore").lstrip(), args)


def look_at_text(file: SourceFile, text: str, args) -> None:
    """Set the kind of a file whose text begins like this."""
    first, newline, _ = text.partition("\n")
    if file.kind == "auto":
        names = re.split(r'"?[\t,;|]"?', first.strip().strip('"'))
        table = len(names) > 1 and args.text_key in names
        file.kind = "jsonl" if text[:1] in ("{", "[", "") else "csv" if table else "text"
    if file.kind == "jsonl":
        spread = newline and not read_json(first)[0] and read_json(text)[1] > len(first)
        if text[:1] == "[" or (text[:1] == "{" and (spread or first.strip() == "{")):
            file.kind = "json"
    elif file.kind == "text" and args.format != "text" and text[:1] == "{" and read_json(first)[0]:
        raise ValueError(
            f"{file.path} holds JSON: give --format jsonl (or --format text, to train on the "
            "JSON itself)"
        )


def is_text(head: bytes) -> bool:
    try:
        return b"\0" not in codecs.getincrementaldecoder("utf-8")().decode(head).encode()
    except UnicodeDecodeError:
        return False


def read_json(text: str) -> tuple[bool, int]:
    """Return (is it JSON?, where the value that it begins with ends; 0 if that is no JSON)."""
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
        return not text[end:].strip(), end
    except (ValueError, RecursionError):
        return False, 0


def long_window(path: str) -> str:
    return (
        f"{path} was packed with a window of more than 128 MiB (zstd --long), which pyarrow does "
        f"not unpack: install the program zstd, or unpack it with zstd -d --long=31"
    )


def unpacker(raw, compression: str):
    """Return a function read(n) that gives up to n bytes of what is packed in a binary file."""
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw).read1
    if compression == "bz2":
        return bz2.BZ2File(raw).read1
    if compression == "xz":
        return lzma.LZMAFile(raw).read1
    if compression == "zst-long":
        return functools.partial(read_program, subprocess.Popen(
            ["zstd", "-dcq", "--long=31"], stdin=raw, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ))  # fmt: skip
    if compression == "zst":
        import pyarrow as pa

        return pa.CompressedInputStream(raw, "zstd").read
    return raw.read


def read_program(process: subprocess.Popen, n: int) -> bytes:
    """Return up to n bytes of a program's output; raise EOFError if it has failed."""
    data = process.stdout.read(n)
    if not data and process.wait():
        raise EOFError(process.stderr.read().decode(errors="replace").strip())
    return data


def first_bytes(raw, compression: str) -> tuple[bytes, str]:
    """Return the first HEAD bytes of what is packed, or as many as are whole, and the problem."""
    found = b""
    try:
        read = unpacker(raw, compression)
        while len(found) < HEAD and (chunk := read(512)):
            found += chunk
    except DAMAGE as e:
        return found, str(e)  # also told when the file is read
    return found, ""


# --- The hub --------------------------------------------------------------------------------------


def has_configs(readme: Path) -> bool:
    """Say if this is a data set's card: if a block of YAML with `configs:` opens it."""
    text = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    return text.startswith("---") and "\nconfigs:" in text.split("\n---")[0]


def hub_split(split: str, args) -> str | None:
    return (args.val_split if split == "val" else None) or args.split


def hub_commit(repository: str, revision: str | None) -> str:
    """Ask the hub for the commit that a branch, tag or commit of a data set stands for."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    nothing_here = f"--source {repository}: there is no such folder here, and"
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=30).sha
    except RevisionNotFoundError:
        raise ValueError(f"--revision {revision}: {repository} has no such revision") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{nothing_here} no public data set of this name on the hub") from None
    except Exception as e:
        raise ValueError(
            f"{nothing_here} the Hugging Face hub cannot be reached ({type(e).__name__}: {e}): "
            "connect this machine, or bring the data set here and give its folder as --source"
        ) from None


def hub_files(source: str, split: str, args, commit: str | None) -> list[SourceFile]:
    """Let `datasets` resolve a hub data set, or a local folder laid out like one.

    It knows the README's configurations and the naming schemes of splits. Of files that are known
    here the text column alone is then read; what only `datasets` can read is streamed through it.
    """
    import datasets

    wanted = hub_split(split, args) or "train"
    try:
        try:
            builder = datasets.load_dataset_builder(source, args.name, revision=commit)
        except datasets.exceptions.DataFilesNotFoundError:
            # A copy of one configuration: `datasets` insists on files of the README's first one.
            patterns = card_patterns(Path(source) / "README.md", args.name)
            builder = datasets.load_dataset_builder(source, data_files=patterns)
    except (OSError, ValueError) as e:
        raise ValueError(f"--source {source}: {' '.join(str(e).split())}") from None
    splits = {str(k): [str(p) for p in v] for k, v in (builder.config.data_files or {}).items()}
    if splits and wanted not in splits:
        raise ValueError(f"--split {wanted}: {source} has {', '.join(splits)}")
    paths = splits.get(wanted, [])
    if paths and all(classify(p)[0] for p in paths):
        return below_common_folder(paths, split, args)
    file = SourceFile(source, source, split, "datasets")
    file.load = {"name": args.name, "split": wanted, "revision": commit}
    if commit is None:
        file.name = "the data set"
        file.sha256 = signature(paths)
    return [file]


def card_patterns(readme: Path, name: str | None) -> dict:
    """Return {split: patterns of file names} of one configuration in a data set's README."""
    import datasets
    import huggingface_hub

    card = huggingface_hub.DatasetCard.load(readme).data.to_dict() if readme.is_file() else {}
    patterns = {c["config_name"]: c.get("data_files") for c in card.get("configs") or []}
    if not patterns.get(name):
        raise ValueError(f"no data files for --name {name}; README.md has {', '.join(patterns)}")
    return datasets.data_files.sanitize_patterns(patterns[name])
