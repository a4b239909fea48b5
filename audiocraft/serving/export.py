"""The command that makes release folders of fine-tunes: `scripts/export`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from audiocraft.models.versions import VERSIONS
from audiocraft.serving.command import Parser, run, say
from audiocraft.serving.worker import log_to_stderr
from audiocraft.utils.export import export_release


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a release folder.

    Args:
        arguments: paths and flags; those of the process by default.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """

    def command() -> None:
        given = _parser().parse_args(arguments)
        log_to_stderr()
        folder = export_release(given.weights, given.folder, given.version)
        say(f"Written: {folder}")

    return run(command)


def _parser() -> Parser:
    parser = Parser(
        prog="scripts/export",
        description="Makes a release folder of fine-tuned weights, in the official format.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "weights", type=Path, help="file of fine-tuned weights; an adapter is merged into its base"
    )
    parser.add_argument("folder", type=Path, help="folder to write; not there yet, or empty")
    parser.add_argument(
        "--version",
        choices=list(VERSIONS),
        help="base of weights that do not name theirs, such as those of the older fine-tuner",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
