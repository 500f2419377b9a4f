"""The command ``lavis-cir index``: makes an index of the user's own pictures, or brings it up to date."""

from __future__ import annotations

import argparse
import os
import sqlite3
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_cir_plugin.search.build import Built
    from lavis_cir_plugin.search.qdrant import Collection

_EXAMPLE = """examples:
  lavis-cir index photos --out my_index --model ViT-B-32-quickgelu:openai
  lavis-cir index photos --out my_index                       # again: new, changed and removed pictures only
  lavis-cir index --out my_index --to http://localhost:6333/photos
  torchrun --nproc_per_node 8 -m lavis_cir_plugin.commands.main index photos --out my_index --model RUN --device cuda
"""


def add_command(subparsers: Any) -> None:
    """Add the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "index",
        help="index folders of pictures for search",
        description="Index folders of pictures, or bring an index up to date.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="of pictures; none: those that the index has")
    parser.add_argument("--out", required=True, metavar="INDEX", help="the index's folder")
    parser.add_argument(
        "--model",
        help="a run's folder or checkpoint, NAME:WEIGHTS of open_clip (ViT-B-32-quickgelu:openai), or blip2:pretrain; "
        "an index that exists knows its own",
    )
    parser.add_argument("--metadata", metavar="FILE", help=".csv or .jsonl with a column 'path' and your own columns")
    parser.add_argument(
        "--forget", action="append", default=[], metavar="FOLDER", help="take a folder out of the index"
    )
    parser.add_argument(
        "--to", metavar="URL", help="also keep the index in a collection of Qdrant: http://HOST:6333/COLLECTION"
    )
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where torch sees one")
    parser.add_argument("--batch", type=int, default=64, help="pictures that are encoded at once (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes that read pictures (as many as processors, at most 8)")
    parser.add_argument(
        "--candidates",
        choices=("auto", "always", "none"),
        default="auto",
        help="find candidates by FAISS: where it pays, in any case, or never (%(default)s)",
    )
    parser.add_argument("--reread", action="store_true", help="read every file again, not only what seems to be new")
    parser.add_argument("--verify", action="store_true", help="check every byte of an index instead of making one")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.verify and args.to:
        raise ValueError("--verify compares the files of the index's folder; leave out --to.")
    try:
        _verify(args.out) if args.verify else _index(args)
    except sqlite3.Error as error:
        raise ValueError(
            f"the catalogue in {args.out} cannot be written ({error}); free some space there and run the command again."
        ) from error


def _index(args: argparse.Namespace) -> None:
    from lavis_cir_plugin.core.processes import rank_and_world
    from lavis_cir_plugin.search.build import build_index_folder
    from lavis_cir_plugin.search.encoder import load_encoder
    from lavis_cir_plugin.search.folders import check_folders

    for name in ("batch", "workers"):
        value = getattr(args, name)
        if value is not None and value < (1 if name == "batch" else 0):
            raise ValueError(f"--{name} must be a whole number >= {1 if name == 'batch' else 0}, got {value}.")
    check_folders(args.folders)  # before the seconds that the model takes
    collection = _collection(args.to) if args.to else None
    device = _join_processes(args.device)
    encoder = load_encoder(args.model or _known_model(args.out), device)
    built = build_index_folder(
        args.folders,
        args.out,
        encoder,
        metadata=args.metadata,
        forget=args.forget,
        thorough=args.reread,
        candidates=args.candidates,
        batch_size=args.batch,
        workers=args.workers,
    )
    if rank_and_world()[0] == 0:
        print("\n".join(_report(built, args.out)))
        if collection is not None:
            _keep(collection, args.out)


def _collection(url: str) -> Collection:
    """Return the collection of a URL, whose server answers."""
    from lavis_cir_plugin.search.qdrant import connect

    collection = connect(url)
    if collection.exists:
        collection.state()
    return collection


def _keep(collection: Collection, out: str) -> None:
    from lavis_cir_plugin.search.qdrant import keep_in

    kept = keep_in(collection, out)
    found = "" if kept.recall == 1 else f" Its graph finds {100 * kept.recall:.1f} % of the exact 50 best."
    print(
        f"{collection.url}: {kept.pictures:,} pictures. Added {kept.added:,} contents, changed {kept.changed:,}, "
        f"removed {kept.removed:,}.{found}"
    )


def _join_processes(device: str | None) -> str:
    """Open torchrun's process group, if there is one; return this process's device."""
    import torch
    import torch.distributed as dist

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return device
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # what is exchanged are Python objects, for which NCCL would need a GPU each
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def _known_model(out: str) -> str:
    from pathlib import Path

    from lavis_cir_plugin.search.folders import MANIFEST
    from lavis_cir_plugin.search.manifest import read_manifest

    index = Path(out).expanduser().absolute()
    if not (index / MANIFEST).is_file():
        raise ValueError(
            f"{out} is a new index, so --model is needed: a run's folder, NAME:WEIGHTS of open_clip such as "
            "ViT-B-32-quickgelu:openai, or blip2:pretrain."
        )
    name = read_manifest(index).name
    if not name:
        raise ValueError(f"{out} was made by a model that only its code can load; name it by --model or use that code.")
    return name


def _report(built: Built, out: str) -> list[str]:
    from lavis_cir_plugin.search.build import NOT_INDEXED

    rate = f", {built.encoded / built.seconds:,.1f} pictures/s" if built.encoded and built.seconds else ""
    lines = [
        f"{out}: {built.pictures:,} pictures. Encoded {built.encoded:,}, read {built.read:,}, forgot "
        f"{built.forgotten:,}, in {built.seconds:,.1f} s{rate}.",
        *(f"{note[0].upper()}{note[1:]}." for note in built.notes),
    ]
    if built.not_indexed:
        reasons = Counter(built.not_indexed.values())
        first = {reason: path for path, reason in reversed(list(built.not_indexed.items()))}
        lines.append(
            f"{len(built.not_indexed):,} files are not indexed (all of them: {os.path.join(out, NOT_INDEXED)}):"
        )
        lines += [f"  {count:>7,}  {reason} (first: {first[reason]})" for reason, count in reasons.most_common(12)]
    return lines


def _verify(out: str) -> None:
    from pathlib import Path

    from lavis_cir_plugin.search.manifest import verify

    manifest = verify(Path(out).expanduser().absolute())
    print(f"{out}: all {len(manifest.files)} files of {manifest.pictures:,} pictures are as they were written.")
