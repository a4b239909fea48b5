"""The first process of a training: `python -m audiocraft.solvers.prepare WORK_FOLDER`.

It turns the dataset of the job in the folder into what the ranks train on, and writes down what
that is. All models that are needed for it live and die with this process.
"""

import logging
import sys
from pathlib import Path
from typing import Final

from audiocraft.data.dataset import DatasetSettings, prepare, save_prepared
from audiocraft.data.files import find
from audiocraft.solvers.job import read_job

DATASET_FILE: Final = "dataset.json"
"""In the work folder of a training; see `dataset.load_prepared`."""


def main() -> None:
    """Reads the job, prepares its dataset and writes `DATASET_FILE`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    work = Path(sys.argv[1])
    job, place = read_job(work)
    prepared = prepare(
        find(Path(place.dataset), Path(place.unpacked)),
        place.source,
        Path(place.data),
        job.version,
        DatasetSettings(job.one_same_description, job.vocabularies, job.stems),
        place.device,
    )
    save_prepared(work / DATASET_FILE, prepared)


if __name__ == "__main__":
    main()
