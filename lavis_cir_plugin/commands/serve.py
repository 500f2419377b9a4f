"""The command ``lavis-cir serve``: searches indexes by HTTP and on a web page."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote

_EXAMPLE = """examples:
  lavis-cir serve my_index                          # http://127.0.0.1:8000
  lavis-cir serve my_index another_index            # the page compares both
  lavis-cir serve my_index --host 0.0.0.0           # for others too; asks for a token, which it prints
"""


def add_command(subparsers: Any) -> None:
    """Add the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "serve",
        help="search indexes by HTTP and on a page",
        description="Search indexes by HTTP and on a page.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("indexes", nargs="+", metavar="INDEX", help="folders that lavis-cir index made")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s; 0: any that is free)")
    parser.add_argument(
        "--token-file", metavar="FILE", help="holds the token to ask for; the variable LAVIS_CIR_TOKEN can hold it too"
    )
    parser.add_argument("--model", help="what made the indexes, if it is not where it was")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--upload-mib", type=int, default=15, help="size of an uploaded picture (%(default)s)")
    parser.add_argument("--upload-megapixels", type=int, default=40, help="pixels of one (%(default)s)")
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    for name in ("upload_mib", "upload_megapixels"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be a whole number >= 1, got {getattr(args, name)}.")
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"lavis-cir serve needs the package {error.name}, which the extra 'serve' brings: "
            "pip install 'lavis_cir_plugin[serve]'."
        ) from None

    from lavis_cir_plugin.serving.limits import MEBIBYTE, Limits
    from lavis_cir_plugin.serving.opened import open_indexes
    from lavis_cir_plugin.serving.server import hosts_for, listening, server_for, token_for

    limits = Limits(
        upload_bytes=args.upload_mib * MEBIBYTE,
        upload_pixels=args.upload_megapixels * 1_000_000,
        bodies_bytes=max(Limits.bodies_bytes, 8 * args.upload_mib * MEBIBYTE),
    )
    token = token_for(args.host, args.token_file)
    with listening(args.host, args.port) as listener:
        indexes = open_indexes(args.indexes, args.model, args.device)
        port = listener.getsockname()[1]
        shown = f"[{args.host}]" if ":" in args.host else args.host
        # Behind # it goes to the page alone: a browser sends no part of it.
        end = f"#token={quote(token)}" if token is not None and args.token_file is None else ""
        print(f"{', '.join(indexes)}: http://{shown}:{port}/{end} (Ctrl-C ends it)", flush=True)
        server_for(indexes, limits, token, hosts_for(args.host)).run(sockets=[listener])
