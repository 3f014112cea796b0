"""Where a run's parameters, metrics, figures and artifacts are recorded.

tracker = make_tracker(uri=None, experiment="leap", directory=run_directory)
with tracker.start_run("smollm2-135m") as run:
    run.log_params(config)
    with run.child("prior") as stage:
        stage.log_metrics({"seconds": 105.0})
print(*tracker.summary(), sep="\\n")
"""

from pipeline.tracking.base import NoTracker, Run, Status, Tracker
from pipeline.tracking.composite import CompositeTracker
from pipeline.tracking.factory import make_tracker
from pipeline.tracking.local import LocalRecords
from pipeline.tracking.mlflow_tracker import MlflowTracker

__all__ = [
    "CompositeTracker",
    "LocalRecords",
    "MlflowTracker",
    "NoTracker",
    "Run",
    "Status",
    "Tracker",
    "make_tracker",
]
