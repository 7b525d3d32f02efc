"""
`treepo-trl view`: the trees of a tree log as a page for a browser, in a file or from a server on this machine.

With `--health`, what the logs of runs show, in words.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from treepo_trl.apps.view import Decode, Index, Page, Source, find_sources, make_server, packed_trees
from treepo_trl.command_line.arguments import OptionsParser, options_parser
from treepo_trl.command_line.errors import user_errors
from treepo_trl.health import Examination, RunLogs, logs_of_run
from treepo_trl.settings import Ranges, check_fields, check_text


_DEFAULT_OUT = "trees.html"
_LARGE = 100 * 2**20
"""Bytes of a page above which a browser takes seconds to open it."""

_RANGES: Ranges = {"port": (lambda value: 0 <= value < 2**16, "from 0 to 65535")}


@dataclass
class ViewArguments:
    """What `treepo-trl view` takes beside the names of runs and files, and `--serve`."""

    out: str | None = field(
        default=None, metadata={"help": f"HTML file to write; it must not exist. Default: {_DEFAULT_OUT}."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of the tokenizer that turns the log's token ids into text. Default: the one "
            "in each run's folder or last checkpoint. Where there is none, token ids are shown."
        },
    )
    port: int | None = field(default=None, metadata={"help": "Port of `--serve`. Default: a free one."})

    def __post_init__(self) -> None:
        check_fields(self, ViewArguments, _RANGES)
        for name in ("out", "tokenizer"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))


def command_parser() -> OptionsParser:
    """The options of `treepo-trl view`, and the names of runs and files."""
    parser = options_parser("view", ViewArguments)
    parser.usage = (
        "treepo-trl view RUN_OR_FILE [RUN_OR_FILE ...] [--out FILE | --serve | --health] [--config FILE] [options]"
    )
    runs_help = (
        "`output_dir` of a run with `log_trees: true`, a folder of such files, or a file of `treepo-trl sample`."
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_OR_FILE", help=runs_help)
    parser.add_argument("--serve", action="store_true", help="Serve the page on this machine instead of writing it.")
    parser.add_argument("--health", action="store_true", help="Print what the logs of the runs show, without a page.")
    return parser


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl view`."""
    with user_errors():
        arguments, runs, is_served, is_health = _parsed(argv)
        if is_health:
            for logs in [logs_of_run(run) for run in runs]:
                print(health_report(logs))
            return
        sources = find_sources(runs)
        out = None if is_served else _new_file(arguments.out or _DEFAULT_OUT)
        decoders = load_decoders(sources, arguments.tokenizer)
        index: Index = {"sources": [], "is_text": True, "trees": []}
        trees = tqdm(packed_trees(sources, decoders, index), desc="trees", unit="tree", disable=None)
        if out is not None:
            write_page(out, trees, index)
            return
        server = make_server(arguments.port or 0, trees, index)
    print(f"{len(index['trees'])} trees at {server.url} (on this machine alone; Ctrl-C ends it)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def _parsed(argv: list[str]) -> tuple[ViewArguments, list[str], bool, bool]:
    """Options, names of runs and files, whether the page is served, and whether it is about health."""
    arguments, rest = command_parser().parse_args_and_config(argv)
    runs = [rest.runs] if isinstance(rest.runs, str) else rest.runs
    if not runs:
        raise ValueError("Name what to view: a run's `output_dir`, or a file with trees.")
    for run in runs:
        check_text("runs", run)
    if rest.serve and arguments.out is not None:
        raise ValueError("`--serve` writes no file. Leave out `--out`, or `--serve`.")
    if arguments.port is not None and not rest.serve:
        raise ValueError("`--port` is for `--serve`. Add it, or leave out `--port`.")
    if rest.health and (rest.serve or arguments != ViewArguments()):
        raise ValueError(
            "`--health` prints words and makes no page. Leave out `--health`, or the options of the page."
        )
    return arguments, runs, bool(rest.serve), bool(rest.health)


def health_report(run: RunLogs) -> str:
    """What the logs of a run show: a line for each illness, and what could not be told."""
    examination = Examination()
    lines = [f"- {finding}" for log in run.logs for finding in examination.add(log)]
    missing = ", ".join(rule.name for rule in examination.without_data())
    return "\n".join(
        [
            f"{run.name} ({', '.join(run.sources)}): {len(lines) or 'no'} finding{'s' * (len(lines) != 1)}.",
            *lines,
            *([f"Not logged, so not examined: {missing}."] if missing else []),
        ]
    )


def _new_file(name: str) -> Path:
    path = Path(name)
    if path.exists():
        raise ValueError(f"`--out {name}` exists already. Remove it, or name another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def load_decoders(sources: Sequence[Source], tokenizer: str | None) -> list[Decode | None]:
    """
    What makes text of the token ids of each source: a tokenizer for all, else each one's own; `None` if it has none.

    Raises:
        ValueError: if a tokenizer cannot be loaded. `OSError` too.
    """
    decoders: dict[str | None, Decode | None] = {None: None}
    names = [tokenizer or (str(found) if (found := source.tokenizer_folder()) else None) for source in sources]
    for name, source in zip(names, sources, strict=True):
        if name is None:
            print(
                f"{source.name} has no tokenizer: its segments are shown as token ids. Name it with `--tokenizer`.",
                file=sys.stderr,
            )
        elif name not in decoders:
            decoders[name] = _decoder(name)
    return [decoders[name] for name in names]


def _decoder(name: str) -> Decode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def write_page(path: Path, trees: Iterable[bytes], index: Index) -> None:
    """Write the page with all trees in it. A run that is interrupted leaves no page."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.writelines(Page(is_served=False).parts(trees, index))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    size = path.stat().st_size
    print(f"{len(index['trees'])} trees in {path} ({size / 2**20:.1f} MiB). Open it in a browser.")
    if size > _LARGE:
        print("A file of this size opens slowly: `--serve` shows the same without it.", file=sys.stderr)
