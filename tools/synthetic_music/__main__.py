"""Compose and render music whose truth is known, by rules: a dataset for training from nothing.

    python -m tools.synthetic_music --out FOLDER --pieces 100 [--seconds 30] [--seed 1] [--jobs 2]

Writes `NAME.flac` (32 kHz, stereo), `NAME.mid` and `NAME.json` of each piece; the `.json` holds
key, bpm, style, instruments, the lead first, descriptions and the melody. The same command gives
the same files. Needs `scripts/setup --render`. Code that can take pieces as they come, and need
not keep them, calls `rendering.rendered(pieces.plan(...))` instead.
"""

import argparse
from pathlib import Path

from audiocraft.errors import AudiocraftError
from tools.synthetic_music.dataset import FORMATS, write_dataset
from tools.synthetic_music.styles import STYLES


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--pieces", type=int, default=24, help="how many")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each, 10 to 60")
    parser.add_argument("--seed", type=int, default=1, help="of every choice")
    styles = parser.add_mutually_exclusive_group()
    styles.add_argument("--style", choices=list(STYLES), help="of all pieces")
    styles.add_argument("--exclude-style", choices=list(STYLES), help="leave a style out")
    parser.add_argument("--jobs", type=int, default=1, help="pieces rendered at a time")
    parser.add_argument("--format", choices=FORMATS, default="flac", help="of the sound")
    given = parser.parse_args()
    try:
        write_dataset(
            given.out,
            given.seed,
            given.pieces,
            given.seconds,
            given.exclude_style,
            given.jobs,
            given.format,
            given.style,
        )
    except AudiocraftError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
