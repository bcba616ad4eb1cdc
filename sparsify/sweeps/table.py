"""The results of many runs as a table for the terminal."""

from collections.abc import Mapping, Sequence

from sparsify.runs.run_folder import read_result
from sparsify.runs.terminal_sink import watched_metrics
from sparsify.sweeps.jobs import Job, known_runs

COLUMNS = {"L0": ",.1f", "CE increase": ".4f", "KL": ".4f"}
"""Labels of the metrics to show, and their formats."""
UNKNOWN = "-"


def results_table(jobs: Sequence[Job], minutes: Mapping[str, float]) -> list[str]:
    """Return the lines of a table with a row for each job, also for those done before.

    Metrics are those of `eval.json`, means over the SAEs of a run.

    Args:
        jobs: The runs. Of equal ones, one has a row.
        minutes: Duration of a run by the key of its job, where it is known.
    """
    # It loads torch, for which --help is not to wait.
    from sparsify.evaluation.table import align

    known = known_runs(jobs)
    rows = [["run", *COLUMNS, "minutes"]]
    for key, job in {job.key: job for job in jobs}.items():
        shown = {}
        if (run := known.finished(job)) is not None:
            metrics = read_result(run)["metrics"]
            shown = watched_metrics({name: v for name, v in metrics.items() if v is not None})
        cells = [
            format(shown[label], form) if label in shown else UNKNOWN
            for label, form in COLUMNS.items()
        ]
        rows.append([job.label, *cells, f"{minutes[key]:.1f}" if key in minutes else UNKNOWN])
    return align(rows)
